"""Re-solving the kept weights against an exact solution of every row's normal equations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mico.methods.support import solve_on_support
from mico.methods.sweep import Segment, factorize, sweep
from tests.methods.test_sweep import correlated


def error_of(value_RC: torch.Tensor, target_RC: torch.Tensor, hessian_CC: torch.Tensor) -> torch.Tensor:
    delta_RC = value_RC - target_RC
    return ((delta_RC @ hessian_CC) * delta_RC).sum(1)


def exact(target_RC: torch.Tensor, hessian_CC: torch.Tensor, keep_RC: torch.Tensor) -> torch.Tensor:
    """Row by row: H_ss v = (H w)_s on the support s."""
    value_RC = torch.zeros_like(target_RC)
    for r, keep_C in enumerate(keep_RC):
        if keep_C.any():
            value_RC[r, keep_C] = torch.linalg.solve(hessian_CC[keep_C][:, keep_C], (hessian_CC @ target_RC[r])[keep_C])
    return value_RC


def problem(rows: int = 12, channels: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, hessian = correlated(rows, channels)
    factor = factorize(hessian, 0.01)
    swept = sweep(weight, factor, [Segment(slice(0, rows), 0.5, None)], None, 16)
    return weight, factor.damped_CC, swept.keep_RC, swept.weight_RC


def test_converges_to_the_exact_solution() -> None:
    weight, hessian, keep, start = problem()
    keep[3] = False  # a row that is pruned whole
    keep[4] = True  # and one that keeps everything
    solved = solve_on_support(weight, hessian, keep, start, steps=400)
    torch.testing.assert_close(solved, exact(weight, hessian, keep), rtol=1e-6, atol=1e-6)
    assert torch.equal(solved[4].round(decimals=6), weight[4].round(decimals=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_worse_than_the_sweep_and_zero_outside_the_mask(dtype: torch.dtype) -> None:
    weight, hessian, keep, start = problem()
    errors = [error_of(start, weight, hessian).sum()]
    for steps in (1, 3, 8, 24):
        solved = solve_on_support(weight.to(dtype), hessian, keep, start.to(dtype), steps)
        assert torch.isfinite(solved).all() and (solved[~keep] == 0).all()
        errors.append(error_of(solved.double(), weight, hessian).sum())
    assert all(later <= before * (1 + 1e-5) for before, later in pairwise(errors))
    best = error_of(exact(weight, hessian, keep), weight, hessian).sum()
    assert errors[-1] <= best + 0.05 * (errors[0] - best), "24 steps recover 95 % of what the exact solution would"


def test_damped_hessian_and_factor_belong_together() -> None:
    _, hessian = correlated(1, 70)
    hessian[5, :] = hessian[:, 5] = 0
    factor = factorize(hessian, 0.01)
    product = factor.upper_CC.T @ factor.upper_CC @ factor.damped_CC
    torch.testing.assert_close(product, torch.eye(70, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(factor.damped_CC[:5, :5].tril(-1), hessian[:5, :5].tril(-1))


def test_quantization_error_adds_to_the_pruning_error() -> None:
    """On re-solved weights the cross term of pruning and quantization error vanishes."""
    weight, hessian, keep, _ = problem()
    solved = exact(weight, hessian, keep)
    generator = torch.Generator().manual_seed(3)
    rounded = solved + 0.05 * torch.randn(solved.shape, generator=generator, dtype=torch.float64) * keep
    whole, pruning = error_of(rounded, weight, hessian), error_of(solved, weight, hessian)
    torch.testing.assert_close(whole, pruning + error_of(rounded, solved, hessian), rtol=1e-8, atol=1e-8)


def test_sweep_takes_a_given_mask() -> None:
    weight, hessian = correlated(8, 40)
    factor = factorize(hessian, 0.01)
    keep = torch.rand(8, 40, generator=torch.Generator().manual_seed(0)) > 0.4
    swept = sweep(weight, factor, [Segment(slice(0, 8), 0.5, None)], None, 16, keep)
    assert torch.equal(swept.keep_RC, keep)
    assert (swept.weight_RC[~keep] == 0).all()
