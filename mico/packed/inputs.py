"""Static grids for what a packed Linear reads: activations quantized to few bits, as a training left them.

The channels of an input are cut into runs of equal length (but for one), each with a width, a step s and a zero point
z. A value x becomes

    Q(x) = s (q + z),   q = the half-integer nearest to x / s - z in [-h, h],   h = (2^bits - 1) / 2.

A grid lies in the checkpoint as bytes, so that no change of the model's dtype touches it. Suffixes: G runs, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

GRID_BYTES = 12  # of one run: bits, scale and zero as float32
WIDEST = 16  # bits


def encode_grid(bits_G: Sequence[int], scale_G: Sequence[float], zero_G: Sequence[float]) -> torch.Tensor:
    """The grid as uint8 (12 G,)."""
    return torch.tensor([list(bits_G), list(scale_G), list(zero_G)], dtype=torch.float32).view(torch.uint8).flatten()


def decode_grid(grid: torch.Tensor, channels: int) -> torch.Tensor:
    """Bits, scale and zero as float32 (3, G). Raises ValueError when the bytes hold no grid of so many channels."""
    if grid.numel() % GRID_BYTES or not 0 < grid.numel() // GRID_BYTES <= channels:
        raise ValueError(f"{grid.numel()} bytes are no grid of inputs for {channels} channels")
    grid_3G = grid.clone().view(torch.float32).view(3, -1)
    bits_G, scale_G = grid_3G[0], grid_3G[1]
    whole = (bits_G == bits_G.round()) & (bits_G >= 1) & (bits_G <= WIDEST)
    if not bool((whole & (scale_G > 0)).all()) or not bool(grid_3G.isfinite().all()):
        raise ValueError("the grid of its inputs is damaged")
    return grid_3G


def by_channel(grid_3G: torch.Tensor, channels: int) -> torch.Tensor:
    """Half of the highest level, scale and zero of every channel, (3, C)."""
    label_C = torch.arange(channels, device=grid_3G.device) * grid_3G.shape[1] // channels
    half_G = (2.0 ** grid_3G[0] - 1) / 2
    return torch.stack([half_G, grid_3G[1], grid_3G[2]]).index_select(1, label_C)


def on_grid(x: torch.Tensor, parts_3C: torch.Tensor) -> torch.Tensor:
    """x (..., C) on the grid that `by_channel` made, computed in float32, in the dtype of x."""
    half_C, scale_C, zero_C = parts_3C
    level = ((x.float() / scale_C - zero_C - 0.5).round_() + 0.5).clamp_(min=-half_C, max=half_C)
    return (scale_C * (level + zero_C)).to(x.dtype)
