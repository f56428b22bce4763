"""Packed weights on a CPU: bfloat16 activations times small integers, through the kernels that PyTorch brings.

A weight is a[r] * b[c] * n[r, c]: the integers n go into 4-bit digits (`_weight_int4pack_mm_for_cpu`) or bytes
(`_weight_int8pack_mm`), b multiplies the activations, a the outputs, so that no scale is rounded and a pruned weight
is an exact zero. Numbers too wide for one column take two (digits: up to three) that read the same channel. Only where
scales differ by row and group at once do they go into the kernel, rounded to bfloat16 as it demands.
Suffixes: R rows, C channels, G groups, K columns of the kernel, N columns of a strip, S strips, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mico.packed.bits import levels
from mico.packed.quantized import QuantizedWeight

ROWS, COLUMNS = 16, 32  # the kernels take multiples of these
RUNS = (256, 128, 64, 32)  # columns that share a scale inside the 4-bit kernel
BYTES_ABOVE = 1.5  # digits a weight from which bytes are faster than digits (benchmarks/README.md)
CENTRE = 128  # of the codes of 8 bits, rounded up
BLOCK = 256  # rows packed at a time: bounds the memory of wide intermediates, and keeps them in the cache


@dataclass(frozen=True)
class CpuWeight:
    """A weight as one of the kernels takes it; `scales` is there for digits and None for bytes."""

    packed: torch.Tensor
    scales: torch.Tensor | None
    run: int
    order_K: torch.Tensor | None  # the channel that each column reads; None: column c reads channel c
    column_K: torch.Tensor | None  # float32 factors of the columns, 0 for the padding
    row_R: torch.Tensor  # float32 factors of the outputs
    rows: int
    moved_K: torch.Tensor | None = None  # float32; see `_moved`

    @property
    def kind(self) -> str:
        return "bytes" if self.scales is None else "4-bit digits"

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        held = (self.packed, self.scales, self.order_K, self.column_K, self.row_R, self.moved_K)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def __call__(self, x_BC: torch.Tensor, bias_R: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b, (B, R) bfloat16, for bfloat16 activations."""
        x_BK = x_BC if self.order_K is None else x_BC.index_select(1, self.order_K)
        if self.column_K is not None:
            x_BK = (x_BK * self.column_K).to(torch.bfloat16)
        if self.moved_K is not None:
            x_BK = _with_sums(x_BK, self.moved_K)
        x_BK = x_BK.contiguous()
        if self.scales is not None:
            y_BR = torch.ops.aten._weight_int4pack_mm_for_cpu(x_BK, self.packed, self.run, self.scales)
        else:
            y_BR = torch.ops.aten._weight_int8pack_mm(x_BK, self.packed, x_BK.new_ones(len(self.packed)))
        y_BR = y_BR[:, : self.rows] * self.row_R  # float32
        if bias_R is not None:
            y_BR += bias_R
        return y_BR.to(torch.bfloat16)


def _with_sums(x_BK: torch.Tensor, moved_K: torch.Tensor) -> torch.Tensor:
    """The activations with their sum over the moved columns, in two bfloat16 parts, in the last two columns."""
    sum_B = x_BK.float() @ moved_K
    x_BK[:, -2] = sum_B
    x_BK[:, -1] = sum_B - x_BK[:, -2]
    return x_BK


def prepare_cpu(quantized: QuantizedWeight) -> CpuWeight | None:
    """The weight for the faster of the two kernels; None where neither can hold it or gains over bfloat16."""
    if not quantized.quantized or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    groups = [_group(quantized, group) for group in range(len(quantized.bits_G))]
    groups = [group for group in groups if len(group.columns_N)]
    channels = quantized.codes_RC.shape[1]
    digits = [strip for group in groups for strip in _digit_strips(quantized, group)]
    share = sum(len(strip.columns_N) for strip in digits) / channels
    if share > BYTES_ABOVE and quantized.row_scale_RG.shape[1] == 1:
        found = [strip for group in groups for strip in _byte_strips(quantized, group)]
        if sum(len(strip.columns_N) for strip in found) < 2 * channels:  # else as large as bfloat16
            return _bytes(quantized, found)
    return _digits(quantized, digits) if share < 3 else None


