"""The stored form: its values against loops, its size against a stream of bits that is really written and read."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.packed.quantized import QuantizedWeight, label_bits

PATTERNS = [(2, 4), (1, 2), (4, 8), (3, 5)]


def make(
    rows: int = 6, bits_G=(4,), factored: bool = False, zeros: bool | str = True, mask=None, seed: int = 0
) -> QuantizedWeight:
    """A random one with 40 channels; mask: None, 'free', or a pattern (n, m); zeros 'shared': one row of them."""
    rng, groups, channels = np.random.default_rng(seed), len(bits_G), 40
    label = rng.permutation(np.arange(channels) * groups // channels)
    codes = np.stack([rng.integers(0, 2 ** np.array(bits_G)[label]) for _ in range(rows)])
    keep = np.ones((rows, channels), dtype=bool)
    if mask == "free":
        keep = rng.random((rows, channels)) > 0.5
    elif mask is not None:
        n, m = mask
        keep = np.stack([rng.permuted(np.arange(channels).reshape(-1, m) % m < n, axis=1).ravel() for _ in range(rows)])
    scale = rng.random((rows, 1 if factored else groups)) + 0.01
    zero = rng.integers(0, 2 ** np.array(bits_G), (1 if zeros == "shared" else rows, groups))
    return QuantizedWeight(
        torch.from_numpy((codes * keep).astype(np.uint8)),
        torch.from_numpy(scale.astype(np.float16)),
        torch.from_numpy((rng.random(groups) + 0.5).astype(np.float16)) if factored else None,
        torch.from_numpy(zero.astype(np.uint8)) if zeros else None,
        tuple(bits_G),
        torch.from_numpy(label),
        torch.from_numpy(keep) if mask is not None else None,
        mask if isinstance(mask, tuple) else None,
    )


CASES = [
    dict(bits_G=bits_G, factored=factored, zeros=zeros, mask=mask)
    for bits_G in ((2,), (8,), (4, 4, 4), (2, 3, 5, 8))
    for factored, zeros in ((False, True), (False, "shared"), (False, False), (True, False), (True, "shared"))
    for mask in (None, "free", (2, 4), (3, 5))
]


def naive_values(weight: QuantizedWeight) -> np.ndarray:
    rows, channels = weight.codes_RC.shape
    values = np.zeros((rows, channels))
    for r, c in itertools.product(range(rows), range(channels)):
        if weight.keep_RC is not None and not weight.keep_RC[r, c]:
            continue
        g = int(weight.label_C[c])
        factored = weight.group_scale_G is not None
        scale = float(weight.row_scale_RG[r, 0 if weight.row_scale_RG.shape[1] == 1 else g])
        scale *= float(weight.group_scale_G[g]) if factored else 1.0
        zero = (
            (2 ** weight.bits_G[g] - 1) / 2
            if weight.zero_RG is None
            else int(weight.zero_RG[r % len(weight.zero_RG), g])
        )
        values[r, c] = scale * (int(weight.codes_RC[r, c]) - zero)
    return values


class Bits:
    """A stream of bits, written and read most significant bit first."""

    def __init__(self) -> None:
        self.bits: list[int] = []
        self.position = 0

    def write(self, value: int, width: int) -> None:
        assert 0 <= value < 2**width
        self.bits += [value >> shift & 1 for shift in reversed(range(width))]

    def read(self, width: int) -> int:
        taken = self.bits[self.position : self.position + width]
        self.position += width
        return int("".join(map(str, taken)) or "0", 2)


def half_to_int(value: torch.Tensor) -> int:
    return int(value.numpy().view(np.uint16))


def write(weight: QuantizedWeight) -> tuple[Bits, dict[str, int]]:
    """Everything but the labels and the shapes as bits, and how many each part took."""
    out, parts, start = Bits(), {}, 0

    def close(part: str) -> None:
        nonlocal start
        parts[part], start = len(out.bits) - start, len(out.bits)

    keep = np.ones(weight.codes_RC.shape, bool) if weight.keep_RC is None else weight.keep_RC.numpy()
    if len(set(weight.bits_G)) > 1:
        for bits in weight.bits_G:
            out.write(bits, 8)
    close("widths")
    if weight.pattern is not None:
        n, m = weight.pattern
        choices = {chosen: i for i, chosen in enumerate(itertools.combinations(range(m), n))}
        for part in keep.reshape(-1, m):
            out.write(choices[tuple(np.flatnonzero(part))], math.ceil(math.log2(len(choices))))
    elif weight.keep_RC is not None:
        for bit in keep.ravel():
            out.write(int(bit), 1)
    close("mask")
    halves = [weight.row_scale_RG, *([weight.group_scale_G] if weight.group_scale_G is not None else [])]
    for scale in torch.cat([h.flatten() for h in halves]):
        out.write(half_to_int(scale), 16)
    close("scales")
    if weight.zero_RG is not None:
        for r, (g, bits) in itertools.product(range(len(weight.zero_RG)), enumerate(weight.bits_G)):
            out.write(int(weight.zero_RG[r, g]), bits)
    close("zeros")
    for r, c in zip(*np.nonzero(keep), strict=True):
        out.write(int(weight.codes_RC[r, c]), weight.bits_G[int(weight.label_C[c])])
    close("codes")
    return out, parts


def read(out: Bits, like: QuantizedWeight) -> np.ndarray:
    """The values again, from the bits, the labels and the layout (not from any array of `like`)."""
    rows, channels = like.codes_RC.shape
    label, groups = like.label_C.tolist(), int(like.label_C.max()) + 1
    bits = [out.read(8) for _ in range(groups)] if len(set(like.bits_G)) > 1 else [like.bits_G[0]] * groups
    keep = np.ones((rows, channels), bool)
    if like.pattern is not None:
        n, m = like.pattern
        choices = list(itertools.combinations(range(m), n))
        for part in keep.reshape(-1, m):
            part[:] = False
            part[list(choices[out.read(math.ceil(math.log2(len(choices))))])] = True
    elif like.keep_RC is not None:
        keep = np.array([out.read(1) for _ in range(rows * channels)], bool).reshape(rows, channels)
    factored = like.group_scale_G is not None
    columns = 1 if factored else groups
    half = np.array([out.read(16) for _ in range(rows * columns)], np.uint16).view(np.float16).astype(np.float64)
    scale = np.broadcast_to(half.reshape(rows, columns), (rows, groups))
    if factored:
        scale = scale * np.array([out.read(16) for _ in range(groups)], np.uint16).view(np.float16).astype(np.float64)
    zero = np.tile((2.0 ** np.array(bits) - 1) / 2, (rows, 1))
    if like.zero_RG is not None:
        stored = [[out.read(bits[g]) for g in range(groups)] for _ in range(len(like.zero_RG))]
        zero = np.broadcast_to(np.array(stored, np.float64), (rows, groups))
    values = np.zeros((rows, channels))
    for r, c in zip(*np.nonzero(keep), strict=True):
        values[r, c] = scale[r, label[c]] * (out.read(bits[label[c]]) - zero[r, label[c]])
    assert out.position == len(out.bits)
    return values


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_values_and_size_equal_a_written_and_read_stream(case):
    weight = make(**case)
    np.testing.assert_allclose(weight.dequantize().numpy(), naive_values(weight), rtol=2e-6)
    stream, parts = write(weight)
    assert weight.stored_bits() == parts
    np.testing.assert_allclose(weight.dequantize().numpy(), read(stream, weight), rtol=2e-6)


@settings(max_examples=30)
@given(
    bits_G=st.lists(st.integers(2, 8), min_size=1, max_size=6),
    mask=st.sampled_from([None, "free", *PATTERNS]),
    rows=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_size_of_any_layout(bits_G, mask, rows, seed):
    weight = make(rows, bits_G, factored=seed % 2 == 0, zeros=(False, True, "shared")[seed % 3], mask=mask, seed=seed)
    assert weight.stored_bits() == write(weight)[1]


@pytest.mark.parametrize("mask", [None, "free", (2, 4)])
def test_kept_weights_of_each_group(mask):
    weight = make(bits_G=(2, 4, 8), mask=mask)
    keep = np.ones((6, 40), bool) if weight.keep_RC is None else weight.keep_RC.numpy()
    expected = [int(keep[:, weight.label_C.numpy() == g].sum()) for g in range(3)]
    assert weight.kept_G().tolist() == expected
    assert sum(expected) == (240 if mask is None else 120 if mask == (2, 4) else keep.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_once(dtype):
    weight = make(bits_G=(3, 8), factored=True, zeros=False)
    assert weight.dequantize(dtype).dtype == dtype
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


def test_sixteen_bits_are_the_values_themselves():
    value_RC = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    keep_RC = torch.arange(8).expand(4, 8) % 2 == 0
    label_C, none = torch.zeros(8, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.float16)
    sparse = QuantizedWeight(value_RC * keep_RC, none, None, None, (16,), label_C, keep_RC)
    assert not sparse.quantized
    assert torch.equal(sparse.dequantize(torch.bfloat16), value_RC * keep_RC)
    assert sparse.stored_bits() == dict(codes=16 * 16, scales=0, zeros=0, widths=0, mask=32)
    dense = QuantizedWeight(value_RC, none, None, None, (16,), label_C)
    assert dense.stored_bits() == dict(codes=16 * 32, scales=0, zeros=0, widths=0, mask=0)
    halved = QuantizedWeight(value_RC * keep_RC, none, None, None, (16,), label_C, keep_RC, (1, 2))
    assert halved.stored_bits() == dict(codes=16 * 16, scales=0, zeros=0, widths=0, mask=16)


@pytest.mark.parametrize(
    "label, bits",
    [
        ([0, 0, 0, 0], 0),  # one group
        ([0, 0, 1, 1, 2, 2], 0),  # equal contiguous groups
        ([0, 0, 0, 1, 1, 1, 2, 2], 0),  # the last one shorter
        ([0, 0, 1, 1, 1, 1, 2, 2], 16),  # contiguous, sizes differ: as any others
        ([0, 1, 0, 1, 0, 1, 0, 1], 8),  # one bit a channel
        ([2, 1, 0, 1, 0, 1, 0, 1], 16),  # two bits a channel
        (list(range(5)) + list(range(5)), 30),
        (list(range(9)), 0),
    ],
)
def test_label_bits(label, bits):
    assert label_bits(torch.tensor(label)) == bits
