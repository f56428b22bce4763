"""The compressed form of one Linear, and what it truly costs. Suffixes: R output rows, C channels, G groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mico.packed.bits import levels, pattern_width, stream_bits

SCALE_BITS = 16
GROUP_HEADER_BITS = 8  # the bit width of one group


@dataclass(frozen=True)
class QuantizedWeight:
    """weight[r, c] = row_scale[r, g] * group_scale[g] * (code[r, c] - zero[r, g]) for kept weights, else 0.

    codes_RC: uint8 in the original channel order (a 16-bit float tensor holding values where nothing is
        quantized: bits 16); 0 where not kept.
    row_scale_RG: float16, (R, G), or (R, 1) when factored; group_scale_G: float16 when factored, else None.
    zero_RG: uint8 codes of zero, (R, G), or (1, G) when all rows share them and they are stored once; None: the
        middle of the grid, (levels - 1) / 2, which costs nothing.
    bits_G: code width per group, 1 to 8, TERNARY (three levels), or 16; label_C: group of each channel;
    keep_RC: surviving weights (None: all); pattern: (n, m) when every m consecutive channels keep exactly n.
    """

    codes_RC: torch.Tensor
    row_scale_RG: torch.Tensor
    group_scale_G: torch.Tensor | None
    zero_RG: torch.Tensor | None
    bits_G: tuple[float, ...]
    label_C: torch.Tensor
    keep_RC: torch.Tensor | None = None
    pattern: tuple[int, int] | None = None

    @property
    def quantized(self) -> bool:
        return not self.codes_RC.is_floating_point()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (R, C) weight, computed in float32 and rounded once to `dtype`."""
        if not self.quantized:
            return self.codes_RC.to(dtype)
        scale_RG = self.row_scale_RG.float()
        if self.group_scale_G is not None:
            scale_RG = scale_RG * self.group_scale_G.float()
        if self.zero_RG is None:
            zero_1G = torch.tensor([[(levels(b) - 1) / 2 for b in self.bits_G]])
            zero_RG = zero_1G.to(scale_RG.device).expand_as(scale_RG)
        else:
            zero_RG = self.zero_RG.float()
        if len(self.bits_G) > 1:
            scale_RG, zero_RG = (values.index_select(1, self.label_C) for values in (scale_RG, zero_RG))
        weight_RC = scale_RG * (self.codes_RC.float() - zero_RG)
        if self.keep_RC is not None:
            weight_RC = weight_RC * self.keep_RC
        return weight_RC.to(dtype)

    def kept_G(self) -> torch.Tensor:
        """Surviving weights of every group."""
        rows, groups = len(self.codes_RC), len(self.bits_G)
        per_channel_C = self.keep_RC.sum(0) if self.keep_RC is not None else torch.full_like(self.label_C, rows)
        return torch.zeros(groups, dtype=torch.int64).index_add_(0, self.label_C.cpu(), per_channel_C.cpu().long())

    def stored_bits(self) -> dict[str, int]:
        """Bits on disk by part: codes, scales, zeros, widths, mask. `label_bits` counts a stream's channel labels."""
        codes = sum(stream_bits(kept, bits) for kept, bits in zip(self.kept_G().tolist(), self.bits_G, strict=True))
        if not self.quantized:
            return dict(codes=codes, scales=0, zeros=0, widths=0, mask=self._mask_bits())
        scales = SCALE_BITS * (self.row_scale_RG.numel() + (0 if self.group_scale_G is None else len(self.bits_G)))
        zeros = 0 if self.zero_RG is None else sum(stream_bits(len(self.zero_RG), bits) for bits in self.bits_G)
        widths = 0 if len(set(self.bits_G)) == 1 else GROUP_HEADER_BITS * len(self.bits_G)
        return dict(codes=codes, scales=scales, zeros=zeros, widths=widths, mask=self._mask_bits())

    def _mask_bits(self) -> int:
        if self.keep_RC is None:
            return 0
        if self.pattern is None:
            return self.keep_RC.numel()
        n, m = self.pattern
        return self.keep_RC.numel() // m * pattern_width(n, m)


def equal_runs(channels: int, groups: int) -> torch.Tensor:
    """Labels of `groups` runs of consecutive channels, equal but for the last: they need not be stored."""
    return torch.arange(channels) // math.ceil(channels / max(groups, 1))


def is_equal_runs(label_C: torch.Tensor, groups: int) -> bool:
    return torch.equal(label_C.cpu(), equal_runs(len(label_C), groups))


def label_width(groups: int) -> int:
    """Bits of the label of one channel."""
    return max(1, math.ceil(math.log2(groups)))


def label_bits(label_C: torch.Tensor) -> int:
    """Bits of one stream's channel labels, which fix its order (original order inside a group)."""
    groups = int(label_C.max()) + 1
    return 0 if is_equal_runs(label_C, groups) else len(label_C) * label_width(groups)
