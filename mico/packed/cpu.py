"""Packed weights on a CPU: bfloat16 activations times small integers, through the kernels that PyTorch brings.

A weight is a[r] * b[c] * v[r, c]: the integers v go into 4-bit digits (`_weight_int4pack_mm_for_cpu`) or bytes
(`_weight_int8pack_mm`), b multiplies the activations, a the outputs, so that no scale is rounded and a pruned weight
is an exact zero. Codes of more than 4 bits take two digits, in two columns that read the same channel. Only where
scales differ by row and group at once do they go into the kernel, rounded to bfloat16 as it demands.
Suffixes: R rows, C channels, G groups, K columns of the kernel, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mico.packed.bits import levels
from mico.packed.quantized import QuantizedWeight

ROWS, COLUMNS = 16, 32  # the kernels take multiples of these
RUNS = (256, 128, 64, 32)  # columns that share a scale inside the 4-bit kernel
BYTES_ABOVE = 1.25  # digits a weight from which bytes are faster than digits


@dataclass(frozen=True)
class CpuWeight:
    """A weight as one of the kernels takes it; `scales` is there for digits and None for bytes."""

    packed: torch.Tensor
    scales: torch.Tensor | None
    run: int
    order_K: torch.Tensor | None  # the channel that each column reads; None: column c reads channel c
    column_K: torch.Tensor | None  # float32 factors of the columns, 0 for the padding
    row_R: torch.Tensor | None  # float32 factors of the outputs
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        held = (self.packed, self.scales, self.order_K, self.column_K, self.row_R)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def __call__(self, x_BC: torch.Tensor, bias_R: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b, (B, R) bfloat16, for bfloat16 activations."""
        x_BK = x_BC if self.order_K is None else x_BC.index_select(1, self.order_K)
        if self.column_K is not None:
            x_BK = (x_BK * self.column_K).to(torch.bfloat16)
        x_BK = x_BK.contiguous()
        if self.scales is not None:
            y_BR = torch.ops.aten._weight_int4pack_mm_for_cpu(x_BK, self.packed, self.run, self.scales)
        else:
            y_BR = torch.ops.aten._weight_int8pack_mm(x_BK, self.packed, x_BK.new_ones(len(self.packed)))
        y_BR = y_BR[:, : self.rows]
        if self.row_R is None and bias_R is None:
            return y_BR
        y_BR = y_BR.float()
        if self.row_R is not None:
            y_BR *= self.row_R
        if bias_R is not None:
            y_BR += bias_R
        return y_BR.to(torch.bfloat16)


def prepare_cpu(quantized: QuantizedWeight) -> CpuWeight | None:
    """The weight for the faster of the two kernels; None where neither can hold it (16-bit values)."""
    if not quantized.quantized or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    groups = [_integers(quantized, group) for group in range(len(quantized.bits_G))]
    parts = [part for part in groups if len(part.columns)]
    digits = sum(part.digits * len(part.columns) for part in parts) / quantized.codes_RC.shape[1]
    separable = quantized.row_scale_RG.shape[1] == 1
    if digits > BYTES_ABOVE and separable:
        signed = [_integers(quantized, group, signed=True) for group in range(len(quantized.bits_G))]
        if all(part.values_RN.numel() == 0 or int(part.values_RN.abs().max()) <= 127 for part in signed):
            return _bytes(quantized, signed)
    return _digits(quantized, parts) if digits <= 3 else None


@dataclass(frozen=True)
class _Integers:
    """One group: weight = scale * factor * (value - offset). Without an offset the values are signed."""

    columns: torch.Tensor
    values_RN: torch.Tensor  # int32
    offset_R1: torch.Tensor | None  # float32, (R, 1) or (1, 1)
    scale_R1: torch.Tensor  # float32 (R, 1): of this group where rows and groups do not separate, else ones
    factor: float
    digits: int = field(default=1)


def _integers(quantized: QuantizedWeight, group: int, signed: bool = False) -> _Integers:
    """Plain codes with an offset where that is exact and short; signed integers with zero at zero otherwise."""
    bits = quantized.bits_G[group]
    columns = (quantized.label_C == group).nonzero().squeeze(1)
    codes_RN = quantized.codes_RC[:, columns].int()
    keep_RN = None if quantized.keep_RC is None else quantized.keep_RC[:, columns]
    separable = quantized.row_scale_RG.shape[1] == 1
    middle = torch.full((1, 1), (levels(bits) - 1) / 2)
    zero_R1 = middle if quantized.zero_RG is None else quantized.zero_RG[:, group : group + 1].float()
    scale_R1 = torch.ones(len(codes_RN), 1)
    factor = 1.0 if quantized.group_scale_G is None else float(quantized.group_scale_G[group])
    if not separable:
        scale_R1 = _relative_scales(quantized)[:, group : group + 1]
    short = separable or (bits <= 4 and not _fits(codes_RN - zero_R1, 1))
    if keep_RN is None and short and not signed:
        return _Integers(columns, codes_RN, zero_R1, scale_R1, factor, 1 if bits <= 4 else 2)
    halves = bool((zero_R1 != zero_R1.round()).any())
    values_RN = (2 * codes_RN - (2 * zero_R1).int()) if halves else codes_RN - zero_R1.int()
    if keep_RN is not None:
        values_RN = values_RN * keep_RN
    digits = next(count for count in (1, 2, 3) if _fits(values_RN, count))
    return _Integers(columns, values_RN, None, scale_R1, factor / 2 if halves else factor, digits)


