"""Where steps start: what calibration sees of every site, and the steps of least squared error for each width.

Suffixes: T tokens, C channels, G groups, K widths, V values of one group, A candidates, R rows of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.sites import Site
from mico.qat.paretoq import COARSE, FINE

ROWS = 512  # tokens of every site that are kept
VALUES = 4096  # of a group, over which steps are searched
ENDS = (0.0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.16, 0.25)  # quantiles tried as the lowest level; mirrored, the highest
NEAR = (0.85, 0.93, 1.0, 1.07, 1.15)  # of the best step, tried with
MOVES = (-0.5, -0.25, 0.0, 0.25, 0.5)  # these moves of the zero point
LEAST = 1e-8  # of a step: of a group that is constant
CHUNK = 256  # rows of a weight searched at a time


@dataclass(frozen=True)
class Seen:
    """rows_TC: float32 rows on the CPU, evenly spaced over all batches; ends_2C: the least and the largest value of
    every channel over all tokens, as a few tokens may carry far larger ones than all others; tokens: mean number a
    sample."""

    rows_TC: torch.Tensor
    ends_2C: torch.Tensor
    tokens: float

    @property
    def extended_TC(self) -> torch.Tensor:
        """The rows, and the ends as two more: steps that leave them out pay for it."""
        return torch.cat([self.rows_TC, self.ends_2C])


@torch.no_grad()
def observe(model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any]]) -> dict[str, Seen]:
    """What every site reads in a forward pass of each batch (the keyword arguments of the model), by its name.

    Raises ValueError where no batch is given, or a site is not reached: its steps would be guesses.
    """
    rows: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    ends: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    tokens = dict.fromkeys(rows, 0)
    samples, given = 0, [dict(batch) for batch in batches]

    def keep(name: str, x: torch.Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        tokens[name] += len(flat)
        ends[name].append(torch.stack([flat.amin(0), flat.amax(0)]).float().cpu())
        spaced = flat[:: max(1, len(flat) * len(given) // ROWS)]
        rows[name].append(spaced.to("cpu", torch.float32, copy=True))  # a view would hold all of x

    hooks = [
        model.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda module, args, name=site.name: keep(name, args[0])  # type: ignore[misc]
        )
        for site in sites
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in given:
            model(**{name: value for name, value in batch.items() if name != "labels"})
            samples += len(batch["input_ids"])
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    missing = [name for name, parts in rows.items() if not parts]
    if missing:
        raise ValueError(f"no calibration sample reaches {missing[0]}: give samples with pictures")
    return {
        name: Seen(torch.cat(parts), _outermost(torch.stack(ends[name])), tokens[name] / samples)
        for name, parts in rows.items()
    }


def _outermost(ends_B2C: torch.Tensor) -> torch.Tensor:
    return torch.stack([ends_B2C[:, 0].amin(0), ends_B2C[:, 1].amax(0)])


# --- activations ----------------------------------------------------------------------------------------------------


def activation_steps(rows_TC: torch.Tensor, label_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale, zero, squared error over variance) of every group and width, (G, K) each."""
    made = [_group_steps(_thinned(rows_TC[:, label_C == g])) for g in range(int(label_C.max()) + 1)]
    scale_GK, zero_GK, error_GK = (torch.stack(part) for part in zip(*made, strict=True))
    return scale_GK, zero_GK, error_GK


def _thinned(values: torch.Tensor) -> torch.Tensor:
    """Sorted, and at most VALUES of them, evenly spaced, both ends included."""
    ordered_V = values.reshape(-1).sort().values
    if len(ordered_V) <= VALUES:
        return ordered_V
    return ordered_V[torch.linspace(0, len(ordered_V) - 1, VALUES).round().long()]


