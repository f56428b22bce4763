"""Bit allocation against enumeration of every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.channels.allocation import WIDTHS, RateTable, allocate_rate, allocate_thresholds

LOWEST, HIGHEST = WIDTHS[0], WIDTHS[-1]


def tables(
    seed: int, lengths=(2, 2), size: int = 50, convex: bool = True, equal_sizes: bool = False
) -> list[RateTable]:
    """Falling distortions: 4^-bits with a different height a group, or arbitrary falling ones."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        fall = 4.0 ** -np.array(WIDTHS) if convex else np.sort(rng.random((length, len(WIDTHS))))[:, ::-1]
        distortion = fall * 10.0 ** rng.uniform(-2, 2, (length, 1))
        kept = np.full(length, size) if equal_sizes else rng.integers(1, size, length)
        made.append(RateTable(np.broadcast_to(distortion, (length, len(WIDTHS))).copy(), kept.astype(float)))
    return made


def flat(found: list[tuple[int, ...]]) -> np.ndarray:
    return np.array([bits for widths in found for bits in widths])


def cost(found: list[tuple[int, ...]], made: list[RateTable]) -> float:
    return float((flat(found) * np.concatenate([t.kept_G for t in made])).sum())


def distortion(found: list[tuple[int, ...]], made: list[RateTable]) -> float:
    stacked = np.concatenate([t.distortion_GW for t in made])
    return float(stacked[np.arange(len(stacked)), flat(found) - LOWEST].sum())


