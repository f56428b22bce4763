"""The meter of a stream whose batches several processes have a share of each.

Suffixes: C channels, T tokens.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from mico.channels.meters import Reservoir, SecondMoments
from mico.team.team import Team


class StreamMeter:
    """Second moments and a reservoir of rows of one stream.

    rows: of the stream in every batch; share: the batches that are added here, when others see the rest.
    """

    def __init__(
        self, channels: int, device: torch.device, rows: list[int] | None = None, share: slice = slice(None)
    ) -> None:
        self.moments, self.reservoir = SecondMoments.empty(channels, device), Reservoir(channels, total=sum(rows or ()))
        self._places: list[list[int]] | None = None  # [first row still to come, rows still to come] of every batch
        if rows is not None:
            places = zip([0, *accumulate(rows)][:-1], rows, strict=True)
            self._places = [[start, length] for start, length in list(places)[share] if length]

    def add(self, x_TC: torch.Tensor) -> None:
        """Add the rows of a batch, or of a part of one where batches were halved."""
        if self._places is not None:
            place = self._places[0]
            self.reservoir.seen = place[0]
            place[:] = place[0] + len(x_TC), place[1] - len(x_TC)
            if not place[1]:
                del self._places[0]
        self.moments.add(x_TC)
        self.reservoir.add(x_TC)

    def join(self, team: Team, rows: list[int]) -> None:
        """Bring the shares of all processes together in the first one, as if it had seen every batch itself."""
        self.moments.reduce(team.total(0))
        parts = [team.send(rank, None, dict(rows=self.reservoir.rows_TC))[1]["rows"] for rank in range(team.size)]
        self.reservoir.rows_TC = in_order(parts, rows, self.reservoir.stride)


def in_order(parts: list[torch.Tensor], rows: list[int], stride: int) -> torch.Tensor:
    """Every stride-th row in the order of the batches; part p holds those of batches p, p + parts, ..."""
    starts = [0, *accumulate(rows)][:-1]
    kept = [len(range(-start % stride, length, stride)) for start, length in zip(starts, rows, strict=True)]
    pieces = [part.split(kept[rank :: len(parts)]) for rank, part in enumerate(parts)]
    return torch.cat([pieces[batch % len(parts)][batch // len(parts)] for batch in range(len(rows))])
