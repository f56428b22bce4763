"""The picture of an MI matrix: its channels in the order of their groups, averaged down to a few cells.

Suffixes: C channels, H cells of one side, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mico.channels.plan import ChannelGroups

CELLS = 48
DIGITS = 4  # significant digits of a cell as text


def ordered_heat(mi_CC: torch.Tensor, groups: ChannelGroups, cells: int = CELLS) -> torch.Tensor:
    """Mean MI of the channel pairs behind every cell (nats, float32 H x H), channels sorted by group.

    H is `cells`, or C when that is less; cells hold equally many channels to one. A channel's pair with itself does
    not count; a cell without any other pair is 0. The matrix is not sorted, which would need a copy of it: products
    with the membership of the cells add up the same pairs.
    """
    channels = len(mi_CC)
    side = min(cells, channels)
    cell_C = torch.empty(channels, dtype=torch.int64)
    cell_C[groups.order_C.cpu()] = torch.arange(channels) * side // channels
    member_CH = torch.nn.functional.one_hot(cell_C, side).to(mi_CC)
    total_HH = member_CH.T @ (mi_CC @ member_CH) - torch.diag(member_CH.T @ mi_CC.diagonal())
    size_H = member_CH.sum(0)
    pairs_HH = size_H[:, None] * size_H - torch.diag(size_H)
    heat_HH = total_HH / pairs_HH.clamp(min=1)
    return ((heat_HH + heat_HH.T) / 2).float().cpu()


def heat_text(heat_HH: torch.Tensor) -> list[str]:
    """The lower half of a symmetric heat as one line a row, to 4 significant digits: short in a JSON file."""
    return [" ".join(f"{value:.{DIGITS}g}" for value in row[: i + 1]) for i, row in enumerate(heat_HH.tolist())]


def heat_cells(lines: Sequence[str]) -> list[list[float]]:
    """The whole symmetric heat behind `heat_text`."""
    rows = [[float(value) for value in line.split()] for line in lines]
    return [[rows[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))]
