"""How many bits every group of every Linear gets under one budget. Suffixes: G groups, W widths.

`rate` puts one price on a stored bit for the whole model; `thresholds` is the rule of the research scripts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
Array = np.ndarray
HIGH, LOW = 0.15, 0.05  # importance above HIGH: 8 bits; between: 4-6; below LOW: 2-3


@dataclass(frozen=True)
class RateTable:
    """One Linear: distortion_GW[g, w] of group g at the w-th width, and the weights it stores, kept_G."""

    distortion_GW: Array
    kept_G: Array


def allocate_rate(
    tables: Sequence[RateTable], budget_bits: float, widths: tuple[int, ...] = WIDTHS
) -> list[tuple[int, ...]]:
    """Widths that minimise the summed distortion with sum(kept * width) <= budget_bits, over all Linears at once.

    widths: those that a group may take, ascending, one for every column of the tables.

    Each group's distortion is replaced by its lower convex hull; then taking hull segments in the order of their
    slope (distortion saved per bit) is the Lagrangian solution for one price λ, and going on with every later
    segment that still fits spends the remainder. A budget below the narrowest everywhere gives that.
    """
    kept = np.concatenate([t.kept_G for t in tables]).astype(np.float64)
    distortion = np.concatenate([t.distortion_GW for t in tables]).astype(np.float64)
    steps = [step for g in range(len(kept)) for step in _hull_steps(g, distortion[g], kept[g], widths)]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    level = np.zeros(len(kept), dtype=np.int64)
    left = budget_bits - kept.sum() * widths[0]
    for _slope, group, low, high in steps:
        cost = kept[group] * (widths[high] - widths[low])
        if level[group] == low and cost <= left:
            level[group], left = high, left - cost
    _fill_remainder(level, kept, distortion, left, widths)
    return _split([widths[w] for w in level], [len(t.kept_G) for t in tables])


def _hull_steps(
    group: int, distortion_W: Array, kept: float, widths: tuple[int, ...]
) -> list[tuple[float, int, int, int]]:
    """(distortion saved per bit, group, from width index, to width index) along the lower convex hull."""
    if kept == 0:
        return []

    def slope(low: int, high: int) -> float:
        return float((distortion_W[low] - distortion_W[high]) / (widths[high] - widths[low]))

    hull = [0]
    for w in range(1, len(widths)):
        if distortion_W[w] >= distortion_W[hull[-1]]:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], w):
            hull.pop()
        hull.append(w)
    return [(slope(a, b) / kept, group, a, b) for a, b in itertools.pairwise(hull)]


def _fill_remainder(level: Array, kept: Array, distortion: Array, left: float, widths: tuple[int, ...]) -> None:
    """Greedy steps to the next width off the hull, best gain per bit first, until nothing fits."""

    def cost(group: int) -> float:
        return float(kept[group] * (widths[level[group] + 1] - widths[level[group]]))

    while True:
        open_groups = [g for g in range(len(level)) if level[g] + 1 < len(widths) and 0 < cost(g) <= left]
        if not open_groups:
            return
        gain = [(distortion[g, level[g]] - distortion[g, level[g] + 1]) / cost(g) for g in open_groups]
        best = open_groups[int(np.argmax(gain))]
        left -= cost(best)
        level[best] += 1


def allocate_thresholds(
    importances: Sequence[Array], kept: Sequence[Array], budget_bits: float
) -> list[tuple[int, ...]]:
    """Widths from importance (a group's share of its Linear's weight energy), scaled to meet the budget.

    > 0.15 starts at 8 bits, 0.05-0.15 at 5, < 0.05 at 3; then the whole model moves one group-bit at a time, the
    most important groups up first or the least important down first, until the next step would pass the budget.
    """
    share, size = np.concatenate(importances), np.concatenate(kept).astype(np.float64)
    level = np.where(share > HIGH, 8, np.where(share >= LOW, 5, 3)).astype(np.int64)
    density = share / np.maximum(size, 1)  # importance a stored bit buys
    while (level * size).sum() > budget_bits and (level > WIDTHS[0]).any():
        rounds = np.argsort(density * 4.0 ** -level.astype(np.float64), kind="stable")
        level[next(g for g in rounds if level[g] > WIDTHS[0])] -= 1
    left = budget_bits - (level * size).sum()
    while True:
        gains = density * 4.0 ** -level.astype(np.float64)
        fits = [g for g in np.argsort(-gains, kind="stable") if level[g] < WIDTHS[-1] and 0 < size[g] <= left]
        if not fits:
            break
        level[fits[0]] += 1
        left -= size[fits[0]]
    return _split(level.tolist(), [len(k) for k in kept])


def _split(widths: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    found, start = [], 0
    for length in lengths:
        found.append(tuple(int(w) for w in widths[start : start + length]))
        start += length
    return found
