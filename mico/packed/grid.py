"""Quantization grids: which values a weight may take, fitted before any weight is moved.

value = scale * (code - zero), 0 <= code < 2**bits. Suffixes: R rows, C channels, G groups, K candidates.
Scales are rounded to 16 bits when they are fitted, so that what is searched is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mico.packed.quantized import QuantizedWeight

TINY = 6e-8  # smallest positive float16: a scale never becomes zero
LARGEST = 65504.0
LARGEST_SHARED = 65280.0  # that float16 and bfloat16 both hold
LEAST_LEVEL = -127  # of whole levels: some kernels take absolute values in 8 bits
SHRINKS = torch.linspace(1.05, 0.45, 13)  # candidate clipping of the largest weight, coarse pass; 1 is one of them
SPREADS = (0.2, 0.05)  # half-widths of the finer passes around the factors
FINE = torch.linspace(0.96, 1.04, 9)  # candidates of a last pass around a scale that stands alone


@dataclass(frozen=True)
class Grid:
    """The stored form of a grid: see QuantizedWeight for the fields. levels_used: codes from 0 on, None: all."""

    row_scale_RG: torch.Tensor
    group_scale_G: torch.Tensor | None
    zero_RG: torch.Tensor | None
    bits_G: tuple[int, ...]
    label_C: torch.Tensor
    levels_used: tuple[int, ...] | None = None

    @property
    def scale_RG(self) -> torch.Tensor:
        """Effective float32 scales, (R, G)."""
        scale_RG = self.row_scale_RG.float()
        return scale_RG if self.group_scale_G is None else scale_RG * self.group_scale_G.float()

    @property
    def zero_point_RG(self) -> torch.Tensor:
        """Effective float32 zero points, (R, G); the middle of the grid where none is stored."""
        if self.zero_RG is not None:
            return self.zero_RG.float().expand(len(self.row_scale_RG), -1)
        return ((self.levels_G - 1) / 2).expand(len(self.row_scale_RG), -1)

    @property
    def levels_G(self) -> torch.Tensor:
        counts = self.levels_used or tuple(2**bits for bits in self.bits_G)
        return torch.tensor(counts, dtype=torch.float32, device=self.row_scale_RG.device)

    def nearest(self, weight_RC: torch.Tensor) -> torch.Tensor:
        """The grid point nearest to every weight, (R, C)."""
        scale_RC, zero_RC = self.scale_RG[:, self.label_C], self.zero_point_RG[:, self.label_C]
        maxq_C = (self.levels_G - 1)[self.label_C]
        return (quantize(weight_RC, scale_RC, zero_RC, maxq_C) - zero_RC) * scale_RC

    def quantized(
        self, codes_RC: torch.Tensor, keep_RC: torch.Tensor | None, pattern: tuple[int, int] | None
    ) -> QuantizedWeight:
        """The QuantizedWeight of these codes on this grid."""
        if keep_RC is not None:
            codes_RC = codes_RC * keep_RC
        return QuantizedWeight(
            codes_RC.to(torch.uint8),
            self.row_scale_RG,
            self.group_scale_G,
            self.zero_RG,
            self.bits_G,
            self.label_C,
            keep_RC,
            pattern,
        )


def to_half(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales to float16, kept inside its positive range."""
    return scale.clamp(TINY, LARGEST).to(torch.float16)


def stored(scale: torch.Tensor) -> torch.Tensor:
    """What is left of a scale once it has been stored, in the dtype it came in."""
    return to_half(scale).to(scale.dtype)


def stored_shared(scale: torch.Tensor) -> torch.Tensor:
    """What is left of scales of either sign once they are exact in float16 and in bfloat16, in their dtype.

    Eight significant bits inside the range of float16: such a scale can be written in either dtype of a model.
    """
    magnitude = scale.abs().clamp(TINY, LARGEST_SHARED).to(torch.bfloat16).to(torch.float16)
    return magnitude.to(scale.dtype).copysign(scale)


def minmax_grid(weight_RC: torch.Tensor, label_C: torch.Tensor, bits_G: tuple[int, ...]) -> Grid:
    """The asymmetric min-max grid of SparseGPT and GPTQ: per row (and group), zero always representable."""
    rows, groups, label_C = len(weight_RC), len(bits_G), label_C.to(weight_RC.device)
    index_RC = label_C.expand(rows, -1)
    zeros_RG = weight_RC.new_zeros(rows, groups)
    low_RG = zeros_RG.scatter_reduce(1, index_RC, weight_RC, "amin", include_self=True)
    high_RG = zeros_RG.scatter_reduce(1, index_RC, weight_RC, "amax", include_self=True)
    empty_RG = (low_RG == 0) & (high_RG == 0)
    low_RG, high_RG = low_RG.masked_fill(empty_RG, -1), high_RG.masked_fill(empty_RG, 1)
    maxq_G = torch.tensor([max(1, 2**bits - 1) for bits in bits_G], dtype=weight_RC.dtype, device=weight_RC.device)
    scale_RG = to_half((high_RG - low_RG) / maxq_G)
    zero_RG = (-low_RG / scale_RG.to(weight_RC.dtype)).round().minimum(maxq_G)
    return Grid(scale_RG, None, zero_RG.to(torch.uint8), bits_G, label_C)


