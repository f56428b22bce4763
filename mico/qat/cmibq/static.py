"""Quantized activations outside of training: the grid of every site as plain numbers, and the hooks that apply them.

A model whose weights are packed has no quantizers any more; with these hooks it computes what was trained.
Suffixes: G groups of channels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mico.errors import UserError
from mico.qat.cmibq.levels import BITS, Steps, half_levels, quantize, runs
from mico.qat.cmibq.quantizer import SharedInput


@dataclass(frozen=True)
class ActivationGrid:
    """One site's grid (mico/qat/cmibq/levels.py), and the Linears that read it by their names in the model."""

    linears: tuple[str, ...]
    channels: int
    bits_G: tuple[int, ...]
    scale_G: tuple[float, ...]
    zero_G: tuple[float, ...]

    def steps(self, device: Any = None) -> Steps:
        """As `quantize` takes them, float32: numbers written as JSON and read back give the same bits."""
        scale, zero = (torch.tensor(part, device=device)[None, :, None] for part in (self.scale_G, self.zero_G))
        half_G1 = half_levels(torch.tensor(self.bits_G, device=device))[:, None]
        return Steps(scale, zero, half_G1, runs(self.channels, len(self.bits_G)).to(device))

    def record(self) -> dict[str, Any]:
        return dict(
            linears=list(self.linears), channels=self.channels, bits=list(self.bits_G), scale=list(self.scale_G),
            zero=list(self.zero_G),
        )  # fmt: skip

    @classmethod
    def of(cls, record: Any, name: str) -> ActivationGrid:
        """Inverse of `record`. Raises UserError naming the site and field where it is damaged."""
        try:
            bits, scale, zero = tuple(record["bits"]), tuple(record["scale"]), tuple(record["zero"])
            linears, channels = tuple(record["linears"]), int(record["channels"])
            grid = cls(linears, channels, bits, scale, zero)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"activation grid of '{name}': {error!r:.80}: damaged, export the model again") from None
        wrong: dict[str, list[Any]] = {
            "bits": [bits for bits in grid.bits_G if bits not in BITS],
            "scale": [scale for scale in grid.scale_G if not (0 < scale < math.inf)],
            "zero": [zero for zero in grid.zero_G if not math.isfinite(zero)],
        }
        for field, values in wrong.items():
            if values:
                raise UserError(f"activation grid of '{name}': {field} {values[0]}: damaged, export the model again")
        if not 0 < len(grid.bits_G) == len(grid.scale_G) == len(grid.zero_G) <= grid.channels:
            raise UserError(f"activation grid of '{name}': bits, scale and zero differ in length: damaged")
        return grid


class StaticInput:
    """Quantizes x (N, C) by a fixed grid, on whatever device it comes."""

    def __init__(self, grid: ActivationGrid) -> None:
        self.grid = grid
        self._steps = grid.steps()

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        if self._steps.label_C.device != x_NC.device:
            self._steps = self.grid.steps(x_NC.device)
        return quantize(x_NC, self._steps)


def quantize_inputs(model: nn.Module, grids: Mapping[str, ActivationGrid]) -> list[RemovableHandle]:
    """Quantize what the Linears of every grid read, in each forward pass from now on; `.remove()` ends it.

    Raises UserError where a Linear is missing or has another number of channels.
    """
    handles = []
    for name, grid in grids.items():
        shared = SharedInput(StaticInput(grid), len(grid.linears))
        for path in grid.linears:
            try:
                linear: Any = model.get_submodule(path)
            except AttributeError:
                raise UserError(f"activation grid of '{name}': the model has no '{path}'") from None
            if getattr(linear, "in_features", None) != grid.channels:
                raise UserError(f"activation grid of '{name}': {grid.channels} channels, '{path}' has other ones")
            handles.append(linear.register_forward_pre_hook(_hook(shared)))
    return handles


def _hook(shared: SharedInput) -> Any:
    return lambda module, args: (shared(args[0]), *args[1:])
