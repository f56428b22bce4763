"""Make a folder with a LLaVA of any depth and random bfloat16 weights, with the shapes and processor of LLaVA-1.5-7B.

    python -m benchmarks.make_llava llava --layers 2 --vision-layers 2

The processor is configured as that of llava-hf/llava-1.5-7b-hf: pictures of 336 x 336 pixels, 576 visual tokens,
`<image>` 32000, `<pad>` 32001, vocabulary 32064. The tokenizer is that of tiny-llama with unused entries behind it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import PreTrainedTokenizerFast as FastTokenizer

from benchmarks.make_model import TOKENIZER, random_weight
from mico.checkpoint import ShardWriter
from mico.import_llava import _write_processor
from mico.loading.names import REFERENCE_DIR

KNOWN, VOCABULARY = 32000, 32064  # tokens of Llama, and rows of LLaVA-1.5's table
TEMPLATE = (  # as published: roles in capitals, pictures before the text, a space behind every turn
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_llava(
    folder: Path, layers: int = 32, vision_layers: int = 24, hidden: int = 4096, ffn: int = 11008, heads: int = 32,
    vision_hidden: int = 1024, vision_ffn: int = 4096, vision_heads: int = 16, seed: int = 0,
) -> int:  # fmt: skip
    """Write config, weights, tokenizer, processor and chat template; return the bytes of the weights."""
    folder.mkdir(parents=True)
    tokenizer = padded_tokenizer()
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            vocab_size=VOCABULARY, max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden, intermediate_size=vision_ffn, num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads, image_size=336, patch_size=14, projection_dim=768, vocab_size=KNOWN,
        ),
        image_token_index=KNOWN, pad_token_id=KNOWN + 1, vision_feature_layer=-2,
        vision_feature_select_strategy="default", dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processor(folder, config, None)
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template=TEMPLATE)))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    writer, generator = ShardWriter(folder), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        writer.add(name, weight_of(name, parameter.shape, generator))
    writer.finish()
    return writer.bytes


def weight_of(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Zeros for a bias, else as `random_weight` makes it; a convolution is the matrix of its patches."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    return random_weight((shape[0], shape[1:].numel()) if len(shape) > 1 else tuple(shape), generator).view(shape)


def padded_tokenizer() -> FastTokenizer:
    """tiny-llama's tokenizer with as many entries as Llama's, then the image and the padding token."""
    content: dict[str, Any] = json.loads((REFERENCE_DIR / TOKENIZER / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    known = {token["content"] for token in content["added_tokens"]} | set(vocabulary)
    vocabulary |= {f"<unused_{number}>": number for number in range(len(known), KNOWN)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<image>", "<pad>")])
    assert tokenizer.token_to_id("<image>") == KNOWN
    ends = {f"{end}_token": tokenizer.id_to_token(number) for number, end in enumerate(("bos", "eos"))}
    return FastTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=4096, **ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("layers", 32), ("vision-layers", 24), ("hidden", 4096), ("ffn", 11008), ("heads", 32),
        ("vision-hidden", 1024), ("vision-ffn", 4096), ("vision-heads", 16), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    print(f"{options['folder']}: {make_llava(**options) / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
