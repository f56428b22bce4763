"""Temperature, average widths and prices."""

from __future__ import annotations

import itertools

import pytest
import torch

from mico.qat.cmibq.allocator import Allocator, GroupFacts, features
from mico.qat.cmibq.bits import COLD, HOT, Price, average_bits, averages_by_modality, one_width, shares, temperature
from mico.qat.cmibq.levels import BITS


def test_temperature_falls_until_one_width_is_taken_and_stays() -> None:
    taus = [temperature(progress / 20) for progress in range(21)]
    assert taus[0] == HOT == 2.0 and taus[14:] == pytest.approx([COLD] * 7) and COLD == 0.2
    assert all(later < sooner for sooner, later in itertools.pairwise(taus[:15]))
    assert temperature(0.35) == pytest.approx((HOT * COLD) ** 0.5)  # geometric: half way in the logarithm
    assert temperature(0.0, 1.0) == COLD and temperature(1.0, 0.0) == pytest.approx(COLD)


def test_averages_are_weighted() -> None:
    share_IK = torch.softmax(torch.randn(5, len(BITS), dtype=torch.float64), -1).requires_grad_()
    cost_I = torch.tensor([1.0, 5.0, 2.0, 2.0, 7.0])
    modality_I = torch.tensor([0, 0, 2, 2, 2])
    each = [sum(p * b for p, b in zip(row.tolist(), BITS, strict=True)) for row in share_IK]

    def mean(places: list[int]) -> float:
        return sum(cost_I[i].item() * each[i] for i in places) / sum(cost_I[i].item() for i in places)

    average = average_bits(share_IK, cost_I)
    assert average.item() == pytest.approx(mean([0, 1, 2, 3, 4]))
    average.backward()
    expected_IK = torch.outer(cost_I.double() / 17, torch.tensor(BITS).double())
    torch.testing.assert_close(share_IK.grad, expected_IK)
    found = averages_by_modality(share_IK, cost_I, modality_I, ("vision", "projector", "text"))
    assert found == pytest.approx({"vision": mean([0, 1]), "text": mean([2, 3, 4])})


def test_one_width_has_the_value_of_the_likeliest_and_the_gradient_of_all() -> None:
    theta_IK = torch.randn(4, len(BITS)).requires_grad_()
    share_IK = shares(theta_IK, 0.5)
    taken_IK = one_width(share_IK)
    torch.testing.assert_close(taken_IK.detach(), torch.eye(len(BITS))[theta_IK.argmax(-1)])
    weight_IK = torch.randn(4, len(BITS))
    (of_taken,) = torch.autograd.grad((taken_IK * weight_IK).sum(), theta_IK, retain_graph=True)
    (of_share,) = torch.autograd.grad((share_IK * weight_IK).sum(), theta_IK)
    assert torch.equal(of_taken, of_share) and of_share.abs().sum() > 0


@pytest.mark.parametrize("pull", [-1.0, 1.0])
def test_price_brings_the_average_to_its_target(pull: float) -> None:
    """Against a loss that wants more bits, and one that wants fewer."""
    theta_IK = torch.zeros(8, len(BITS)).requires_grad_()
    cost_I, price = torch.arange(1.0, 9.0), Price(4.0)
    optimizer = torch.optim.Adam([theta_IK], lr=1e-2)
    for _ in range(600):
        average = average_bits(shares(theta_IK, 1.0), cost_I)
        optimizer.zero_grad()
        (pull * average + price(average)).backward()
        optimizer.step()
        price.rise(average)
    assert average.item() == pytest.approx(4.0, abs=0.02)
    assert price.value.item() == pytest.approx(-pull, abs=0.1)  # the loss's own slope, by which it is balanced


def test_penalty_is_the_augmented_lagrangian() -> None:
    price = Price(4.0, rate=0.5, stiffness=3.0)
    price.rise(torch.tensor(4.6))
    average = torch.tensor(4.2, requires_grad=True)
    price(average).backward()
    assert price(average).item() == pytest.approx(0.3 * 0.2 + 1.5 * 0.04, rel=1e-5)
    assert average.grad is not None and average.grad.item() == pytest.approx(0.3 + 3 * 0.2, rel=1e-5)
    assert "value" in price.state_dict()


def facts(count: int) -> GroupFacts:
    make = torch.Generator().manual_seed(0)
    columns = [torch.rand(count, generator=make) + 0.1 for _ in range(4)]
    return GroupFacts(*columns, torch.arange(count) % 3)


def test_features_are_standardized_logarithms() -> None:
    known, importance_I = facts(12), torch.rand(12) + 0.1
    table_I6 = features(known, importance_I)
    columns = (importance_I, known.variance_I, known.peak_I, known.params_I, known.macs_I)
    for place, values in enumerate(columns):
        logarithms = values.double().log()
        expected = (logarithms - logarithms.mean()) / logarithms.std(unbiased=False)
        torch.testing.assert_close(table_I6[:, place].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.unique(table_I6[:, 5]).numel() == 3
    same_I6 = features(known, torch.zeros(12))  # nothing known yet: the column is 0, not infinite
    assert torch.all(same_I6[:, 0] == 0) and torch.isfinite(same_I6).all()


def test_all_widths_start_equally_likely_and_both_parts_learn() -> None:
    state = torch.random.get_rng_state()
    allocator = Allocator(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    allocator.features_I6.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.all(allocator() == 0)
    optimizer = torch.optim.SGD(allocator.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (allocator() * torch.randn(5, len(BITS), generator=torch.Generator().manual_seed(2))).sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in allocator.parameters())
    assert torch.equal(allocator(), allocator.mlp(allocator.features_I6) + allocator.residual)
