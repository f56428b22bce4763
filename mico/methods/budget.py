"""One budget of bits for the whole model: what every group costs and loses, and who gets how many bits.

Measured on the dense model before the walk; while the walk goes on, what finished layers really took is
subtracted and the rest is allocated anew, so that the sum is met and not only its estimate.
Suffixes: R rows, C channels, G groups, W widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mico.channels.allocation import WIDTHS, RateTable, allocate_rate, allocate_thresholds
from mico.channels.plan import LayerPlan
from mico.methods.method import output_energy
from mico.methods.sweep import Factor, keep_mask
from mico.packed.grid import group_errors
from mico.packed.quantized import GROUP_HEADER_BITS, SCALE_BITS, QuantizedWeight

SAMPLED_ROWS = 256  # of a Linear, evenly spaced, stand for all of them in the rate table


@dataclass(frozen=True)
class Demand:
    """What one Linear may spend bits on: its rate table, and the importance of each group."""

    table: RateTable
    importance_G: np.ndarray


def demand(
    weight_RC: torch.Tensor,
    gram_CC: torch.Tensor,
    factor: Factor,
    plan: LayerPlan,
    rates: bool,
    widths: tuple[int, ...] = WIDTHS,
) -> Demand:
    """Measure one Linear on the dense model's statistics, at each of the `widths` its groups may take.

    Distortion of group g at b bits: sum over the likely survivors of (Q_b(w) - w)² / U_ii², the error that the
    sweep cannot push on, as a share of the Linear's output energy tr(W H Wᵀ): a share, because what a block does
    with an output is scaled to its size. `rates` False leaves the table at zero (thresholds do not read it).
    """
    label_C, groups = plan.groups.label_C, plan.groups.count
    weight_RC = weight_RC.float()
    cost_C = factor.pivots_C.float().square().reciprocal().to(weight_RC.device)
    keep_RC = keep_mask(weight_RC.square() * cost_C, plan.sparsity, plan.pattern, per_row=False)
    keep_RC = torch.ones_like(weight_RC, dtype=torch.bool) if keep_RC is None else keep_RC

    def by_group(values_C: torch.Tensor) -> np.ndarray:
        sums_G = torch.zeros(groups, dtype=torch.float64).index_add_(0, label_C, values_C.double().cpu())
        return sums_G.numpy()

    kept_G = by_group(keep_RC.sum(0))
    energy_C = gram_CC.diagonal().to(weight_RC.device) * weight_RC.square().sum(0)
    importance_G = by_group(energy_C) / max(float(energy_C.sum()), 1e-30)
    distortion_GW = np.zeros((groups, len(widths)))
    if rates:
        rows = torch.linspace(0, len(weight_RC) - 1, min(SAMPLED_ROWS, len(weight_RC))).long()
        sample_RC, weighing_RC = weight_RC[rows], (cost_C * keep_RC)[rows]
        scale = len(weight_RC) / len(rows) / max(output_energy(weight_RC, gram_CC), 1e-30)
        for w, bits in enumerate(widths):
            error_G = group_errors(sample_RC, weighing_RC, label_C, groups, bits, plan.integer)
            distortion_GW[:, w] = error_G.cpu().numpy() * scale
    return Demand(RateTable(distortion_GW, kept_G), importance_G)


def shared(demands: Sequence[Demand]) -> Demand:
    """Linears that must take one width together, as a Linear of one group."""
    table = RateTable(
        sum(need.table.distortion_GW.sum(0, keepdims=True) for need in demands),  # type: ignore[arg-type]
        np.array([sum(need.table.kept_G.sum() for need in demands)]),
    )
    return Demand(table, np.array([sum(need.importance_G.sum() for need in demands)]))


def plain_bits(weight_RC: torch.Tensor, wbits: int) -> int:
    """Scales and zeros of the plain layout: one 16-bit scale and one `wbits` zero a row."""
    return len(weight_RC) * (SCALE_BITS + wbits)


def factored_bits(weight_RC: torch.Tensor, groups: int) -> int:
    """Scales and widths of the factored layout."""
    return SCALE_BITS * len(weight_RC) + (SCALE_BITS + GROUP_HEADER_BITS) * (groups if groups > 1 else 0)


class Budget:
    """Bits for codes that are left, and the Linears that still wait for theirs (in the order of the walk).

    A name stands for one Linear, or for the `shared` demand of several.
    """

    def __init__(
        self, demands: dict[str, Demand], allocation: str, code_bits: float, widths: tuple[int, ...] = WIDTHS
    ) -> None:
        self._waiting, self._allocation, self._left, self._widths = dict(demands), allocation, code_bits, widths
        self._kept = 0

    def widths(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Widths of the groups of these Linears, allocated together with all that are still waiting."""
        waiting = list(self._waiting.values())
        if self._allocation == "rate":
            found = allocate_rate([d.table for d in waiting], self._left, self._widths)
        else:
            kept = [d.table.kept_G for d in waiting]
            found = allocate_thresholds([d.importance_G for d in waiting], kept, self._left)
        return {name: bits for name, bits in zip(self._waiting, found, strict=True) if name in names}

    def spend(self, name: str, *finished: QuantizedWeight) -> None:
        """Take what the codes of the finished Linears of a name really cost out of the budget."""
        for quantized in finished:
            self._left -= quantized.stored_bits()["codes"]
            self._kept += int(quantized.kept_G().sum())
        del self._waiting[name]

    @property
    def exceeded(self) -> bool:
        return self._left < 0

    @property
    def missed_by(self) -> float:
        """How far the finished Linears are from the budget, in bits a kept weight; meaningful when none waits."""
        return abs(self._left) / max(self._kept, 1)
