"""LoRA of a QuantLinear: what is quantized is the weight with its adapter, as it will be stored.

An adapter beside a quantized weight would have to be merged into it in the end, and what quantization then does to the
sum nobody trained for. Here the sum is quantized in every forward pass, so that merging changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear

from mico.adapters.family import Family
from mico.qat.cmibq.quantizer import QuantLinear
from mico.qat.cmibq.sites import PROJECTOR
from mico.qat.lora import ADAPTER, with_adapters


class QuantLora(Linear):
    """y = Q(x) Q(W + alpha / rank B A)^T + b."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., C) -> (..., R)."""
        base: Any = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return base(x)
        with torch.autocast(x.device.type, enabled=False):  # as merging computes it
            weight_RC = base.weight + self.get_delta_weight(ADAPTER)
        return base.with_weight(x, weight_RC)


def adapted(model: Any, family: Family, *, rank: int, alpha: float, seed: int) -> Any:
    """A PeftModel around a wrapped LLaVA, with adapters in its language model and projector."""
    projector = [name for site in model.cmibq.sites if site.modality == PROJECTOR for name in site.linears]
    return with_adapters(
        model, family, rank=rank, alpha=alpha, dropout=0.0, seed=seed, also=projector, kinds={QuantLinear: QuantLora}
    )