# --- the numbers of a group -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """One group: weight = scale * factor * (code - zero); low_R1, high_R1: the range of code - zero."""

    index: int
    columns_N: torch.Tensor
    zero_R1: torch.Tensor  # float32, (R, 1), or (1, 1) where rows share it
    factor: float
    low: float
    high: float

    @property
    def halves(self) -> bool:
        return bool((self.zero_R1 != self.zero_R1.round()).any())


@dataclass(frozen=True)
class _Strip:
    """Columns of a kernel. What lies in them is (times * code - minus, or 0 where pruned, + lift) >> shift.

    zero_R1 (digits): what the kernel adds to digit - 8. moved (bytes): whether CENTRE was subtracted instead of zero.
    """

    group: int
    columns_N: torch.Tensor
    factor: float
    times: int
    minus_R1: torch.Tensor  # int16
    lift: int = 0
    shift: int = 0
    further: bool = False  # not the first column of its channels
    zero_R1: torch.Tensor | None = None
    moved: bool = False


def _group(quantized: QuantizedWeight, index: int) -> _Group:
    columns_N = (quantized.label_C == index).nonzero().squeeze(1)
    factor = 1.0 if quantized.group_scale_G is None else float(quantized.group_scale_G[index])
    middle = torch.full((1, 1), (levels(quantized.bits_G[index]) - 1) / 2)
    zero_R1 = middle if quantized.zero_RG is None else quantized.zero_RG[:, index : index + 1].float()
    if not len(columns_N):
        return _Group(index, columns_N, zero_R1, factor, 0, 0)
    codes_RN = quantized.codes_RC if len(quantized.bits_G) == 1 else quantized.codes_RC[:, columns_N]
    low_R1, high_R1 = (bound.float()[:, None] - zero_R1 for bound in codes_RN.aminmax(dim=1))
    return _Group(index, columns_N, zero_R1, factor, float(low_R1.min()), float(high_R1.max()))


def _signed(group: _Group) -> tuple[int, torch.Tensor, float, float, float]:
    """times, minus, factor, low and high of whole numbers with zero at zero: what masks need."""
    times = 2 if group.halves else 1
    return times, (times * group.zero_R1).short(), group.factor / times, times * group.low, times * group.high


def _digit_strips(quantized: QuantizedWeight, group: _Group) -> list[_Strip]:
    """Digits of 4 bits, lowest first: plain codes where that is exact and short, else signed numbers.

    Plain codes without stored zeros move to the middle of their digits, whose zero is then 7.5 at every place.
    """
    bits = quantized.bits_G[group.index]
    separable = quantized.row_scale_RG.shape[1] == 1
    times, minus_R1, factor, low, high = _signed(group)
    exact = separable or group.halves  # a scale times a half is exact in bfloat16 too
    plain = quantized.keep_RC is None and (exact or (bits <= 4 and not (low >= -8 and high <= 7)))
    if plain:
        count = 1 if bits <= 4 else 2
        times, lift, factor = 1, 0, group.factor
        minus_R1 = torch.zeros(1, 1, dtype=torch.int16)
        if group.halves:
            minus_R1 = minus_R1 - (16**count - levels(bits)) // 2
            zeros = [torch.full((1, 1), 0.5)] * count
        else:
            middle = torch.full((1, 1), 0.0)
            zeros = [8 - group.zero_R1] if count == 1 else [136 - group.zero_R1, middle]
    else:
        count = next(count for count in (1, 2, 3) if low >= -8 * 16 ** (count - 1) and high < 8 * 16 ** (count - 1))
        lift = 8 * 16 ** (count - 1)
        zeros = [torch.full((1, 1), 0.0 if place == count - 1 else 8.0) for place in range(count)]
    return [
        _Strip(
            group.index, group.columns_N, factor * 16**place, times, minus_R1, lift, 4 * place, place > 0, zeros[place]
        )
        for place in range(count)
    ]


