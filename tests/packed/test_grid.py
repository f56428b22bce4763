"""Grids against loops in float64, brute force, and what their stored form gives back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.packed.grid import (
    LARGEST,
    SHRINKS,
    TINY,
    Grid,
    group_errors,
    integer_grid,
    minmax_grid,
    quantize,
    stored_shared,
    symmetric_grid,
    to_half,
)
from tests.methods.naive import minmax

WIDTHS = tuple(range(2, 9))


def problem(rows: int, channels: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with rows of very different size, and the price of each one's error (0: a mask removes it)."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, channels, generator=generator) * torch.rand(rows, 1, generator=generator)
    keep_RC = torch.rand(rows, channels, generator=generator) > 0.4
    return weight_RC * scale, (0.1 + torch.rand(channels, generator=generator)) * keep_RC


def spread_labels(channels: int, groups: int) -> torch.Tensor:
    return torch.arange(channels) * 7 % groups


def codes_of(grid: Grid, weight_RC: torch.Tensor) -> torch.Tensor:
    label_C = grid.label_C
    zero_RC, maxq_C = grid.zero_point_RG[:, label_C], (grid.levels_G - 1)[label_C]
    return quantize(weight_RC, grid.scale_RG[:, label_C], zero_RC, maxq_C)


def naive_error(
    weight_RC: torch.Tensor, importance_RC: torch.Tensor, scale_RG: torch.Tensor, label_C: torch.Tensor, bits_G
) -> np.ndarray:
    """Weighted squared error of each row when every weight takes the nearest of its group's ±(k + 1/2) s."""
    weight, importance = weight_RC.double().numpy(), importance_RC.double().numpy()
    scale, label = scale_RG.double().numpy(), label_C.numpy()
    error = np.zeros(len(weight))
    for r in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            g = label[c]
            levels = (np.arange(2 ** bits_G[g]) - (2 ** bits_G[g] - 1) / 2) * scale[r, g]
            error[r] += importance[r, c] * np.min(np.abs(levels - weight[r, c])) ** 2
    return error


def plain_scales(
    weight_RC: torch.Tensor, importance_RC: torch.Tensor, label_C: torch.Tensor, bits_G: tuple[int, ...]
) -> torch.Tensor:
    """Max-abs scales (R, G) of the surviving weights; with several groups, their best rank-one fit in logs."""
    scale_RG = torch.zeros(len(weight_RC), len(bits_G))
    for g, bits in enumerate(bits_G):
        members_RC = (weight_RC.abs() * (importance_RC > 0))[:, label_C == g]
        scale_RG[:, g] = members_RC.amax(1).clamp_min(TINY) / ((2**bits - 1) / 2)
    if len(bits_G) == 1:
        return to_half(scale_RG).float()
    log_RG = scale_RG.log()
    row_R1 = to_half(log_RG.mean(1, keepdim=True).exp()).float()
    return row_R1 * to_half((log_RG.mean(0) - log_RG.mean()).exp()).float()


@pytest.mark.parametrize("bits_G", [(2,), (8,), (3, 4, 2, 8)])
def test_minmax_grid_equals_loops(bits_G):
    weight_RC = problem(9, 40, seed=1)[0].double()
    weight_RC[2] = 0  # a row of zeros
    weight_RC[3] = weight_RC[3].abs()  # a row without a negative weight
    label_C = spread_labels(40, len(bits_G))
    grid = minmax_grid(weight_RC, label_C, bits_G)
    scale, zero, maxq = minmax(weight_RC.numpy(), label_C.numpy(), list(bits_G))
    assert grid.row_scale_RG.dtype == torch.float16 and grid.zero_RG.dtype == torch.uint8
    np.testing.assert_array_equal(grid.scale_RG[:, label_C].numpy(), scale)
    np.testing.assert_array_equal(grid.zero_RG[:, label_C].numpy(), zero)
    expected = scale * (np.clip(np.round(weight_RC.numpy() / scale + zero), 0, maxq) - zero)
    np.testing.assert_allclose(grid.nearest(weight_RC).numpy(), expected, rtol=1e-6, atol=1e-12)


