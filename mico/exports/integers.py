"""Quantized weights as the integer kernels of other tools know them: whole multiples of one scale a group.

Suffixes: R rows, C channels, G groups of equal, consecutive channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mico.errors import UserError
from mico.packed.bits import levels
from mico.packed.quantized import QuantizedWeight

REMEDY = "compress again with mico compress --profile vllm, or export with --to dense"
LEAST_BITS, MOST_BITS = 2, 8  # of containers


class Inexact(Exception):
    """Why a weight has no exact integer form."""


@dataclass(frozen=True)
class Integers:
    """weight[r, c] = scale[r, g] * level[r, c], with -2**(bits - 1) <= level < 2**(bits - 1).

    level_RC: int16, 0 where pruned; scale_RG: float32, of either sign; bits: of the narrowest container that holds
    the levels and is not narrower than the codes were; more than MOST_BITS where there is none.
    """

    level_RC: torch.Tensor
    scale_RG: torch.Tensor
    bits: int

    @property
    def group_size(self) -> int:
        return self.level_RC.shape[1] // self.scale_RG.shape[1]

    def values(self) -> torch.Tensor:
        """The (R, C) float32 weight."""
        return self.level_RC * self.scale_RG.repeat_interleave(self.group_size, 1)

    def in_groups_of(self, size: int) -> Integers:
        """The same weight with smaller groups: scales are repeated."""
        assert self.group_size % size == 0, (self.group_size, size)
        return replace(self, scale_RG=self.scale_RG.repeat_interleave(self.group_size // size, 1))


def integers(weight: QuantizedWeight) -> Integers:
    """The integer form of one quantized weight; every value is kept. Raises Inexact when its groups are scattered.

    Levels that lie half a step beside zero are doubled and their scale is halved, which takes one bit more. A zero
    point turns into levels that are not centred, which may take one bit more.
    """
    channels, groups = weight.codes_RC.shape[1], len(weight.bits_G)
    label_C = weight.label_C.cpu()
    if channels % groups or not torch.equal(label_C, torch.arange(channels) // (channels // groups)):
        raise Inexact(f"its {groups} groups of channels are not consecutive and equal")
    scale_RG = weight.row_scale_RG.float()
    if weight.group_scale_G is not None:
        scale_RG = scale_RG * weight.group_scale_G.float()
    twice_RG = _twice_zero(weight)
    level_RC = 2 * weight.codes_RC.to(torch.int16) - twice_RG.repeat_interleave(channels // groups, 1)
    if bool((twice_RG % 2 == 0).all()):
        level_RC = level_RC // 2
    else:
        scale_RG = scale_RG / 2
    if weight.keep_RC is not None:
        level_RC = level_RC * weight.keep_RC
    bits = max(LEAST_BITS, math.ceil(max(weight.bits_G)))
    while int(level_RC.min()) < -(2 ** (bits - 1)) or int(level_RC.max()) >= 2 ** (bits - 1):
        bits += 1
    return Integers(level_RC, scale_RG.expand(-1, groups).contiguous(), bits)


def _twice_zero(weight: QuantizedWeight) -> torch.Tensor:
    """Twice the zero points, (R, G) or (1, G) int16: odd where zero lies between two codes."""
    if weight.zero_RG is not None:
        return 2 * weight.zero_RG.to(torch.int16)
    device = weight.codes_RC.device
    return torch.tensor([[levels(bits) - 1 for bits in weight.bits_G]], dtype=torch.int16, device=device)


def check_bits(found: Integers) -> None:
    """Raise Inexact unless there is a container for the levels around an exact zero."""
    if found.bits > MOST_BITS:
        low, high = int(found.level_RC.min()), int(found.level_RC.max())
        raise Inexact(f"its levels {low} to {high} need more than {MOST_BITS} bits around an exact zero")


def check_scales(found: Integers, dtype: torch.dtype, factored: bool) -> None:
    """Raise Inexact unless every scale is a number of `dtype`."""
    if not torch.equal(found.scale_RG.to(dtype).float(), found.scale_RG):
        what = "products of row and group scales" if factored else "scales"
        raise Inexact(f"its {what} are not exact in {str(dtype).removeprefix('torch.')}")


def refuse(target: str, reasons: Mapping[str, str], remedy: str = REMEDY) -> None:
    """Raise one UserError for all weights without an exact form, naming three and the way to an exact export."""
    if not reasons:
        return
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    raise UserError(f"--to {target} cannot hold {len(reasons)} weights exactly: {shown}{more}: {remedy}")
