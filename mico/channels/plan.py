"""Decisions about the channels of one stream and one Linear. Suffixes: C input channels, G groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChannelGroups:
    """`label_C` (int64, 0..G-1): the group of every input channel of a stream; every group is non-empty."""

    label_C: torch.Tensor

    @classmethod
    def single(cls, channels: int) -> ChannelGroups:
        return cls(torch.zeros(channels, dtype=torch.int64))

    @classmethod
    def contiguous(cls, channels: int, group_size: int) -> ChannelGroups:
        return cls(torch.arange(channels) // group_size)

    @property
    def count(self) -> int:
        return int(self.label_C.max()) + 1

    @property
    def sizes_G(self) -> torch.Tensor:
        return torch.bincount(self.label_C, minlength=self.count)

    @property
    def order_C(self) -> torch.Tensor:
        """Channels sorted by group, original order inside a group (so the labels alone restore it)."""
        return torch.argsort(self.label_C, stable=True)


@dataclass(frozen=True)
class LayerPlan:
    """How to compress one Linear: bits of every group (16 = not quantized).

    factored: scales a_r * b_g on a symmetric grid; integer: one scale per (row, group) on a symmetric grid that
    holds zero; neither: one min-max scale and zero per (row, group).
    """

    groups: ChannelGroups
    bits_G: tuple[int, ...]
    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None
    factored: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        assert len(self.bits_G) == self.groups.count, (len(self.bits_G), self.groups.count)
        assert not (self.factored and self.integer), "a plan has one grid"