def test_minmax_grid_holds_zero_and_reaches_both_ends():
    weight_RC = problem(6, 64, seed=2)[0]
    grid = minmax_grid(weight_RC, torch.zeros(64, dtype=torch.int64), (4,))
    assert torch.equal(grid.nearest(torch.zeros_like(weight_RC)), torch.zeros_like(weight_RC))
    step_R1 = grid.scale_RG
    assert ((grid.nearest(weight_RC) - weight_RC).abs() <= step_R1 * 0.51).sum() >= 0.98 * weight_RC.numel()
    assert ((grid.nearest(weight_RC) - weight_RC).abs() <= step_R1 * 1.01).all()


@pytest.mark.parametrize("bits_G", [(2,), (4,), (8,), (2, 3, 5, 8)])
def test_symmetric_levels_are_mirrored_and_without_zero(bits_G):
    weight_RC, importance_RC = problem(5, 48, seed=3)
    label_C = spread_labels(48, len(bits_G))
    grid = symmetric_grid(weight_RC, importance_RC, label_C, bits_G)
    assert grid.zero_RG is None
    for channel in (0, 1, 2, 3):
        width = bits_G[int(label_C[channel])]
        codes_KC = torch.zeros(2**width, 48)
        codes_KC[:, channel] = torch.arange(2**width)
        for row in range(5):
            one = Grid(grid.row_scale_RG[row : row + 1].expand(2**width, -1), grid.group_scale_G, None, bits_G, label_C)
            levels_K = one.quantized(codes_KC, None, None).dequantize()[:, channel]
            assert torch.equal(levels_K, -levels_K.flip(0))
            steps_K = levels_K.diff()
            torch.testing.assert_close(steps_K, torch.full_like(steps_K, 2 * levels_K.abs().min().item()))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    bits_G=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=5).map(tuple),
    exponent=st.integers(-5, 3),
)
def test_symmetric_grid_is_never_worse_than_plain_max_abs(seed, bits_G, exponent):
    """Down to weights whose scales are subnormal in float16: the candidates are rounded before they are judged.

    Below 1e-5 the factors take so few values that a search in turns can end beside the plain ones.
    """
    weight_RC, importance_RC = problem(4, 20, seed, 10.0**exponent)
    label_C = spread_labels(20, len(bits_G))
    grid = symmetric_grid(weight_RC, importance_RC, label_C, bits_G)
    found = naive_error(weight_RC, importance_RC, grid.scale_RG, label_C, bits_G)
    plain = naive_error(
        weight_RC, importance_RC, plain_scales(weight_RC, importance_RC, label_C, bits_G), label_C, bits_G
    )
    assert found.sum() <= plain.sum() * (1 + 1e-4) + 1e-30
    if len(bits_G) == 1:
        assert (found <= plain * (1 + 1e-4) + 1e-30).all()


@pytest.mark.parametrize("bits, limit", [(2, 1.02), (3, 1.03), (4, 1.1)])
def test_one_group_equals_brute_force(bits, limit):
    """As good as every scale the coarse pass may take, and close to the best of 800 scales a row."""
    weight_RC, importance_RC = problem(12, 48, seed=5)
    label_C = torch.zeros(48, dtype=torch.int64)
    grid = symmetric_grid(weight_RC, importance_RC, label_C, (bits,))
    error_R = naive_error(weight_RC, importance_RC, grid.scale_RG, label_C, (bits,))
    widest_R1 = (weight_RC.abs() * (importance_RC > 0)).amax(1, keepdim=True) / ((2**bits - 1) / 2)

    def best(factors: torch.Tensor) -> np.ndarray:
        scale_RF = to_half(widest_R1 * factors).double()
        half = (2**bits - 1) / 2
        level_RFC = ((weight_RC.double()[:, None] / scale_RF[..., None] - half).round() + half).clamp(-half, half)
        gap_RFC = level_RFC * scale_RF[..., None] - weight_RC.double()[:, None]
        return (gap_RFC.square() * importance_RC.double()[:, None]).sum(2).amin(1).numpy()

    assert (error_R <= best(SHRINKS) * (1 + 1e-5)).all()
    assert (error_R <= best(torch.linspace(0.4, 1.1, 800)) * limit).all()