def _group_steps(values_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    last = len(values_V) - 1
    places = torch.tensor([round(end * last) for end in ENDS])
    low_A = values_V[places].repeat_interleave(len(ENDS))
    high_A = values_V[last - places].repeat(len(ENDS))
    variance = values_V.var(unbiased=False).clamp_min(LEAST**2)
    best = [_search(values_V, low_A, high_A, bits) for bits in BITS]
    scale_K, zero_K, error_K = (torch.stack(part) for part in zip(*best, strict=True))
    return scale_K, zero_K, error_K / variance


def _search(
    values_V: torch.Tensor, low_A: torch.Tensor, high_A: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels from low to high, as they are and moved so that 0 is one of them; then steps and zeros near the best."""
    scale_A = ((high_A - low_A) / (2**bits - 1)).clamp_min(LEAST)
    zero_A = (high_A + low_A) / 2 / scale_A
    scale_A, zero_A = scale_A.repeat(2), torch.cat([zero_A, (zero_A - 0.5).round() + 0.5])
    scale, zero, _ = _best(values_V, scale_A, zero_A, bits)
    near_A = torch.tensor(NEAR).repeat_interleave(len(MOVES))
    scale_A = (scale * near_A).clamp_min(LEAST)
    return _best(values_V, scale_A, zero * scale / scale_A + torch.tensor(MOVES).repeat(len(NEAR)), bits)


def _best(
    values_V: torch.Tensor, scale_A: torch.Tensor, zero_A: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = (2.0**bits - 1) / 2
    level_AV = ((values_V / scale_A[:, None] - zero_A[:, None] - 0.5).round_() + 0.5).clamp_(-half, half)
    error_A = ((level_AV + zero_A[:, None]) * scale_A[:, None] - values_V).square_().mean(1)
    least = error_A.argmin()
    return scale_A[least], zero_A[least], error_A[least]


# --- weights --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_steps(
    weight_RC: torch.Tensor, label_C: torch.Tensor, keep_RC: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale (R, G, K), squared error over the second moment (G, K)), every row of a group at its best step.

    keep_RC: weights that are not pruned (None: all); the others need no step.
    """
    groups = int(label_C.max()) + 1
    kept_RC = torch.ones_like(weight_RC, dtype=torch.bool) if keep_RC is None else keep_RC.bool()
    weight_RC = weight_RC * kept_RC
    chunks = list(zip(weight_RC.float().split(CHUNK), kept_RC.split(CHUNK), strict=True))
    parts = [[_best_steps(rows, kept, label_C, groups, bits) for bits in BITS] for rows, kept in chunks]
    scale_RGK = torch.cat([torch.stack([scale for scale, _ in part], -1) for part in parts])
    error_GK = torch.stack([torch.stack([error for _, error in part], -1) for part in parts]).sum(0)
    energy_G = _sums(weight_RC.float().square(), label_C, groups).sum(0).clamp_min(LEAST**2)
    return scale_RGK, error_GK / energy_G[:, None]


def _best_steps(
    weight_RC: torch.Tensor, kept_RC: torch.Tensor, label_C: torch.Tensor, groups: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    half = (2.0**bits - 1) / 2
    zeros_RG = weight_RC.new_zeros(len(weight_RC), groups)
    widest_RG = zeros_RG.scatter_reduce(1, label_C.expand_as(weight_RC), weight_RC.abs(), "amax")
    best_RG = (widest_RG / half).clamp_min(LEAST)
    least_RG = torch.full_like(best_RG, torch.inf)
    for candidates in (COARSE, FINE):
        middle_RG = best_RG
        for factor in candidates.tolist():
            tried_RG = (middle_RG * factor).clamp_min(LEAST)
            tried_RC = tried_RG.index_select(1, label_C)
            level_RC = ((weight_RC / tried_RC - 0.5).round_() + 0.5).clamp_(-half, half)
            error_RG = _sums((level_RC * tried_RC - weight_RC).square_() * kept_RC, label_C, groups)
            better_RG = error_RG < least_RG
            best_RG, least_RG = torch.where(better_RG, tried_RG, best_RG), torch.where(better_RG, error_RG, least_RG)
    return best_RG, least_RG.sum(0)


def _sums(values_RC: torch.Tensor, label_C: torch.Tensor, groups: int) -> torch.Tensor:
    return values_RC.new_zeros(len(values_RC), groups).index_add_(1, label_C, values_RC)
