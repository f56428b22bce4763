"""The widths of all groups of one kind, activations or weights: learned, priced, and at last chosen for good.

Suffixes: I groups of all sites of the kind, K widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mico.errors import UserError
from mico.qat.cmibq.allocator import Allocator, GroupFacts, features
from mico.qat.cmibq.bits import HOT, Price, average_bits, averages_by_modality, one_width, shares
from mico.qat.cmibq.importance import normalized
from mico.qat.cmibq.knapsack import choose_widths, objective, softened
from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.quantizer import Choice, Quantizer
from mico.qat.cmibq.sites import MODALITIES

FACTS = tuple(GroupFacts.__dataclass_fields__)
FREE = -1  # of chosen_I: widths are still learned


class Widths(nn.Module):
    """Logits, price and choice of one kind. The quantizers belong to others; their groups lie one after the other.

    cost_I: weight of a group in the average. After a forward pass of the model share_IK holds what it used.
    """

    cost_I: torch.Tensor
    chosen_I: torch.Tensor

    def __init__(
        self, option: str, quantizers: Sequence[Quantizer], facts: GroupFacts, cost_I: torch.Tensor, target: float
    ) -> None:
        super().__init__()
        self.option, self.quantizers = option, tuple(quantizers)
        self.allocator = Allocator(len(cost_I))
        self.price = Price(target)
        for name in FACTS:
            self.register_buffer(name, getattr(facts, name))
        self.register_buffer("cost_I", cost_I.clone())  # of its own: ZeRO-3 gathers a buffer under one name alone
        self.register_buffer("chosen_I", torch.full((len(cost_I),), FREE, dtype=torch.int64))
        self.fixed = False
        self.share_IK: torch.Tensor | None = None  # of the last forward pass
        self.learned_IK: torch.Tensor | None = None  # what quantizers read of it; None once widths are fixed
        self.register_load_state_dict_post_hook(lambda module, keys: module._settle())

    def facts(self) -> GroupFacts:
        return GroupFacts(*(getattr(self, name) for name in FACTS))

    def _settle(self) -> None:
        """Follow chosen_I."""
        self.fixed = bool((self.chosen_I != FREE).all())

    def distribute(self, tau: float, soft: bool) -> None:
        """Give every quantizer its widths for the next forward pass."""
        if self.fixed:
            self.share_IK = nn.functional.one_hot(self.chosen_I, len(BITS)).float()
            self.learned_IK, chosen_I = None, self.chosen_I
        else:
            with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
                share_IK = shares(self.allocator(), tau)
                self.share_IK = share_IK if soft else one_width(share_IK)
            self.learned_IK, chosen_I = share_IK, share_IK.detach().argmax(-1)
        start = 0
        for quantizer in self.quantizers:
            here = slice(start, start := start + len(quantizer.error_GK))
            share_GK = None if self.learned_IK is None else self.learned_IK[here]
            quantizer.choice = Choice(share_GK, chosen_I[here], soft and not self.fixed)

    def average(self) -> torch.Tensor:
        """Mean width in the last forward pass, differentiable."""
        assert self.share_IK is not None, "no forward pass yet"
        return average_bits(self.share_IK, self.cost_I)

    def averages(self) -> dict[str, float]:
        assert self.share_IK is not None, "no forward pass yet"
        return averages_by_modality(self.share_IK, self.cost_I, self.facts().modality_I, MODALITIES)

    def refresh(self, use_importance: bool) -> None:
        """Features as they follow from the importance measured so far."""
        importance_I = torch.cat([quantizer.meter.importance_G for quantizer in self.quantizers])
        facts = self.facts()
        known_I = normalized(importance_I, facts.modality_I) if use_importance else torch.ones_like(importance_I)
        self.allocator.features_I6.copy_(features(facts, known_I))

    def distortion(self, use_importance: bool) -> torch.Tensor:
        """What every width loses, (I, K): as measured in backward passes; without importance the relative squared
        error where calibration saw it, by cost. Raises ValueError before anything was measured, UserError where a
        gradient was infinite or no number."""
        if not use_importance:
            return torch.cat([quantizer.error_GK for quantizer in self.quantizers]) * self.cost_I[:, None]
        if not all(int(quantizer.meter.batches) for quantizer in self.quantizers):
            raise ValueError("no backward pass has measured what the widths lose: train before widths are chosen")
        found_IK = torch.cat([quantizer.meter.distortion_GK for quantizer in self.quantizers])
        if not bool(found_IK.isfinite().all()):
            raise UserError(
                f"{self.option} {self.price.target:g}: widths cannot be chosen, gradients are infinite or no number: "
                "lower --learning-rate"
            )
        return found_IK

    @torch.no_grad()
    def begin(self, use_importance: bool) -> None:
        """Logits from what was measured of the dense model, for widths to be learned from there.

        Raises UserError where the target cannot be met in the end: before anything is trained.
        """
        self.refresh(use_importance)
        loss_IK = objective(self.distortion(use_importance), self.price.target)
        choose_widths(loss_IK, self.cost_I, self.price.target, self.option)
        self.allocator.residual.copy_(softened(loss_IK, self.cost_I, self.price.target, HOT))

    @torch.no_grad()
    def harden(self, use_importance: bool, preference: float) -> None:
        """Choose for good. Raises UserError where the target cannot be met (mico/qat/cmibq/knapsack.py)."""
        distortion_IK = self.distortion(use_importance)
        learned_IK = torch.log_softmax(self.allocator().double(), -1)
        loss_IK = objective(distortion_IK, self.price.target) - preference * learned_IK
        self.fix(choose_widths(loss_IK, self.cost_I, self.price.target, self.option))

    @torch.no_grad()
    def fix(self, chosen_I: torch.Tensor) -> None:
        """Take these widths, places in BITS, from now on."""
        self.chosen_I.copy_(chosen_I)
        self._settle()
        self.distribute(1.0, soft=False)
