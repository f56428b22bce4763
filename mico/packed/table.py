"""Embeddings and output heads at 8 or 4 bits: rounded to nearest, every run of a row with a scale of its own.

Suffixes: R rows (tokens), C channels, N runs, K channels of a run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mico.errors import UserError
from mico.packed.grid import quantize, symmetric_grid
from mico.packed.quantized import QuantizedWeight, equal_runs

LONGEST_RUN = 64  # channels that share a scale below 8 bits
ROWS_AT_ONCE = 1 << 22  # weights searched at a time, which bounds the memory of the search


def run_length(channels: int, bits: int) -> int:
    """Channels that share a scale: a whole row at 8 bits, else the longest power of two that divides it, up to 64.

    Raises UserError when the rows cannot be packed one by one.
    """
    run = channels if bits == 8 else min(channels & -channels, LONGEST_RUN)
    if run * bits % 8:
        raise UserError(f"--embed-bits {bits}: rows of {channels} channels do not fill whole bytes, use 8 or 16")
    return run


def quantize_table(weight_RC: torch.Tensor, bits: int) -> QuantizedWeight:
    """The table on symmetric grids without zero points, fitted for the least squared error of every run.

    Raises UserError as `run_length` does.
    """
    rows, channels = weight_RC.shape
    run = run_length(channels, bits)
    codes, scales = zip(*_parts(weight_RC.reshape(-1, run), bits), strict=True)
    groups = channels // run
    return QuantizedWeight(
        torch.cat(codes).view(rows, channels), torch.cat(scales).view(rows, groups), None, None,
        (bits,) * groups, equal_runs(channels, groups).to(weight_RC.device),
    )  # fmt: skip


def _parts(weight_NK: torch.Tensor, bits: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    label_K = torch.zeros(weight_NK.shape[1], dtype=torch.long, device=weight_NK.device)
    for part_NK in weight_NK.split(max(1, ROWS_AT_ONCE // weight_NK.shape[1])):
        part_NK = part_NK.float()
        grid = symmetric_grid(part_NK, torch.ones_like(part_NK), label_K, (bits,))
        largest = grid.levels_G - 1
        yield quantize(part_NK, grid.scale_RG, grid.zero_point_RG, largest).to(torch.uint8), grid.row_scale_RG