@pytest.mark.parametrize("bits_G", [(4, 4, 4), (2, 3, 4, 5, 6, 7, 8)])
def test_factored_scales_recover_a_planted_rank_one_matrix(bits_G):
    generator = torch.Generator().manual_seed(6)
    groups, rows, members = len(bits_G), 10, 24
    row_R1 = torch.logspace(-3, 0, rows)[torch.randperm(rows, generator=generator)][:, None]
    planted_RG = row_R1 * torch.logspace(-1, 1, groups)[torch.randperm(groups, generator=generator)]
    label_C = torch.arange(members * groups) % groups
    top_C = torch.tensor(bits_G)[label_C].exp2() - 1
    codes_RC = (torch.rand(rows, len(label_C), generator=generator) * (top_C + 1)).floor().minimum(top_C)
    codes_RC[:, :groups], codes_RC[:, groups : 2 * groups] = 0, top_C[:groups]  # both ends of every grid are in use
    weight_RC = planted_RG[:, label_C] * (codes_RC - top_C / 2)
    grid = symmetric_grid(weight_RC, torch.ones_like(weight_RC), label_C, bits_G)
    assert grid.row_scale_RG.shape == (rows, 1) and grid.group_scale_G.shape == (groups,)
    torch.testing.assert_close(grid.scale_RG, planted_RG, rtol=5e-3, atol=0)
    assert torch.equal(codes_of(grid, weight_RC), codes_RC)


def test_widths_differ_by_group():
    weight_RC, importance_RC = problem(3, 600, seed=7)
    label_C = spread_labels(600, 3)
    for grid in (
        symmetric_grid(weight_RC, importance_RC, label_C, (2, 3, 6)),
        minmax_grid(weight_RC, label_C, (2, 3, 6)),
    ):
        nearest_RC = grid.nearest(weight_RC)
        counts = [[len(nearest_RC[r, label_C == g].unique()) for g in range(3)] for r in range(3)]
        assert all(a <= 4 and b <= 8 and 32 < c <= 64 for a, b, c in counts), counts
        assert max(a for a, _, _ in counts) == 4 and max(b for _, b, _ in counts) == 8


def test_masked_weights_do_not_move_the_scale():
    weight_RC, importance_RC = problem(4, 32, seed=8)
    label_C = spread_labels(32, 2)
    loud_RC = torch.where(importance_RC > 0, weight_RC, 1e4)
    for bits_G in ((4, 4), (3, 6)):
        quiet, loud = (symmetric_grid(w, importance_RC, label_C, bits_G) for w in (weight_RC, loud_RC))
        assert torch.equal(quiet.scale_RG, loud.scale_RG)


