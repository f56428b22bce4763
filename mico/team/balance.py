"""Which process of a team solves which stream."""

from __future__ import annotations


class Balance:
    """Who solves which stream: costly ones first, each to the process that has done least, over all blocks."""

    def __init__(self, size: int) -> None:
        self.load = [0.0] * size

    def owners(self, shapes: list[tuple[int, int]]) -> list[int]:
        """An owner for every stream of (rows, channels); streams given together can be solved at the same time."""
        owners = [0] * len(shapes)
        for place in sorted(range(len(shapes)), key=lambda place: -solving_cost(*shapes[place])):
            owner = min(range(len(self.load)), key=lambda rank: self.load[rank])
            owners[place] = owner
            self.load[owner] += solving_cost(*shapes[place])
        return owners

    def share(self, rank: int) -> float:
        """The part of all solving work that went to one process."""
        return self.load[rank] / (sum(self.load) or 1.0)


def solving_cost(rows: int, channels: int) -> float:
    """Of factoring H and sweeping the rows, up to a constant."""
    return float(channels) ** 3 + float(rows) * float(channels) ** 2
