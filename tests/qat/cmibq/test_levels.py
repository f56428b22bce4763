"""The quantizers' arithmetic against the table of its docstring, value by value in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mico.qat.cmibq.levels import BITS, Steps, half_levels, mixture, quantize, runs, vote

DOUBLE = torch.float64


def one_value(x: float, scale: float, zero: float, bits: int) -> tuple[float, float, float, float]:
    """(Q, dQ/dx, dQ/ds, dQ/dz) of one value: plain arithmetic."""
    half = (2**bits - 1) / 2
    r = x / scale - zero
    q = min(max(round(r - 0.5) + 0.5, -half), half)
    inside = abs(r) <= half
    return scale * (q + zero), float(inside), q - r if inside else q + zero, 0.0 if inside else scale


def problem(kind: str, rows: int = 7, channels: int = 11, groups: int = 3) -> tuple[torch.Tensor, Steps]:
    """Values, some outside of the levels of every width, and steps: of activations (one row) or weights (every row)."""
    make = torch.Generator().manual_seed(3)
    x_NC = torch.randn(rows, channels, generator=make, dtype=DOUBLE)
    steps = 1 if kind == "activations" else rows
    base = (torch.rand(steps, groups, 1, generator=make, dtype=DOUBLE) + 0.5) * 1.2
    half_K = half_levels(torch.tensor(BITS)).double()
    scale_MGK = base / half_K
    zero_MGK = torch.randn(1, groups, len(BITS), generator=make, dtype=DOUBLE) if kind == "activations" else None
    return x_NC, Steps(scale_MGK, zero_MGK, half_K.expand(groups, -1), runs(channels, groups))


def expected(x_NC: torch.Tensor, g_NC: torch.Tensor, share_GK: torch.Tensor, steps: Steps) -> dict[str, torch.Tensor]:
    """Output and gradients of the mixture by loops."""
    rows, channels = x_NC.shape
    shared_rows = steps.scale_MGK.shape[0] == 1
    found = dict(
        y=torch.zeros_like(x_NC), x=torch.zeros_like(x_NC), share=torch.zeros_like(share_GK),
        scale=torch.zeros_like(steps.scale_MGK), zero=torch.zeros_like(steps.scale_MGK[:1]),
    )  # fmt: skip
    for n in range(rows):
        for c in range(channels):
            group, m = int(steps.label_C[c]), 0 if shared_rows else n
            size = int((steps.label_C == group).sum())
            x, g = x_NC[n, c].item(), g_NC[n, c].item()
            for k, bits in enumerate(BITS):
                zero = 0.0 if steps.zero_MGK is None else steps.zero_MGK[0, group, k].item()
                value, of_x, of_scale, of_zero = one_value(x, steps.scale_MGK[m, group, k].item(), zero, bits)
                share, damping = share_GK[group, k].item(), 1 / math.sqrt(size * (2**bits - 1) / 2)
                found["y"][n, c] += share * value
                found["x"][n, c] += share * g * of_x
                found["scale"][m, group, k] += share * g * of_scale * damping
                found["zero"][0, group, k] += share * g * of_zero * damping
                found["share"][group, k] += g * (value - x)
    return found


def some_shares(groups: int = 3) -> torch.Tensor:
    make = torch.Generator().manual_seed(5)
    return torch.softmax(torch.randn(groups, len(BITS), generator=make, dtype=DOUBLE), -1)


@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_mixture_equals_the_table(kind: str) -> None:
    x_NC, steps = problem(kind)
    share_GK, upstream_NC = some_shares(), torch.randn(7, 11, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    wanted = expected(x_NC, upstream_NC, share_GK, steps)
    seen = []
    leaves = [part.clone().requires_grad_() for part in (x_NC, share_GK, steps.scale_MGK)]
    zero = None if steps.zero_MGK is None else steps.zero_MGK.clone().requires_grad_()
    y_NC = mixture(leaves[0], leaves[1], Steps(leaves[2], zero, *steps[2:]), lambda *parts: seen.append(parts))
    y_NC.backward(upstream_NC)
    torch.testing.assert_close(y_NC.detach(), wanted["y"])
    for leaf, name in zip(leaves, ("x", "share", "scale"), strict=True):
        torch.testing.assert_close(leaf.grad, wanted[name], msg=name)
    if zero is not None:
        torch.testing.assert_close(zero.grad, wanted["zero"])
    squares_GK = torch.zeros_like(share_GK)
    for k in range(len(BITS)):
        lone_GK = torch.zeros_like(share_GK)
        lone_GK[:, k] = 1
        error_NC = expected(x_NC, upstream_NC, lone_GK, steps)["y"] - x_NC
        squares_GK[:, k].index_add_(0, steps.label_C, (upstream_NC * error_NC).square().sum(0))
    assert len(seen) == 1 and torch.equal(seen[0][0], x_NC) and torch.equal(seen[0][1], upstream_NC)
    torch.testing.assert_close(seen[0][2], squares_GK)


@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_one_width_a_group_equals_the_table_and_votes_reach_all_shares(kind: str) -> None:
    x_NC, steps = problem(kind)
    chosen_G, upstream_NC = torch.tensor([0, 3, 5]), torch.randn(7, 11, dtype=DOUBLE)
    taken_GK = torch.nn.functional.one_hot(chosen_G, len(BITS)).double()
    wanted = expected(x_NC, upstream_NC, taken_GK, steps)
    x, scale, share = (part.clone().requires_grad_() for part in (x_NC, steps.scale_MGK, some_shares()))
    given = steps._replace(scale_MGK=scale)
    vote(quantize(x, given.only(chosen_G)), x, share, given).backward(upstream_NC)
    torch.testing.assert_close(quantize(x, given.only(chosen_G)).detach(), wanted["y"])
    torch.testing.assert_close(x.grad, wanted["x"])
    torch.testing.assert_close(scale.grad, wanted["scale"])
    torch.testing.assert_close(share.grad, expected(x_NC, upstream_NC, some_shares(), steps)["share"])


def test_gradient_of_logits_is_that_of_finite_differences() -> None:
    """Through softmax, where the term that the shares' gradient leaves out has no effect."""
    x_NC, steps = problem("activations")
    upstream_NC = torch.randn(7, 11, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    theta_GK = torch.randn(3, len(BITS), dtype=DOUBLE, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (mixture(x_NC, torch.softmax(theta / 0.7, -1), steps) * upstream_NC).sum()

    loss(theta_GK).backward()
    for g in range(3):
        for k in range(len(BITS)):
            moved = torch.zeros_like(theta_GK)
            moved[g, k] = 1e-6
            slope = (loss(theta_GK + moved) - loss(theta_GK - moved)).item() / 2e-6
            assert theta_GK.grad is not None and theta_GK.grad[g, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("bits", BITS)
def test_a_group_takes_no_more_values_than_its_width_has_levels(bits: int) -> None:
    x_NC, steps = problem("activations", rows=4000)
    chosen_G = torch.full((3,), BITS.index(bits))
    y_NC = quantize(x_NC, steps.only(chosen_G))
    counts = [len(y_NC[:, steps.label_C == g].unique()) for g in range(3)]
    assert max(counts) <= 2**bits and min(counts) > 0.7 * 2**bits


def test_half_precision_keeps_its_dtype() -> None:
    x_NC, steps = problem("activations")
    steps = Steps(*(part.float() if part.is_floating_point() else part for part in steps if part is not None))
    x = x_NC.bfloat16().requires_grad_()
    y = mixture(x, some_shares().float(), steps)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (20, 8), (5, 8), (11, 3)])
def test_runs_are_even(channels: int, groups: int) -> None:
    sizes = torch.bincount(runs(channels, groups))
    assert len(sizes) == min(channels, groups) and sizes.max() - sizes.min() <= 1
    assert torch.equal(runs(channels, groups), runs(channels, groups).sort().values)
