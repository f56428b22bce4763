"""Make a folder with a Llama of any shape and random bfloat16 weights, shard by shard, to try large shapes on.

    python -m benchmarks.make_model big --layers 8                       # the shape of Llama-2-7B, 8 of its layers
    python -m benchmarks.make_model small --hidden 2048 --ffn 5504 --heads 16 --layers 4

Needs the memory of one tensor and a few seconds a gigabyte. The tokenizer is that of tiny-llama, so token ids stay
below 4,096. Weights are normal with a deviation that keeps activations of one size through the layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from mico.loading.names import REFERENCE_DIR

TOKENIZER = "tiny-llama"
LEAST_VOCABULARY = 4096
SLICE = 1 << 22  # random numbers drawn at a time


def make_model(
    folder: Path, layers: int = 8, hidden: int = 4096, ffn: int = 11008, heads: int = 32, kv_heads: int | None = None,
    vocabulary: int = 32000, context: int = 4096, seed: int = 0,
) -> int:  # fmt: skip
    """Write config, tokenizer, one shard a layer and one for the ends; return the bytes of the weights."""
    if vocabulary < LEAST_VOCABULARY:
        raise SystemExit(f"--vocabulary {vocabulary}: the tokenizer has {LEAST_VOCABULARY} tokens")
    folder.mkdir(parents=True)
    for file in (REFERENCE_DIR / TOKENIZER).glob("*token*"):
        shutil.copy(file, folder)
    kv_heads = kv_heads or heads
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        max_position_embeddings=context, tie_word_embeddings=False, dtype="bfloat16", hidden_act="silu",
        rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    parts = [ends(hidden, vocabulary), *(layer(index, hidden, ffn, heads, kv_heads) for index in range(layers))]
    for number, shapes in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {key: random_weight(shape, generator) for key, shape in shapes}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = dict(metadata=dict(total_size=total), weight_map=weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return total


def ends(hidden: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors outside the layers."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def layer(index: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of one layer."""
    prefix, narrow = f"model.layers.{index}.", hidden // heads * kv_heads
    for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
        yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
    for name in ("gate", "up"):
        yield f"{prefix}mlp.{name}_proj.weight", (ffn, hidden)
    yield f"{prefix}mlp.down_proj.weight", (hidden, ffn)
    for name in ("input", "post_attention"):
        yield f"{prefix}{name}_layernorm.weight", (hidden,)


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm, else normal with deviation 1 / sqrt(inputs), made in slices."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    flat = torch.empty(shape[0] * shape[1], dtype=torch.bfloat16)
    for part in flat.split(SLICE):
        part.copy_(torch.randn(len(part), generator=generator) * shape[1] ** -0.5)
    return flat.view(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("layers", 8), ("hidden", 4096), ("ffn", 11008), ("heads", 32), ("kv-heads", None), ("vocabulary", 32000),
        ("context", 4096), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    print(f"{options['folder']}: {make_model(**options) / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
