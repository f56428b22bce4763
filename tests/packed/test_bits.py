"""Bit streams against one big Python integer, which knows nothing of bytes, chunks or tensors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.packed import bits
from mico.packed.bits import (
    TERNARY,
    levels,
    pack,
    pack_pattern,
    packed_bytes,
    pattern_width,
    stream_bits,
    unpack,
    unpack_pattern,
)

WIDTHS = [*range(1, 33), TERNARY]


def naive(numbers: list[int], width: float) -> bytes:
    """The stream: one whole number whose digits are the given ones, lowest first; five ternary digits a byte."""
    if width == TERNARY:
        fives = [numbers[start : start + 5] for start in range(0, len(numbers), 5)]
        return bytes(sum(digit * 3**place for place, digit in enumerate(five)) for five in fives)
    whole = sum(number << (index * int(width)) for index, number in enumerate(numbers))
    return whole.to_bytes(math.ceil(len(numbers) * int(width) / 8), "little")


def extremes(count: int, width: float) -> list[int]:
    """Smallest and largest numbers in turn, which show a bit that leaks into its neighbour."""
    return [(levels(width) - 1) * (index % 2) for index in range(count)]


@pytest.mark.parametrize("width", WIDTHS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_stream_is_one_big_number_and_reads_back(width: float, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, levels(width) - 1), max_size=70))
    stream = pack(torch.tensor(numbers, dtype=torch.int64), width)
    assert stream.dtype == torch.uint8 and bytes(stream.tolist()) == naive(numbers, width)
    assert len(stream) == packed_bytes(len(numbers), width) == math.ceil(stream_bits(len(numbers), width) / 8)
    found = unpack(stream, len(numbers), width)
    assert found.dtype == (torch.uint8 if width <= 8 else torch.int64) and found.tolist() == numbers


@pytest.mark.parametrize("width", WIDTHS)
def test_every_ragged_length(width: float) -> None:
    for count in range(35):
        numbers = extremes(count, width)
        stream = pack(torch.tensor(numbers, dtype=torch.int64), width)
        assert bytes(stream.tolist()) == naive(numbers, width)
        assert unpack(stream, count, width).tolist() == numbers


@pytest.mark.parametrize("width", [1, 3, 5, 8, 11, 32, TERNARY])
def test_chunks_meet_without_a_seam(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "CHUNK", 16)
    for count in (15, 16, 17, 32, 75):
        numbers = extremes(count, width)
        stream = pack(torch.tensor(numbers), width)
        assert bytes(stream.tolist()) == naive(numbers, width)
        assert unpack(stream, count, width).tolist() == numbers


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_any_shape_layout_and_dtype(dtype: torch.dtype) -> None:
    numbers = (torch.arange(35).view(5, 7) % 2).to(dtype).T  # not contiguous
    assert bytes(pack(numbers, 3).tolist()) == naive(numbers.reshape(-1).int().tolist(), 3)


# --- patterns -------------------------------------------------------------------------------------------------------

SMALL = [(n, m) for m in range(2, 9) for n in range(1, m)]


def naive_rank(block: tuple[int, ...]) -> int:
    """Place of a pattern among all that keep as many, sorted by their highest place, then by the next."""
    n, m = sum(block), len(block)
    chosen = sorted(itertools.combinations(range(m), n), key=lambda places: places[::-1])
    return chosen.index(tuple(place for place, bit in enumerate(block) if bit))


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_all_patterns_have_their_own_number(n: int, m: int) -> None:
    blocks = [block for block in itertools.product((0, 1), repeat=m) if sum(block) == n]
    keep = torch.tensor(blocks, dtype=torch.bool)
    width = pattern_width(n, m)
    assert 2 ** (width - 1) < len(blocks) <= 2**width
    stream = pack_pattern(keep, n, m)
    assert bytes(stream.tolist()) == naive([naive_rank(block) for block in blocks], width)
    assert torch.equal(unpack_pattern(stream, keep.numel(), n, m), keep.reshape(-1))


@pytest.mark.parametrize(("n", "m"), [(16, 32), (1, 32), (31, 32), (8, 16), (11, 29)])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 9))
def test_wide_patterns_read_back(n: int, m: int, seed: int, count: int) -> None:
    order = torch.rand(count, m, generator=torch.Generator().manual_seed(seed)).argsort(1)
    keep = order < n
    stream = pack_pattern(keep, n, m)
    assert len(stream) == math.ceil(count * pattern_width(n, m) / 8)
    assert torch.equal(unpack_pattern(stream, keep.numel(), n, m), keep.reshape(-1))


@pytest.mark.parametrize("ends", [slice(0, 16), slice(16, 32)])
def test_the_first_and_the_last_pattern(ends: slice) -> None:
    keep = torch.zeros(32, dtype=torch.bool)
    keep[ends] = True
    rank = unpack(pack_pattern(keep, 16, 32), 1, pattern_width(16, 32)).item()
    assert rank == (0 if ends.start == 0 else math.comb(32, 16) - 1)


def test_a_block_that_keeps_another_number_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="does not keep 2 of 4"):
        pack_pattern(torch.tensor([True, False, False, False]), 2, 4)
