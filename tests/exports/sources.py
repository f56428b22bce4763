"""Packed sources for the tests of exports, made of random models rounded to a grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mico.adapters import family_of
from mico.exports.source import PackedSource
from mico.packed.grid import Grid, integer_grid, minmax_grid, quantize, symmetric_grid
from mico.packed.quantized import QuantizedWeight
from tests.tiny import random_model, train_tokenizer

SHAPE = dict(hidden_size=64, num_key_value_heads=4)  # rows and channels in whole words, heads of 16 channels


class Source(PackedSource):
    """Without a folder behind it."""

    def dense_model(self, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_config(self.config).to(dtype)
        left = model.load_state_dict(self.dense_state(dtype), strict=False)
        assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
        model.tie_weights()
        return model.eval()


def minmax(weight_RC: torch.Tensor, _price_RC: torch.Tensor, label_C: torch.Tensor, bits_G: tuple[int, ...]) -> Grid:
    return minmax_grid(weight_RC, label_C, bits_G)


GRIDS: dict[str, Callable[..., Grid]] = {"integer": integer_grid, "symmetric": symmetric_grid, "minmax": minmax}


def rounded(
    weight_RC: torch.Tensor, kind: str = "integer", bits: int = 4, size: int | None = 32, sparsity: float = 0.0
) -> QuantizedWeight:
    """Rounded to the nearest level of a grid; size: channels a group, None for whole rows."""
    weight_RC = weight_RC.detach().float()
    label_C = torch.arange(weight_RC.shape[1]) // (size or weight_RC.shape[1])
    keep_RC = weight_RC.abs() > weight_RC.abs().quantile(sparsity) if sparsity else None
    price_RC = torch.ones_like(weight_RC) if keep_RC is None else keep_RC.float()
    grid = GRIDS[kind](weight_RC, price_RC, label_C, (bits,) * (int(label_C[-1]) + 1))
    scale_RC, zero_RC = grid.scale_RG[:, label_C], grid.zero_point_RG[:, label_C]
    return grid.quantized(quantize(weight_RC, scale_RC, zero_RC, (grid.levels_G - 1)[label_C]), keep_RC, None)


def packed_source(
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    bits: tuple[int, ...] = (4,),
    changes: dict[str, Any] | None = None,
    **grid: Any,
) -> Source:
    """Every Linear of the blocks rounded to a grid, one of `bits` after the other a stream; the rest in `dtype`."""
    model = random_model(arch, **(SHAPE if arch == "llama" else {}) | (changes or {}))
    model.config.dtype = dtype
    family = family_of(model.config)
    others = {key: value.to(dtype) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del others["lm_head.weight"]
    weights = {}
    for block in range(model.config.num_hidden_layers):
        for number, stream in enumerate(family.streams):
            width = bits[(block * len(family.streams) + number) % len(bits)]
            for path in stream.linears:
                name = f"{family.blocks}.{block}.{path}"
                weights[name] = rounded(others.pop(f"{name}.weight"), bits=width, **grid)
    return Source(Path("no-folder"), model.config, train_tokenizer(), family, weights, others)