@pytest.mark.parametrize("bits_G", [(4,), (2, 4, 8)])
def test_degenerate_rows_groups_and_sizes_stay_finite(bits_G):
    groups = len(bits_G)
    label_C = spread_labels(24, groups)
    weight_RC, importance_RC = (tensor.clone() for tensor in problem(8, 24, seed=9))
    weight_RC[0] = 0
    weight_RC[1] = 0.25  # constant
    weight_RC[2] *= 1e-9  # below every float16
    weight_RC[3] *= 1e7  # beyond float16
    weight_RC[:, label_C == groups - 1] *= 0.0 if groups > 1 else 1.0
    importance_RC[4] = 0
    importance_RC[:, label_C == 0] *= 0.0 if groups > 1 else 1.0
    for grid in (symmetric_grid(weight_RC, importance_RC, label_C, bits_G), minmax_grid(weight_RC, label_C, bits_G)):
        assert torch.isfinite(grid.scale_RG).all() and (grid.scale_RG > 0).all()
        assert (grid.row_scale_RG <= LARGEST).all()
        nearest_RC = grid.nearest(weight_RC)
        assert torch.isfinite(nearest_RC).all()
        assert torch.equal(grid.quantized(codes_of(grid, weight_RC), None, None).dequantize(), nearest_RC)
        rest = [1, 5, 6, 7]  # ordinary rows are not harmed by their neighbours
        live_C = (label_C != groups - 1) & (label_C != 0) if groups > 1 else label_C == 0
        live_RC = (importance_RC[rest] > 0) & live_C
        gap_RC = (nearest_RC[rest] - weight_RC[rest])[live_RC]
        assert gap_RC.square().sum() < 0.1 * weight_RC[rest][live_RC].square().sum()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    bits_G=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6).map(tuple),
    symmetric=st.booleans(),
    exponent=st.integers(-8, 4),
)
def test_codes_of_the_nearest_points_give_them_back(seed, bits_G, symmetric, exponent):
    weight_RC, importance_RC = problem(5, 18, seed, 10.0**exponent)
    label_C = spread_labels(18, len(bits_G))
    if symmetric:
        grid = symmetric_grid(weight_RC, importance_RC, label_C, bits_G)
    else:
        grid = minmax_grid(weight_RC, label_C, bits_G)
    codes_RC = codes_of(grid, weight_RC)
    quantized = grid.quantized(codes_RC, None, None)
    assert quantized.codes_RC.dtype == torch.uint8
    assert (quantized.codes_RC.long() < torch.tensor([2**b for b in bits_G])[label_C]).all()
    assert torch.equal(quantized.dequantize(), grid.nearest(weight_RC))
    keep_RC = importance_RC > 0
    masked = grid.quantized(codes_RC, keep_RC, None)
    assert torch.equal(masked.dequantize(), grid.nearest(weight_RC) * keep_RC)
    assert not masked.codes_RC[~keep_RC].any()
    torch.testing.assert_close(grid.nearest(grid.nearest(weight_RC)), grid.nearest(weight_RC), rtol=0, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_every_width_survives(bits):
    top = 2**bits
    weight_RC = (torch.arange(top) - (top - 1) / 2)[None] * 0.01
    label_C = torch.zeros(top, dtype=torch.int64)
    for grid in (
        symmetric_grid(weight_RC, torch.ones_like(weight_RC), label_C, (bits,)),
        minmax_grid(weight_RC, label_C, (bits,)),
    ):
        codes_RC = codes_of(grid, weight_RC)
        if grid.zero_RG is None:
            assert torch.equal(codes_RC[0], torch.arange(float(top)))
        assert torch.equal(grid.quantized(codes_RC, None, None).dequantize(), grid.nearest(weight_RC))


# --- whole levels ---------------------------------------------------------------------------------------------------


def whole_levels(bits: int) -> np.ndarray:
    return np.arange(max(-(2 ** (bits - 1)), -127), 2 ** (bits - 1))


def naive_whole_error(weight_RC: torch.Tensor, importance_RC: torch.Tensor, scale_RG, label_C, bits_G) -> np.ndarray:
    """Weighted squared error of each (row, group) when every weight takes the nearest whole multiple of its scale."""
    weight, importance = weight_RC.double().numpy(), importance_RC.double().numpy()
    scale, error = scale_RG.double().numpy(), np.zeros(scale_RG.shape)
    for r in range(weight.shape[0]):
        for c, g in enumerate(label_C.tolist()):
            levels = whole_levels(bits_G[g]) * scale[r, g]
            error[r, g] += importance[r, c] * np.min(np.abs(levels - weight[r, c])) ** 2
    return error


@pytest.mark.parametrize("bits_G", [(2,), (8,), (4, 4), (2, 3, 5, 8)])
def test_integer_grid_holds_zero_and_whole_multiples_only(bits_G):
    weight_RC, importance_RC = problem(7, 48, seed=3)
    label_C = spread_labels(48, len(bits_G))
    grid = integer_grid(weight_RC, importance_RC, label_C, bits_G)
    assert grid.zero_RG is not None and grid.zero_RG.shape == (1, len(bits_G))
    assert torch.equal(grid.nearest(torch.zeros_like(weight_RC)), torch.zeros_like(weight_RC))
    far_RC = torch.full_like(weight_RC, 1e4)
    for codes_RC in (codes_of(grid, far_RC), codes_of(grid, -far_RC), codes_of(grid, weight_RC)):
        level_RC = grid.quantized(codes_RC, None, None).dequantize() / grid.scale_RG[:, label_C]
        for c, g in enumerate(label_C.tolist()):
            assert set(level_RC[:, c].tolist()) <= set(whole_levels(bits_G[g]).tolist())
    level_RC = codes_of(grid, far_RC) - codes_of(grid, -far_RC)
    spans = [len(whole_levels(bits)) - 1 for bits in bits_G]
    assert torch.equal(level_RC.abs(), torch.tensor(spans, dtype=torch.float32)[label_C].expand_as(level_RC))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    bits_G=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4).map(tuple),
    exponent=st.integers(-7, 3),
)
def test_integer_grid_takes_the_best_candidate_of_either_sign(seed, bits_G, exponent):
    weight_RC, importance_RC = problem(4, 20, seed, 10.0**exponent)
    label_C = spread_labels(20, len(bits_G))
    grid = integer_grid(weight_RC, importance_RC, label_C, bits_G)
    found_RG = naive_whole_error(weight_RC, importance_RC, grid.scale_RG, label_C, bits_G)
    for sign, shrink in ((1, 1.0), (-1, 1.0), (1, float(SHRINKS[5])), (-1, float(SHRINKS[-1]))):
        scale_RG = torch.zeros(4, len(bits_G))
        for g, bits in enumerate(bits_G):
            members_RC = (weight_RC.abs() * (importance_RC > 0))[:, label_C == g]
            scale_RG[:, g] = members_RC.amax(1).clamp_min(TINY) / ((2**bits - 1) / 2) * sign * shrink
        other_RG = naive_whole_error(weight_RC, importance_RC, stored_shared(scale_RG), label_C, bits_G)
        assert (found_RG <= other_RG * (1 + 1e-4) + 1e-30).all()


