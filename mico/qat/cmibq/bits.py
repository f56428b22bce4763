"""Shares of widths while they are learned: their temperature, their averages, and the price that keeps to a target.

Suffixes: I groups of all sites, K widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.quantizer import straight_through

HOT, COLD = 2.0, 0.2  # temperature at the start, and where the mixture ends


def temperature(progress: float, hard_share: float = 0.3) -> float:
    """tau after this part (0 to 1) of the steps in which widths are learned: geometric from HOT to COLD while they are
    mixed, then COLD.

    At COLD the mixture is nearly one width, so that little changes when only that one is taken.
    """
    mixed = min(1.0, max(0.0, progress) / (1 - hard_share)) if hard_share < 1 else 1.0
    return HOT * (COLD / HOT) ** mixed


def shares(logits_IK: torch.Tensor, tau: float) -> torch.Tensor:
    """softmax(theta / tau), (I, K)."""
    return torch.softmax(logits_IK / tau, -1)


def one_width(share_IK: torch.Tensor) -> torch.Tensor:
    """The most likely width alone in value, all shares in gradient."""
    taken_IK = functional.one_hot(share_IK.argmax(-1), share_IK.shape[-1]).to(share_IK.dtype)
    return straight_through(taken_IK, share_IK)


def average_bits(share_IK: torch.Tensor, cost_I: torch.Tensor) -> torch.Tensor:
    """Mean width, weighted by cost (MACs for activations, parameters for weights); differentiable in the shares."""
    bits_K = torch.tensor(BITS, dtype=share_IK.dtype, device=share_IK.device)
    return (share_IK @ bits_K) @ (cost_I / cost_I.sum()).to(share_IK)


def averages_by_modality(
    share_IK: torch.Tensor, cost_I: torch.Tensor, modality_I: torch.Tensor, names: Sequence[str]
) -> dict[str, float]:
    """The same of every modality that has groups, by name."""
    found = {}
    for number, name in enumerate(names):
        here_I = modality_I == number
        if bool(here_I.any()):
            found[name] = float(average_bits(share_IK[here_I].detach(), cost_I[here_I]))
    return found


class Price(nn.Module):
    """lambda of one target: the loss gets lambda gap + stiffness gap^2 / 2 with gap = average - target.

    `rise` is the dual ascent, once a step: lambda grows by rate gap. It may become negative, where the rate loss would
    push the average below the target. The quadratic term (augmented Lagrangian, Hestenes 1969) damps what would
    otherwise swing around the target.
    """

    value: torch.Tensor

    def __init__(self, target: float, rate: float = 0.02, stiffness: float = 1.0) -> None:
        super().__init__()
        self.target, self.rate, self.stiffness = target, rate, stiffness
        self.register_buffer("value", torch.zeros(()))

    def forward(self, average: torch.Tensor) -> torch.Tensor:
        """The penalty, a scalar."""
        gap = average - self.target
        return self.value * gap + 0.5 * self.stiffness * gap.square()

    @torch.no_grad()
    def rise(self, average: torch.Tensor) -> None:
        self.value += self.rate * (average.detach().float() - self.target)
