"""A model's Linears as QATLinears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mico.adapters.family import Family, lookup
from mico.errors import UserError
from mico.packed.linear import PackedLinear
from mico.qat.linear import QATLinear


def stream_linears(model: nn.Module, family: Family) -> list[str]:
    """Names of the Linears that are quantized: those of the family's streams, in every block."""
    count = len(lookup(model, family.blocks))  # type: ignore[arg-type]
    paths = [path for stream in family.streams for path in stream.linears]
    return [f"{family.blocks}.{index}.{path}" for index in range(count) for path in paths]


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which weights a packed model keeps, by the names of its pruned Linears."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    kept = {name: module.quantized().keep_RC for name, module in packed.items()}
    return {name: keep_RC for name, keep_RC in kept.items() if keep_RC is not None}


def quantize_linears(
    model: nn.Module, family: Family, bits: float, group_size: int | None, start: str,
    masks: Mapping[str, torch.Tensor], advance: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Put QATLinears in the place of a dense model's Linears; embeddings, head and norms are trained as they are.

    masks: weights that stay pruned. Raises UserError where groups do not divide a row.
    """
    for name in stream_linears(model, family):
        linear: Any = model.get_submodule(name)
        try:
            made = QATLinear.of(linear, bits, group_size, start, masks.get(name))
        except ValueError as error:
            raise UserError(f"{error} ({name})") from None
        put_module(model, name, made)
        advance(name)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def qat_modules(model: nn.Module) -> dict[str, QATLinear]:
    """The QATLinears of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}