def _byte_strips(quantized: QuantizedWeight, group: _Group) -> list[_Strip]:
    """Signed bytes. Where they do not fit, code - CENTRE does; what that lacks takes a column where weights are pruned.

    Where none are, it is the same number in all columns of a row, and two columns for all groups suffice (`_moved`).
    """
    times, minus_R1, factor, low, high = _signed(group)
    columns_N, index = group.columns_N, group.index
    if low >= -128 and high <= 127:
        return [_Strip(index, columns_N, factor, times, minus_R1)]
    centre = torch.full((1, 1), CENTRE, dtype=torch.int16)
    if quantized.keep_RC is None and (len(quantized.bits_G) == 1 or quantized.zero_RG is None):
        return [_Strip(index, columns_N, group.factor, 1, centre, moved=True)]
    lack_R1 = times * CENTRE - minus_R1
    return [
        _Strip(index, columns_N, group.factor, 1, centre), _Strip(index, columns_N, -factor, 0, lack_R1, further=True)
    ]  # fmt: skip


# --- layouts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Which channel and which strip each column reads; `used_K` is False for the padding."""

    strips: list[_Strip]
    order_K: torch.Tensor
    strip_K: torch.Tensor
    used_K: torch.Tensor

    def of_strips(self, values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[self.strip_K]

    def factors(self) -> torch.Tensor | None:
        """Float32 factors of the columns; None: all 1."""
        column_K = self.of_strips([strip.factor for strip in self.strips], torch.float32) * self.used_K
        return None if bool((column_K == 1).all()) else column_K

    def gather(self, channels: int) -> torch.Tensor | None:
        straight = len(self.order_K) == channels and torch.equal(self.order_K, torch.arange(channels))
        return None if straight else self.order_K

    def numbers(self, quantized: QuantizedWeight) -> Iterator[tuple[slice, torch.Tensor]]:
        """The int16 numbers of the columns, (some rows, K), block by block of rows."""
        gather_K, rows = self.gather(quantized.codes_RC.shape[1]), len(quantized.codes_RC)
        times_K = self.of_strips([strip.times for strip in self.strips], torch.int16)
        lift_K = self.of_strips([strip.lift for strip in self.strips], torch.int16)
        shift_K = self.of_strips([strip.shift for strip in self.strips], torch.int16)
        minus_RS = torch.cat([strip.minus_R1.expand(rows, 1) for strip in self.strips], 1)
        for start in range(0, rows, BLOCK):
            here = slice(start, min(start + BLOCK, rows))
            numbers_RK = _columns(quantized.codes_RC[here], gather_K).short() * times_K
            numbers_RK -= minus_RS[here][:, self.strip_K] if len(self.strips) > 1 else minus_RS[here]
            if quantized.keep_RC is not None:
                numbers_RK *= _columns(quantized.keep_RC[here], gather_K)
            numbers_RK += lift_K
            yield here, numbers_RK.bitwise_right_shift_(shift_K)


def _columns(values_RC: torch.Tensor, gather_K: torch.Tensor | None) -> torch.Tensor:
    return values_RC if gather_K is None else values_RC.index_select(1, gather_K)


def _layout(strips: list[_Strip], sets: list[list[int]], multiple: int, spare: int = 0) -> _Layout:
    """Sets of strips one after the other, each filled up to a multiple of columns.

    Inside a set channels stand in their own order, their further columns after all first ones: gathers are spared
    where there is one column a channel.
    """
    order, which, used = [], [], []
    for members in sets:
        columns_N = torch.cat([strips[index].columns_N for index in members])
        strip_N = torch.cat([torch.full((len(strips[index].columns_N),), index) for index in members])
        later_N = torch.tensor([strips[index].shift + strips[index].further for index in range(len(strips))])[strip_N]
        by = (later_N * (int(columns_N.max()) + 1) + columns_N).argsort()
        padding = spare + -(len(columns_N) + spare) % multiple
        order.append(torch.cat([columns_N[by], torch.zeros(padding, dtype=torch.long)]))
        which.append(torch.cat([strip_N[by], torch.full((padding,), members[0])]))
        used.append(torch.arange(len(columns_N) + padding) < len(columns_N))
    return _Layout(strips, torch.cat(order), torch.cat(which), torch.cat(used))


def _bytes(quantized: QuantizedWeight, strips: list[_Strip]) -> CpuWeight:
    rows, channels = quantized.codes_RC.shape
    moved = any(strip.moved for strip in strips)
    layout = _layout(strips, [list(range(len(strips)))], COLUMNS, 2 if moved else 0)
    packed = torch.zeros(_up(rows, ROWS), len(layout.order_K), dtype=torch.int8)
    for here, numbers_RK in layout.numbers(quantized):
        packed[here] = numbers_RK * layout.used_K
    moved_K = _moved(quantized, layout, packed) if moved else None
    return CpuWeight(
        packed, None, 0, layout.gather(channels), layout.factors(), _row_factors(quantized), rows, moved_K
    )  # fmt: skip


def _moved(quantized: QuantizedWeight, layout: _Layout, packed: torch.Tensor) -> torch.Tensor:
    """Weights of the columns in a sum of the activations; what it is to be multiplied with goes into `packed`.

    code - zero = (code - CENTRE) - (zero - CENTRE): the last term is that of a row, or -1/2 where zeros are not stored.
    """
    share = 1.0
    if quantized.zero_RG is None:
        packed[:, -2:], share = -1, 0.5
    else:
        packed[: len(quantized.codes_RC), -2:] = quantized.zero_RG.short() - CENTRE
    return -share * layout.of_strips([strip.moved for strip in layout.strips], torch.float32) * layout.used_K


def _digits(quantized: QuantizedWeight, strips: list[_Strip]) -> CpuWeight:
    """Digits of 4 bits; what shares zeros and scales inside the kernel lies together, filled up to whole runs."""
    rows, channels = quantized.codes_RC.shape
    separable = quantized.row_scale_RG.shape[1] == 1
    sets: dict[float, list[int]] = {}
    for index, strip in enumerate(strips):
        assert strip.zero_R1 is not None
        same = separable and strip.zero_R1.numel() == 1
        sets.setdefault(float(strip.zero_R1) if same else -1.0 - index, []).append(index)
    widths = [sum(len(strips[index].columns_N) for index in members) for members in sets.values()]
    run = min(RUNS, key=lambda size: sum(_up(width, size) for width in widths))
    layout = _layout(strips, list(sets.values()), run)
    packed = []
    for _, numbers_RK in layout.numbers(quantized):
        digits_RK = numbers_RK.bitwise_and_(15).int()
        if len(digits_RK) % ROWS:
            digits_RK = torch.nn.functional.pad(digits_RK, (0, 0, 0, -len(digits_RK) % ROWS), value=8)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits_RK, 1))
    scales = _kernel_scales(quantized, layout, run)
    gather_K, column_K = layout.gather(channels), layout.factors()
    return CpuWeight(torch.cat(packed), scales, run, gather_K, column_K, _row_factors(quantized), rows)


