"""The integer form of every kind of weight: the same values, in the container that is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.errors import UserError
from mico.exports.integers import Inexact, check_bits, check_scales, integers, refuse
from mico.packed.bits import TERNARY
from mico.packed.quantized import QuantizedWeight
from tests.exports.sources import GRIDS, rounded


def weights(seed: int, rows: int = 5, channels: int = 96) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(sorted(GRIDS)),
    bits=st.integers(2, 8),
    size=st.sampled_from([None, 96, 48, 32]),
    sparsity=st.sampled_from([0.0, 0.5]),
)
def test_the_values_are_kept_bit_for_bit(seed, kind, bits, size, sparsity):
    weight = rounded(weights(seed), kind, bits, size, sparsity)
    found = integers(weight)
    factored = weight.group_scale_G is not None  # products of 22 bits times a level: float32 rounds either way once
    assert torch.allclose(found.values(), weight.dequantize(), rtol=2e-7 if factored else 0, atol=0)
    assert found.group_size == (size or 96)
    assert -(2 ** (found.bits - 1)) <= int(found.level_RC.min()) and int(found.level_RC.max()) < 2 ** (found.bits - 1)
    assert found.bits == {"integer": bits, "symmetric": bits + 1}.get(kind, found.bits) and found.bits >= bits
    assert torch.equal(found.in_groups_of(16).values(), found.values())


def test_three_levels_and_two():
    code_RC = torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8)
    scale_RG = torch.full((1, 1), 0.5, dtype=torch.float16)
    label_C = torch.zeros(4, dtype=torch.int64)
    ternary = integers(QuantizedWeight(code_RC, scale_RG, None, None, (TERNARY,), label_C))
    assert ternary.level_RC.tolist() == [[-1, 0, 1, 0]] and ternary.bits == 2 and float(ternary.scale_RG) == 0.5
    binary = integers(QuantizedWeight(code_RC.clamp(max=1), scale_RG, None, None, (1,), label_C))
    assert binary.level_RC.tolist() == [[-1, 1, 1, 1]] and binary.bits == 2 and float(binary.scale_RG) == 0.25


def test_narrow_groups_lie_in_the_widest_container():
    weight = rounded(weights(3), "integer", 3, 32)
    mixed = replace(weight, bits_G=(3, 6, 3))
    assert integers(mixed).bits == 6 and torch.equal(integers(mixed).values(), weight.dequantize())


@pytest.mark.parametrize("label", [[0, 1] * 48, [0] * 90 + [1] * 6, [1] * 48 + [0] * 48])
def test_scattered_and_unequal_groups_have_no_form(label):
    weight = replace(rounded(weights(1), "integer", 4, 48), label_C=torch.tensor(label))
    with pytest.raises(Inexact, match="its 2 groups of channels are not consecutive and equal"):
        integers(weight)


def test_what_does_not_fit_is_said():
    with pytest.raises(Inexact, match="need more than 8 bits around an exact zero"):
        check_bits(integers(rounded(weights(1), "symmetric", 8, None)))
    found = integers(rounded(weights(1), "symmetric", 4, None))
    check_scales(found, torch.float16, factored=False)
    with pytest.raises(Inexact, match="its scales are not exact in bfloat16"):
        check_scales(found, torch.bfloat16, factored=False)
    with pytest.raises(Inexact, match="its products of row and group scales are not exact in float16"):
        check_scales(integers(rounded(weights(1), "symmetric", 4, 32)), torch.float16, factored=True)
    for dtype in (torch.float16, torch.bfloat16):
        check_scales(integers(rounded(weights(1), "integer", 4, 32)), dtype, factored=False)


def test_one_line_names_three_weights_and_the_way_out():
    refuse("vllm", {})
    with pytest.raises(UserError) as caught:
        refuse("vllm", {f"layer{i}": "its reason" for i in range(5)})
    text = str(caught.value)
    assert text.startswith("--to vllm cannot hold 5 weights exactly: layer0: its reason; layer1: its reason; layer2")
    assert "layer3" not in text and "(and 2 more)" in text and "mico compress --profile vllm" in text
    assert "--to dense" in text and "\n" not in text
