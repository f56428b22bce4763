"""The mathematics of scores against naive loops."""

from __future__ import annotations

import math

import pytest
import torch

from mico.visual_tokens.scoring import (
    adaptive_count,
    attention_rows,
    best_half_of_heads,
    gather_rows,
    gravity,
    information,
    mean_over_raters,
    packed,
    random_scores,
    ranks,
    select_raters,
)
from tests.visual_tokens.tiny import numbers


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=numbers(seed))


def test_packed_and_gathered() -> None:
    columns_BK, real_BK = packed(torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0] * 5]).bool())
    assert columns_BK[0].tolist() == [1, 3, 4] and columns_BK[1, 0] == 0
    assert real_BK.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    values = normal(3, 5, 2)
    assert torch.equal(gather_rows(values, columns_BK)[0], values[0, [1, 3, 4]])


def test_raters_are_above_the_mean_similarity() -> None:
    visual, text = normal(2, 6, 4), normal(2, 5, 4, seed=1)
    real, asked = torch.ones(2, 6).bool(), torch.ones(2, 5).bool()
    real[1, 4:] = asked[1, 3:] = False
    found, none = select_raters(visual, real, text, asked)
    for b in range(2):
        v, q = visual[b, real[b]].double(), text[b, asked[b]].double()
        similar = []
        for row in v:
            powers = [math.exp(float(row @ token)) for token in q]
            similar.append([power / sum(powers) for power in powers])
        mean = [sum(row[i] for row in similar) / len(similar) for i in range(len(q))]
        assert found[b].tolist() == [m > sum(mean) / len(mean) for m in mean] + [False] * (5 - len(q))
    assert none == 0


