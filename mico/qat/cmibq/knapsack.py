"""The widths that are taken for good: a multiple-choice knapsack, solved to proven optimality.

Every group takes one width; the sum of what the widths lose is least, the average width is at most the target and at
least the target less a tolerance.

At a price p of the average, a choice loses at least B = sum_i min_k (loss + p bits) - p target, and exactly B plus its
excess: what its widths cost above the cheapest ones at that price, plus p for what it leaves of the target. So the
choice of least excess is the best one. It is found by dynamic programming over choices of an excess up to a bound; the
bound is doubled until there is one, and then none beyond the bound can be better (the core of Pisinger, 1995). Where
the lower limit binds, HiGHS solves the same as an integer programme. Suffixes: I groups of all sites, K widths.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, kron
from scipy.sparse import eye as identity

from mico.errors import UserError
from mico.qat.cmibq.levels import BITS

Array = np.ndarray
TOLERANCE = 0.02  # bits that the average may stay below the target
STATES = 2_000_000  # of the dynamic programme; beyond, branch and bound
REACH = 8.0  # of logits below the largest of their group
LIMIT = 1e6  # of a price, in units of the loss
_SLACK = 1e-9  # of the target, for sums in floating point


def objective(distortion_IK: torch.Tensor, target: float) -> torch.Tensor:
    """Distortion in units of its mean at the width nearest the target, (I, K), float64."""
    nearest = min(range(len(BITS)), key=lambda k: abs(BITS[k] - target))
    unit = distortion_IK[:, nearest].double().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return distortion_IK.double() / unit


def softened(loss_IK: torch.Tensor, cost_I: torch.Tensor, target: float, tau: float) -> torch.Tensor:
    """Logits theta (I, K) of the knapsack with shares in place of widths and `tau` times their entropy as a bonus.

    Its shares of least loss are softmax(theta / tau) with theta = -(loss + price bits), at the price of a bit at which
    the average is the target; as tau falls they become the cheapest widths at that price. Logits of a group lie within
    REACH of the largest: none is out of reach of what is learned later.
    """
    loss = loss_IK.double()
    bits_K = torch.tensor(BITS, dtype=torch.float64, device=loss.device)
    share_I = cost_I.double() / cost_I.double().mean()

    def logits(price: float) -> torch.Tensor:
        theta_IK = -(loss + price * share_I[:, None] * bits_K)
        return (theta_IK - theta_IK.amax(1, keepdim=True)).clamp_min(-REACH)

    low, high = -LIMIT, LIMIT
    for _ in range(100):
        price = (low + high) / 2
        average = (torch.softmax(logits(price) / tau, -1) @ bits_K) @ (share_I / len(share_I))
        low, high = (price, high) if float(average) > target else (low, price)
    return logits((low + high) / 2)


def choose_widths(
    loss_IK: torch.Tensor,
    cost_I: torch.Tensor,
    target: float,
    option: str = "--target-bits",
    tolerance: float = TOLERANCE,
) -> torch.Tensor:
    """Places in BITS, (I,), that minimise the summed loss with target - tolerance <= average width <= target.

    cost_I: weight of a group in the average. Raises UserError naming the option where no choice meets it: below the
    narrowest width, above the widest, or too few groups of too different sizes.
    """
    loss = _scaled(loss_IK.detach().cpu().double().numpy())
    share = cost_I.detach().cpu().double().numpy()
    bits_IK = np.outer(share / share.sum(), np.array(BITS, dtype=np.float64))
    low, high = max(min(BITS), target - tolerance) * (1 - _SLACK), target * (1 + _SLACK)
    chosen = _by_price(loss, bits_IK, high)
    if chosen is None or _total(bits_IK, chosen) < low:
        chosen = _by_branching(loss, bits_IK, low, high)
    if chosen is None:
        raise UserError(
            f"{option} {target:g}: no choice among widths of {', '.join(map(str, BITS))} bits averages within "
            f"{tolerance:g} below it over {len(loss)} groups: choose from {min(BITS)} to {max(BITS)}, or more groups"
        )
    return torch.from_numpy(chosen).to(cost_I.device)


def _scaled(loss: Array) -> Array:
    """The same problem in numbers that fit the solver's tolerances: the least loss of a group is 0, the mean 1."""
    shifted = loss - loss.min(1, keepdims=True)
    mean = shifted.mean()
    return shifted / mean if mean > 0 else shifted


def _total(table_IK: Array, chosen_I: Array) -> float:
    return float(np.take_along_axis(table_IK, chosen_I[:, None], 1).sum())


# --- without the lower limit ----------------------------------------------------------------------------------------


