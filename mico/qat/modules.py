"""A model's Linears as QATLinears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Mask:
    """Which weights of a Linear stay (R, C), and the n:m pattern of it if it has one."""

    keep_RC: torch.Tensor
    pattern: tuple[int, int] | None = None


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """The masks of a packed model, by the names of its pruned Linears."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    found = {name: module.quantized() for name, module in packed.items()}
    return {name: Mask(one.keep_RC, one.pattern) for name, one in found.items() if one.keep_RC is not None}


def check_trainable(family: Family, method: str) -> None:
    """Raise UserError for a family of which not all weights lie in Linears that every token passes."""
    if family.vision or any(stream.expert is not None for stream in family.streams):
        what = "sees images" if family.vision else "has experts"
        raise UserError(f"--method {method}: {family.name} {what}, language models without experts can be trained")


def check_groups(model: nn.Module, family: Family, group_size: int | None) -> None:
    """Raise UserError naming the first Linear whose rows `group_size` does not divide."""
    for name in stream_linears(model, family) if group_size is not None else ():
        linear: Any = model.get_submodule(name)
        if linear.in_features % group_size:
            raise UserError(
                f"--group-size {group_size}: {linear.in_features} input channels are no multiple of it ({name})"
            )


def quantize_linears(
    model: nn.Module, family: Family, bits: float, group_size: int | None, start: str, masks: Mapping[str, Mask],
    advance: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Put QATLinears in the place of a dense model's Linears; embeddings, head and norms are trained as they are.

    masks: weights that stay pruned. `check_groups` has found that groups divide the rows.
    """
    for name in stream_linears(model, family):
        linear: Any = model.get_submodule(name)
        mask = masks.get(name)
        keep_RC, pattern = (None, None) if mask is None else (mask.keep_RC, mask.pattern)
        put_module(model, name, QATLinear.of(linear, bits, group_size, start, keep_RC, pattern))
        advance(name)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def qat_modules(model: nn.Module) -> dict[str, QATLinear]:
    """The QATLinears of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}
