"""Tiny random LLaVA models, prompts for them, and what they answer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    Qwen3Config,
)

IMAGE, VISUAL = 79, 36
TEXT: dict[str, Any] = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TEXTS: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}


def llava(text: str = "llama", layers: int = 4, following: bool = False, attention: str = "sdpa", **more: Any) -> Any:
    """A float32 LLaVA (`following`: LLaVA-NeXT) of 36 visual tokens a tile, with weights that make attention uneven."""
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4
    )
    settings = {**TEXT, **(dict(head_dim=8) if text == "qwen3" else {}), **more}
    language = TEXTS[text](num_hidden_layers=layers, **settings)
    kind, extra = (LlavaNextConfig, dict(image_grid_pinpoints=[[24, 48], [48, 24]])) if following else (LlavaConfig, {})
    config = kind(vision_config=eyes, text_config=language, image_token_index=IMAGE, image_seq_length=VISUAL, **extra)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 0.2 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise
    return model.eval().requires_grad_(False)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(before: int, behind: int, seed: int = 0, visual: int = VISUAL) -> torch.Tensor:
    """Text, an image, text, (1, T)."""
    texts = [
        torch.randint(3, IMAGE, (1, count), generator=numbers(seed + i)) for i, count in enumerate((before, behind))
    ]
    return torch.cat((texts[0], torch.full((1, visual), IMAGE), texts[1]), 1)


def picture(seed: int = 0, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=numbers(100 + seed))


def batched(*prompts: torch.Tensor, side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts of unequal length as one batch, padded on a side."""
    length = max(ids.shape[1] for ids in prompts)
    rows, masks = [], []
    for ids in prompts:
        space = length - ids.shape[1]
        pads = (space, 0) if side == "left" else (0, space)
        rows.append(torch.nn.functional.pad(ids, pads, value=0))
        masks.append(torch.nn.functional.pad(torch.ones_like(ids), pads))
    return dict(input_ids=torch.cat(rows), attention_mask=torch.cat(masks))


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generated(model: Any, new: int = 3, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids (B, new) and their logits (B, new, vocabulary), chosen greedily unless told otherwise."""
    made = model.generate(
        **{**dict(do_sample=False), **inputs}, max_new_tokens=new, min_new_tokens=new, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return made.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(made.logits, 1)
