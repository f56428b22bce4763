"""The plain peers on known weights: Wanda, round-to-nearest with magnitude pruning, GPTQ's contiguous groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mico.channels.meters import SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.methods import METHODS, Layer, LayerResult, StreamProblem
from tests.methods.naive import minmax, obs

ROWS, CHANNELS = 14, 48


def inputs(dead: int | None = None) -> torch.Tensor:
    """Correlated rows whose channels differ in size by a factor of a hundred."""
    generator = torch.Generator().manual_seed(3)
    x_TC = torch.randn(400, CHANNELS, generator=generator) @ torch.randn(CHANNELS, CHANNELS, generator=generator)
    x_TC = x_TC * torch.logspace(-1, 1, CHANNELS)[torch.randperm(CHANNELS, generator=generator)]
    if dead is not None:
        x_TC[:, dead] = 0
    return x_TC


def problem(plan: LayerPlan, x_TC: torch.Tensor | None = None, blocksize: int = 16) -> StreamProblem:
    moments = SecondMoments.empty(CHANNELS)
    moments.add(inputs() if x_TC is None else x_TC)
    weight_RC = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(4))
    second = torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(5))
    layers = (Layer("a", weight_RC, None, plan), Layer("b", second, torch.ones(5), plan))
    return StreamProblem(layers, moments, None, 0.01, blocksize)


def plan(bits: int = 16, sparsity: float = 0.0, pattern=None, group_size: int | None = None) -> LayerPlan:
    groups = ChannelGroups.contiguous(CHANNELS, group_size) if group_size else ChannelGroups.single(CHANNELS)
    return LayerPlan(groups, (bits,) * groups.count, sparsity, pattern)


def results(method: str, stream: StreamProblem) -> list[tuple[Layer, LayerResult]]:
    found = METHODS[method](stream)
    assert all(result.bias_R is None and not result.fallbacks for result in found)
    return list(zip(stream.layers, found, strict=True))


def rounded(weight_RC: torch.Tensor, label_C: torch.Tensor, bits: list[int]) -> np.ndarray:
    weight = weight_RC.double().numpy()
    scale, zero, maxq = minmax(weight, label_C.numpy(), bits)
    return scale * (np.clip(np.round(weight / scale + zero), 0, maxq) - zero)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_wanda_keeps_the_largest_weight_times_norm_of_every_row(sparsity):
    norm_C = np.sqrt((inputs().double().numpy() ** 2).sum(0))
    for layer, result in results("wanda", problem(plan(sparsity=sparsity))):
        keep = result.quantized.keep_RC.numpy()
        for r, row in enumerate(layer.weight_RC.double().numpy()):
            pruned = np.argsort(np.abs(row) * norm_C)[: int(CHANNELS * sparsity)]
            assert set(np.flatnonzero(~keep[r])) == set(pruned)
        expected = layer.weight_RC.half().float() * result.quantized.keep_RC  # no compensation
        assert torch.equal(result.quantized.dequantize(), expected)


def test_rtn_prunes_the_smallest_magnitudes_of_the_layer():
    by_row = set()
    for layer, result in results("rtn", problem(plan(sparsity=0.6))):
        keep, magnitude = result.quantized.keep_RC.numpy(), layer.weight_RC.abs().numpy()
        assert (~keep).sum() == int(keep.size * 0.6)
        assert magnitude[~keep].max() < magnitude[keep].min()
        by_row |= set(keep.sum(1).tolist())
    assert len(by_row) > 1  # of the layer, not of each row


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 6), (4, 8)])
@pytest.mark.parametrize("method", ["wanda", "rtn", "sparsegpt"])
def test_a_pattern_keeps_exactly_n_of_every_m(method, pattern):
    n, m = pattern
    norm_C = np.sqrt((inputs().double().numpy() ** 2).sum(0)) if method == "wanda" else np.ones(CHANNELS)
    for layer, result in results(method, problem(plan(4, pattern=pattern), blocksize=24)):
        assert result.quantized.pattern == pattern
        keep = result.quantized.keep_RC.numpy().reshape(-1, m)
        assert (keep.sum(1) == n).all()
        zeros_RBM = (result.quantized.dequantize() == 0).reshape(-1, m)
        assert (zeros_RBM.sum(1) >= m - n).all()
        if method != "sparsegpt":
            score = (layer.weight_RC.double().numpy() * norm_C).__abs__().reshape(-1, m)
            assert (np.where(keep, score, np.inf).min(1) > np.where(keep, -np.inf, score).max(1)).all()


@pytest.mark.parametrize("method", ["wanda", "rtn"])
@pytest.mark.parametrize("bits, group_size", [(4, None), (3, 16), (8, 10)])
def test_survivors_are_rounded_to_nearest_on_the_dense_grid(method, bits, group_size):
    chosen = plan(bits, sparsity=0.5, group_size=group_size)
    label_C = torch.arange(CHANNELS) // (group_size or CHANNELS)
    for layer, result in results(method, problem(chosen)):
        expected = rounded(layer.weight_RC, label_C, [bits] * chosen.groups.count)
        found = result.quantized.dequantize().double().numpy()
        np.testing.assert_allclose(found, expected * result.quantized.keep_RC.numpy(), rtol=1e-5, atol=1e-6)
        assert result.quantized.row_scale_RG.shape == (len(layer.weight_RC), chosen.groups.count)


def test_without_a_mask_everything_is_kept_and_a_dead_channel_is_no_trouble():
    for method in ("wanda", "rtn", "gptq"):
        for _, result in results(method, problem(plan(4), inputs(dead=7))):
            assert result.quantized.keep_RC is None
            assert torch.isfinite(result.quantized.dequantize()).all()
            assert 0 < result.facts["error"] < 0.1


@pytest.mark.parametrize("group_size", [None, 16, 20])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_has_contiguous_groups_and_equals_the_naive_sweep(group_size, bits):
    chosen = plan(bits, group_size=group_size)
    label = np.arange(CHANNELS) // (group_size or CHANNELS)
    assert chosen.groups.label_C.tolist() == label.tolist()
    x = inputs().double().numpy()
    for layer, result in results("gptq", problem(chosen)):
        expected, _ = obs(
            layer.weight_RC.double().numpy(),
            2 / len(x) * x.T @ x,
            labels=label,
            bits=[bits] * chosen.groups.count,
            blocksize=16,
        )
        # One weight that falls on the other side of a tie in float32 moves the later columns of its row.
        same_R = np.isclose(result.quantized.dequantize().numpy(), expected, rtol=1e-4, atol=1e-5).all(1)
        assert same_R.mean() >= 0.8


@pytest.mark.parametrize("method", ["wanda", "rtn", "gptq", "sparsegpt"])
def test_the_error_told_is_that_of_the_outputs(method):
    x_TC = inputs().double()
    for layer, result in results(method, problem(plan(3, sparsity=0.0 if method == "gptq" else 0.5))):
        dense = x_TC @ layer.weight_RC.double().T
        gap = x_TC @ (result.quantized.dequantize() - layer.weight_RC).double().T
        assert result.facts["error"] == pytest.approx(float(gap.square().sum() / dense.square().sum()), rel=1e-3)


def test_the_peers_stand_in_the_order_of_the_field():
    """Output error at 50 %: compensation beats the activation-aware mask, which beats magnitude."""
    error = {
        method: sum(result.facts["error"] for _, result in results(method, problem(plan(sparsity=0.5))))
        for method in ("sparsegpt", "wanda", "rtn")
    }
    assert error["sparsegpt"] < error["wanda"] < error["rtn"]


def test_a_stream_too_large_for_one_sweep_is_solved_linear_by_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = problem(plan(bits=4, sparsity=0.5))
    assert [part.layers for part in stream.parts()] == [stream.layers]
    whole = METHODS["sparsegpt"](stream)
    monkeypatch.setattr("mico.methods.method.SWEPT_TOGETHER", ROWS * CHANNELS)
    assert [part.layers for part in stream.parts()] == [(layer,) for layer in stream.layers]
    for mine, theirs in zip(METHODS["sparsegpt"](stream), whole, strict=True):
        assert torch.equal(mine.quantized.codes_RC, theirs.quantized.codes_RC)
        assert mine.facts["error"] == pytest.approx(theirs.facts["error"], rel=1e-5)