@settings(max_examples=200)
@given(st.floats(1e-12, 1e9), st.booleans())
def test_shared_scales_are_exact_in_both_half_dtypes(size, negative):
    scale = torch.tensor([-size if negative else size])
    found = stored_shared(scale)
    assert torch.equal(found.to(torch.float16).float(), found) and torch.equal(found.to(torch.bfloat16).float(), found)
    assert found.isfinite().all() and found != 0 and (found < 0) == negative
    if 1e-4 < size < 6e4:
        assert abs(float(found) / float(scale) - 1) <= 2**-8


def test_group_errors_on_whole_levels_equal_loops():
    weight_RC, importance_RC = problem(6, 40, seed=9)
    label_C = spread_labels(40, 4)
    found_G = group_errors(weight_RC, importance_RC, label_C, 4, 3, whole=True).numpy()
    widest_RG = torch.stack([(weight_RC.abs() * (importance_RC > 0))[:, label_C == g].amax(1) for g in range(4)], 1)
    tried = [
        naive_whole_error(weight_RC, importance_RC, widest_RG / 3.5 * k, label_C, (3,) * 4)
        for k in SHRINKS[::2].tolist()
    ]
    np.testing.assert_allclose(found_G, np.min(tried, 0).sum(0), rtol=1e-4)
    assert (found_G != group_errors(weight_RC, importance_RC, label_C, 4, 3).numpy()).all()
