"""The compressed form of one Linear, and what it truly costs. Suffixes: R output rows, C channels, G groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SCALE_BITS = 16
GROUP_HEADER_BITS = 8  # the bit width of one group


@dataclass(frozen=True)
class QuantizedWeight:
    """weight[r, c] = row_scale[r, g] * group_scale[g] * (code[r, c] - zero[r, g]) for kept weights, else 0.

    codes_RC: uint8 in the original channel order (a 16-bit float tensor holding values where nothing is
        quantized: bits 16); 0 where not kept.
    row_scale_RG: float16, (R, G), or (R, 1) when factored; group_scale_G: float16 when factored, else None.
    zero_RG: uint8 codes of zero, (R, G), or (1, G) when all rows share them and they are stored once; None: the
        middle of the grid, (2**b - 1) / 2, which costs nothing.
    bits_G: code width per group; label_C: group of each channel; keep_RC: surviving weights (None: all);
    pattern: (n, m) when every m consecutive channels keep exactly n.
    """

    codes_RC: torch.Tensor
    row_scale_RG: torch.Tensor
    group_scale_G: torch.Tensor | None
    zero_RG: torch.Tensor | None
    bits_G: tuple[int, ...]
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
            zero_1G = torch.tensor([[(2**b - 1) / 2 for b in self.bits_G]])
            zero_RG = zero_1G.to(scale_RG.device).expand_as(scale_RG)
        else:
            zero_RG = self.zero_RG.float()
        weight_RC = scale_RG[:, self.label_C] * (self.codes_RC.float() - zero_RG[:, self.label_C])
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
        bits_G = torch.tensor(self.bits_G)
        codes = int((self.kept_G() * bits_G).sum())
        if not self.quantized:
            return dict(codes=codes, scales=0, zeros=0, widths=0, mask=self._mask_bits())
        scales = SCALE_BITS * (self.row_scale_RG.numel() + (0 if self.group_scale_G is None else len(self.bits_G)))
        zeros = 0 if self.zero_RG is None else int(bits_G.sum()) * len(self.zero_RG)
        widths = 0 if len(set(self.bits_G)) == 1 else GROUP_HEADER_BITS * len(self.bits_G)
        return dict(codes=codes, scales=scales, zeros=zeros, widths=widths, mask=self._mask_bits())

    def _mask_bits(self) -> int:
        if self.keep_RC is None:
            return 0
        if self.pattern is None:
            return self.keep_RC.numel()
        n, m = self.pattern
        return self.keep_RC.numel() // m * math.ceil(math.log2(math.comb(m, n)))


def label_bits(label_C: torch.Tensor) -> int:
    """Bits of one stream's channel labels, which fix its order (original order inside a group).

    Sorted labels are the group sizes alone (16 bits each); equal contiguous groups follow from their number.
    """
    groups = int(label_C.max()) + 1
    if groups == 1:
        return 0
    if bool((label_C[1:] >= label_C[:-1]).all()):
        sizes_G = torch.bincount(label_C)
        return 0 if len(set(sizes_G[:-1].tolist())) == 1 and sizes_G[-1] <= sizes_G[0] else 16 * groups
    return len(label_C) * math.ceil(math.log2(groups))
