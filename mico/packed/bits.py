"""Whole numbers as streams of bits: fixed widths, ternary digits, and the patterns of n:m masks.

Streams are little-endian: number i of a width w occupies bits i*w to i*w + w - 1, bit k of the stream being bit
k % 8 of byte k // 8. Nothing here knows of weights. Every function works on the device of its input.
"""

from __future__ import annotations

import math

import torch

TERNARY = 1.58  # the name of the width of three levels; five digits share a byte: 1.6 bits each
TRITS = 5
CHUNK = 1 << 22  # numbers unpacked at a time: bounds the memory of the wide intermediate


def levels(width: float) -> int:
    """How many values a code of this width can take: 2**width, 3 for TERNARY."""
    return 3 if width == TERNARY else 2 ** int(width)


def packed_bytes(count: int, width: float) -> int:
    """Bytes of `count` numbers of a width."""
    return -(-count // TRITS) if width == TERNARY else -(-count * int(width) // 8)


def stream_bits(count: int, width: float) -> int:
    """Bits of `count` numbers of a width, before the last byte is filled up."""
    return 8 * -(-count // TRITS) if width == TERNARY else count * int(width)


def pack(numbers: torch.Tensor, width: float) -> torch.Tensor:
    """Numbers (any shape, 0 <= number < levels(width), width 1 to 32) as a 1-D uint8 stream."""
    if width == TERNARY:
        return _pack_trits(numbers)
    flat, width = numbers.reshape(-1), int(width)
    parts = [_pack_chunk(part, width) for part in flat.split(CHUNK)] or [flat.to(torch.uint8)]
    return torch.cat(parts)[: packed_bytes(flat.numel(), width)]


def unpack(stream: torch.Tensor, count: int, width: float) -> torch.Tensor:
    """The `count` numbers of a stream, 1-D: uint8 up to 8 bits, int64 above. Inverse of `pack`."""
    assert stream.numel() == packed_bytes(count, width), (stream.numel(), count, width)
    if width == TERNARY:
        return _unpack_trits(stream, count)
    width = int(width)
    step = CHUNK // 8 * width
    parts = [_unpack_chunk(stream[start : start + step], width) for start in range(0, stream.numel(), step)]
    return torch.cat(parts)[:count] if parts else stream.new_zeros(0, dtype=_result(width))


def _work(width: int) -> torch.dtype:
    return torch.int16 if width <= 8 else torch.int64


def _result(width: int) -> torch.dtype:
    return torch.uint8 if width <= 8 else torch.int64


def _meetings(width: int) -> list[tuple[int, int, int]]:
    """(byte, place, shift): where number `place` of eight meets byte `byte` of the `width` bytes they fill."""
    return [
        (byte, place, place * width - 8 * byte)
        for byte in range(width)
        for place in range(8 * byte // width, min(8, -(-8 * (byte + 1) // width)))
    ]


def _pack_chunk(numbers: torch.Tensor, width: int) -> torch.Tensor:
    eights = -(-numbers.numel() // 8)
    padded = numbers.new_zeros(eights * 8, dtype=_work(width))
    padded[: numbers.numel()] = numbers
    by_place = padded.view(eights, 8).T.contiguous()
    stream = numbers.new_zeros(width, eights, dtype=torch.uint8)
    for byte, place, shift in _meetings(width):
        moved = by_place[place] << shift if shift >= 0 else by_place[place] >> -shift
        stream[byte] |= (moved & 255).to(torch.uint8)
    return stream.T.reshape(-1)


def _unpack_chunk(stream: torch.Tensor, width: int) -> torch.Tensor:
    eights = -(-stream.numel() // width)
    padded = stream.new_zeros(eights * width)
    padded[: stream.numel()] = stream
    by_byte = padded.view(eights, width).T.to(_work(width))
    numbers = torch.zeros(8, eights, dtype=_work(width), device=stream.device)
    for byte, place, shift in _meetings(width):
        numbers[place] |= by_byte[byte] >> shift if shift >= 0 else by_byte[byte] << -shift
    return (numbers & (2**width - 1)).to(_result(width)).T.reshape(-1)


def _pack_trits(digits: torch.Tensor) -> torch.Tensor:
    flat = digits.reshape(-1)
    padded = flat.new_zeros(-(-flat.numel() // TRITS) * TRITS, dtype=torch.int16)
    padded[: flat.numel()] = flat
    powers = 3 ** torch.arange(TRITS, dtype=torch.int16, device=flat.device)
    return (padded.view(-1, TRITS) * powers).sum(1).to(torch.uint8)


def _unpack_trits(stream: torch.Tensor, count: int) -> torch.Tensor:
    powers = 3 ** torch.arange(TRITS, dtype=torch.int16, device=stream.device)
    digits = torch.div(stream.to(torch.int16)[:, None], powers, rounding_mode="floor") % 3
    return digits.to(torch.uint8).reshape(-1)[:count]


# --- masks ----------------------------------------------------------------------------------------------------------


def pattern_width(n: int, m: int) -> int:
    """Bits that name one of the C(m, n) ways to keep n of m."""
    return math.ceil(math.log2(math.comb(m, n)))


def pack_pattern(keep: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """A bool mask in which every m consecutive entries keep exactly n, as ranks of their patterns (uint8 stream).

    The rank of kept places p_1 < ... < p_n is sum C(p_i, i), the combinatorial number system.
    """
    blocks = keep.reshape(-1, m).long()
    assert bool((blocks.sum(1) == n).all()), f"a block does not keep {n} of {m}"
    table = _binomials(n, m, keep.device)
    order = blocks.cumsum(1) * blocks
    rank = (table[torch.arange(m, device=keep.device), order] * blocks).sum(1)
    return pack(rank, pattern_width(n, m))


def unpack_pattern(stream: torch.Tensor, count: int, n: int, m: int) -> torch.Tensor:
    """Inverse of `pack_pattern`: `count` bools, 1-D."""
    rank = unpack(stream, count // m, pattern_width(n, m)).long()
    keep = torch.zeros(len(rank), m, dtype=torch.bool, device=stream.device)
    left, table = torch.full_like(rank, n), _binomials(n, m, stream.device)
    for place in range(m - 1, -1, -1):
        worth = table[place][left]
        here = (left > 0) & (rank >= worth)
        keep[:, place] = here
        rank, left = rank - worth * here, left - here.long()
    return keep.reshape(-1)


def _binomials(n: int, m: int, device: torch.device) -> torch.Tensor:
    """C(place, i) for places below m and i up to n."""
    return torch.tensor([[math.comb(place, i) for i in range(n + 1)] for place in range(m)], device=device)
