"""The final choice of widths against every choice there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from mico.errors import UserError
from mico.qat.cmibq.knapsack import REACH, TOLERANCE, choose_widths, objective, softened
from mico.qat.cmibq.levels import BITS

GROUPS = 3000


def brute_force(loss_IK: torch.Tensor, cost_I: torch.Tensor, target: float, tolerance: float) -> float:
    """The least loss over all choices whose average is allowed; infinity where none is."""
    least = float("inf")
    share_I = cost_I / cost_I.sum()
    for choice in itertools.product(range(len(BITS)), repeat=len(cost_I)):
        average = sum(share_I[i].item() * BITS[k] for i, k in enumerate(choice))
        if target - tolerance - 1e-9 <= average <= target + 1e-9:
            least = min(least, sum(loss_IK[i, k].item() for i, k in enumerate(choice)))
    return least


@pytest.mark.parametrize("seed", range(6))
def test_choice_is_the_best_of_all(seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    cost_I = torch.randint(1, 9, (5,), generator=make).double()
    falling = torch.rand(5, 1, generator=make) * 4.0 ** -torch.tensor(BITS)
    loss_IK = (falling * (1 + 0.5 * torch.rand(5, len(BITS), generator=make))).double()
    if seed % 2:
        loss_IK = torch.rand(5, len(BITS), generator=make).double()  # not even falling
    target, tolerance = [3.0, 4.0, 5.25][seed % 3], 0.3
    least = brute_force(loss_IK, cost_I, target, tolerance)
    chosen_I = choose_widths(loss_IK, cost_I, target, tolerance=tolerance)
    assert loss_IK.gather(1, chosen_I[:, None]).sum().item() == pytest.approx(least, rel=1e-7)
    average = (torch.tensor(BITS)[chosen_I] * cost_I).sum() / cost_I.sum()
    assert target - tolerance - 1e-6 <= average <= target + 1e-6


def test_a_large_model_meets_its_target() -> None:
    """About the groups that a LLaVA of 7B parameters has; far better than one width for all."""
    make = torch.Generator().manual_seed(0)
    cost_I = torch.tensor([1.0, 3.0, 4.0, 43 / 16])[torch.randint(4, (GROUPS,), generator=make)] * 4096**2
    noise = torch.exp(2 * torch.randn(GROUPS, 1, generator=make))
    loss_IK = noise * cost_I[:, None] * 4.0 ** -torch.tensor(BITS)
    chosen_I = choose_widths(loss_IK, cost_I, 4.0)
    average = (torch.tensor(BITS)[chosen_I] * cost_I).sum() / cost_I.sum()
    assert 4.0 - TOLERANCE <= average <= 4.0 + 1e-6
    assert loss_IK.gather(1, chosen_I[:, None]).sum() < 0.5 * loss_IK[:, BITS.index(4)].sum()


@pytest.mark.parametrize("target", [2.0, 8.0])
def test_the_ends_can_be_chosen(target: float) -> None:
    chosen_I = choose_widths(torch.rand(7, len(BITS)), torch.rand(7) + 0.1, target)
    assert torch.equal(torch.tensor(BITS)[chosen_I], torch.full((7,), int(target)))


def test_a_target_out_of_reach_is_refused_by_its_option() -> None:
    with pytest.raises(UserError, match=r"--target-bits-act 4\.5: no choice among widths .* over 1 groups"):
        choose_widths(torch.rand(1, len(BITS)), torch.ones(1), 4.5, "--target-bits-act")
    with pytest.raises(UserError, match=r"--target-bits 1\.5"):
        choose_widths(torch.rand(9, len(BITS)), torch.ones(9), 1.5)


def test_learned_logits_decide_between_equal_distortions_alone() -> None:
    distortion_IK = 4.0 ** -torch.tensor(BITS).float().expand(2, -1)
    logits_IK = torch.zeros(2, len(BITS))
    logits_IK[1, BITS.index(6)] = 3.0  # the second group wants 6 bits, so the first gets 2 at an average of 4
    cost_I = torch.ones(2)

    def chosen(preference: float) -> list[int]:
        """As Widths.harden puts it together."""
        loss_IK = objective(distortion_IK, 4.0) - preference * torch.log_softmax(logits_IK.double(), -1)
        return [BITS[k] for k in choose_widths(loss_IK, cost_I, 4.0).tolist()]

    assert chosen(0.0) == [4, 4] and chosen(10.0) == [2, 6] and chosen(0.1) == [4, 4]


@pytest.mark.parametrize("target", [3.5, 4.0, 6.0])
def test_softened_shares_meet_the_target_at_one_price(target: float) -> None:
    """The optimality conditions of a convex problem: loss + tau log share falls by the price of its bits alone."""
    make = torch.Generator().manual_seed(0)
    loss_IK = torch.rand(7, 1, generator=make, dtype=torch.float64) * 2.0 ** -torch.tensor(BITS).double() * 9
    cost_I = torch.rand(7, generator=make, dtype=torch.float64) + 0.5
    logits_IK = softened(loss_IK, cost_I, target, 2.0)
    share_IK, bits_K = torch.softmax(logits_IK / 2, -1), torch.tensor(BITS, dtype=torch.float64)
    assert float(cost_I / cost_I.sum() @ (share_IK @ bits_K)) == pytest.approx(target, abs=1e-6)
    value_IK = loss_IK + 2 * share_IK.log()
    price_IK = -(value_IK[:, 1:] - value_IK[:, :1]) / (bits_K[1:] - bits_K[0]) / cost_I[:, None]
    torch.testing.assert_close(price_IK, price_IK[:1, :1].expand_as(price_IK))


def test_softened_logits_stay_within_reach_of_learning() -> None:
    loss_IK = 1e9 * 4.0 ** -torch.tensor(BITS).double().expand(3, -1) * torch.tensor([[1.0], [1e-6], [1e-12]])
    logits_IK = softened(loss_IK, torch.ones(3), 4.0, 2.0)
    assert float(logits_IK.amax(1).abs().max()) == 0 and float(logits_IK.min()) == -REACH
    assert float(torch.softmax(logits_IK / 2, -1).mean(0) @ torch.tensor(BITS).double()) == pytest.approx(4, abs=1e-3)
