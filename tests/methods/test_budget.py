"""One budget for the whole model: what is measured before the walk, and what is spent while it goes on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mico.channels.allocation import WIDTHS, RateTable
from mico.channels.meters import SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.methods import METHODS, Layer, StreamProblem
from mico.methods.budget import SAMPLED_ROWS, Budget, Demand, demand, factored_bits, plain_bits, shared
from mico.methods.sweep import factorize
from mico.packed.grid import SHRINKS, group_errors
from mico.packed.quantized import QuantizedWeight

CHANNELS, GROUPS = 64, 4


def planned(kept_G, seed: int) -> Demand:
    rng = np.random.default_rng(seed)
    importance_G = rng.dirichlet(np.full(len(kept_G), 2.0))
    return Demand(RateTable(importance_G[:, None] * 4.0 ** -np.array(WIDTHS), np.array(kept_G, float)), importance_G)


def finished(bits_G, kept_G) -> QuantizedWeight:
    """A compressed Linear that keeps kept_G weights of its groups of 40 x 25 weights."""
    groups, size = len(bits_G), 25
    label_C = torch.arange(groups * size) // size
    keep_RC = torch.zeros(40, groups * size, dtype=torch.bool)
    for g, kept in enumerate(kept_G):
        flat = torch.zeros(40 * size, dtype=torch.bool)
        flat[:kept] = True
        keep_RC[:, label_C == g] = flat.view(40, size)
    codes, ones = torch.zeros(keep_RC.shape, dtype=torch.uint8), torch.ones(40, 1, dtype=torch.float16)
    return QuantizedWeight(codes, ones, torch.ones(groups, dtype=torch.float16), None, tuple(bits_G), label_C, keep_RC)


@pytest.mark.parametrize("allocation", ["rate", "thresholds"])
@pytest.mark.parametrize("drift", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("target", [2.6, 4.0, 6.5])
def test_the_total_is_met_though_masks_turn_out_differently(allocation, drift, target):
    """A Linear keeps as many weights as planned, but in other groups; later Linears make good for earlier ones."""
    rng = np.random.default_rng(7)
    linears, groups = 42, 5
    estimates = {f"l{i}": rng.integers(300, 700, groups) for i in range(linears)}
    allowed = target * sum(kept.sum() for kept in estimates.values())
    budget = Budget({n: planned(k, i) for i, (n, k) in enumerate(estimates.items())}, allocation, allowed)
    spent = 0
    names = list(estimates)
    for start in range(0, linears, 2):  # streams of two Linears
        stream = names[start : start + 2]
        widths = budget.widths(stream)
        assert sorted(widths) == sorted(stream)
        for name in stream:
            kept = np.round(estimates[name] * (1 + drift * rng.uniform(-1, 1, groups))).astype(int)
            if name == names[-1]:
                kept = estimates[name]  # nobody is left to make good for the last one
            quantized = finished(widths[name], kept)
            assert quantized.stored_bits()["codes"] == int((kept * np.array(widths[name])).sum())
            spent += quantized.stored_bits()["codes"]
            budget.spend(name, quantized)
    weights = sum(kept.sum() for kept in estimates.values())
    assert abs(spent - allowed) / weights <= 0.01
    if drift == 0:
        assert spent <= allowed


@pytest.mark.parametrize("allocation", ["rate", "thresholds"])
def test_as_estimated_the_widths_do_not_change_on_the_way(allocation):
    """Replanning after every Linear gives what planning once gave, when nothing turned out differently."""
    kept = [np.array([500, 400]), np.array([300, 300]), np.array([100, 700])]
    demands = {f"l{i}": planned(k, i) for i, k in enumerate(kept)}
    budget = Budget(demands, allocation, 4.0 * sum(k.sum() for k in kept))
    first = budget.widths(list(demands))
    for name, k in zip(demands, kept, strict=True):
        now = budget.widths([name])[name]
        assert abs(np.array(now) - np.array(first[name])).max() <= 1  # the remainder may be spent elsewhere
        budget.spend(name, finished(first[name], k))


def test_what_is_spent_is_gone_and_a_linear_is_paid_once():
    demands = {n: planned([1000, 1000], i) for i, n in enumerate("ab")}
    generous, exhausted = (Budget(dict(demands), "rate", 2 * 2000 * 4.0) for _ in range(2))
    generous.spend("a", finished((2, 2), (1000, 1000)))
    exhausted.spend("a", finished((6, 6), (1000, 1000)))
    assert sum(generous.widths("b")["b"]) == 2 * 6 and exhausted.widths("b")["b"] == (2, 2)
    with pytest.raises(KeyError):
        generous.spend("a", finished((2, 2), (1000, 1000)))
    assert set(demands) == {"a", "b"}  # the caller's table is not eaten


def measured(rows: int = 48) -> tuple[torch.Tensor, SecondMoments, LayerPlan]:
    """A weight, the moments of correlated inputs of very different size, and a plan with four interleaved groups."""
    generator = torch.Generator().manual_seed(2)
    x_TC = torch.randn(500, CHANNELS, generator=generator) * torch.logspace(-1, 1, CHANNELS)
    x_TC = x_TC @ (torch.eye(CHANNELS) + 0.1 * torch.randn(CHANNELS, CHANNELS, generator=generator))
    moments = SecondMoments.empty(CHANNELS)
    moments.add(x_TC)
    weight_RC = torch.randn(rows, CHANNELS, generator=generator)
    groups = ChannelGroups(torch.arange(CHANNELS) * 5 % GROUPS)
    return weight_RC, moments, LayerPlan(groups, (4,) * GROUPS, 0.5, None, True)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_demand_equals_loops(pattern):
    weight_RC, moments, plan = measured()
    plan = LayerPlan(plan.groups, plan.bits_G, 0.0 if pattern else 0.5, pattern, True)
    factor = factorize(moments.hessian_CC, 0.01)
    found = demand(weight_RC, moments.gram_CC, factor, plan, rates=True)
    label, weight = plan.groups.label_C.numpy(), weight_RC.double().numpy()
    damped = moments.hessian_CC + 0.01 * moments.hessian_CC.diagonal().mean() * torch.eye(CHANNELS)
    inverse = torch.linalg.inv(damped).numpy()
    # 1 / U_ii²: the variance of channel i given all later ones, from the inverse of the trailing block.
    cost = np.array([1 / np.linalg.inv(damped.numpy()[i:, i:])[0, 0] for i in range(CHANNELS)])
    assert cost[0] == pytest.approx(1 / inverse[0, 0])
    score = weight**2 * cost
    if pattern:
        ranks = np.argsort(np.argsort(-score.reshape(len(weight), -1, 4), axis=2), axis=2)
        keep = (ranks < 2).reshape(weight.shape)
    else:
        keep = score > np.sort(score, axis=None)[score.size // 2 - 1]
    for g in range(GROUPS):
        assert found.table.kept_G[g] == keep[:, label == g].sum()
    gram = moments.gram_CC.numpy()
    energy = np.array([(np.diag(gram) * weight**2)[:, label == g].sum() for g in range(GROUPS)])
    np.testing.assert_allclose(found.importance_G, energy / energy.sum(), rtol=1e-4)
    total = np.trace(weight @ gram @ weight.T)
    for w, bits in enumerate(WIDTHS):
        loops = np.zeros(GROUPS)
        for (r, row), g in itertools.product(enumerate(weight), range(GROUPS)):
            members = (label == g) & keep[r]
            half = (2**bits - 1) / 2
            errors = []
            for shrink in SHRINKS[::2].double().tolist():
                scale = np.abs(row[members]).max() / half * shrink
                level = np.clip(np.round(row[members] / scale - 0.5) + 0.5, -half, half)
                errors.append((cost[members] * (level * scale - row[members]) ** 2).sum())
            loops[g] += min(errors)
        np.testing.assert_allclose(found.table.distortion_GW[:, w], loops / total, rtol=5e-3)
    assert (np.diff(found.table.distortion_GW) < 0).all()


def test_importances_sum_to_one_and_the_size_of_a_linear_does_not_matter():
    small, moments, plan = measured()
    large = small * 64  # a power of two: the same mantissas of the float16 scales
    factor = factorize(moments.hessian_CC, 0.01)
    first, second = (demand(w, moments.gram_CC, factor, plan, rates=True) for w in (small, large))
    assert first.importance_G.sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(first.importance_G, second.importance_G, rtol=1e-4)
    np.testing.assert_allclose(first.table.distortion_GW, second.table.distortion_GW, rtol=1e-3)
    without = demand(small, moments.gram_CC, factor, plan, rates=False)
    assert not without.table.distortion_GW.any() and (without.table.kept_G == first.table.kept_G).all()


def test_sampled_rows_stand_for_all():
    """Twice the sample's rows, every row twice: the same distortions as of the sample alone."""
    weight_RC, moments, plan = measured(rows=SAMPLED_ROWS)
    factor = factorize(moments.hessian_CC, 0.01)
    once = demand(weight_RC, moments.gram_CC, factor, plan, rates=True)
    twice = demand(weight_RC.repeat_interleave(2, 0), moments.gram_CC, factor, plan, rates=True)
    assert twice.table.kept_G.sum() == 2 * once.table.kept_G.sum()
    np.testing.assert_allclose(twice.table.distortion_GW, once.table.distortion_GW, rtol=0.02)