def _kernel_scales(quantized: QuantizedWeight, layout: _Layout, run: int) -> torch.Tensor:
    """Scale and scale * zero of every run and row, (K / run, R, 2) bfloat16."""
    rows, groups = len(quantized.codes_RC), len(quantized.bits_G)
    relative_RG = torch.ones(rows, groups)
    if quantized.row_scale_RG.shape[1] > 1:
        relative_RG = quantized.row_scale_RG.float() / _row_factors(quantized)[:, None]
    group_S = torch.tensor([strip.group for strip in layout.strips])
    scale_RS = relative_RG[:, group_S].to(torch.bfloat16)
    zero_RS = torch.cat([strip.zero_R1.expand(rows, 1) for strip in layout.strips if strip.zero_R1 is not None], 1)
    pair_RS2 = torch.stack([scale_RS, (scale_RS * zero_RS).to(torch.bfloat16)], 2)
    scales = torch.zeros(len(layout.order_K) // run, _up(rows, ROWS), 2, dtype=torch.bfloat16)
    scales[:, :rows] = pair_RS2[:, layout.strip_K[::run]].transpose(0, 1)
    return scales


def _row_factors(quantized: QuantizedWeight) -> torch.Tensor:
    """Float32 factors of the rows: their scale, or the largest where groups have their own (1 where all are 0)."""
    scale_RG = quantized.row_scale_RG.float()
    if scale_RG.shape[1] == 1:
        return scale_RG[:, 0]
    largest_R = scale_RG.abs().amax(1)
    return largest_R.masked_fill(largest_R == 0, 1.0)  # scales are divided by it


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
