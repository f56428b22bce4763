"""What is known of every group of channels, and the logits of its widths made from it. Suffix I: groups of all sites.

logits = MLP(features) + a free residual. The network lets groups learn from groups like them, so that bits move in few
steps; the residual lets each leave the others. Both start at zero, all widths equally likely; Widths.begin then gives
the residual what was measured of the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mico.qat.cmibq.levels import BITS

HIDDEN = 32
NAMES = ("log importance", "log variance", "log max/sigma", "log params", "log MACs", "modality")
TINY = 1e-12  # below which a logarithm is not taken


@dataclass(frozen=True)
class GroupFacts:
    """What does not change while bits are learned, by group: (I,) each.

    modality_I: place in sites.MODALITIES; params_I: weights that meet the group's channels (of a weight's group: its
    own); macs_I: their multiplications a sample.
    """

    variance_I: torch.Tensor
    peak_I: torch.Tensor  # max |x| / sigma
    params_I: torch.Tensor
    macs_I: torch.Tensor
    modality_I: torch.Tensor


def features(facts: GroupFacts, importance_I: torch.Tensor) -> torch.Tensor:
    """(I, 6), float32, detached: the columns of NAMES, each with mean 0 and variance 1 where it is not constant."""
    logarithms = [
        values.float().clamp_min(TINY).log()
        for values in (importance_I, facts.variance_I, facts.peak_I, facts.params_I, facts.macs_I)
    ]
    table_I6 = torch.stack([*logarithms, facts.modality_I.float()], 1).detach()
    spread_6 = table_I6.std(0, unbiased=False)
    return (table_I6 - table_I6.mean(0)) / torch.where(spread_6 > 1e-6, spread_6, 1.0)


class Allocator(nn.Module):
    """Logits theta (I, K) of the widths of all groups of one kind (activations or weights)."""

    features_I6: torch.Tensor

    def __init__(self, groups: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the same in every process, and nothing else draws from it
            torch.manual_seed(0)
            self.mlp = nn.Sequential(nn.Linear(len(NAMES), HIDDEN), nn.GELU(), nn.Linear(HIDDEN, len(BITS)))
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[2].bias)  # type: ignore[arg-type]
        self.residual = nn.Parameter(torch.zeros(groups, len(BITS)))
        self.register_buffer("features_I6", torch.zeros(groups, len(NAMES)))

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.residual.device.type, enabled=False):
            return self.mlp(self.features_I6) + self.residual