@pytest.mark.parametrize("groups", [1, 3])
def test_layout_costs_equal_what_is_stored(groups):
    weight_RC, moments, _ = measured()
    stream = ChannelGroups(torch.arange(CHANNELS) * 5 % groups)
    mixed = LayerPlan(stream, (3, 4, 5)[:groups], 0.5, None, True)
    plain = LayerPlan(ChannelGroups.single(CHANNELS), (4,), 0.5)
    sizes = {}
    for name, plan in (("mixed", mixed), ("plain", plain)):
        problem = StreamProblem((Layer("a", weight_RC, None, plan),), moments, None, 0.01, 32)
        sizes[name] = METHODS["sparsegpt"](problem)[0].quantized.stored_bits()
    assert factored_bits(weight_RC, groups) == sum(sizes["mixed"][part] for part in ("scales", "zeros", "widths"))
    assert plain_bits(weight_RC, 4) == sum(sizes["plain"][part] for part in ("scales", "zeros", "widths"))


def test_linears_that_share_a_width_are_one_account():
    """Their table is the sum, they are given one width, and are charged together."""
    members = [planned([100, 50], 1), planned([30, 20], 2)]
    together, alone = shared(members), planned([200], 3)
    expected = sum(need.table.distortion_GW.sum(0) for need in members)
    np.testing.assert_allclose(together.table.distortion_GW, expected[None])
    assert together.table.kept_G.tolist() == [200.0] and len(together.importance_G) == 1
    budget = Budget({"set": together, "alone": alone}, "rate", 400 * 4.0)
    (bits,) = budget.widths(["set"])["set"]
    budget.spend("set", finished((bits, bits), [100, 50]), finished((bits, bits), [30, 20]))
    (other,) = budget.widths(["alone"])["alone"]
    budget.spend("alone", finished((other,), [200]))
    assert bits + other == 8 and budget.missed_by == 0 and not budget.exceeded
    short = Budget({"alone": alone}, "rate", 200 * 4.0)
    short.spend("alone", finished((5,), [200]))
    assert short.exceeded and short.missed_by == pytest.approx(1.0)


def test_demand_on_whole_levels_at_given_widths():
    weight_RC = torch.randn(12, CHANNELS, generator=torch.Generator().manual_seed(4))
    moments = SecondMoments.empty(CHANNELS)
    moments.add(torch.randn(300, CHANNELS, generator=torch.Generator().manual_seed(5)))
    factor = factorize(moments.hessian_CC, 0.01)
    groups = ChannelGroups.contiguous(CHANNELS, 32)
    plan = LayerPlan(groups, (4, 4), integer=True)
    found = demand(weight_RC, moments.gram_CC, factor, plan, True, (4, 5, 8))
    assert found.table.distortion_GW.shape == (2, 3) and (np.diff(found.table.distortion_GW) < 0).all()
    price_RC = (1 / factor.pivots_C.float().square()).expand_as(weight_RC)
    energy = float(((weight_RC @ moments.gram_CC.float()) * weight_RC).sum())
    for column, bits in enumerate((4, 5, 8)):
        error_G = group_errors(weight_RC, price_RC, groups.label_C, 2, bits, whole=True).numpy()
        np.testing.assert_allclose(found.table.distortion_GW[:, column], error_G / energy, rtol=1e-4)
