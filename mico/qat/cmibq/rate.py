"""The information-bottleneck rate: how many bits a quantized activation carries under a learned prior.

Quantization of step D is replaced by z = x + D u with u ~ U(-1/2, 1/2), whose density under a prior with distribution
function F is F(z + D/2) - F(z - D/2) over D. Then

    R = E[-log2(F(z + D/2) - F(z - D/2))]

bounds the mutual information I(X; Z) from above for every prior, and estimates the code length of the quantized x
(Balle, Laparra & Simoncelli, 2017). The prior is a logistic distribution for every channel, independent.
Suffixes: T tokens, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

LOG_2 = math.log(2)
LEAST_SPREAD = 1e-6  # of a channel that calibration saw constant


class LogisticPrior(nn.Module):
    """A logistic distribution of every channel; it starts with the mean and deviation that calibration saw.

    Both are learned relative to that start, so that one learning rate serves channels of every size.
    """

    mean_C: torch.Tensor
    spread_C: torch.Tensor

    def __init__(self, mean_C: torch.Tensor, deviation_C: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_C", mean_C.float())
        self.register_buffer("spread_C", (deviation_C.float() * math.sqrt(3) / math.pi).clamp_min(LEAST_SPREAD))
        self.shift_C = nn.Parameter(torch.zeros_like(self.mean_C))
        self.log_spread_C = nn.Parameter(torch.zeros_like(self.mean_C))

    def bits(self, z_TC: torch.Tensor, step_1C: torch.Tensor) -> torch.Tensor:
        """-log2(F(z + D/2) - F(z - D/2)) of every value, stable in both tails."""
        spread_C = self.spread_C * self.log_spread_C.exp()
        middle = (z_TC.float() - self.mean_C - self.spread_C * self.shift_C) / spread_C
        half = 0.5 * step_1C / spread_C
        # S(b) - S(a) = S(b) S(-a) (1 - e^(a - b)) for the logistic S
        inside = torch.log(-torch.expm1(-2 * half).clamp_max(-torch.finfo(torch.float32).tiny))
        return -(functional.logsigmoid(middle + half) + functional.logsigmoid(half - middle) + inside) / LOG_2


def rate(x_BTC: torch.Tensor, step_1C: torch.Tensor, prior: LogisticPrior, generator: torch.Generator) -> torch.Tensor:
    """R in bits a value: the mean over samples, tokens and channels, with noise from `generator` (of x's device).

    All samples (B) have the same noise, so that the mean over processes is the rate of their batches together.
    """
    noise_TC = torch.rand(x_BTC.shape[-2:], generator=generator, device=x_BTC.device, dtype=torch.float32) - 0.5
    with torch.autocast(x_BTC.device.type, enabled=False):
        return prior.bits(x_BTC.float() + step_1C * noise_TC, step_1C).mean()
