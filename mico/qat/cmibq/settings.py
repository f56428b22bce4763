"""How a LLaVA is quantized by CM-IBQ: the options as a validated record."""

from __future__ import annotations

from dataclasses import dataclass

from mico.errors import UserError
from mico.qat.cmibq.levels import BITS


@dataclass(frozen=True)
class Settings:
    """weight_group: columns of a weight that share a scale a row, and a width.

    use_importance: False leaves importance out of the features, and allocates by relative squared errors.
    settled_share: part of the training at its end in which widths are chosen for good. hard_share: part of what comes
    before, at its end, in which every group takes one width. preference: weight of the learned logits beside the
    measured distortion in the choice. ib_weight, ib_tokens: beta, and tokens of a sample and site over which the rate
    is taken.
    """

    target_bits_act: float = 4.0
    target_bits_weight: float = 4.0
    num_groups: int = 8
    weight_group: int = 128
    use_ib: bool = True
    use_importance: bool = True
    settled_share: float = 0.4
    hard_share: float = 0.3
    preference: float = 1.0
    ib_weight: float = 1e-2
    ib_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("target_bits_act", "target_bits_weight"):
            value = getattr(self, option)
            if not min(BITS) <= value <= max(BITS):
                raise UserError(f"--{option.replace('_', '-')} {value}: must be from {min(BITS)} to {max(BITS)}")
        for option in ("num_groups", "weight_group", "ib_tokens"):
            value = getattr(self, option)
            if value < 1:
                raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")
        for option in ("ib_weight", "preference"):
            value = getattr(self, option)
            if not value >= 0:
                raise UserError(f"--{option.replace('_', '-')} {value}: must not be negative")
        for option in ("hard_share", "settled_share"):
            value = getattr(self, option)
            if not 0 <= value <= 1:
                raise UserError(f"--{option.replace('_', '-')} {value}: must be from 0 to 1")