def quantize(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, maxq: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest grid points (broadcasting; float tensor of whole numbers)."""
    return (weight / scale + zero).round_().clamp_(min=0).minimum(maxq)


def symmetric_grid(
    weight_RC: torch.Tensor, importance_RC: torch.Tensor, label_C: torch.Tensor, bits_G: tuple[int, ...]
) -> Grid:
    """A grid symmetric about zero with factored scales s_rg = a_r * b_g, minimising sum importance * (Q(w) - w)^2.

    The levels ±(k + 1/2) * s need no stored zero; 16 * (R + G) bits of scales instead of 16 * R * G. The
    scale of every (row, group) is searched first, its best rank-one fit in the log domain starts the factors,
    then rows and groups are searched in turn (coarse-to-fine coordinate descent on the true error).
    importance_RC is 0 for weights that a mask will remove. Source: algorithm notes, factored scales.
    """
    groups = len(bits_G)
    half_G = torch.tensor([(2.0**bits - 1) / 2 for bits in bits_G], dtype=weight_RC.dtype, device=weight_RC.device)
    problem = _ScaleSearch(weight_RC, importance_RC, label_C, half_G)
    widest_RG = problem.widest_RG() / half_G
    if groups == 1:
        one_G = torch.ones_like(half_G)
        row_R1 = problem.best_rows(widest_RG, one_G, SHRINKS)
        row_R1 = problem.best_rows(row_R1, one_G, FINE)
        return Grid(to_half(row_R1), None, None, bits_G, problem.label_C)
    full_RG = problem.best_RG(widest_RG, SHRINKS)
    weight_RG = problem.energy_RG() + 1e-30
    log_RG = full_RG.log()
    group_G = ((log_RG - (log_RG * weight_RG).sum(1, keepdim=True) / weight_RG.sum(1, keepdim=True)) * weight_RG).sum(0)
    group_G = stored((group_G / weight_RG.sum(0)).exp())
    row_R1 = ((log_RG - group_G.log()) * weight_RG).sum(1, keepdim=True).div(weight_RG.sum(1, keepdim=True)).exp()
    for spread in SPREADS:
        candidates = torch.linspace(1 - spread, 1 + spread, 9)
        row_R1 = problem.best_rows(row_R1, group_G, candidates)
        group_G = problem.best_groups(row_R1, group_G, candidates)
    return Grid(to_half(row_R1), to_half(group_G), None, bits_G, problem.label_C)


def integer_grid(
    weight_RC: torch.Tensor, importance_RC: torch.Tensor, label_C: torch.Tensor, bits_G: tuple[int, ...]
) -> Grid:
    """A grid of whole multiples of one scale a (row, group), minimising sum importance * (Q(w) - w)^2.

    The levels (code - 2**(bits - 1)) * s are those of compressed-tensors, GPTQ and GGUF, so such a grid can be
    exported as it is, and zero is one of them. There is one level more on one side (not at 8 bits: LEAST_LEVEL); a
    negative scale puts it on the side that gains more. Scales are exact in float16 and in bfloat16.
    importance_RC as in `symmetric_grid`.
    """
    half_G = torch.tensor([(2.0**bits - 1) / 2 for bits in bits_G], dtype=weight_RC.dtype, device=weight_RC.device)
    problem = _ScaleSearch(weight_RC, importance_RC, label_C, half_G, whole=True)
    scale_RG = problem.best_RG(problem.widest_RG() / half_G, torch.cat([SHRINKS, -SHRINKS]), stored_shared)
    scale_RG = problem.best_RG(scale_RG, FINE, stored_shared)
    zeros = [min(2 ** (bits - 1), -LEAST_LEVEL) for bits in bits_G]
    zero_1G = torch.tensor([zeros], dtype=torch.uint8, device=weight_RC.device)
    used = tuple(zero + 2 ** (bits - 1) for zero, bits in zip(zeros, bits_G, strict=True))
    return Grid(scale_RG.to(torch.float16), None, zero_1G, bits_G, problem.label_C, used)


def group_errors(
    weight_RC: torch.Tensor,
    importance_RC: torch.Tensor,
    label_C: torch.Tensor,
    groups: int,
    bits: int,
    whole: bool = False,
) -> torch.Tensor:
    """Sum of importance * (Q(w) - w)^2 by group (G,) at `bits`, every (row, group) at its best scale.

    What a group loses at a width, for allocating bits: it is only compared between groups and widths, so a
    coarse search without the rank-one constraint is enough. `whole`: on the levels of `integer_grid`.
    """
    half_G = weight_RC.new_full((groups,), (2.0**bits - 1) / 2)
    problem = _ScaleSearch(weight_RC, importance_RC, label_C, half_G, whole)
    widest_RG = problem.widest_RG() / problem.half_G
    errors = torch.stack([problem.error_RG(widest_RG * shrink) for shrink in SHRINKS[::2].tolist()])
    return errors.amin(0).sum(0, dtype=torch.float64)


class _ScaleSearch:
    """Weighted quantization error of every (row, group) at candidate scales.

    The levels of group g are the half-integers from -half_G[g] to half_G[g]; `whole`: the integers half a step below,
    down to LEAST_LEVEL.
    """

    def __init__(
        self,
        weight_RC: torch.Tensor,
        importance_RC: torch.Tensor,
        label_C: torch.Tensor,
        half_G: torch.Tensor,
        whole: bool = False,
    ) -> None:
        self.weight_RC, self.importance_RC, self.half_G = weight_RC, importance_RC, half_G
        self.label_C = label_C.to(weight_RC.device)
        step = 0.5 if whole else 0.0
        self.offset = 0.5 - step  # of the levels from the integers
        low_G = (-half_G - step).clamp_min(LEAST_LEVEL) if whole else -half_G
        self.low_C, self.high_C = low_G[self.label_C], (half_G - step)[self.label_C]

    def _by_group(self, values_RC: torch.Tensor) -> torch.Tensor:
        if len(self.half_G) == 1:
            return values_RC.sum(1, keepdim=True)
        shape = (len(values_RC), len(self.half_G))
        return values_RC.new_zeros(shape).index_add_(1, self.label_C, values_RC)

    def widest_RG(self) -> torch.Tensor:
        """Largest magnitude of the weights that matter; a full row without any stands in for an empty group."""
        magnitude_RC = self.weight_RC.abs() * (self.importance_RC > 0)
        shape = (len(magnitude_RC), len(self.half_G))
        index_RC = self.label_C.expand_as(magnitude_RC)
        widest_RG = magnitude_RC.new_zeros(shape).scatter_reduce(1, index_RC, magnitude_RC, "amax")
        fallback_R1 = self.weight_RC.abs().amax(1, keepdim=True).clamp_min(TINY)
        return torch.where(widest_RG > 0, widest_RG, fallback_R1)

    def energy_RG(self) -> torch.Tensor:
        return self._by_group(self.importance_RC * self.weight_RC.square())

    def error_RG(self, scale_RG: torch.Tensor) -> torch.Tensor:
        scale_RC = scale_RG[:, self.label_C] if scale_RG.shape[1] > 1 else scale_RG
        level_RC = (self.weight_RC / scale_RC).sub_(self.offset).round_().add_(self.offset)
        level_RC = torch.minimum(torch.maximum(level_RC, self.low_C), self.high_C)
        return self._by_group(level_RC.mul_(scale_RC).sub_(self.weight_RC).square_().mul_(self.importance_RC))

    def best_RG(
        self,
        scale_RG: torch.Tensor,
        candidates_K: torch.Tensor,
        store: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone,
    ) -> torch.Tensor:
        """Scale of every (row, group) times its best candidate factor, every candidate rounded by `store`."""
        errors = torch.stack([self.error_RG(store(scale_RG * k)) for k in candidates_K.tolist()])
        return store(scale_RG * candidates_K.to(scale_RG)[errors.argmin(0)])

    def best_rows(self, row_R1: torch.Tensor, group_G: torch.Tensor, candidates_K: torch.Tensor) -> torch.Tensor:
        """Row scales times their best factors, every candidate rounded as it would be stored."""
        rows = torch.stack([stored(row_R1 * k) for k in candidates_K.tolist()])
        errors = torch.stack([self.error_RG(row_R1 * group_G).sum(1, keepdim=True) for row_R1 in rows])
        return rows.gather(0, errors.argmin(0, keepdim=True))[0]

    def best_groups(self, row_R1: torch.Tensor, group_G: torch.Tensor, candidates_K: torch.Tensor) -> torch.Tensor:
        """Group scales times their best factors, every candidate rounded as it would be stored."""
        groups = torch.stack([stored(group_G * k) for k in candidates_K.tolist()])
        errors = torch.stack([self.error_RG(row_R1 * group_G).sum(0) for group_G in groups])
        return groups.gather(0, errors.argmin(0, keepdim=True))[0]
