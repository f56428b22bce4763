"""The counts of matrices behind the memory forecast, held to what the methods really allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mico.channels.meters import PairedMoments, SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.forecast.memory import SWEPT_TOGETHER, gram_bytes, moment_bytes, solve_bytes
from mico.forecast.outline import StreamShape
from mico.methods import METHODS, PAIRED, Layer, StreamProblem

TALL, WIDE = (384, 1536), (1024, 96)  # channels, rows: weights outweigh factors, and the other way round


def allocated(work: Any) -> int:
    """The most bytes that PyTorch's allocator held at once beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def problem(channels: int, rows: int, method: str, sparsity: float, groups: int) -> StreamProblem:
    make = torch.Generator().manual_seed(0)
    moments, paired = SecondMoments.empty(channels), None
    x_TC = torch.randn(2 * channels, channels, generator=make)
    moments.add(x_TC)
    if method in PAIRED:
        paired = PairedMoments(channels)
        for _ in range(4):
            paired.add(x_TC, x_TC + 0.1 * torch.randn(x_TC.shape, generator=make))
        moments = paired.total
    label_C = torch.randperm(channels, generator=make) % groups
    plan = LayerPlan(ChannelGroups(label_C), (4,) * groups, sparsity, None, factored=groups > 1)
    weight_RC = torch.randn(rows, channels, generator=make)
    return StreamProblem((Layer("one", weight_RC, None, plan),), moments, paired, 0.01, 128)


@pytest.mark.parametrize(
    ("kind", "method", "sparsity", "groups", "shape"),
    [
        ("rows", "sparsegpt", 0.5, 1, TALL),
        ("rows", "sparsegpt", 0.5, 1, WIDE),
        ("rows dense", "gptq", 0.0, 1, TALL),
        ("symmetric", "sparsegpt", 0.5, 4, TALL),
        ("mico", "mico", 0.5, 4, TALL),
        ("mico", "mico", 0.5, 4, WIDE),
        ("mico dense", "mico", 0.0, 4, TALL),
        ("mico dense", "mico", 0.0, 4, WIDE),
        ("wanda", "wanda", 0.5, 1, TALL),
        ("rtn", "rtn", 0.0, 1, TALL),
    ],
)
def test_what_a_method_takes(kind: str, method: str, sparsity: float, groups: int, shape: tuple[int, int]) -> None:
    channels, rows = shape
    made = problem(channels, rows, method, sparsity, groups)
    most = allocated(lambda: METHODS[method](made))
    assert solve_bytes(StreamShape("one", channels, (rows,)), kind) == pytest.approx(most, rel=0.15)


@pytest.mark.parametrize(("tokens", "channels"), [(3000, 512), (600, 1024)])
def test_what_adding_a_batch_takes(tokens: int, channels: int) -> None:
    x_TC = torch.randn(tokens, channels)
    moments, paired = SecondMoments.empty(channels), PairedMoments(channels)
    assert gram_bytes(channels, tokens) == pytest.approx(allocated(lambda: moments.add(x_TC)), rel=0.1)
    assert gram_bytes(channels, tokens, 2) == pytest.approx(allocated(lambda: paired.add(x_TC, x_TC)), rel=0.15)


@pytest.mark.parametrize("channels", [8192, 8193])
def test_moments_of_wide_streams_are_halved(channels: int) -> None:
    with torch.device("meta"):
        made = SecondMoments.empty(channels, "meta")
    assert moment_bytes(channels) == made.gram_CC.numel() * made.gram_CC.itemsize


def test_a_large_stream_takes_what_its_largest_linear_takes() -> None:
    """Where a stream is swept Linear by Linear (StreamProblem.parts), memory is that of one sweep."""
    small, large = SWEPT_TOGETHER // 4096 // 2, SWEPT_TOGETHER // 4096
    alone = solve_bytes(StreamShape("one", 4096, (large,)), "rows")
    assert solve_bytes(StreamShape("one", 4096, (large, small)), "rows") == alone
    assert solve_bytes(StreamShape("one", 4096, (small, small)), "rows") == alone
    assert solve_bytes(StreamShape("one", 4096, (small, small // 2)), "rows") < alone