def _by_price(loss: Array, bits_IK: Array, high: float) -> Array | None:
    """The best choice with an average of at most `high`; None where there is none, or too many are nearly as good."""
    if bits_IK.min(1).sum() > high:
        return None
    price = _price(loss, bits_IK, high)
    reduced = loss + price * bits_IK
    excess = reduced - reduced.min(1, keepdims=True)
    cheapest = reduced.argmin(1)
    bound = price * (high - _total(bits_IK, cheapest))  # the excess of the cheapest choice, which is allowed
    tried = bound / 2**12
    while True:
        found = _least_excess(excess, bits_IK, cheapest, price, high, min(tried, bound) * (1 + 1e-9))
        if found is not None or tried >= bound:
            return found
        tried *= 2


def _price(loss: Array, bits_IK: Array, high: float) -> float:
    """The least price of a bit, to the last digits, at which the cheapest widths keep to the budget; 0 if they do."""

    def average(price: float) -> float:
        return _total(bits_IK, (loss + price * bits_IK).argmin(1))

    cheap, dear = 0.0, 1.0
    if average(0.0) <= high:
        return 0.0
    while average(dear) > high:
        cheap, dear = dear, 4 * dear
    for _ in range(80):
        middle = (cheap + dear) / 2
        cheap, dear = (middle, dear) if average(middle) > high else (cheap, middle)
    return dear


def _least_excess(
    excess: Array, bits_IK: Array, cheapest: Array, price: float, high: float, bound: float
) -> Array | None:
    """The choice of least excess if that is at most `bound`, else None.

    A state is the average and the excess of widths chosen so far, the other groups at their cheapest. One with no
    lower average and no lower loss (excess less price times average) than another is dropped: nothing follows from it
    that would not be better from the other.
    """
    open_groups = np.flatnonzero((excess <= bound).sum(1) > 1)
    averages, excesses = np.array([_total(bits_IK, cheapest)]), np.zeros(1)
    moves = bits_IK - np.take_along_axis(bits_IK, cheapest[:, None], 1)
    allowed = [np.flatnonzero(excess[i] <= bound) for i in open_groups]
    # what the groups that follow can still take from the average, and add to it
    less = np.cumsum([moves[i, ks].min() for i, ks in zip(open_groups[::-1], allowed[::-1], strict=True)])[::-1]
    more = np.cumsum([moves[i, ks].max() for i, ks in zip(open_groups[::-1], allowed[::-1], strict=True)])[::-1]
    history: list[tuple[Array, Array]] = []  # of every state: its parent, the width taken
    for place, (i, ks) in enumerate(zip(open_groups, allowed, strict=True)):
        after = place + 1 < len(open_groups)
        floor, ceiling = (less[place + 1], more[place + 1]) if after else (0.0, 0.0)
        parent = np.tile(np.arange(len(averages)), len(ks))
        width = np.repeat(ks, len(averages))
        averages, excesses = averages[parent] + moves[i, width], excesses[parent] + excess[i, width]
        reach = excesses + price * np.maximum(0.0, high - averages - ceiling)
        kept = np.flatnonzero((reach <= bound) & (averages + floor <= high))
        loss = excesses - price * averages
        order = kept[np.lexsort((loss[kept], np.round(averages[kept], 12)))]
        best = np.minimum.accumulate(loss[order])
        order = order[np.concatenate([[True], loss[order][1:] < best[:-1]])] if len(order) else order
        if not 0 < len(order) <= STATES:
            return None
        history.append((parent[order], width[order]))
        averages, excesses = averages[order], excesses[order]
    total = np.where(averages <= high, excesses + price * (high - averages), np.inf)
    state = int(total.argmin())
    if total[state] > bound:
        return None
    chosen = cheapest.copy()
    for i, (parent, width) in zip(open_groups[::-1], history[::-1], strict=True):
        chosen[i], state = width[state], parent[state]
    return chosen


# --- with it --------------------------------------------------------------------------------------------------------


def _by_branching(loss: Array, bits_IK: Array, low: float, high: float) -> Array | None:
    """The best choice with an average from `low` to `high`, None where there is none: branch and bound of HiGHS."""
    groups, widths = loss.shape
    one_each = kron(identity(groups, format="csr"), np.ones((1, widths)), format="csr")
    average = csr_array(bits_IK.reshape(1, -1))
    solution = milp(
        loss.ravel(), integrality=np.ones(groups * widths), bounds=Bounds(0, 1), options=dict(mip_rel_gap=0.0),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(average, low, high)],
    )  # fmt: skip
    if solution.status == 2:
        return None
    if solution.status != 0:
        raise RuntimeError(f"the knapsack of {groups} groups was not solved: {solution.message}")
    return solution.x.reshape(groups, widths).argmax(1)
