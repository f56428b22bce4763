"""The column sweep against an independent float64 implementation with an explicit inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mico.errors import UserError
from mico.methods.sweep import Segment, factorize, lowest, sweep
from mico.packed.grid import minmax_grid
from tests.methods.naive import obs


def correlated(rows: int, channels: int, seed: int = 0, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs with very different channel scales, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    x = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ (mix + 0.3)
    x *= torch.logspace(-1, 1, channels, dtype=torch.float64)[torch.randperm(channels, generator=generator)]
    weight = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return weight, 2 / tokens * x.T @ x


CASES = {
    "gptq": dict(bits=[4]),
    "gptq-3bit-groups": dict(bits=[3, 4, 2, 8], grouped=True),
    "sparse": dict(sparsity=0.5),
    "sparse-4bit": dict(sparsity=0.5, bits=[4]),
    "sparse-groups": dict(sparsity=0.7, bits=[5, 3, 4, 2], grouped=True),
    "2:4": dict(pattern=(2, 4)),
    "2:4-4bit": dict(pattern=(2, 4), bits=[4]),
    "3:5-groups": dict(pattern=(3, 5), bits=[4, 4, 3, 6], grouped=True),
    "dead": dict(sparsity=0.5, bits=[4], dead=7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocksize", [40, 120])
def test_sweep_equals_naive(case: str, blocksize: int) -> None:
    options = dict(CASES[case])
    weight, hessian = correlated(24, 160, seed=len(case))
    channels = weight.shape[1]
    for dead in range(options.pop("dead", 0)):
        hessian[dead * 11, :] = hessian[:, dead * 11] = 0
    grouped = options.pop("grouped", False)
    labels = torch.arange(channels) * 7 % 4 if grouped else torch.zeros(channels, dtype=torch.int64)
    bits = options.pop("bits", None)
    sparsity, pattern = options.get("sparsity", 0.0), options.get("pattern")
    expected, keep = obs(
        weight.numpy(), hessian.numpy(), labels=labels.numpy(), bits=bits, blocksize=blocksize, **options
    )

    grids = [minmax_grid(weight, labels, tuple(bits))] if bits else None
    factor = factorize(hessian, 0.01)
    start = weight.clone()
    start[:, factor.dead_C] = 0
    swept = sweep(start, factor, [Segment(slice(0, 24), sparsity, pattern)], grids, blocksize)

    assert np.linalg.norm(swept.weight_RC.numpy() - expected) <= 1e-6 * np.linalg.norm(expected)
    if sparsity or pattern:
        assert (swept.keep_RC.numpy() == keep).mean() == 1.0
        assert abs((swept.weight_RC == 0).double().mean().item() - (sparsity or 1 - pattern[0] / pattern[1])) < 0.08
    hessian[factor.dead_C, factor.dead_C] = 1.0
    damped = hessian + torch.eye(channels, dtype=torch.float64) * 0.01 * hessian.diagonal().mean()
    delta = start - swept.weight_RC
    energy = ((delta @ damped) * delta).sum(1)
    torch.testing.assert_close(swept.loss_R, energy, rtol=1e-6, atol=1e-9)


def test_linears_of_a_stream_together_equal_each_alone() -> None:
    weight, hessian = correlated(30, 64)
    label = torch.zeros(64, dtype=torch.int64)
    factor = factorize(hessian, 0.01)
    parts = [(slice(0, 10), 0.5, (3,)), (slice(10, 30), 0.25, (5,))]
    grids = [minmax_grid(weight[rows], label, bits) for rows, _, bits in parts]
    segments = [Segment(rows, sparsity, None) for rows, sparsity, _ in parts]
    together = sweep(weight, factor, segments, grids, 32)
    for grid, (rows, sparsity, _) in zip(grids, parts, strict=True):
        local = Segment(slice(0, rows.stop - rows.start), sparsity, None)
        alone = sweep(weight[rows], factor, [local], [grid], 32)
        torch.testing.assert_close(together.weight_RC[rows], alone.weight_RC)
        assert torch.equal(together.codes_RC[rows], alone.codes_RC)
        assert torch.equal(together.keep_RC[rows], alone.keep_RC)


def test_codes_and_mask_rebuild_the_values() -> None:
    weight, hessian = correlated(16, 48)
    label = torch.arange(48) % 3
    grid = minmax_grid(weight.float(), label, (2, 4, 7))
    swept = sweep(weight.float(), factorize(hessian, 0.01), [Segment(slice(0, 16), 0.5, None)], [grid], 16)
    assert torch.equal(grid.quantized(swept.codes_RC, swept.keep_RC, None).dequantize(), swept.weight_RC)


def test_factor_inverts_the_damped_hessian() -> None:
    _, hessian = correlated(1, 50)
    factor = factorize(hessian, 0.01)
    upper = factor.upper_CC
    assert torch.equal(upper, upper.triu())
    damped = hessian + torch.eye(50, dtype=torch.float64) * 0.01 * hessian.diagonal().mean()
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-10)


def test_rank_one_hessian_is_damped_and_not_worse_than_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    hessian, weight = 2 * x.T @ x, torch.randn(8, 64, generator=generator, dtype=torch.float64)
    label = torch.zeros(64, dtype=torch.int64)
    grid = minmax_grid(weight, label, (3,))
    factor = factorize(hessian, 0.01)
    swept = sweep(weight, factor, [Segment(slice(0, 8), 0.0, None)], [grid])
    scale, zero = grid.scale_RG.double(), grid.zero_point_RG.double()
    rounded = scale * ((weight / scale + zero).round().clamp(0, 7) - zero)
    error, plain = (float(((w - weight) @ x.T).square().sum()) for w in (swept.weight_RC, rounded))
    assert torch.isfinite(swept.weight_RC).all()
    assert error <= plain


def test_damping_escalates_and_is_reported() -> None:
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.2  # indefinite until the damping passes 0.2
    factor = factorize(hessian, 0.01)
    assert factor.escalated == 2 and factor.damping == pytest.approx(1.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_hessian_is_refused(value: float) -> None:
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[2, 2] = value
    with pytest.raises(UserError, match="NaN or Inf"):
        factorize(hessian, 0.01)


def test_lowest_counts_exactly_without_ties() -> None:
    score = torch.randperm(100, generator=torch.Generator().manual_seed(1)).view(10, 10).float()
    for count in (0, 1, 37, 100):
        assert int(lowest(score, count).sum()) == count