def _relative_scales(quantized: QuantizedWeight) -> torch.Tensor:
    """Scales by row and group, relative to the largest of the row, (R, G) float32."""
    scale_RG = quantized.row_scale_RG.float()
    return scale_RG / scale_RG.amax(1, keepdim=True)


def _fits(values: torch.Tensor, digits: int) -> bool:
    """Whether signed values fit into so many digits of 4 bits, the highest of them signed."""
    half = 8 * 16 ** (digits - 1)
    return values.numel() == 0 or (float(values.min()) >= -half and float(values.max()) < half)


def _row_factors(quantized: QuantizedWeight) -> torch.Tensor:
    return quantized.row_scale_RG.float().amax(1)


def _bytes(quantized: QuantizedWeight, parts: list[_Integers]) -> CpuWeight:
    """One byte a weight, channels in their own order."""
    rows, channels = quantized.codes_RC.shape
    values_RC = torch.zeros(_up(rows, ROWS), _up(channels, COLUMNS), dtype=torch.int8)
    column_K = torch.zeros(values_RC.shape[1])
    for part in parts:
        values_RC[:rows, part.columns] = part.values_RN.to(torch.int8)
        column_K[part.columns] = part.factor
    order_K = None
    if values_RC.shape[1] != channels:
        order_K = torch.arange(values_RC.shape[1]).clamp_max(channels - 1)
    plain = order_K is None and bool((column_K == 1).all())
    return CpuWeight(values_RC, None, 0, order_K, None if plain else column_K, _row_factors(quantized), rows)


def _digits(quantized: QuantizedWeight, parts: list[_Integers]) -> CpuWeight:
    """Digits of 4 bits; columns of one group (and place) together, filled up to whole runs."""
    rows, channels = quantized.codes_RC.shape
    strips = [strip for part in parts for strip in _strips(part)]
    if quantized.row_scale_RG.shape[1] == 1:
        strips = _merged(strips)
    run = min(RUNS, key=lambda size: sum(_up(len(strip.columns), size) for strip in strips))
    width = sum(_up(len(strip.columns), run) for strip in strips)
    packed_RK = torch.full((_up(rows, ROWS), width), 8, dtype=torch.int32)
    scales = torch.zeros(width // run, len(packed_RK), 2, dtype=torch.bfloat16)
    order_K, column_K, at = torch.zeros(width, dtype=torch.long), torch.zeros(width), 0
    for strip in strips:
        here = slice(at, at + len(strip.columns))
        packed_RK[:rows, here] = strip.digits_RN
        order_K[here], column_K[here] = strip.columns, strip.factor_N
        runs = slice(at // run, (at + _up(len(strip.columns), run)) // run)
        scales[runs, :rows, 0] = strip.scale_R1[:, 0].to(torch.bfloat16)
        scales[runs, :rows, 1] = (strip.scale_R1.to(torch.bfloat16).float() * strip.zero_R1)[:, 0].to(torch.bfloat16)
        at += _up(len(strip.columns), run)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(packed_RK, 1)
    straight = width == channels and torch.equal(order_K, torch.arange(channels))
    plain = bool((column_K == 1).all())
    return CpuWeight(
        packed, scales, run, None if straight else order_K, None if plain else column_K, _row_factors(quantized), rows
    )


@dataclass(frozen=True)
class _Strip:
    """Columns of the 4-bit kernel: value = scale * ((digit - 8) + zero), times a factor a column."""

    columns: torch.Tensor
    digits_RN: torch.Tensor
    zero_R1: torch.Tensor
    scale_R1: torch.Tensor
    factor_N: torch.Tensor


def _strips(part: _Integers) -> list[_Strip]:
    """The digits of a group, lowest first. Plain codes of two digits: value - offset = 16 (high - k) + low - rest."""
    found, count = [], len(part.columns)
    middle = 8 if part.digits == 2 else 0
    values_RN = part.values_RN + (8 * 16 ** (part.digits - 1) if part.offset_R1 is None else 0)
    for place in range(part.digits):
        digits_RN = values_RN // 16**place % 16
        top = place == part.digits - 1
        if part.offset_R1 is None:
            zero_R1 = torch.full((1, 1), 0.0 if top else 8.0)
        elif place == 0:
            zero_R1 = 8 - part.offset_R1 + 16 * middle
        else:
            zero_R1 = torch.full((1, 1), 8.0 - middle)
        factor_N = torch.full((count,), part.factor * 16**place)
        found.append(_Strip(part.columns, digits_RN, zero_R1, part.scale_R1, factor_N))
    return found


def _merged(strips: list[_Strip]) -> list[_Strip]:
    """Strips with the same zeros become one: groups differ by their columns' factors alone."""
    by_zero: dict[tuple[float, ...], list[_Strip]] = {}
    for strip in strips:
        by_zero.setdefault(tuple(strip.zero_R1.reshape(-1).tolist()), []).append(strip)
    return [_joined(same) for same in by_zero.values()]


def _joined(same: list[_Strip]) -> _Strip:
    columns = torch.cat([strip.columns for strip in same])
    digits_RN = torch.cat([strip.digits_RN for strip in same], 1)
    factor_N = torch.cat([strip.factor_N for strip in same])
    if len(set(columns.tolist())) == len(columns):  # no channel twice: in their own order, gathers may be spared
        order = columns.argsort()
        columns, digits_RN, factor_N = columns[order], digits_RN[:, order], factor_N[order]
    return _Strip(columns, digits_RN, same[0].zero_R1, same[0].scale_R1, factor_N)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
