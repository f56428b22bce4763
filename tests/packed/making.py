"""Small models whose Linears hold random packed weights of every kind, and the dense models they must equal."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mico.adapters import family_of
from mico.checkpoint import pack_model, save_packed
from mico.loading import quiet
from mico.packed.bits import TERNARY, levels
from mico.packed.quantized import QuantizedWeight, equal_runs
from mico.packed.table import quantize_table
from tests.tiny import random_model, train_tokenizer

KINDS = ("mico", "grouped", "pattern", "pruned", "ternary")


def random_weight(weight_RC: torch.Tensor, kind: str, label_C: torch.Tensor, seed: int) -> QuantizedWeight:
    """A weight near zero of the shape of `weight_RC`; only 'mico' and 'ternary' follow the stream's labels.

    mico: factored scales, mixed widths, a mask, no zero points. grouped: 16 channels a group, zero points.
    pattern: one group, 2:4. pruned: the values themselves in 16 bits, half of them gone. ternary: groups of 1.58, 1
    and 3 bits that share their zero points over the rows.
    """
    rows, channels = weight_RC.shape
    make = torch.Generator().manual_seed(seed)
    keep_RC = torch.rand(rows, channels, generator=make) > 0.5
    none = torch.zeros(0, 1, dtype=torch.float16)
    if kind == "pruned":
        return QuantizedWeight(
            (weight_RC * keep_RC).bfloat16(), none, None, None, (16,), torch.zeros_like(label_C), keep_RC
        )
    groups, pattern = {"pattern": 1, "grouped": channels // 16}.get(kind, 3), None
    bits_G: tuple[float, ...] = {"mico": (2, 3, 8), "ternary": (TERNARY, 1, 3)}.get(kind, (4,) * groups)
    if kind == "pattern":
        order = torch.rand(rows, channels // 4, 4, generator=make).argsort(2)
        keep_RC, pattern = (order < 2).view(rows, channels), (2, 4)
    label_C = label_C if kind in ("mico", "ternary") else equal_runs(channels, groups)
    counts_G = torch.tensor([levels(bits) for bits in bits_G])
    codes_RC = (torch.rand(rows, channels, generator=make) * counts_G[label_C]).long()
    masked = kind in ("mico", "pattern")
    factored = kind == "mico"
    zero_G = torch.stack([counts_G // 2] * (1 if kind == "ternary" else rows))
    return QuantizedWeight(
        (codes_RC * keep_RC if masked else codes_RC).to(torch.uint8),
        (torch.rand(rows, 1 if factored else groups, generator=make) / 8).half(),
        torch.rand(groups, generator=make).half() if factored else None,
        None if factored else zero_G.to(torch.uint8),
        bits_G, label_C, keep_RC if masked else None, pattern,
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """dense: the model with the values of the packed weights; packed: the same model in memory, packed."""

    dense: Any
    packed: Any
    weights: dict[str, QuantizedWeight]
    dtype: torch.dtype

    def save(self, folder: Path) -> Path:
        """The checkpoint as `mico compress` writes it."""
        family = family_of(self.dense.config)

        def named(inside: str) -> dict[str, QuantizedWeight]:
            return {name: made for name, made in self.weights.items() if name.startswith(inside)}

        tables = {name: made for name, made in self.weights.items() if not name.startswith(f"{family.blocks}.")}
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            save_packed(folder, self.dense, family, tables, lambda i: named(f"{family.blocks}.{i}."), self.dtype)
        train_tokenizer().save_pretrained(folder)
        return folder


def pair(
    arch: str = "llama", kind: str = "mico", embed_bits: int = 16, dtype: torch.dtype = torch.float32, **changes: object
) -> Pair:
    """A random model whose Linears (and tables, unless embed_bits is 16) are packed; biases are not zero."""
    return pair_of(random_model(arch, **changes), kind, embed_bits, dtype)


@torch.no_grad()
def pair_of(dense: Any, kind: str = "mico", embed_bits: int = 16, dtype: torch.dtype = torch.float32) -> Pair:
    """The same of a model that is there already, which is changed."""
    for name, parameter in dense.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        parameter.copy_(parameter.to(dtype))
    family = family_of(dense.config)
    parts: list[dict[str, QuantizedWeight]] = [_tables(dense, embed_bits)]
    for index, block in enumerate(dense.get_submodule(family.blocks)):
        part: dict[str, QuantizedWeight] = {}
        for number, stream in enumerate(family.streams):
            channels = block.get_submodule(stream.linears[0]).in_features
            seed = 100 * index + 10 * number
            label_C = torch.randint(0, 3, (channels,), generator=torch.Generator().manual_seed(seed))
            for place, path in enumerate(stream.linears):
                linear = block.get_submodule(path)
                made = random_weight(linear.weight, kind, label_C, seed + place)
                linear.weight.copy_(made.dequantize())
                part[f"{family.blocks}.{index}.{path}"] = made
        parts.append(part)
    packed = copy.deepcopy(dense)
    pack_model(packed, family, parts, dtype)
    return Pair(dense, packed, {name: made for part in parts for name, made in part.items()}, dtype)


def _tables(model: Any, bits: int) -> dict[str, QuantizedWeight]:
    if bits == 16:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for module in {id(m.weight): m for m in (model.get_output_embeddings(), model.get_input_embeddings())}.values():
        table = quantize_table(module.weight, bits)
        module.weight.copy_(table.dequantize())
        found[names[id(module)]] = table
    return found


@torch.no_grad()
def logits(model: Any, count: int = 12) -> torch.Tensor:
    ids = torch.arange(count).view(2, -1) * 13 % model.config.get_text_config().vocab_size
    return model(input_ids=ids, use_cache=False).logits
