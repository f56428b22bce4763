"""What one site reads, quantized for good: its grid as plain numbers, and as a packed Linear holds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mico.packed.inputs import encode_grid


@dataclass(frozen=True)
class ActivationGrid:
    """One site's grid (mico/qat/cmibq/levels.py), and the Linears that read it by their names in the model.

    Suffix G: groups of channels.
    """

    linears: tuple[str, ...]
    channels: int
    bits_G: tuple[int, ...]
    scale_G: tuple[float, ...]
    zero_G: tuple[float, ...]

    def encoded(self) -> torch.Tensor:
        """Bytes for `PackedLinear.input_grid` (mico/packed/inputs.py), with which it computes what was trained."""
        return encode_grid(self.bits_G, self.scale_G, self.zero_G)
