"""One Linear as one 1-D uint8 tensor, which states its own layout: what a packed checkpoint holds as `weight`.

    header   20 bytes, see `Header`
    widths   one byte a group, where the groups differ
    labels   ceil(log2 G) bits a channel, where the groups are not equal runs of consecutive channels; the Linears of
             a stream share them, so only the first of them holds them
    scales   rows, R*G or R numbers of 16 bits, then G of the groups where the scales are factored
    zeros    by group, R numbers of the group's width (one, where all rows share it)
    mask     one bit a weight, or the pattern of every m weights
    codes    by group, the surviving weights row by row; every part starts at a whole byte

Dense loaders refuse such a tensor, as it has not the shape of a weight. Suffixes: R rows, C channels, G groups.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from mico.packed.bits import TERNARY, pack, pack_pattern, packed_bytes, pattern_width, unpack, unpack_pattern
from mico.packed.quantized import QuantizedWeight, equal_runs, is_equal_runs, label_width

MAGIC, BLOB_VERSION = b"mQ", 1
FACTORED, ZEROS, ROW_ZEROS, MASK, MIXED, LABELS, BORROWED, BFLOAT = (1 << bit for bit in range(8))
_HEADER = struct.Struct("<2sBBIIIBBBB")
HEADER_BYTES = _HEADER.size
LARGEST_M = 32  # of n:m masks: the rank of a pattern stays below 2**32
_TERNARY_BYTE = 158  # the byte that stands for a width of 1.58 bits


@dataclass(frozen=True)
class Header:
    """The first bytes of a blob. flags: see the constants; n, m: of the mask's pattern, 0 for a bitmap; width: of
    all groups unless they are MIXED, 16 for values that are not quantized; BFLOAT: 16-bit numbers are bfloat16."""

    flags: int
    rows: int
    channels: int
    groups: int
    n: int
    m: int
    width: int

    @classmethod
    def of(cls, blob: torch.Tensor) -> Header:
        """Read and check the header. Raises ValueError when the tensor is not a blob of this version, or too short
        for what its header states: nobody reserves memory for what a damaged one claims."""
        raw = bytes(blob[:HEADER_BYTES].tolist())
        if len(raw) < HEADER_BYTES or raw[:2] != MAGIC:
            raise ValueError(f"no packed weight: it starts with {raw[:2]!r}, {MAGIC!r} is expected")
        _, version, flags, rows, channels, groups, n, m, width, _ = _HEADER.unpack(raw)
        if version != BLOB_VERSION:
            raise ValueError(f"packed weight of version {version}; this code reads {BLOB_VERSION}: update mico")
        head = cls(flags, rows, channels, groups, n, m, width)
        head._check(len(blob))
        return head

    def _check(self, size: int) -> None:
        rows, channels, groups, n, m = self.rows, self.channels, self.groups, self.n, self.m
        if not (rows > 0 and 0 < groups <= channels):
            raise ValueError(f"packed weight of {rows:,} rows, {channels:,} channels in {groups:,} groups: damaged")
        if (n or m) and not (self.has(MASK) and 0 < n < m <= LARGEST_M and channels % m == 0):
            raise ValueError(f"packed weight: a mask of {n}:{m} over {channels:,} channels: damaged")
        if self.width == 16 and self.flags & ~(MASK | BFLOAT):
            raise ValueError(f"packed weight of 16-bit values with flags {self.flags:#04x}: damaged")
        least = rows * channels // m * pattern_width(n, m) if m else rows * channels  # a bit of mask or code a weight
        if HEADER_BYTES + least // 8 > size:
            raise ValueError(f"packed weight of {size:,} bytes: too few for {rows:,} x {channels:,} weights")

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)

    def tensor(self) -> torch.Tensor:
        raw = _HEADER.pack(
            MAGIC, BLOB_VERSION, self.flags, self.rows, self.channels, self.groups, self.n, self.m, self.width, 0
        )
        return torch.tensor(list(raw), dtype=torch.uint8)

    @property
    def borrows(self) -> bool:
        """Whether the channel labels lie with another Linear of the stream."""
        return self.has(BORROWED)

    @property
    def float_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.has(BFLOAT) else torch.float16


def encode(weight: QuantizedWeight, *, borrow_labels: bool = False) -> torch.Tensor:
    """The blob of a weight. borrow_labels: another Linear of the stream holds the channel labels."""
    rows, channels = weight.codes_RC.shape
    groups = len(weight.bits_G)
    own_labels = not is_equal_runs(weight.label_C, groups) if weight.quantized else False
    n, m = weight.pattern if weight.pattern and weight.keep_RC is not None else (0, 0)
    mixed = weight.quantized and len(set(weight.bits_G)) > 1
    row_zeros = weight.zero_RG is not None and len(weight.zero_RG) != rows
    flags = sum(
        flag
        for flag, given in {
            FACTORED: weight.group_scale_G is not None,
            ZEROS: weight.zero_RG is not None,
            ROW_ZEROS: row_zeros,
            MASK: weight.keep_RC is not None,
            MIXED: mixed,
            LABELS: own_labels and not borrow_labels,
            BORROWED: own_labels and borrow_labels,
            BFLOAT: (weight.row_scale_RG if weight.quantized else weight.codes_RC).dtype == torch.bfloat16,
        }.items()
        if given
    )
    width = 16 if not weight.quantized else _width_byte(weight.bits_G[0])
    head = Header(flags, rows, channels, groups, n, m, width)
    parts = [head.tensor()]
    if mixed:
        parts.append(torch.tensor([_width_byte(bits) for bits in weight.bits_G], dtype=torch.uint8))
    if head.has(LABELS):
        parts.append(pack(weight.label_C.cpu(), label_width(groups)))
    if weight.quantized:
        parts += _grid_parts(weight)
    if weight.keep_RC is not None:
        parts.append(pack_pattern(weight.keep_RC.cpu(), n, m) if m else pack(weight.keep_RC.cpu(), 1))
    return torch.cat(parts + _code_parts(weight))


def _width_byte(bits: float) -> int:
    return _TERNARY_BYTE if bits == TERNARY else int(bits)


def _grid_parts(weight: QuantizedWeight) -> list[torch.Tensor]:
    scales = [weight.row_scale_RG] + ([weight.group_scale_G] if weight.group_scale_G is not None else [])
    parts = [scale.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for scale in scales]
    if weight.zero_RG is not None:
        zeros = weight.zero_RG.cpu()
        parts += [pack(zeros[:, group], bits) for group, bits in enumerate(weight.bits_G)]
    return parts


def _code_parts(weight: QuantizedWeight) -> list[torch.Tensor]:
    codes_RC, label_C = weight.codes_RC.detach().cpu(), weight.label_C.cpu()
    keep_RC = None if weight.keep_RC is None else weight.keep_RC.cpu()
    if not weight.quantized:
        values = codes_RC.reshape(-1) if keep_RC is None else codes_RC[keep_RC]
        return [values.contiguous().view(torch.uint8)]
    parts = []
    for group, bits in enumerate(weight.bits_G):
        columns = (label_C == group).nonzero().squeeze(1)
        codes = codes_RC[:, columns]
        parts.append(pack(codes if keep_RC is None else codes[keep_RC[:, columns]], bits))
    return parts


class _Reader:
    """Takes one part of a blob after the other."""

    def __init__(self, blob: torch.Tensor) -> None:
        self.blob, self.at = blob, HEADER_BYTES

    def take(self, count: int) -> torch.Tensor:
        part = self.blob[self.at : self.at + count]
        if len(part) != count:
            raise ValueError(f"packed weight of {len(self.blob):,} bytes ends before byte {self.at + count:,}")
        self.at += count
        return part

    def numbers(self, count: int, width: float) -> torch.Tensor:
        return unpack(self.take(packed_bytes(count, width)), count, width)

    def floats(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self.take(2 * count).clone().view(dtype)  # the copy is aligned, which a view need not be


def decode(blob: torch.Tensor, label_C: torch.Tensor | None = None) -> QuantizedWeight:
    """The weight behind a blob, on its device. label_C: the stream's channel labels, where the blob borrows them.

    Raises ValueError when the blob is damaged, of another version, or borrows labels that are not given.
    """
    head, reader = Header.of(blob), _Reader(blob)
    rows, channels, groups = head.rows, head.channels, head.groups
    widths = _widths(head, reader)
    label_C = _labels(head, reader, label_C).to(blob.device)
    quantized = head.width != 16
    scale_RG, scale_G, zero_RG = torch.zeros(0, 1, dtype=torch.float16, device=blob.device), None, None
    if quantized:
        scale_RG = reader.floats(rows * (1 if head.has(FACTORED) else groups), head.float_dtype).view(rows, -1)
        scale_G = reader.floats(groups, head.float_dtype) if head.has(FACTORED) else None
        if head.has(ZEROS):
            zero_RG = torch.stack([reader.numbers(1 if head.has(ROW_ZEROS) else rows, width) for width in widths], 1)
    keep_RC = _mask(head, reader).view(rows, channels) if head.has(MASK) else None
    numbers = (head, reader, widths, label_C, keep_RC)
    codes_RC = _codes(*numbers) if quantized else _values(head, reader, keep_RC)
    if reader.at != len(blob):
        raise ValueError(f"packed weight of {len(blob):,} bytes: {reader.at:,} are expected")
    pattern = (head.n, head.m) if head.m else None
    return QuantizedWeight(codes_RC, scale_RG, scale_G, zero_RG, widths, label_C, keep_RC, pattern)


def decode_labels(blob: torch.Tensor) -> torch.Tensor:
    """The channel labels of a blob alone, (C,). Raises ValueError when it holds none, or is damaged."""
    head, reader = Header.of(blob), _Reader(blob)
    _widths(head, reader)
    return _labels(head, reader, None)


def decode_rows(blob: torch.Tensor, ids_N: torch.Tensor) -> QuantizedWeight:
    """These rows alone, (N, C), of a blob without mask and mixed widths whose rows fill whole bytes (embeddings).

    Raises ValueError when the blob is not of that kind.
    """
    head, reader = Header.of(blob), _Reader(blob)
    run = head.channels // head.groups
    row_bytes, rest = divmod(run * head.width, 8)
    if head.flags & ~BFLOAT or not 1 <= head.width <= 8 or rest or run * head.groups != head.channels:
        raise ValueError("packed embedding: rows of one width without mask or zero points are expected")
    ids_N = ids_N.to(blob.device)
    scales = reader.take(2 * head.rows * head.groups).view(head.rows, -1)[ids_N]
    codes = [
        unpack(reader.take(head.rows * row_bytes).view(head.rows, -1)[ids_N].reshape(-1), len(ids_N) * run, head.width)
        for _ in range(head.groups)
    ]
    codes_NC = torch.cat([part.view(len(ids_N), run) for part in codes], 1)
    label_C = equal_runs(head.channels, head.groups).to(blob.device)
    return QuantizedWeight(codes_NC, scales.view(head.float_dtype), None, None, (head.width,) * head.groups, label_C)


def _widths(head: Header, reader: _Reader) -> tuple[float, ...]:
    found = reader.take(head.groups).tolist() if head.has(MIXED) else [head.width] * head.groups
    widths = tuple(TERNARY if width == _TERNARY_BYTE else width for width in found)
    known = (*range(1, 9), TERNARY, *([] if head.has(MIXED) else [16]))
    wrong = [width for width in widths if width not in known]
    if wrong:
        raise ValueError(f"packed weight: a group of {wrong[0]} bits; 1 to 8 and {TERNARY} are known")
    return widths


def _labels(head: Header, reader: _Reader, label_C: torch.Tensor | None) -> torch.Tensor:
    if head.has(LABELS):
        label_C = reader.numbers(head.channels, label_width(head.groups)).long()
    elif not head.has(BORROWED):
        return equal_runs(head.channels, head.groups)
    if label_C is None or len(label_C) != head.channels:
        raise ValueError("packed weight: its channel labels lie with another Linear of the stream, which is not here")
    if int(label_C.max()) >= head.groups:
        raise ValueError(f"packed weight: a channel of group {int(label_C.max())}, {head.groups} groups: damaged")
    return label_C


def _mask(head: Header, reader: _Reader) -> torch.Tensor:
    count = head.rows * head.channels
    if not head.m:
        return reader.numbers(count, 1).bool()
    stream = reader.take(packed_bytes(count // head.m, pattern_width(head.n, head.m)))
    return unpack_pattern(stream, count, head.n, head.m)


def _codes(
    head: Header, reader: _Reader, widths: tuple[float, ...], label_C: torch.Tensor, keep_RC: torch.Tensor | None
) -> torch.Tensor:
    codes_RC = torch.zeros(head.rows, head.channels, dtype=torch.uint8, device=label_C.device)
    for group, width in enumerate(widths):
        columns = (label_C == group).nonzero().squeeze(1)
        if keep_RC is None:
            codes_RC[:, columns] = reader.numbers(head.rows * len(columns), width).view(head.rows, -1)
            continue
        keep = keep_RC[:, columns]
        codes = torch.zeros(keep.shape, dtype=torch.uint8, device=label_C.device)
        codes[keep] = reader.numbers(int(keep.sum()), width)
        codes_RC[:, columns] = codes
    return codes_RC


def _values(head: Header, reader: _Reader, keep_RC: torch.Tensor | None) -> torch.Tensor:
    if keep_RC is None:
        return reader.floats(head.rows * head.channels, head.float_dtype).view(head.rows, head.channels)
    values_RC = torch.zeros(keep_RC.shape, dtype=head.float_dtype, device=keep_RC.device)
    values_RC[keep_RC] = reader.floats(int(keep_RC.sum()), head.float_dtype)
    return values_RC
