"""How a LLaVA is quantized by CM-IBQ: the options as a validated record."""

from __future__ import annotations

from dataclasses import dataclass

from mico.errors import UserError
from mico.qat.cmibq.levels import BITS


@dataclass(frozen=True)
class Settings:
    """weight_group: columns of a weight that share a scale a row, and a width.

    use_importance: False leaves importance out of the features, and allocates by relative squared errors.
    hard_share: part of the training at its end in which every group takes one width. preference: weight of the learned
    logits beside the measured distortion in the final choice. ib_weight, ib_rows: beta, and tokens of a site over
    which the rate is taken.
    """

    target_bits_act: float = 4.0
    target_bits_weight: float = 4.0
    num_groups: int = 8
    weight_group: int = 128
    use_ib: bool = True
    use_importance: bool = True
    hard_share: float = 0.3
    preference: float = 0.1
    ib_weight: float = 1e-2
    ib_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("target_bits_act", "target_bits_weight"):
            value = getattr(self, option)
            if not min(BITS) <= value <= max(BITS):
                raise UserError(f"--{option.replace('_', '-')} {value}: must be from {min(BITS)} to {max(BITS)}")
        for option in ("num_groups", "weight_group", "ib_rows"):
            value = getattr(self, option)
            if value < 1:
                raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")
        for option in ("ib_weight", "preference"):
            value = getattr(self, option)
            if not value >= 0:
                raise UserError(f"--{option.replace('_', '-')} {value}: must not be negative")
        if not 0 <= self.hard_share <= 1:
            raise UserError(f"--hard-share {self.hard_share}: must be from 0 to 1")
