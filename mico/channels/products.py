"""Large float32 products on the CPU, by oneDNN where that is the faster of the two libraries inside PyTorch.

PyTorch gives float32 products on x86 to MKL, which leaves the AVX-512 units of AMD processors idle; oneDNN, to which
torch.compile gives the Linears, does not (2.2 x on an EPYC 9005). Everything else takes PyTorch's own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

FEWEST_STEPS = 2**22  # multiply-adds below which a call costs more than it saves
ONEDNN = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: torch.Tensor, weight_RC: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias for x of shape (..., C), without a graph: torch.nn.functional.linear."""
    plain = x.dtype != torch.float32 or weight_RC.dtype != torch.float32 or x.device.type != "cpu"
    if not ONEDNN or plain or x.numel() * len(weight_RC) < FEWEST_STEPS:
        return F.linear(x, weight_RC, bias_R)
    # Strided operands would fall to oneDNN's reference kernel, which is thousands of times slower.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight_RC.contiguous(), bias_R, "none", [], "")


class FastLinears(TorchFunctionMode):
    """Context in which every torch.nn.functional.linear is `linear`. Only for forwards that need no gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))
