"""llama.cpp's block containers, packed by hand so that every weight keeps its value.

A block is 32 consecutive channels of one row that share one float16 `d`; a weight is d * q with a whole q. Which
container fits is a question of the grid alone: the offsets q of a block and its unit d follow from codes, zeros
and scales, never from a search over rounded values. Suffixes: R rows, C channels, K blocks a row, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mico.packed.bits import levels
from mico.packed.quantized import QuantizedWeight

BLOCK = 32  # channels


@dataclass(frozen=True)
class Container:
    """One block layout: the offsets it holds are low..high, or -high..-low with a negative d."""

    name: str
    low: int
    high: int

    def holds(self, least_RK: torch.Tensor, most_RK: torch.Tensor) -> bool:
        """Whether every block fits, as it is or with the sign of its d turned."""
        as_is_RK = (least_RK >= self.low) & (most_RK <= self.high)
        turned_RK = (least_RK >= -self.high) & (most_RK <= -self.low)
        return bool((as_is_RK | turned_RK).all())


Q4_0 = Container("Q4_0", -8, 7)  # 4.5 bits a weight
Q5_0 = Container("Q5_0", -16, 15)  # 5.5
Q8_0 = Container("Q8_0", -128, 127)  # 8.5
CONTAINERS = (Q4_0, Q5_0, Q8_0)  # narrowest first


@dataclass(frozen=True)
class Fit:
    """The narrowest exact container of one weight, or None, why none is exact, and what to compress with instead."""

    container: Container | None
    reason: str = ""
    remedy: str = ""


PRUNED = Fit(None)  # 16-bit numbers: there are no codes to pack
PROFILE = "--profile gguf"


def fit(weight: QuantizedWeight) -> Fit:
    """Choose a container for one quantized Linear without packing it."""
    if not weight.quantized:
        return PRUNED
    if weight.codes_RC.shape[1] % BLOCK:
        return Fit(None, f"its {weight.codes_RC.shape[1]} channels are not a multiple of {BLOCK}")
    offset_RC = _offsets(weight)
    unit_RK, mixed_RK = _units(weight, offset_RC)
    if mixed_RK.any():
        return Fit(None, f"channels of several groups, with different scales, meet in a block of {BLOCK}", PROFILE)
    if not torch.equal(unit_RK.half().float(), unit_RK):
        if weight.group_scale_G is not None:
            return Fit(None, "a product of row scale and group scale is not a float16 number", PROFILE)
        return Fit(None, "half a scale is not a float16 number", PROFILE)
    least_RK, most_RK = _ranges(offset_RC)
    container = next((container for container in CONTAINERS if container.holds(least_RK, most_RK)), None)
    if container is None:
        return Fit(None, f"its levels lie more than {-Q8_0.low} steps from zero, the reach of Q8_0", PROFILE)
    return Fit(container)


def pack(weight: QuantizedWeight, container: Container) -> torch.Tensor:
    """The (R, bytes a row) uint8 blocks of a weight that `fit` found to be exact in `container`."""
    offset_RC = _offsets(weight)
    unit_RK, _ = _units(weight, offset_RC)
    _, most_RK = _ranges(offset_RC)
    turn_RK = 1 - 2 * (most_RK > container.high).to(torch.int16)
    q_RKb = offset_RC.reshape(len(offset_RC), -1, BLOCK) * turn_RK[..., None]
    unit_RK = unit_RK * turn_RK
    d_RKx = unit_RK.half().view(torch.uint8).reshape(*unit_RK.shape, 2)
    return torch.cat([d_RKx, *_LAYOUTS[container](q_RKb)], -1).flatten(1)


def _parts_G(weight: QuantizedWeight) -> torch.Tensor:
    """Units a scale, (G,) int16: 2 where zero lies between two codes, so that the levels are odd halves; else 1."""
    if weight.zero_RG is not None:
        return torch.ones(len(weight.bits_G), dtype=torch.int16, device=weight.codes_RC.device)
    parts = [1 + (levels(bits) - 1) % 2 for bits in weight.bits_G]
    return torch.tensor(parts, dtype=torch.int16, device=weight.codes_RC.device)


def _offsets(weight: QuantizedWeight) -> torch.Tensor:
    """Distance of every weight from zero in units, (R, C) int16; 0 where pruned."""
    parts_G = _parts_G(weight)
    if weight.zero_RG is not None:
        zero_RG = weight.zero_RG.to(torch.int16)
    else:
        top_G = torch.tensor([levels(bits) - 1 for bits in weight.bits_G], dtype=torch.int16, device=parts_G.device)
        zero_RG = (top_G * parts_G // 2)[None]
    offset_RC = weight.codes_RC.to(torch.int16) * parts_G[weight.label_C] - zero_RG[:, weight.label_C]
    return offset_RC if weight.keep_RC is None else offset_RC * weight.keep_RC


def _units(weight: QuantizedWeight, offset_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 unit of every block (0 when the block is all zero), and which blocks would need several; (R, K)."""
    scale_RG = weight.row_scale_RG.float()
    if weight.group_scale_G is not None:
        scale_RG = scale_RG * weight.group_scale_G.float()
    unit_RG = scale_RG / _parts_G(weight)
    unit_RKb = (unit_RG[:, weight.label_C] * (offset_RC != 0)).reshape(len(offset_RC), -1, BLOCK)
    least_RK, most_RK = unit_RKb.amin(-1), unit_RKb.amax(-1)
    unit_RK = torch.where(most_RK > 0, most_RK, least_RK)
    return unit_RK, ((unit_RKb != 0) & (unit_RKb != unit_RK[..., None])).any(-1)


def _ranges(offset_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest offset of every block, (R, K)."""
    q_RKb = offset_RC.reshape(len(offset_RC), -1, BLOCK)
    return q_RKb.amin(-1), q_RKb.amax(-1)


def _nibbles(level_RKb: torch.Tensor) -> torch.Tensor:
    """Byte i holds channel i in its low half and channel i + 16 in its high half; (R, K, 16)."""
    low, high = (level_RKb & 15).to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _four_bits(q_RKb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (_nibbles(q_RKb + 8),)


def _five_bits(q_RKb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four bytes of fifth bits, channel i at bit i, then the low four bits as nibbles."""
    level_RKb = q_RKb + 16
    place = torch.arange(8, dtype=level_RKb.dtype, device=level_RKb.device)
    fifth_RKx = ((level_RKb >> 4).reshape(*level_RKb.shape[:-1], 4, 8) << place).sum(-1)
    return fifth_RKx.to(torch.uint8), _nibbles(level_RKb)


def _eight_bits(q_RKb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (q_RKb.to(torch.int8).view(torch.uint8),)


_LAYOUTS = {Q4_0: _four_bits, Q5_0: _five_bits, Q8_0: _eight_bits}
