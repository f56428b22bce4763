"""QATLinear: an nn.Linear that computes with the quantized form of its float32 weight, and learns both.

Suffixes: R output rows, C input channels, G groups of consecutive channels of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mico.packed.grid import stored_shared
from mico.packed.quantized import QuantizedWeight, equal_runs
from mico.qat.paretoq import STARTS, WIDTHS, at_least_smallest, by_group, quantize


class QATLinear(nn.Linear):
    """y = x Q(W)^T + b, with `weight` kept in float32 under its old name and `weight_scale` (R, G) beside it.

    weight_scale is alpha of mico/qat/paretoq.py. The forward pass uses s = alpha / divisor rounded to what float16 and
    bfloat16 both hold, so that the packed model computes what was trained; the rounding passes gradients on.
    keep_RC: weights that a mask leaves (None: all); the others are and stay exactly zero. pattern: as that of a
    QuantizedWeight, of a mask that keeps n of every m.
    """

    keep_RC: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: float, groups: int, **where: Any) -> None:
        super().__init__(in_features, out_features, bias, **where)
        self.bits = bits
        self.weight_scale = nn.Parameter(torch.ones(out_features, groups, **where))
        self.register_buffer("keep_RC", None)
        self.pattern: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, linear: nn.Linear, bits: float, group_size: int | None = None, start: str = "mse",
        keep_RC: torch.Tensor | None = None, pattern: tuple[int, int] | None = None,
    ) -> QATLinear:  # fmt: skip
        """A QATLinear that starts at the weight of `linear`. Raises ValueError where groups do not divide a row."""
        channels = linear.in_features
        if group_size is not None and channels % group_size:
            raise ValueError(f"--group-size {group_size}: {channels} input channels are no multiple of it")
        groups = 1 if group_size is None else channels // group_size
        made = cls(channels, linear.out_features, linear.bias is not None, bits, groups, device="meta")
        weight_RC = linear.weight.detach().float()
        if keep_RC is not None:
            weight_RC = weight_RC * keep_RC
            made.keep_RC, made.pattern = keep_RC.bool(), pattern
        made.weight = nn.Parameter(weight_RC)
        made.weight_scale = nn.Parameter(STARTS[start](weight_RC, bits, groups, keep_RC))
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())
        return made.train(linear.training)

    def stored_alpha(self) -> torch.Tensor:
        """alpha (R, G) as the packed form holds it: s = alpha / divisor in 16 bits. Straight-through."""
        divisor = WIDTHS[self.bits].divisor
        alpha_RG = at_least_smallest(self.weight_scale)
        rounded_RG = stored_shared(alpha_RG.detach() / divisor) * divisor
        return alpha_RG + (rounded_RG - alpha_RG).detach()

    def quantized_weight(self) -> torch.Tensor:
        """The float32 weight that the forward pass uses, (R, C)."""
        weight_RC = quantize(self.weight, self.stored_alpha(), self.bits)
        return weight_RC if self.keep_RC is None else weight_RC * self.keep_RC

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., R), in the dtype of x or of autocast."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.quantized_weight().to(x.dtype), bias)

    @torch.no_grad()
    def to_quantized(self) -> QuantizedWeight:
        """The packed form, which dequantizes to `quantized_weight()` bit for bit."""
        width, groups = WIDTHS[self.bits], self.weight_scale.shape[1]
        alpha_RG = self.stored_alpha()
        code_RGS = width.codes(by_group(self.weight, groups) / alpha_RG[..., None])
        scale_RG, zero_1G = alpha_RG / width.divisor, None
        if self.bits in (1, 2):  # odd levels: -1, 1 and -3, ..., 3 are twice the half-integers of the packed form
            code_RGS, scale_RG = (code_RGS + 2**self.bits - 1) / 2, 2 * scale_RG
        elif width.symmetric:
            code_RGS = code_RGS + 1
        else:
            half = 2 ** (int(self.bits) - 1)
            code_RGS = code_RGS + half
            zero_1G = torch.full((1, groups), half, dtype=torch.uint8, device=code_RGS.device)
        codes_RC = code_RGS.reshape(self.weight.shape).to(torch.uint8)
        if self.keep_RC is not None:
            codes_RC = codes_RC * self.keep_RC
        label_C = equal_runs(self.in_features, groups).to(codes_RC.device)
        half_RG = scale_RG.to(torch.float16)
        widths = (self.bits,) * groups
        return QuantizedWeight(codes_RC, half_RG, None, zero_1G, widths, label_C, self.keep_RC, self.pattern)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, groups={self.weight_scale.shape[1]}"