def brute_force(made: list[RateTable], budget: float) -> float:
    """The least distortion of all 7^G choices within the budget."""
    kept = np.concatenate([t.kept_G for t in made])
    stacked = np.concatenate([t.distortion_GW for t in made])
    choices = np.array(list(itertools.product(range(len(WIDTHS)), repeat=len(kept))))
    fits = ((choices + LOWEST) * kept).sum(1) <= budget
    return float(stacked[np.arange(len(kept)), choices[fits]].sum(1).min())


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), convex=st.booleans())
def test_rate_is_within_one_step_of_the_best_of_all_choices(seed, share, convex):
    made = tables(seed, convex=convex)
    total = sum(t.kept_G.sum() for t in made)
    budget = total * (LOWEST + share * (HIGHEST - LOWEST))
    found = allocate_rate(made, budget)
    assert cost(found, made) <= budget + 1e-9
    assert set(flat(found)) <= set(WIDTHS)
    best = brute_force(made, budget)
    # One step of one group: one width where distortions are convex, at most all widths at once where they are not.
    falls = [-np.diff(t.distortion_GW) if convex else t.distortion_GW[:, :1] - t.distortion_GW for t in made]
    step = max(float(fall.max()) for fall in falls)
    assert best - 1e-9 <= distortion(found, made) <= best + step + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_rate_is_the_best_choice_where_groups_are_equally_large(seed):
    """With convex distortions and equal sizes the greedy steps are optimal at every budget, not only on the hull."""
    made = tables(seed, size=10, equal_sizes=True)
    for budget in range(4 * 10 * LOWEST, 4 * 10 * HIGHEST + 1, 35):
        assert distortion(allocate_rate(made, budget), made) == pytest.approx(brute_force(made, budget), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_rate_is_the_best_choice_at_every_budget_on_the_hull(seed):
    """Arbitrary distortions: what one price λ picks is optimal for the bits that it spends."""
    made = tables(seed, lengths=(3, 1), convex=False)
    kept, stacked = (np.concatenate(parts) for parts in zip(*((t.kept_G, t.distortion_GW) for t in made), strict=True))
    for price in np.logspace(-5, 1, 13):
        choice = (stacked + price * kept[:, None] * np.array(WIDTHS)).argmin(1)
        budget = float((kept * np.array(WIDTHS)[choice]).sum())
        assert distortion(allocate_rate(made, budget), made) == pytest.approx(brute_force(made, budget), rel=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_more_bits_never_hurt(seed):
    made = tables(seed, lengths=(5, 1, 7), size=1000)
    total = sum(t.kept_G.sum() for t in made)
    found = [distortion(allocate_rate(made, total * bits), made) for bits in np.linspace(1.5, 8.5, 29)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), bits=st.floats(2, 8))
def test_rate_spends_the_remainder_off_the_hull_too(seed, bits):
    """Arbitrary distortions, whose hulls jump several widths: no single further width would have fitted."""
    made = tables(seed, lengths=(3, 4), convex=False)
    kept = np.concatenate([t.kept_G for t in made])
    found = allocate_rate(made, bits * kept.sum())
    open_sizes = kept[flat(found) < HIGHEST]
    assert len(open_sizes) == 0 or bits * kept.sum() - cost(found, made) < open_sizes.min()


def test_the_range_of_budgets_is_closed_at_both_ends():
    made = tables(0, lengths=(3, 4))
    total = sum(t.kept_G.sum() for t in made)
    assert [len(widths) for widths in allocate_rate(made, total * 3)] == [3, 4]
    for budget, bits in ((0.0, 2), (total * 2.0, 2), (total * 8.0, 8), (total * 100.0, 8)):
        assert set(flat(allocate_rate(made, budget))) == {bits}
        assert set(flat(allocate_thresholds([t.kept_G / total for t in made], [t.kept_G for t in made], budget))) == {
            bits
        }


@pytest.mark.parametrize("bits", WIDTHS)
def test_equal_groups_get_equal_bits(bits):
    table = RateTable(np.tile(4.0 ** -np.array(WIDTHS), (4, 1)), np.full(4, 32.0))
    found = allocate_rate([table, table], 8 * 32.0 * bits)
    assert found == [(bits,) * 4] * 2
    found = allocate_rate([table, table], 8 * 32.0 * (bits + 0.5))
    assert max(map(max, found)) - min(map(min, found)) <= 1


def test_groups_that_lose_more_get_more():
    heights = np.array([[1.0], [4.0], [16.0], [64.0]])  # each twice as large as the one before: one bit more
    table = RateTable(heights * 4.0 ** -np.array(WIDTHS), np.full(4, 100.0))
    assert allocate_rate([table], 400 * 4.5) == [(3, 4, 5, 6)]


def test_a_useless_width_is_jumped_over():
    """Off the convex hull: 3 bits gain nothing here, 4 bits all."""
    first = RateTable(np.array([[1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1]]), np.array([10.0]))
    second = RateTable(np.array([[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]]), np.array([10.0]))
    assert allocate_rate([first, second], 60.0) == [(4,), (2,)]


@pytest.mark.parametrize("allocate", ["rate", "thresholds"])
def test_groups_without_weights_cost_nothing_and_break_nothing(allocate):
    kept = np.array([100.0, 0.0, 50.0])
    distorted = np.array([[1.0], [0.0], [0.5]]) * 4.0 ** -np.array(WIDTHS)
    if allocate == "rate":
        found = allocate_rate([RateTable(distorted, kept), RateTable(distorted * 0, kept * 0)], 600)
    else:
        found = allocate_thresholds([np.array([0.7, 0.0, 0.3]), np.zeros(3)], [kept, kept * 0], 600)
    assert [len(widths) for widths in found] == [3, 3]
    assert set(flat(found)) <= set(WIDTHS)
    assert 100 * found[0][0] + 50 * found[0][2] == 600


def model(seed: int, linears: int = 42, groups: int = 10) -> tuple[list[np.ndarray], list[np.ndarray], list[RateTable]]:
    """Importances, surviving weights and rate tables of a model the size of the shipped ones."""
    rng = np.random.default_rng(seed)
    importances = [rng.dirichlet(np.full(groups, 2.0)) for _ in range(linears)]
    kept = [np.round(rng.dirichlet(np.full(groups, 8.0)) * rng.choice([64, 128, 340]) * 64) for _ in range(linears)]
    fall = 4.0 ** -np.array(WIDTHS)
    return importances, kept, [RateTable(i[:, None] * fall, k) for i, k in zip(importances, kept, strict=True)]


@pytest.mark.parametrize("target", [2.0, 2.37, 3.0, 4.0, 5.5, 8.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_target_is_met_to_a_hundredth_of_a_bit(target, seed):
    importances, kept, made = model(seed)
    total = sum(k.sum() for k in kept)
    for found in (allocate_rate(made, target * total), allocate_thresholds(importances, kept, target * total)):
        assert target - 0.01 <= cost(found, made) / total <= target


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), target=st.floats(2, 8))
def test_thresholds_meet_the_budget_to_the_smallest_group(seed, target):
    importances, kept, made = model(seed, linears=4, groups=5)
    sizes = np.concatenate(kept)
    budget = target * sizes.sum()
    found = allocate_thresholds(importances, kept, budget)
    open_sizes = sizes[(flat(found) < HIGHEST) & (sizes > 0)]
    assert cost(found, made) <= budget + 1e-9
    assert len(open_sizes) == 0 or budget - cost(found, made) < open_sizes.min()


def test_thresholds_start_from_the_three_classes():
    """A budget that the rule itself spends changes nothing: > 0.15 8 bits, 0.05-0.15 5 bits, < 0.05 3 bits."""
    importance, kept = np.array([0.5, 0.2, 0.15, 0.1, 0.04, 0.01]), np.full(6, 10.0)
    assert allocate_thresholds([importance], [kept], 10.0 * (8 + 8 + 5 + 5 + 3 + 3)) == [(8, 8, 5, 5, 3, 3)]


def test_thresholds_give_way_from_the_least_important():
    importance, kept = np.array([0.5, 0.2, 0.1, 0.04]), np.full(4, 10.0)
    short = allocate_thresholds([importance], [kept], 10.0 * (8 + 8 + 5 + 3) - 10)[0]
    assert sum(short) == 23 and short[0] == 8
    for budget in np.arange(80.0, 321.0, 10.0):
        widths = allocate_thresholds([importance], [kept], budget)[0]
        assert list(widths) == sorted(widths, reverse=True)
        assert sum(widths) * 10 == budget


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), widths=st.sampled_from([(4, 5, 8), (4, 8), (3,)]))
def test_a_choice_of_widths_is_kept_to_and_as_good_as_enumeration(seed, share, widths):
    """Columns of other widths are not there; within one step of the best of all choices."""
    columns = [WIDTHS.index(bits) for bits in widths]
    made = [RateTable(t.distortion_GW[:, columns], t.kept_G) for t in tables(seed)]
    kept, stacked = (np.concatenate(parts) for parts in zip(*((t.kept_G, t.distortion_GW) for t in made), strict=True))
    budget = kept.sum() * (widths[0] + share * (widths[-1] - widths[0]))
    found = flat(allocate_rate(made, budget, widths))
    assert set(found) <= set(widths) and (found * kept).sum() <= budget + 1e-9
    choices = np.array(list(itertools.product(range(len(widths)), repeat=len(kept))))
    fits = (np.array(widths)[choices] * kept).sum(1) <= budget + 1e-9
    reached = stacked[np.arange(len(kept)), [widths.index(bits) for bits in found]].sum()
    best = stacked[np.arange(len(kept)), choices[fits]].sum(1).min()
    step = max(float((t.distortion_GW[:, :1] - t.distortion_GW).max()) for t in made)
    assert best - 1e-9 <= reached <= best + step + 1e-9
