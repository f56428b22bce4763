"""DPC-kNN and cluster means against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from mico.visual_tokens.recycle import cluster_means, clusters
from tests.visual_tokens.tiny import numbers


def naive(tokens: list[list[float]], count: int) -> list[int]:
    size, width = len(tokens), len(tokens[0])
    far = [[math.dist(a, b) / math.sqrt(width) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    apart = []
    for i in range(size):
        denser = [far[i][j] for j in range(size) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart.append(min(denser) if denser else max(map(max, far)))
    centres = sorted(range(size), key=lambda i: -density[i] * apart[i])[:count]
    return [
        centres.index(i) if i in centres else min(range(count), key=lambda c: far[i][centres[c]]) for i in range(size)
    ]


@pytest.mark.parametrize(("size", "count", "seed"), [(12, 2, 0), (33, 4, 1), (83, 9, 2), (5, 5, 3), (1, 1, 4)])
def test_clusters(size: int, count: int, seed: int) -> None:
    tokens = torch.randn(size, 6, generator=numbers(seed))
    found = clusters(tokens, count)
    assert found.tolist() == naive(tokens.double().tolist(), count)
    assert sorted(set(found.tolist())) == list(range(count))


def test_equal_tokens_still_fill_every_cluster() -> None:
    assert sorted(set(clusters(torch.ones(11, 4), 2).tolist())) == [0, 1]


def test_groups_that_lie_apart_are_found() -> None:
    centres = torch.eye(3, 8) * 20
    tokens = centres.repeat_interleave(10, 0) + 0.1 * torch.randn(30, 8, generator=numbers(0))
    label = clusters(tokens, 3)
    assert all(len(set(label[i : i + 10].tolist())) == 1 for i in (0, 10, 20)) and len(set(label.tolist())) == 3
    means = cluster_means(tokens, label, 3)
    assert torch.allclose(means[label[10]], tokens[10:20].mean(0), atol=1e-6)
