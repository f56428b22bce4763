"""Blobs: what goes in comes out field by field, they are as large as is told, and damage is named."""

from __future__ import annotations

import dataclasses
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mico.packed.bits import TERNARY, levels
from mico.packed.blob import (
    BFLOAT,
    BORROWED,
    FACTORED,
    HEADER_BYTES,
    LABELS,
    MASK,
    MIXED,
    ROW_ZEROS,
    ZEROS,
    Header,
    decode,
    decode_labels,
    decode_rows,
    encode,
)
from mico.packed.quantized import QuantizedWeight, equal_runs, is_equal_runs, label_bits

WIDTHS = [*range(1, 9), TERNARY]


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    for field in dataclasses.fields(QuantizedWeight):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        else:
            assert one == other, field.name


def mask_of(draw, rows: int, channels: int, rng: np.random.Generator) -> tuple[np.ndarray | None, tuple | None]:
    """None; nothing or everything pruned; free, with some rows all pruned; or n of every m."""
    kind = draw(st.sampled_from(["none", "nothing", "everything", "free", "pattern"]))
    if kind == "none":
        return None, None
    if kind == "pattern":
        divisors = [m for m in (2, 4, 5, 8, 16, 32) if channels % m == 0]
        if divisors:
            m = draw(st.sampled_from(divisors))
            n = draw(st.integers(1, m - 1))
            order = rng.permuted(np.tile(np.arange(m), (rows * channels // m, 1)), axis=1)
            return (order < n).reshape(rows, channels), (n, m)
    keep = np.full((rows, channels), kind == "nothing")
    if kind == "free":
        keep = (rng.random((rows, channels)) > 0.6) & (rng.random((rows, 1)) > 0.3)
    return keep, None


@st.composite
def weights(draw) -> QuantizedWeight:
    """Any weight that a method can make, and some that none makes."""
    rows, channels = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keep, pattern = mask_of(draw, rows, channels, rng)
    mask = None if keep is None else torch.from_numpy(keep.copy())
    kind = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    if draw(st.integers(0, 5)) == 0:
        values = torch.from_numpy(rng.standard_normal((rows, channels))).to(kind)
        values = values if mask is None else values.where(mask, torch.zeros((), dtype=kind))
        nothing, label_C = torch.zeros(0, 1, dtype=torch.float16), torch.zeros(channels, dtype=torch.int64)
        return QuantizedWeight(values, nothing, None, None, (16,), label_C, mask, pattern)
    groups = draw(st.one_of(st.integers(1, min(channels, 6)), st.just(channels)))
    label = equal_runs(channels, groups).numpy()
    if draw(st.booleans()):
        label = rng.integers(0, groups, channels)  # a group can be empty
    bits_G = tuple(draw(st.lists(st.sampled_from(WIDTHS), min_size=groups, max_size=groups)))
    if draw(st.booleans()):
        bits_G = bits_G[:1] * groups
    codes = rng.integers(0, np.array([levels(b) for b in bits_G])[label], (rows, channels))
    codes = codes if keep is None else codes * keep
    factored, zeros = draw(st.booleans()), draw(st.sampled_from([0, 1, rows]))
    zero = rng.integers(0, np.array([levels(b) for b in bits_G]), (zeros, groups))
    return QuantizedWeight(
        torch.from_numpy(codes.astype(np.uint8)),
        torch.from_numpy(rng.random((rows, 1 if factored else groups))).to(kind),
        torch.from_numpy(rng.random(groups)).to(kind) if factored else None,
        torch.from_numpy(zero.astype(np.uint8)) if zeros else None,
        bits_G, torch.from_numpy(label), mask, pattern,
    )  # fmt: skip


def sections(weight: QuantizedWeight) -> int:
    """Parts of a blob after its header, each of which starts at a whole byte."""
    groups = len(weight.bits_G)
    return 5 + groups + (groups if weight.zero_RG is not None else 0)


@settings(max_examples=150)
@given(weight=weights())
def test_a_weight_comes_back_field_by_field(weight: QuantizedWeight) -> None:
    blob = encode(weight)
    assert blob.dtype == torch.uint8 and blob.ndim == 1
    assert_same(decode(blob), weight)
    assert torch.equal(encode(decode(blob)), blob)
    assert torch.equal(decode(blob).dequantize(), weight.dequantize())


@settings(max_examples=100)
@given(weight=weights())
def test_a_blob_is_as_large_as_is_told(weight: QuantizedWeight) -> None:
    """stored_bits and the labels, but for the header and the bits that fill up the last byte of every part."""
    told, groups = sum(weight.stored_bits().values()), len(weight.bits_G)
    own, lent = (8 * (len(encode(weight, borrow_labels=borrow)) - HEADER_BYTES) for borrow in (False, True))
    assert told <= lent < told + 8 * sections(weight)
    if is_equal_runs(weight.label_C, groups):
        assert own == lent
    elif groups == int(weight.label_C.max()) + 1:  # label_bits knows the groups from the labels alone
        assert label_bits(weight.label_C) <= own - lent < label_bits(weight.label_C) + 8


@settings(max_examples=50)
@given(weight=weights())
def test_borrowed_labels_are_handed_in(weight: QuantizedWeight) -> None:
    blob = encode(weight, borrow_labels=True)
    head = Header.of(blob)
    assert head.borrows == (weight.quantized and not is_equal_runs(weight.label_C, len(weight.bits_G)))
    assert_same(decode(blob, weight.label_C), weight)
    assert torch.equal(decode_labels(encode(weight)), weight.label_C)
    if head.borrows:
        for labels in (None, weight.label_C[:-1]):
            with pytest.raises(ValueError, match="labels lie with another Linear of the stream, which is not here"):
                decode(blob, labels)
    else:
        assert_same(decode(blob), weight)


def simple(rows: int = 4, channels: int = 16, bits_G=(2, 3, 5), pattern=None) -> QuantizedWeight:
    """With every part a blob can have."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.arange(channels) % len(bits_G))
    keep = rng.random((rows, channels)) > 0.5
    if pattern:
        keep = np.tile(np.arange(channels) % pattern[1] < pattern[0], (rows, 1))
    codes = rng.integers(0, 2 ** np.array(bits_G)[label], (rows, channels)) * keep
    zero = rng.integers(0, 2 ** np.array(bits_G), (rows, len(bits_G)))
    return QuantizedWeight(
        torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(rng.random((rows, len(bits_G)))).half(), None,
        torch.from_numpy(zero.astype(np.uint8)), tuple(bits_G), torch.from_numpy(label), torch.from_numpy(keep),
        pattern,
    )  # fmt: skip


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_flags_tell_what_is_there(pattern) -> None:
    weight = simple(pattern=pattern)
    assert Header.of(encode(weight)).flags == ZEROS | MASK | MIXED | LABELS
    assert Header.of(encode(weight, borrow_labels=True)).flags == ZEROS | MASK | MIXED | BORROWED
    assert (Header.of(encode(weight)).n, Header.of(encode(weight)).m) == (pattern or (0, 0))
    shared = dataclasses.replace(weight, zero_RG=weight.zero_RG[:1], keep_RC=None, pattern=None)
    assert Header.of(encode(shared)).flags == ZEROS | ROW_ZEROS | MIXED | LABELS
    factored = dataclasses.replace(
        shared, zero_RG=None, row_scale_RG=shared.row_scale_RG[:, :1].bfloat16(), bits_G=(4, 4, 4),
        group_scale_G=torch.ones(3).bfloat16(), label_C=equal_runs(16, 3),
    )  # fmt: skip
    head = Header.of(encode(factored))
    assert (head.flags, head.rows, head.channels, head.groups, head.width) == (FACTORED | BFLOAT, 4, 16, 3, 4)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_truncated_or_longer_blob_is_refused_at_every_length(pattern) -> None:
    blob = encode(simple(pattern=pattern))
    for length in range(len(blob)):
        with pytest.raises(ValueError, match="packed weight") as caught:
            decode(blob[:length])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"of {len(blob) + 1} bytes: {len(blob)} are expected"):
        decode(torch.cat([blob, blob[:1]]))


class Small(TorchDispatchMode):
    """Every tensor made in it must be small."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert not isinstance(made, torch.Tensor) or made.nbytes < 2**20, func
        return made


def forged(**fields: int) -> torch.Tensor:
    """A blob whose header states something else."""
    blob = encode(simple(pattern=(2, 4)))
    layout = struct.Struct("<2sBBIIIBBBB")
    names = ("magic", "version", "flags", "rows", "channels", "groups", "n", "m", "width", "unused")
    values = dict(zip(names, layout.unpack(bytes(blob[:HEADER_BYTES].tolist())), strict=True)) | fields
    return torch.cat([torch.tensor(list(layout.pack(*values.values())), dtype=torch.uint8), blob[HEADER_BYTES:]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(magic=b"XX"), "no packed weight: it starts with b'XX', b'mQ' is expected"),
        (dict(version=2), "version 2; this code reads 1: update mico"),
        (dict(rows=2**31), "too few for 2,147,483,648 x 16 weights"),
        (dict(channels=2**31), "too few for 4 x 2,147,483,648 weights"),
        (dict(rows=2**32 - 1, channels=2**32 - 4, groups=2**32 - 4), "too few for"),
        (dict(groups=2**31), "16 channels in 2,147,483,648 groups"),
        (dict(rows=0), "of 0 rows"),
        (dict(channels=0), "0 channels"),
        (dict(groups=0), "0 groups"),
        (dict(n=4), "a mask of 4:4"),
        (dict(n=0), "a mask of 0:4"),
        (dict(m=0), "a mask of 2:0"),
        (dict(n=100, m=200), "a mask of 100:200"),
        (dict(m=3), "a mask of 2:3 over 16 channels"),
        (dict(flags=ZEROS | MIXED | LABELS), "a mask of 2:4"),
        (dict(flags=MASK, width=9), "a group of 9 bits"),
        (dict(flags=MASK, width=0), "a group of 0 bits"),
        (dict(width=16), "16-bit values with flags 0x"),
        (dict(groups=2, flags=ZEROS | MASK | MIXED | BORROWED), "labels lie with another Linear"),
    ],
)
def test_a_header_that_cannot_be_is_named_before_memory_is_spent(fields: dict[str, int], message: str) -> None:
    blob = forged(**fields)
    with Small():
        decode(encode(simple()))  # imports what the mode needs
    tracemalloc.start()
    try:
        with Small(), pytest.raises(ValueError, match=message) as caught:
            decode(blob)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@settings(max_examples=300)
@given(at=st.integers(0, HEADER_BYTES + 12), byte=st.integers(0, 255), pattern=st.sampled_from([None, (2, 4)]))
def test_any_byte_of_the_head_may_be_wrong(at: int, byte: int, pattern) -> None:
    """It is told in one line, or the values differ in a way that only a checksum shows; nothing else happens."""
    weight = simple(pattern=pattern)
    blob = encode(weight)
    blob[at] = byte
    try:
        found = decode(blob)
    except ValueError as error:
        assert "packed weight" in str(error) and "\n" not in str(error)
    else:
        assert found.codes_RC.numel() <= 64 * len(blob) and found.dequantize().shape == found.codes_RC.shape


def test_a_group_that_does_not_exist_is_named() -> None:
    blob = encode(simple())
    start = HEADER_BYTES + 3  # after the widths; two bits a label, of which the groups use 0 to 2
    blob[start : start + math.ceil(16 * 2 / 8)] = 255
    with pytest.raises(ValueError, match="a channel of group 3, 3 groups: damaged"):
        decode(blob)
    borrowing = encode(simple(), borrow_labels=True)
    with pytest.raises(ValueError, match="a channel of group 3, 3 groups: damaged"):
        decode(borrowing, torch.full((16,), 3))


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 4), (4, 1), (2, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_single_rows_are_those_of_the_whole(bits: int, groups: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes_RC = torch.randint(0, 2**bits, (7, 32), generator=generator).to(torch.uint8)
    scale_RG = torch.rand(7, groups, generator=generator).to(kind)
    weight = QuantizedWeight(codes_RC, scale_RG, None, None, (bits,) * groups, equal_runs(32, groups))
    ids_N = torch.tensor([6, 0, 3, 3])
    rows = decode_rows(encode(weight), ids_N)
    assert torch.equal(rows.dequantize(), weight.dequantize()[ids_N])
    assert decode_rows(encode(weight), ids_N[:0]).dequantize().shape == (0, 32)
    with pytest.raises(IndexError):
        decode_rows(encode(weight), torch.tensor([7]))


@pytest.mark.parametrize(
    "weight",
    [simple(), dataclasses.replace(simple(bits_G=(4,)), zero_RG=None)],
    ids=["mixed", "masked"],
)
def test_rows_that_do_not_lie_apart_are_refused(weight: QuantizedWeight) -> None:
    with pytest.raises(ValueError, match="packed embedding: rows of one width without mask or zero points"):
        decode_rows(encode(weight), torch.tensor([0]))