def test_a_single_token_rates_alone() -> None:
    asked = torch.tensor([[True, False], [False, False]])
    found, none = select_raters(normal(2, 6, 4), torch.ones(2, 6).bool(), normal(2, 2, 4), asked)
    assert found.tolist() == [[True, False], [False, False]] and none == 1


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (5, 1)])
def test_attention_rows(heads: int, key_heads: int) -> None:
    queries, keys = normal(2, heads, 7, 6), normal(2, key_heads, 7, 6, seed=1)
    seen = torch.ones(2, 7).bool()
    seen[1, :2] = False
    rows = torch.tensor([[3, 6], [2, 5]])
    index = rows[:, None, :, None].expand(-1, heads, -1, 6)
    found = attention_rows(queries.gather(2, index), keys, rows, seen, 0.3)
    for b in range(2):
        for h in range(heads):
            for r, row in enumerate(rows[b].tolist()):
                allowed = [n for n in range(row + 1) if seen[b, n]]
                weights = [
                    math.exp(0.3 * float(queries[b, h, row] @ keys[b, h // (heads // key_heads), n])) for n in allowed
                ]
                expected = torch.zeros(7)
                expected[allowed] = torch.tensor(weights) / sum(weights)
                assert torch.allclose(found[b, h, r], expected, atol=1e-6)


def frequencies(width: int) -> torch.Tensor:
    return 1 / 10000 ** (torch.arange(0, width, 2) / width)


@pytest.mark.parametrize(("width", "first"), [(16, 91), (128, 1707)])
def test_gravity_is_what_rope_makes_of_ones_and_stays_positive(width: int, first: int) -> None:
    distance = torch.arange(first + 100)
    found = gravity(distance, frequencies(width))
    each = frequencies(width).tolist()
    naive = torch.tensor([sum(2 * math.cos(n * f) for f in each) / math.sqrt(width) for n in distance.tolist()])
    assert int((naive <= 0).nonzero()[0]) == first, "the distance at which it turns negative"
    floor = 0.05 * math.sqrt(width)
    assert torch.allclose(found, naive.clamp_min(floor), atol=1e-4) and float(found.min()) > 0
    assert float(found[first]) == pytest.approx(floor)
    if width == 128:
        assert torch.allclose(found[:1000], naive[:1000], atol=1e-4), "no clamp where LLaVA-1.5 works"


def test_gravity_is_the_product_of_rotated_ones() -> None:
    """The public definition: RoPE applied to vectors of ones, their product over sqrt(d)."""
    width, angles = 8, torch.tensor([3.0, 17.0])[:, None] * frequencies(8)
    turned = torch.cat((angles.cos() - angles.sin(), angles.cos() + angles.sin()), 1)
    assert float(gravity(torch.tensor(14), frequencies(8))) == pytest.approx(
        float(turned[0] @ turned[1]) / math.sqrt(width), rel=1e-5
    )


@pytest.mark.parametrize("heads", [1, 4, 5, 14])
def test_the_half_of_the_heads_that_looks_most(heads: int) -> None:
    attention = torch.rand(2, heads, 3, 5, generator=numbers(0))
    real = torch.tensor([[True] * 3, [True, False, True]])
    found = best_half_of_heads(attention, real)
    for b in range(2):
        mass = [float(attention[b, h][real[b]].sum()) for h in range(heads)]
        best = sorted(range(heads), key=lambda h: -mass[h])[: math.ceil(heads / 2)]
        assert torch.equal(found[b], attention[b, best])


def test_mean_over_raters() -> None:
    attention, real = (
        torch.rand(2, 3, 4, 5, generator=numbers(0)),
        torch.tensor([[True] * 4, [False, True, True, False]]),
    )
    found = mean_over_raters(attention, real)
    assert torch.allclose(found[0], attention[0].mean((0, 1))) and torch.allclose(
        found[1], attention[1, :, 1:3].mean((0, 1))
    )


def test_ranks() -> None:
    full, one = torch.eye(3, 6), torch.ones(3, 6)
    attention = torch.stack((full, one, full))[:, None].expand(-1, 2, -1, -1)
    real = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    assert ranks(attention, real, torch.ones(3, 6).bool()).tolist() == [3, 1, 2]


@pytest.mark.parametrize(("rank", "expected"), [(5, 30), (10, 34), (1, 27), (0, 26)])
def test_more_rank_keeps_more(rank: int, expected: int) -> None:
    assert adaptive_count(30, 100, rank, raters=10) == expected == 100 - round(70 / 95 * (100 - rank))


def test_adaptive_count_stays_within_what_is_there() -> None:
    assert (
        adaptive_count(100, 100, 1, 10) == 100 and adaptive_count(1, 3, 0, 90) == 1 and adaptive_count(1, 1, 1, 9) == 1
    )


def test_chance_gives_a_token_one_score_at_all_stages() -> None:
    first = random_scores(torch.arange(20), 20, seed=5)
    assert torch.equal(
        random_scores(torch.tensor([3, 17, -1]), 20, seed=5), torch.stack((first[3], first[17], first[0] * 0))
    )
    assert not torch.equal(first, random_scores(torch.arange(20), 20, seed=6))


def test_information_is_the_divergence_from_looking_everywhere_alike() -> None:
    real_BV = torch.ones(2, 6, dtype=torch.bool)
    real_BV[1, 4:] = False
    attention_BHQV = (
        torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).square() * real_BV[:, None, None]
    )
    attention_BHQV[0, 0, 0] = 0.0  # looks at text alone
    attention_BHQV[0, 0, 1] = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    attention_BHQV[0, 0, 2] = 0.1
    nats_BHQ = information(attention_BHQV, real_BV)
    assert nats_BHQ[0, 0, :3].tolist() == pytest.approx([0, math.log(6), 0], abs=1e-6)
    for sample, head, row in ((0, 1, 3), (1, 2, 4), (1, 0, 0)):
        weights = attention_BHQV[sample, head, row, real_BV[sample]].double()
        share = (weights / weights.sum()).tolist()
        told = sum(p * math.log(len(share) * p) for p in share if p > 0)
        assert nats_BHQ[sample, head, row].item() == pytest.approx(told, abs=1e-6)
