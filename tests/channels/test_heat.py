"""The picture of an MI matrix, compared with sums over its pairs one by one."""

from __future__ import annotations

import json

import pytest
import torch

from mico.channels.heat import heat_cells, heat_text, ordered_heat
from mico.channels.plan import ChannelGroups
from mico.runs import RunFolder
from mico.stages import Groups, heat_maps
from tests.workspace import Workspace, workspace


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


def information(channels: int, seed: int = 0) -> torch.Tensor:
    half = torch.rand(channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (half + half.T).fill_diagonal_(0)


def labels(channels: int, count: int, seed: int = 0) -> ChannelGroups:
    drawn = torch.randint(count, (channels,), generator=torch.Generator().manual_seed(seed))
    return ChannelGroups(torch.cat([torch.arange(count), drawn])[:channels])


def pair_by_pair(mi_CC: torch.Tensor, groups: ChannelGroups, side: int) -> list[list[float]]:
    """The mean over the pairs of every cell, each pair looked up in the unsorted matrix."""
    order = sorted(range(len(mi_CC)), key=lambda channel: (int(groups.label_C[channel]), channel))
    found = [[[] for _ in range(side)] for _ in range(side)]
    for row, a in enumerate(order):
        for column, b in enumerate(order):
            if a != b:
                found[row * side // len(order)][column * side // len(order)].append(float(mi_CC[a, b]))
    return [[sum(pairs) / len(pairs) if pairs else 0.0 for pairs in row] for row in found]


@pytest.mark.parametrize(("channels", "cells"), [(60, 7), (50, 48), (20, 48), (48, 48), (1, 4)])
def test_cells_are_means_over_pairs(channels: int, cells: int) -> None:
    mi_CC, groups = information(channels), labels(channels, min(5, channels))
    expected = pair_by_pair(mi_CC, groups, min(cells, channels))
    torch.testing.assert_close(ordered_heat(mi_CC, groups, cells), torch.tensor(expected))


def test_the_diagonal_of_the_matrix_does_not_count() -> None:
    mi_CC, groups = information(30), labels(30, 3)
    loud = mi_CC.clone().fill_diagonal_(100.0)
    torch.testing.assert_close(ordered_heat(loud, groups, 6), ordered_heat(mi_CC, groups, 6))


def test_groups_that_share_information_are_bright_squares() -> None:
    groups = ChannelGroups(torch.arange(40) % 2)
    mi_CC = (groups.label_C[:, None] == groups.label_C).double()
    heat_HH = ordered_heat(mi_CC, groups, 4)
    assert torch.equal(heat_HH, torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)))


def test_text_keeps_four_digits_and_symmetry() -> None:
    heat_HH = ordered_heat(information(100) / 1000, labels(100, 4))
    read = torch.tensor(heat_cells(heat_text(heat_HH)))
    assert torch.equal(read, read.T)
    torch.testing.assert_close(read, heat_HH, rtol=5e-4, atol=0)


def test_maps_of_three_blocks_and_one_expert(tmp_path) -> None:
    """Without heat (starved experts, groups of other kinds) a stream has no map; of experts the first one has."""
    streams, heat_HH = ("attn_in", "experts.0.in", "experts.1.in", "experts.2.in"), torch.eye(2)
    with RunFolder.open(tmp_path / "groups", {}) as run:
        for index in range(6):
            tensors = {name: torch.zeros(8, dtype=torch.int32) for name in streams}
            tensors |= {f"heat/{name}": heat_HH for name in streams if name != "experts.0.in"}
            records = [dict(block=index, stream=name, sizes=[8]) for name in streams]
            run.write_block(index, {}, tensors, records)
        found = heat_maps(Groups(run), 6)
        assert set(Groups(run).block(0)[0]) == set(streams)
    assert [(one["block"], one["stream"]) for one in found] == [
        (block, stream) for block in (0, 3, 5) for stream in ("attn_in", "experts.1.in")
    ]
    assert (
        found[0] == json.loads(json.dumps(found[0])) == dict(block=0, stream="attn_in", sizes=[8], cells=["1", "0 1"])
    )


def test_a_grouping_by_mi_keeps_its_maps(space: Workspace) -> None:
    """The pairs of a map add up to what the record of the stream tells of the MI within and between its groups."""
    run = space.run.parent / "groups"
    arguments = json.loads((run / "manifest.json").read_text())["arguments"]
    groups = Groups(RunFolder.view(run, arguments))
    labels_of, records = groups.block(0)
    assert set(groups.heats(0)) == set(labels_of) == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    for record in records:
        channels, heat_HH = sum(record["sizes"]), groups.heats(0)[record["stream"]].double()
        size_H = torch.bincount(torch.arange(channels) * len(heat_HH) // channels).double()
        pairs_HH = size_H[:, None] * size_H - torch.diag(size_H)
        inside = sum(size * (size - 1) for size in record["sizes"])
        outside = channels * (channels - 1) - inside
        told = (record["within_mi"] or 0) * inside + (record["between_mi"] or 0) * outside
        assert float((heat_HH * pairs_HH).sum()) == pytest.approx(told, rel=1e-5)
