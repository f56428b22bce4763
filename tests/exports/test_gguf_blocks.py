"""Block containers of llama.cpp: bytes decoded one by one against the native dequantization."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.exports.gguf_blocks import fit, pack
from mico.packed.bits import TERNARY, levels
from mico.packed.quantized import QuantizedWeight

BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}


def make(
    bits=4, zero=None, groups: int = 1, rows: int = 5, channels: int = 96, mask: bool = False, seed: int = 0, **changes
) -> QuantizedWeight:
    """A random weight with contiguous groups. zero: None (levels beside zero), 'any', or one code for all rows."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, levels(bits), (rows, channels))
    codes[:, ::7], codes[:, 3::7] = 0, levels(bits) - 1  # every block meets both ends
    keep = rng.random((rows, channels)) > 0.5
    scale = torch.from_numpy((rng.random((rows, groups)) + 0.01).astype(np.float16))
    zeros = None
    if zero is not None:
        drawn = rng.integers(0, levels(bits), (rows, groups)) if zero == "any" else np.full((1, groups), zero)
        zeros = torch.from_numpy(drawn.astype(np.uint8))
    fields = dict(
        codes_RC=torch.from_numpy((codes * keep if mask else codes).astype(np.uint8)),
        row_scale_RG=scale,
        group_scale_G=None,
        zero_RG=zeros,
        bits_G=(bits,) * groups,
        label_C=torch.arange(channels) * groups // channels,
        keep_RC=torch.from_numpy(keep) if mask else None,
    )
    return QuantizedWeight(**fields | changes)


def decode(row: bytes, name: str) -> list[float]:
    """One row of blocks by the layout in ggml-common.h, value by value."""
    values: list[float] = []
    for start in range(0, len(row), BYTES[name]):
        block = row[start : start + BYTES[name]]
        (d,) = struct.unpack("<e", block[:2])
        if name == "Q8_0":
            values += [d * q for q in struct.unpack("<32b", block[2:])]
            continue
        nibbles = block[-16:]
        low = [byte % 16 for byte in nibbles] + [byte // 16 for byte in nibbles]
        if name == "Q4_0":
            values += [d * (q - 8) for q in low]
        else:
            (fifth,) = struct.unpack("<I", block[2:6])
            values += [d * (q + 16 * (fifth >> i & 1) - 16) for i, q in enumerate(low)]
    return values


def check(weight: QuantizedWeight, name: str) -> torch.Tensor:
    """The weight fits `name` and its bytes decode to the native values; returns the bytes."""
    found = fit(weight)
    assert found.container is not None and found.container.name == name, found
    packed = pack(weight, found.container)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(weight.codes_RC), weight.codes_RC.shape[1] // 32 * BYTES[name])
    decoded = torch.tensor([decode(row.numpy().tobytes(), name) for row in packed])
    assert torch.equal(decoded, weight.dequantize())
    return packed


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "bits, zero, name",
    [
        (2, None, "Q4_0"),
        (3, None, "Q4_0"),  # odd offsets up to 7
        (4, None, "Q5_0"),
        (5, None, "Q8_0"),
        (7, None, "Q8_0"),
        (TERNARY, None, "Q4_0"),
        (4, 8, "Q4_0"),
        (4, 7, "Q4_0"),  # -7..8: d turns negative
        (4, 6, "Q5_0"),
        (4, "any", "Q5_0"),
        (5, 16, "Q5_0"),
        (5, 15, "Q5_0"),
        (8, 128, "Q8_0"),
        (8, 127, "Q8_0"),
        (3, "any", "Q4_0"),
    ],
)
def test_the_narrowest_container_that_holds_every_value(bits, zero, name, mask, groups):
    check(make(bits, zero, groups, rows=8, mask=mask, seed=3), name)


def test_scales_of_either_sign():
    weight = make(4, 8, groups=3)
    sign_RG = torch.tensor([1, -1, -1, 1, -1], dtype=torch.float16)[:, None]
    check(make(4, 8, groups=3, row_scale_RG=weight.row_scale_RG * sign_RG), "Q4_0")


def test_a_block_needs_one_scale_only_for_what_it_keeps():
    label_C = torch.arange(96) % 2
    mixed = dict(label_C=label_C, bits_G=(4, 4))
    scale_RG = torch.tensor([[0.5, 0.25]] * 5, dtype=torch.float16)
    assert "several groups" in fit(make(row_scale_RG=scale_RG, **mixed)).reason
    check(make(row_scale_RG=scale_RG, keep_RC=(label_C == 1).expand(5, -1), **mixed), "Q5_0")
    check(make(row_scale_RG=scale_RG[:, :1].expand(-1, 2), **mixed), "Q5_0")  # equal scales may mix


def test_widths_may_differ_between_blocks():
    codes_RC = make(2, groups=3).codes_RC
    check(make(2, groups=3, bits_G=(2, 4, 3), codes_RC=codes_RC), "Q5_0")


def test_pruned_and_empty_rows():
    keep_RC = torch.ones(5, 96, dtype=torch.bool)
    keep_RC[2], keep_RC[3, 32:64] = False, False
    packed = check(make(4, "any", keep_RC=keep_RC), "Q5_0")
    assert packed[2].reshape(3, 22)[:, :2].eq(0).all()  # nothing kept: d is zero


@pytest.mark.parametrize(
    "weight, reason",
    [
        (make(channels=80), "80 channels are not a multiple of 32"),
        (make(8, None), "lie more than 128 steps"),
        (make(8, 100), "lie more than 128 steps"),
        (make(group_scale_G=torch.tensor([1.1], dtype=torch.float16)), "product of row scale and group scale"),
        (make(row_scale_RG=torch.full((5, 1), 3 * 2.0**-24, dtype=torch.float16)), "half a scale"),
        (make(codes_RC=torch.zeros(5, 96, dtype=torch.float16)), ""),  # pruned only: there is no grid to fit
    ],
)
def test_why_nothing_is_exact(weight, reason):
    found = fit(weight)
    assert found.container is None
    assert reason in found.reason and bool(reason) == bool(found.reason)


def test_factored_scales_whose_product_is_a_float16_number():
    check(make(4, 8, groups=3, group_scale_G=torch.tensor([0.5, 1, 2], dtype=torch.float16)), "Q4_0")


def smallest(weight: QuantizedWeight) -> str | None:
    """By trying every container on every block: whole multiples of the unit, one sign of it or the other."""
    limits = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
    values = weight.dequantize().double().numpy().reshape(-1, 32)
    halves = 2 if weight.zero_RG is None and weight.bits_G[0] != TERNARY else 1
    units = weight.row_scale_RG.double().numpy()[:, weight.label_C].reshape(-1, 32)[:, 0] / halves
    for name, (low, high) in limits.items():
        q = values / units[:, None]
        fits = ((q >= low) & (q <= high)).all(1) | ((-q >= low) & (-q <= high)).all(1)
        if fits.all():
            return name
    return None


@settings(max_examples=60)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, TERNARY]),
    zero=st.sampled_from([None, "any", 0, 1]),
    groups=st.sampled_from([1, 3]),
    mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_contiguous_groups(bits, zero, groups, mask, seed):
    weight = make(bits, zero, groups, rows=4, mask=mask, seed=seed)
    name = smallest(weight)
    if name is None:
        assert fit(weight).container is None
    else:
        check(weight, name)
