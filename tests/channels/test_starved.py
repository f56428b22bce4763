"""Experts with few tokens: what every method makes of them."""

from __future__ import annotations

import pytest
import torch

from mico.channels.meters import PairedMoments, SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.channels.starved import is_starved, note, trusted, trusted_pair
from mico.methods import METHODS, PAIRED, Layer, StreamProblem

CHANNELS, ROWS = 32, 12


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed))


def moments(count: int) -> SecondMoments:
    found = SecondMoments.empty(CHANNELS)
    if count:
        found.add(rows(count))
    return found


def pairs(count: int) -> PairedMoments:
    found = PairedMoments(CHANNELS)
    for index in range(count):
        found.add(rows(1, index), rows(1, index) + 0.1 * rows(1, 100 + index))
    return found


def problem(count: int, sparsity: float, paired: bool, factored: bool) -> StreamProblem:
    plan = LayerPlan(ChannelGroups.single(CHANNELS), (4,), sparsity, factored=factored)
    weight_RC = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(7))
    own = trusted_pair(pairs(count)) if paired else None
    seen = own.total if own else trusted(moments(count))
    return StreamProblem((Layer("a", weight_RC, None, plan),), seen, own, 0.01, 128)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 200])
def test_an_eighth_of_the_channels_is_enough(count: int) -> None:
    found, text = trusted(moments(count)), note(moments(count), 1, 5)
    gram_CC = moments(count).gram_CC
    assert is_starved(moments(count)) == (count < 4) == (text is not None)
    if count >= 4:
        assert torch.equal(found.gram_CC, gram_CC) and found.count == count
    elif count:
        assert torch.equal(found.gram_CC, torch.diag(gram_CC.diagonal())) and found.count == count
        assert text == f"block 1, expert 5: {count} tokens for 32 channels, each weighed alone"
    else:
        assert torch.equal(found.hessian_CC, torch.eye(CHANNELS, dtype=torch.float64))
        assert text == "block 1, expert 5: 0 tokens, rounded to nearest"


@pytest.mark.parametrize("method", METHODS)
def test_without_a_token_every_method_rounds_to_nearest(method: str) -> None:
    paired = method in PAIRED
    case = problem(0, 0.0, paired, factored=paired)
    found, expected = METHODS[method](case)[0], METHODS["rtn"](problem(0, 0.0, False, factored=paired))[0]
    assert torch.equal(found.quantized.codes_RC, expected.quantized.codes_RC)
    assert torch.equal(found.quantized.dequantize(), expected.quantized.dequantize())
    assert found.fallbacks == () and 0 < found.facts["error"] < 0.1


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "mico"])
def test_without_a_token_the_smallest_weights_are_pruned(method: str) -> None:
    case = problem(0, 0.5, method in PAIRED, factored=method in PAIRED)
    keep_RC = METHODS[method](case)[0].quantized.keep_RC
    weight_RC = case.weight_RC.abs()
    if method == "wanda":  # within each row
        assert (weight_RC.masked_fill(~keep_RC, torch.inf).amin(1) >= (weight_RC * ~keep_RC).amax(1)).all()
    else:
        assert weight_RC[keep_RC].min() >= weight_RC[~keep_RC].max()


@pytest.mark.parametrize("method", ["sparsegpt", "gptq", "mico"])
@pytest.mark.parametrize("count", [1, 3])
def test_with_few_tokens_no_error_is_pushed_onto_another_channel(method: str, count: int) -> None:
    case = problem(count, 0.0, method in PAIRED, factored=False)
    found = METHODS[method](case)[0].quantized
    expected = METHODS["rtn"](problem(0, 0.0, False, factored=False))[0].quantized
    assert torch.equal(found.codes_RC, expected.codes_RC)


def test_enough_pairs_are_left_alone_and_few_aim_at_the_dense_weight() -> None:
    enough = pairs(8)
    assert trusted_pair(enough) is enough
    few = trusted_pair(pairs(3))
    assert torch.equal(few.cross_CC, few.total.gram_CC) and few.held.count > 0
    assert torch.equal(few.total.hessian_CC, torch.diag(pairs(3).total.hessian_CC.diagonal()))
