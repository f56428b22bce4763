"""Forecast sizes against hand counts of the packed layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mico.adapters.llama import LLAMA
from mico.forecast.outline import Outline, StreamShape
from mico.forecast.size import group_count, kept_share, packed_size, stream_bits
from mico.settings import Compression, Grouping

STREAM = StreamShape("attn_in", 128, (64, 32))
WEIGHTS = 128 * 96


def made(**options: Any) -> Compression:
    return Compression(**dict(method="sparsegpt", wbits=4) | options)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (dict(), 4 * WEIGHTS + 96 * (16 + 4)),
        (dict(sparsity=0.5), 4 * WEIGHTS / 2 + WEIGHTS + 96 * 20),
        (dict(sparsity=0.5, wbits=16), 16 * WEIGHTS / 2 + WEIGHTS),
        (dict(pattern=(2, 4)), 4 * WEIGHTS / 2 + WEIGHTS / 4 * 3 + 96 * 20),  # six patterns take three bits
        (dict(group_size=32), 4 * WEIGHTS + 96 * 4 * 20),
        (dict(group_size=32, profile="vllm"), 4 * WEIGHTS + 4 * (96 * 16 + 2 * 8)),  # a zero a group and Linear
        (dict(method="mico"), 4 * WEIGHTS + 96 * 16),
        (
            dict(method="mico", target_avg_bits=3.0, grouping=Grouping(n_groups=4)),
            3 * WEIGHTS + 96 * 16 + 2 * 4 * (16 + 8) + 128 * 2,
        ),
        (dict(method="mico", grouping=Grouping(n_groups=4)), 4 * WEIGHTS + 96 * 20 - 0.002 * WEIGHTS),
    ],
)
def test_bits_of_a_stream(options: dict[str, Any], bits: float) -> None:
    assert stream_bits(STREAM, made(**options)) == pytest.approx(bits)


def test_groups_and_survivors() -> None:
    assert [group_count(made(group_size=size), 128) for size in (None, 128, 100, 32)] == [1, 1, 2, 4]
    assert group_count(made(profile="vllm"), 128) == 1
    assert group_count(made(method="mico", grouping=Grouping()), 4) == 4
    assert kept_share(made(sparsity=0.3)) == pytest.approx(0.7) and kept_share(made(pattern=(1, 4))) == 0.25


@pytest.mark.parametrize(("embed_bits", "table"), [(16, 2 * 50 * 128), (8, 20 + 50 * (128 + 2)), (4, 20 + 50 * 68)])
def test_whole_model(embed_bits: int, table: int) -> None:
    norms = 200
    shape = Outline(
        LLAMA, ((STREAM,), (STREAM,)), (WEIGHTS + norms,) * 2, 30, ((50, 128),), 50 * 128 + 7, 128, 50, 0,
        torch.bfloat16, 1.0,
    )  # fmt: skip
    found = packed_size(shape, made(embed_bits=embed_bits))
    linears = 2 * (4 * WEIGHTS + 96 * 20) // 8
    assert found.tensors == linears + 2 * (2 * norms + 7) + table
    assert found.bits == pytest.approx(linears * 8 / (2 * WEIGHTS))
    assert 0 < found.file - found.tensors - 4 * 20 <= 150 * 30
