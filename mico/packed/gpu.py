"""Packed weights on a GPU: their layout for the Triton kernel of gpu_kernel.py, and 2:4 sparsity through torch.

Columns are sorted by (width, group) and cut into chunks of 32, so that a chunk has one width and one group; the last
chunk of a group is filled up with columns that read no channel. A chunk of a row is `bits` words of 32 bits: code j
occupies bits j*bits to j*bits + bits - 1. 32 rows lie side by side in memory and their chunks follow one another, so
that a program reads one contiguous stretch. Suffixes: R rows, C channels, G groups, K chunks, N columns (32 a chunk),
S row blocks of 32, W words, B batch, J the 32 places in a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from mico.packed.bits import TERNARY, levels
from mico.packed.gpu_kernel import gpu_kernel
from mico.packed.quantized import QuantizedWeight

_GPU_COLUMNS = 32  # of a chunk: one word of the mask
_GPU_ROWS = 32  # that lie side by side
_GPU_SEGMENTS = 9  # 0: three levels in two bits; 1 to 8: that many bits
_GPU_DENSE_BATCH = 256  # from here unpacking once and one dense product take over
_GPU_DENSE_WEIGHTS = 1 << 24  # unpacked at a time: bounds the memory of the float32 intermediates
_GPU_MOST_SPLITS = 8
_GPU_MOST_WARPS = 16
_GPU_DTYPES = (torch.bfloat16, torch.float16)


def available() -> bool:
    """Whether the kernel can run here: Triton, and a device (or Triton's interpreter)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and (interpreted or torch.cuda.is_available())


@dataclass(frozen=True)
class GpuWeight:
    """A weight in the layout above. Padding columns and rows hold zero codes."""

    words_SWR: torch.Tensor  # int32
    mask_SKR: torch.Tensor | None  # int32, bit j: column j of the chunk survives; None: all, or zeros are codes
    scale_GR: torch.Tensor  # float16; one group where chunks have factors
    factor_K: torch.Tensor | None  # float16 factors of the chunks
    zero: torch.Tensor | None  # uint8, (G, R), or (K,) where rows share them; None: the middle of the grid
    group_K: torch.Tensor  # int32
    order_JK: torch.Tensor | None  # int32, channel of column j of chunk k, -1: none; None: 32 k + j
    segments: tuple[tuple[int, int, int, int], ...]  # (segment, first chunk, end chunk, first word)
    table: torch.Tensor  # int32, (_GPU_SEGMENTS, 3): the same for the kernel
    rows: int
    channels: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        held = (
            self.words_SWR, self.mask_SKR, self.scale_GR, self.factor_K,
            self.zero, self.group_K, self.order_JK, self.table,
        )  # fmt: skip
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def __call__(self, x_BC: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b, (B, R) in the dtype of x, which is the one the weight was prepared for; sums are float32."""
        assert x_BC.dtype == self.dtype and x_BC.shape[1] == self.channels, (x_BC.dtype, x_BC.shape)
        if len(x_BC) == 0:
            return x_BC.new_empty(0, self.rows)
        if len(x_BC) >= _GPU_DENSE_BATCH:
            return functional.linear(x_BC, self.dense(self.dtype), None if bias_R is None else bias_R.to(x_BC.dtype))
        if not x_BC.is_cuda:
            return _gpu_launch(self, x_BC, bias_R)
        with torch.cuda.device(x_BC.device):
            return _gpu_launch(self, x_BC, bias_R)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The (R, C) weight, equal to QuantizedWeight.dequantize(dtype)."""
        weight_RC = torch.empty(self.rows, self.channels, dtype=dtype, device=self.words_SWR.device)
        step = max(1, _GPU_DENSE_WEIGHTS // (_GPU_ROWS * _GPU_COLUMNS * len(self.group_K)))
        for start in range(0, len(self.words_SWR), step):
            rows = slice(start * _GPU_ROWS, min(self.rows, (start + step) * _GPU_ROWS))
            for columns_N, weight_RN in _gpu_unpacked(self, start, start + step):
                weight_RC[rows, columns_N] = weight_RN[: rows.stop - rows.start].to(dtype)
        return weight_RC


def prepare_gpu(quantized: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> GpuWeight | None:
    """The weight for activations of `dtype` on `device`; None where nothing is quantized (16-bit values).

    Raises ValueError for a dtype that is neither bfloat16 nor float16.
    """
    if dtype not in _GPU_DTYPES:
        raise ValueError(f"dtype {dtype}: the GPU kernel takes activations in bfloat16 or float16")
    if not quantized.quantized:
        return None
    codes_RC, keep_RC = _gpu_zeros_as_codes(quantized)
    channel_N, group_K, segments = _gpu_columns(quantized)
    words = [
        _gpu_words(codes_RC, channel_N[first * _GPU_COLUMNS : end * _GPU_COLUMNS], _gpu_bits(segment))
        for segment, first, end, _ in segments
    ]
    channels = codes_RC.shape[1]
    straight_N = torch.arange(len(channel_N), device=channel_N.device)
    straight = torch.equal(channel_N, torch.where(straight_N < channels, straight_N, -1))
    table = torch.zeros(_GPU_SEGMENTS, 3, dtype=torch.int32)
    for segment, *place in segments:
        table[segment] = torch.tensor(place)
    scale_GR, factor_K, zero = _gpu_grid(quantized, group_K)

    def there(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.to(device).contiguous()

    return GpuWeight(
        there(_gpu_blocks(torch.cat(words))),
        there(None if keep_RC is None else _gpu_blocks(_gpu_words(keep_RC, channel_N, 1))),
        there(scale_GR),
        there(factor_K),
        there(zero),
        there(group_K.int()),
        there(None if straight else channel_N.view(-1, _GPU_COLUMNS).T.int()),
        segments,
        there(table),
        len(codes_RC),
        channels,
        dtype,
    )


# --- layout ---------------------------------------------------------------------------------------------------------


def _gpu_bits(segment: int) -> int:
    """Bits that a code takes in memory."""
    return segment or 2


def _gpu_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _gpu_zeros_as_codes(quantized: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes and mask; where zero is a code everywhere, pruned weights take it and the mask is spared."""
    codes_RC, keep_RC, zero_RG = quantized.codes_RC, quantized.keep_RC, quantized.zero_RG
    if keep_RC is None or zero_RG is None:
        return codes_RC, keep_RC
    largest_G = torch.tensor([levels(bits) - 1 for bits in quantized.bits_G], device=zero_RG.device)
    if bool((zero_RG > largest_G).any()):
        return codes_RC, keep_RC
    zero_RC = zero_RG if len(quantized.bits_G) == 1 else zero_RG.index_select(1, quantized.label_C)
    return torch.where(keep_RC, codes_RC, zero_RC.to(codes_RC.dtype)), None


def _gpu_columns(
    quantized: QuantizedWeight,
) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[int, int, int, int], ...]]:
    """Channel of every column (-1: none), group of every chunk, and the segments of chunks of one width."""
    label_C, bits_G = quantized.label_C, quantized.bits_G
    segment_G = [0 if bits == TERNARY else int(bits) for bits in bits_G]
    columns: list[torch.Tensor] = []
    groups: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    word = 0
    for segment in sorted(set(segment_G)):
        first = len(groups)
        for group in (g for g, own in enumerate(segment_G) if own == segment):
            channel_N = (label_C == group).nonzero().squeeze(1)
            padding = _gpu_up(len(channel_N), _GPU_COLUMNS) - len(channel_N)
            columns.append(functional.pad(channel_N, (0, padding), value=-1))
            groups += [group] * (len(columns[-1]) // _GPU_COLUMNS)
        if len(groups) > first:
            segments.append((segment, first, len(groups), word))
            word += (len(groups) - first) * _gpu_bits(segment)
    return torch.cat(columns), torch.tensor(groups, device=label_C.device), tuple(segments)


def _gpu_words(numbers_RC: torch.Tensor, channel_N: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of the columns `channel_N`, (W, R) int32, rows filled up to whole blocks."""
    rows, chunks = len(numbers_RC), len(channel_N) // _GPU_COLUMNS
    words = torch.zeros(chunks, bits, _gpu_up(rows, _GPU_ROWS), dtype=torch.int32, device=numbers_RC.device)
    for j in range(_GPU_COLUMNS):
        channel_K = channel_N[j::_GPU_COLUMNS]
        numbers_KR = (numbers_RC.index_select(1, channel_K.clamp_min(0)) * (channel_K >= 0)).T.int()
        word, shift = divmod(j * bits, 32)
        words[:, word, :rows] |= numbers_KR << shift
        if shift + bits > 32:
            words[:, word + 1, :rows] |= numbers_KR >> (32 - shift)
    return words.flatten(0, 1)


def _gpu_blocks(words_WR: torch.Tensor) -> torch.Tensor:
    """(W, R) -> (S, W, 32)."""
    return words_WR.view(len(words_WR), -1, _GPU_ROWS).transpose(0, 1).contiguous()


def _gpu_grid(
    quantized: QuantizedWeight, group_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scales, factors and zeros as GpuWeight holds them."""
    rows = len(quantized.codes_RC)
    padding = (0, _gpu_up(rows, _GPU_ROWS) - rows)
    scale_GR = functional.pad(quantized.row_scale_RG.T, padding)
    factor_K = None if quantized.group_scale_G is None else quantized.group_scale_G[group_K]
    zero_RG = quantized.zero_RG
    if zero_RG is None:
        return scale_GR, factor_K, None
    if len(zero_RG) == 1 and rows > 1:
        return scale_GR, factor_K, zero_RG[0, group_K]
    return scale_GR, factor_K, functional.pad(zero_RG.T, padding)


def _gpu_unpacked(weight: GpuWeight, start: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Channels (N,) and float32 weights (R, N) of row blocks start to end, one segment at a time."""
    words_SWR = weight.words_SWR[start:end]
    rows = slice(start * _GPU_ROWS, (start + len(words_SWR)) * _GPU_ROWS)
    place_J = torch.arange(_GPU_COLUMNS, device=words_SWR.device)
    for segment, first, last, word in weight.segments:
        bits, chunks = _gpu_bits(segment), slice(first, last)
        words_SKPR = words_SWR[:, word : word + (last - first) * bits].unflatten(1, (-1, bits))
        level_RKJ = _gpu_codes(words_SKPR, bits).float()
        group_K = weight.group_K[chunks].long()
        level_RKJ -= _gpu_zero_of(weight, segment, group_K, chunks, rows)
        if weight.factor_K is None:
            scale_RK = weight.scale_GR[group_K, rows].T.float()
        else:
            scale_RK = weight.scale_GR[0, rows, None].float() * weight.factor_K[chunks].float()
        level_RKJ *= scale_RK[..., None]
        if weight.mask_SKR is not None:
            level_RKJ *= _gpu_codes(weight.mask_SKR[start:end, chunks, None], 1)
        channel_KJ = place_J + _GPU_COLUMNS * torch.arange(first, last, device=place_J.device)[:, None]
        if weight.order_JK is not None:
            channel_KJ = weight.order_JK[:, chunks].T.long()
        real_N = ((channel_KJ >= 0) & (channel_KJ < weight.channels)).reshape(-1)
        yield channel_KJ.reshape(-1)[real_N], level_RKJ.flatten(1)[:, real_N]


def _gpu_codes(words_SKPR: torch.Tensor, bits: int) -> torch.Tensor:
    """The 32 codes of every chunk, (R, K, 32) int32."""
    codes = []
    for j in range(_GPU_COLUMNS):
        word, shift = divmod(j * bits, 32)
        code_SKR = words_SKPR[:, :, word] >> shift  # arithmetic: what is above the code is cut off below
        if shift + bits > 32:
            code_SKR = code_SKR & (2 ** (32 - shift) - 1) | words_SKPR[:, :, word + 1] << (32 - shift)
        codes.append(code_SKR & (2**bits - 1))
    return torch.stack(codes, 3).transpose(1, 2).flatten(0, 1)


def _gpu_zero_of(weight: GpuWeight, segment: int, group_K: torch.Tensor, chunks: slice, rows: slice) -> Any:
    """Zero points of some chunks, broadcast against (R, K, 32)."""
    if weight.zero is None:
        return ((2**segment if segment else 3) - 1) / 2
    if weight.zero.dim() == 1:
        return weight.zero[chunks, None].float()
    return weight.zero[group_K, rows].T[..., None].float()


# --- kernel ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GpuTile:
    """What one program computes: rows, chunks at a time, batch; whether by matrix units; programs that share a sum."""

    rows: int
    chunks: int
    batch: int
    dot: bool
    splits: int
    warps: int


def _gpu_tile(batch: int, rows: int, chunks: int, processors: int) -> _GpuTile:
    """One row of activations is multiplied as it comes, more go through the matrix units in tiles of at least 16.

    Where the rows alone do not keep the processors busy, programs grow over the chunks, and then share them.
    """
    if batch > 1:
        tile_batch = 16 if batch <= 16 else 64
        programs, tile_chunks, warps = -(-rows // 64) * -(-batch // tile_batch), 32, 4
    else:
        programs, tile_chunks, warps = -(-rows // 32), 16, 4
        while warps < _GPU_MOST_WARPS and programs * warps < 12 * processors and tile_chunks < chunks:
            tile_chunks, warps = 2 * tile_chunks, 2 * warps
    wanted, possible = 8 * processors // (programs * warps), -(-chunks // tile_chunks)
    splits = max(1, min(wanted, possible, _GPU_MOST_SPLITS))
    if batch > 1:
        return _GpuTile(64, tile_chunks, tile_batch, True, splits, warps)
    return _GpuTile(32, tile_chunks, 1, False, splits, warps)


def _gpu_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _gpu_launch(weight: GpuWeight, x_BC: torch.Tensor, bias_R: torch.Tensor | None) -> torch.Tensor:
    """num_stages=1: the loads of a step are hoisted anyway, and pipelining them makes compilation ten times longer."""
    batch = len(x_BC)
    tile = _gpu_tile(batch, weight.rows, len(weight.group_K), _gpu_processors(x_BC.device))
    if tile.dot:
        # The batch of a channel side by side, in whole tiles: channels are then gathered in any order at full width.
        x_BC = functional.pad(x_BC, (0, 0, 0, -batch % tile.batch)).T.contiguous().T
    shape = (batch, weight.rows) if tile.splits == 1 else (tile.splits, batch, weight.rows)
    y = x_BC.new_empty(shape, dtype=x_BC.dtype if tile.splits == 1 else torch.float32)
    own_bias = bias_R if tile.splits == 1 else None
    grid = (-(-weight.rows // tile.rows), -(-batch // tile.batch), tile.splits)
    gpu_kernel()[grid](
        x_BC, weight.words_SWR, weight.mask_SKR, weight.scale_GR, weight.factor_K, weight.zero, weight.group_K,
        weight.order_JK, weight.table, own_bias, y, batch, weight.rows, weight.channels, len(weight.group_K),
        weight.words_SWR.shape[1], *x_BC.stride(), **_gpu_constants(weight, tile, own_bias),
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    if tile.splits == 1:
        return y
    y_BR = y.sum(0)
    return (y_BR if bias_R is None else y_BR + bias_R).to(x_BC.dtype)


def _gpu_constants(weight: GpuWeight, tile: _GpuTile, bias_R: torch.Tensor | None) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    return dict(
        SEGMENTS=sum(1 << segment for segment, *_ in weight.segments),
        GATHER=int(weight.order_JK is not None),
        PADDED=int(len(weight.group_K) * _GPU_COLUMNS > weight.channels),
        MASKED=int(weight.mask_SKR is not None),
        FACTORED=int(weight.factor_K is not None),
        ZEROS=0 if weight.zero is None else 2 if weight.zero.dim() == 1 else 1,
        BIAS=int(bias_R is not None),
        DOT=int(tile.dot),
        BLOCK_R=tile.rows,
        BLOCK_K=tile.chunks,
        BLOCK_B=tile.batch,
    )


# --- 2:4 sparsity ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparse24Weight:
    """A 2:4 pruned weight as torch's semi-structured tensor: 16-bit values and places, for sparse matrix units."""

    sparse_RC: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        parts = (getattr(self.sparse_RC, name, None) for name in ("packed", "meta"))
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x_BC: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b, (B, R) in the dtype of x."""
        return functional.linear(x_BC, self.sparse_RC, None if bias_R is None else bias_R.to(x_BC.dtype))


def prepare_sparse24(quantized: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> Sparse24Weight:
    """The weight for sparse matrix units, dequantized to `dtype`.

    Raises ValueError for a pattern, dtype or device that they do not take.
    """
    device = torch.device(device)
    if quantized.pattern != (2, 4):
        raise ValueError(f"pattern {quantized.pattern}: sparse matrix units take 2:4 alone; use prepare_gpu")
    if dtype not in _GPU_DTYPES:
        raise ValueError(f"dtype {dtype}: sparse matrix units take bfloat16 or float16 here")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"device {device}: 2:4 sparsity needs a CUDA device of compute capability 8.0; use prepare_gpu"
        )
    to_sparse: Callable[[torch.Tensor], torch.Tensor] = torch.sparse.to_sparse_semi_structured
    return Sparse24Weight(to_sparse(quantized.dequantize(dtype).to(device)))
