"""A tiny LLaVA, and the same weights as the authors of LLaVA lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.tiny import VOCABULARY, train_tokenizer

TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4,
    initializer_range=0.2,
)  # fmt: skip
PATCHES = 4


def tiny_llava(vocabulary: int = VOCABULARY, image: int = VOCABULARY - 1) -> Any:
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT | dict(vocab_size=vocabulary)), vision_config=CLIPVisionConfig(**VISION),
        image_token_index=image, image_seq_length=PATCHES,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def seeing(model: Any, image: int) -> torch.Tensor:
    """Logits of a text with one picture in it."""
    ids = torch.tensor([[5, 6, *[image] * PATCHES, 7, 8, 9]])
    return model(input_ids=ids, pixel_values=pixels()).logits


def original(folder: Path, tower: str, model: Any, inside: bool = False, pickled: bool = False, **changes: Any) -> Path:
    """The authors' folder of a model; inside: with the weights of the vision tower."""
    folder.mkdir(parents=True)
    text = {name: value for name, value in TEXT.items() if name not in ("initializer_range",)}
    config = dict(
        text, model_type="llava", architectures=["LlavaLlamaForCausalLM"], mm_vision_tower=tower, mm_hidden_size=16,
        mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch", rms_norm_eps=1e-6,
        torch_dtype="float32", image_aspect_ratio="pad",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    train_tokenizer().save_pretrained(folder)
    state: dict[str, torch.Tensor] = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for key, tensor in model.state_dict().items():
        tower_part = key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        if key.startswith("model.vision_tower."):
            if inside:
                state[f"model.vision_tower.vision_tower.vision_model.{tower_part}"] = tensor
        elif key.startswith("model.multi_modal_projector.linear_"):
            number, part = key.removeprefix("model.multi_modal_projector.linear_").split(".")
            state[f"model.mm_projector.{2 * int(number) - 2}.{part}"] = tensor
        else:
            state[key.replace("model.language_model.", "model.")] = tensor
    state = {key: tensor.clone() for key, tensor in state.items()}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
