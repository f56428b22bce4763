"""The final choice of widths against every choice there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from mico.errors import UserError
from mico.qat.cmibq.knapsack import TOLERANCE, choose_widths, objective
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
    plain = choose_widths(objective(distortion_IK, logits_IK, 0.0, 4.0), cost_I, 4.0)
    assert [BITS[k] for k in plain.tolist()] == [4, 4]
    learned = choose_widths(objective(distortion_IK, logits_IK, 10.0, 4.0), cost_I, 4.0)
    assert [BITS[k] for k in learned.tolist()] == [2, 6]
    weak = choose_widths(objective(distortion_IK, logits_IK, 0.1, 4.0), cost_I, 4.0)
    assert [BITS[k] for k in weak.tolist()] == [4, 4]
