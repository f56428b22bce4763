"""Quantized inputs of packed Linears: the grid against a naive one, stored as bytes that no dtype touches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional

from mico.packed.blob import encode
from mico.packed.inputs import by_channel, decode_grid, encode_grid, on_grid
from mico.packed.linear import PackedLinear
from mico.packed.quantized import QuantizedWeight
from mico.qat.cmibq.levels import Steps, half_levels, quantize, runs

BITS, SCALE, ZERO = (2, 8, 5), (0.3, 0.011, 0.07), (0.5, -3.25, 1.0)


def naive(x: float, bits: int, scale: float, zero: float) -> float:
    """The nearest of the 2^bits levels scale (q + zero)."""
    half = (2**bits - 1) / 2
    levels = [scale * (place - half + zero) for place in range(2**bits)]
    return min(levels, key=lambda level: abs(level - x))


def values() -> torch.Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


def test_values_go_to_the_nearest_level_of_their_run() -> None:
    parts_3C = by_channel(decode_grid(encode_grid(BITS, SCALE, ZERO), 10), 10)
    found = on_grid(values(), parts_3C)
    run_C = [channel * 3 // 10 for channel in range(10)]
    for x_C, found_C in zip(values().tolist(), found.tolist(), strict=True):
        for x, value, run in zip(x_C, found_C, run_C, strict=True):
            assert math.isclose(value, naive(x, BITS[run], SCALE[run], ZERO[run]), rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_in_training(dtype: torch.dtype) -> None:
    x_NC = values().to(dtype)
    scale_MGK, zero_MGK = (torch.tensor(part)[None, :, None] for part in (SCALE, ZERO))
    trained = quantize(x_NC, Steps(scale_MGK, zero_MGK, half_levels(torch.tensor(BITS))[:, None], runs(10, 3)))
    assert torch.equal(on_grid(x_NC, by_channel(decode_grid(encode_grid(BITS, SCALE, ZERO), 10), 10)), trained)


def packed(groups: int) -> PackedLinear:
    make = torch.Generator().manual_seed(1)
    codes_RC = torch.randint(0, 16, (6, 10), generator=make, dtype=torch.uint8)
    scale_RG = torch.rand(6, 1, generator=make).half()
    blob = encode(QuantizedWeight(codes_RC, scale_RG, None, None, (4,), torch.zeros(10, dtype=torch.int64)))
    linear = PackedLinear(10, 6, len(blob), input_groups=groups)
    linear.weight = blob
    return linear


def test_a_packed_linear_quantizes_what_it_reads() -> None:
    linear = packed(3)
    linear.input_grid = encode_grid(BITS, SCALE, ZERO)
    rounded = on_grid(values(), by_channel(decode_grid(linear.input_grid, 10), 10))
    assert not torch.equal(rounded, values())
    assert torch.equal(linear(values()), functional.linear(rounded, linear.dense()))
    again = packed(3)
    again.load_state_dict(linear.state_dict())
    assert torch.equal(again(values()), linear(values())) and torch.equal(
        copy.deepcopy(linear)(values()), linear(values())
    )
    half = copy.deepcopy(linear).to(torch.bfloat16)  # the grid keeps all of its bits
    assert half.input_grid is not None and torch.equal(half.input_grid, linear.input_grid)
    assert list(packed(0).state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (torch.zeros(13, dtype=torch.uint8), "13 bytes are no grid"),
        (encode_grid(BITS, SCALE, (0.0, math.nan, 0.0)), "damaged"),
        (encode_grid((2, 3, 40), SCALE, ZERO), "damaged"),
        (encode_grid(BITS, (0.1, 0.0, 0.1), ZERO), "damaged"),
        (encode_grid((2,) * 11, (1.0,) * 11, (0.0,) * 11), "no grid of inputs for 10 channels"),
    ],
)
def test_damaged_grids_are_refused(grid: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_grid(grid, 10)
