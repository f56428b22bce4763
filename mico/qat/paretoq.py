"""The quantizers of ParetoQ at 1, 1.58, 2, 3 and 4 bits, with their straight-through gradients and step sizes.

A group of weights w has one step alpha > 0 and r = w / alpha. Its dequantized values are c * s:

    bits   code c                                       s          gradient of w    gradient of alpha, a weight
    1      sign(w), +1 at 0                             alpha      |r| <= 1         sign
    1.58   round(1.5 clip(r, ±.99)): -1, 0, 1           alpha/1.5  |r| <= .99       q - r inside, ±2/3 outside
    2      2 round(2 clip(r, ±.99) - .5) + 1: ±1, ±3    alpha/4    |r| <= .99       q - r inside, ±3/4 outside
    3, 4   clamp(round(r), -2^(b-1), 2^(b-1) - 1)       alpha      inside that      round(r) - r inside, ends outside

q = c s / alpha. The gradient of alpha is summed over its group and divided by sqrt(numel Qp), Qp = 1 below 3 bits.
Source: Liu et al., ParetoQ (2025); Esser et al., Learned Step Size Quantization (2020), for 3 and 4 bits.
Suffixes: R output rows, C input channels, G groups of consecutive channels of a row, S channels in a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mico.packed.bits import TERNARY

EDGE = 0.99  # |r| up to which 1.58 and 2 bits pass gradients: the last level is reached before 1
SMALLEST = 1e-5  # of alpha
COARSE = torch.logspace(math.log10(0.03), math.log10(1.1), 40)  # of the largest weight, searched for the MSE start
FINE = torch.linspace(0.92, 1.08, 17)  # around the best of them


@dataclass(frozen=True)
class Width:
    """One row of the table above.

    divisor: alpha / s. limits: of r, beyond which a weight gets no gradient. outside: |term| of alpha's gradient there
    (3 and 4 bits: the limit itself).
    """

    bits: float
    divisor: float
    limits: tuple[float, float]
    positive_levels: int  # Qp

    @property
    def symmetric(self) -> bool:
        """Whether the levels lie symmetric about zero, so that no zero point is stored."""
        return self.bits < 3

    def codes(self, r: torch.Tensor) -> torch.Tensor:
        """c of the table, as floats."""
        if self.bits == 1:
            return torch.where(r >= 0, 1.0, -1.0).to(r.dtype)
        if self.bits == TERNARY:
            return (1.5 * r.clamp(-EDGE, EDGE)).round()
        if self.bits == 2:
            return 2 * (2 * r.clamp(-EDGE, EDGE) - 0.5).round() + 1
        return r.round().clamp(*self.limits)

    def step_terms(self, r: torch.Tensor) -> torch.Tensor:
        """What every weight adds to the gradient of alpha, per unit of its own gradient."""
        q = self.codes(r) / self.divisor
        return q if self.bits == 1 else torch.where(self.inside(r), q - r, q)

    def inside(self, r: torch.Tensor) -> torch.Tensor:
        """Where the gradient of a weight passes."""
        low, high = self.limits
        return (r >= low) & (r <= high)


WIDTHS = {
    width.bits: width
    for width in (
        Width(1, 1.0, (-1.0, 1.0), 1),
        Width(TERNARY, 1.5, (-EDGE, EDGE), 1),
        Width(2, 4.0, (-EDGE, EDGE), 1),
        Width(3, 1.0, (-4.0, 3.0), 3),
        Width(4, 1.0, (-8.0, 7.0), 7),
    )
}


def quantize(weight_RC: torch.Tensor, alpha_RG: torch.Tensor, bits: float) -> torch.Tensor:
    """The dequantized weight, (R, C), differentiable in both arguments by the table above.

    C must be a multiple of G. alpha below SMALLEST counts as SMALLEST, and its gradient passes if it makes it larger.
    """
    return _Quantize.apply(weight_RC, at_least_smallest(alpha_RG), WIDTHS[bits])


def at_least_smallest(alpha_RG: torch.Tensor) -> torch.Tensor:
    """alpha as it is used. A step of the optimizer can leap below SMALLEST: it must be able to come back."""
    return _AtLeastSmallest.apply(alpha_RG)


class _AtLeastSmallest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha_RG: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(alpha_RG < SMALLEST)
        return alpha_RG.clamp_min(SMALLEST)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (below_RG,) = ctx.saved_tensors
        return torch.where(below_RG, gradients[0].clamp_max(0), gradients[0])


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_RC: torch.Tensor, alpha_RG: torch.Tensor, width: Width) -> torch.Tensor:
        ctx.save_for_backward(weight_RC, alpha_RG)
        ctx.width = width
        weight_RGS, alpha_RG1 = by_group(weight_RC, alpha_RG.shape[1]), alpha_RG[..., None]
        return (width.codes(weight_RGS / alpha_RG1) * (alpha_RG1 / width.divisor)).view_as(weight_RC)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight_RC, alpha_RG = ctx.saved_tensors
        width, groups = ctx.width, alpha_RG.shape[1]
        gradient_RGS = by_group(gradients[0], groups)
        r_RGS = by_group(weight_RC, groups) / alpha_RG[..., None]
        of_weight = (gradient_RGS * width.inside(r_RGS)).view_as(weight_RC)
        scale = math.sqrt(weight_RC.numel() * width.positive_levels)
        of_alpha_RG = (gradient_RGS * width.step_terms(r_RGS)).sum(-1) / scale
        return of_weight, of_alpha_RG, None


def by_group(values_RC: torch.Tensor, groups: int) -> torch.Tensor:
    """(R, C) -> (R, G, S)."""
    return values_RC.reshape(len(values_RC), groups, -1)


# --- where alpha starts ---------------------------------------------------------------------------------------------


def paper_start(weight_RC: torch.Tensor, bits: float, groups: int, keep_RC: torch.Tensor | None = None) -> torch.Tensor:
    """alpha of the paper's code, (R, G): the mean magnitude at 1 bit, else the largest over the largest level.

    keep_RC: the weights that a mask leaves; the others count for nothing.
    """
    magnitude_RGS, kept_RGS = _magnitudes(weight_RC, groups, keep_RC)
    if bits == 1:
        alpha_RG = magnitude_RGS.sum(-1) / kept_RGS.sum(-1).clamp_min(1)
    else:
        alpha_RG = magnitude_RGS.amax(-1) / max(1, WIDTHS[bits].positive_levels)
    return alpha_RG.clamp_min(SMALLEST)


def mse_start(weight_RC: torch.Tensor, bits: float, groups: int, keep_RC: torch.Tensor | None = None) -> torch.Tensor:
    """alpha with the least squared error of every group, (R, G): closed form at 1 bit, else searched coarse to fine."""
    alpha_RG = paper_start(weight_RC, bits, groups, keep_RC)
    if bits == 1:
        return alpha_RG
    _, kept_RGS = _magnitudes(weight_RC, groups, keep_RC)
    weight_RGS = by_group(weight_RC, groups)
    for candidates in (COARSE, FINE):
        alpha_RG = _best(weight_RGS, kept_RGS, alpha_RG, candidates.tolist(), WIDTHS[bits])
    return alpha_RG.clamp_min(SMALLEST)


def _magnitudes(
    weight_RC: torch.Tensor, groups: int, keep_RC: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    keep_RC = torch.ones_like(weight_RC) if keep_RC is None else keep_RC.to(weight_RC.dtype)
    return by_group(weight_RC.abs() * keep_RC, groups), by_group(keep_RC, groups)


def _best(
    weight_RGS: torch.Tensor, kept_RGS: torch.Tensor, alpha_RG: torch.Tensor, factors: list[float], width: Width
) -> torch.Tensor:
    best_RG, least_RG = alpha_RG, torch.full_like(alpha_RG, math.inf)
    for factor in factors:
        tried_RG = alpha_RG * factor
        level_RGS = width.codes(weight_RGS / tried_RG[..., None]) * (tried_RG[..., None] / width.divisor)
        error_RG = ((level_RGS - weight_RGS).square() * kept_RGS).sum(-1)
        better_RG = error_RG < least_RG
        best_RG, least_RG = torch.where(better_RG, tried_RG, best_RG), torch.where(better_RG, error_RG, least_RG)
    return best_RG


STARTS = {"mse": mse_start, "paper": paper_start}
