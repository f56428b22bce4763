"""The rate against plain arithmetic, and against the entropy of what is really quantized."""

from __future__ import annotations

import math

import pytest
import torch

from mico.qat.cmibq.rate import LogisticPrior, rate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logistic(count: int, channels: int, mean: float, spread: float) -> torch.Tensor:
    u = torch.rand(count, channels, generator=generator(1), dtype=torch.float64)
    return (mean + spread * (u / (1 - u)).log()).float()


def entropy(x_TC: torch.Tensor, step: float) -> float:
    """Bits a value of round(x / step), from counts, mean over channels; the rounding has a random phase."""
    found = []
    for c, phase in enumerate(torch.rand(x_TC.shape[1], generator=generator(2)).tolist()):
        counts = (x_TC[:, c] / step + phase).round().unique(return_counts=True)[1].double()
        p = counts / counts.sum()
        found.append(-(p * p.log2()).sum().item())
    return sum(found) / len(found)


def test_bits_are_minus_log_of_the_probability_of_a_bin() -> None:
    prior = LogisticPrior(torch.tensor([0.3, -1.0]), torch.tensor([1.0, 2.0]))
    prior.shift_C.data, prior.log_spread_C.data = torch.tensor([0.1, -0.2]), torch.tensor([0.2, -0.1])
    z_TC, step_1C = torch.linspace(-6, 6, 14).view(7, 2), torch.tensor([[0.5, 0.25]])
    found = prior.bits(z_TC, step_1C)
    for t in range(7):
        for c in range(2):
            start = [1.0, 2.0][c] * math.sqrt(3) / math.pi
            mean = [0.3, -1.0][c] + start * [0.1, -0.2][c]
            spread, z, half = start * math.exp([0.2, -0.1][c]), z_TC[t, c].item(), step_1C[0, c].item() / 2
            low, high = (1 / (1 + math.exp(-(edge - mean) / spread)) for edge in (z - half, z + half))
            assert found[t, c].item() == pytest.approx(-math.log2(high - low), rel=1e-4)


def test_far_tails_stay_finite_and_have_gradients() -> None:
    prior = LogisticPrior(torch.zeros(1), torch.ones(1))
    z_TC = torch.tensor([[-400.0], [400.0], [0.0]], requires_grad=True)
    found = prior.bits(z_TC, torch.tensor([[1e-4]]))
    found.sum().backward()
    assert torch.isfinite(found).all() and z_TC.grad is not None and torch.isfinite(z_TC.grad).all()
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-5)
    assert found[0].item() > 400 * math.pi / math.sqrt(3) / math.log(2)


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_near_the_entropy_of_a_logistic_source_with_the_right_prior(step: float) -> None:
    x_TC = logistic(40_000, 4, 0.7, 1.0)
    prior = LogisticPrior(x_TC.mean(0), x_TC.std(0))
    found, counted = rate(x_TC, torch.full((1, 4), step), prior, generator()).item(), entropy(x_TC, step)
    assert counted - 0.01 <= found <= counted + 0.05


@pytest.mark.parametrize("source", ["normal", "uniform", "two"])
def test_never_below_the_entropy_of_the_quantized_values(source: str) -> None:
    make = generator(3)
    x_TC = {
        "normal": torch.randn(20_000, 4, generator=make),
        "uniform": 4 * torch.rand(20_000, 4, generator=make),
        "two": torch.randn(20_000, 4, generator=make) / 4 + torch.randint(2, (20_000, 4), generator=make) * 3,
    }[source]
    for mean, deviation in ((x_TC.mean(0), x_TC.std(0)), (x_TC.mean(0) + 1, 0.4 * x_TC.std(0))):
        found = rate(x_TC, torch.full((1, 4), 0.5), LogisticPrior(mean, deviation), generator()).item()
        assert found >= entropy(x_TC, 0.5) - 0.01


def test_learning_the_prior_and_larger_steps_lower_the_rate() -> None:
    x_TC = logistic(2000, 4, 3.0, 2.0)
    prior = LogisticPrior(torch.zeros(4), torch.ones(4))
    step_1C = torch.full((1, 4), 0.5, requires_grad=True)
    first = rate(x_TC, step_1C, prior, generator())
    first.backward()
    assert step_1C.grad is not None and torch.all(step_1C.grad < 0)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for turn in range(150):
        optimizer.zero_grad()
        rate(x_TC, step_1C.detach(), prior, generator(turn)).backward()
        optimizer.step()
    learned = rate(x_TC, step_1C, prior, generator()).item()
    assert learned < first.item() - 1 and learned == pytest.approx(entropy(x_TC, 0.5), abs=0.1)


def test_gradients_are_those_of_finite_differences() -> None:
    x_TC = logistic(20, 3, 0.0, 1.0).requires_grad_()
    prior = LogisticPrior(torch.zeros(3), torch.ones(3))
    step_1C = torch.tensor([[0.5, 1.0, 2.0]], requires_grad=True)
    rate(x_TC, step_1C, prior, generator()).backward()
    for leaf, place in ((x_TC, (4, 1)), (step_1C, (0, 2)), (prior.shift_C, (0,)), (prior.log_spread_C, (2,))):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf[place] += sign * 1e-2
                ends.append(rate(x_TC, step_1C, prior, generator()).item())
                leaf[place] -= sign * 1e-2
        assert leaf.grad is not None
        assert leaf.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=2e-5)
