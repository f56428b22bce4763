"""How many bytes the packed model will take, part by part as mico/packed/blob.py stores them.

Suffixes: R output rows, C input channels, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mico.channels.plan import ChannelGroups
from mico.forecast.outline import Outline, StreamShape
from mico.packed.bits import pattern_width
from mico.packed.blob import HEADER_BYTES
from mico.packed.quantized import GROUP_HEADER_BITS, SCALE_BITS, label_width
from mico.packed.table import run_length
from mico.profiles import PROFILES
from mico.settings import Compression

AUTO_GROUPS = 8  # of a stream where clustering will choose, from 2 to 20
KEPT_BACK = 2e-3  # bits a weight that the budget of mixed widths leaves unspent (mico/solve.py)
ENTRY_BYTES = 110  # of a tensor in the header of a weight file


@dataclass(frozen=True)
class Size:
    """Bytes of the packed model. tensors: as its bits are counted; file: of the weight files; bits: a Linear weight."""

    tensors: int
    file: int
    bits: float


def kept_share(settings: Compression) -> float:
    """Share of the weights that survives."""
    return settings.pattern[0] / settings.pattern[1] if settings.pattern else 1 - settings.sparsity


def group_count(settings: Compression, channels: int) -> int:
    """Groups of a stream of `channels` channels."""
    if settings.profile is not None:
        return channels // PROFILES[settings.profile].group_size(channels, settings.group_size)
    if settings.grouping is not None:
        wanted = settings.grouping.n_groups
        return min(AUTO_GROUPS, channels) if isinstance(wanted, str) else wanted
    return 1 if settings.group_size is None else ChannelGroups.contiguous(channels, settings.group_size).count


def packed_size(shape: Outline, settings: Compression) -> Size:
    """Forecast what compress writes. Raises UserError as `run_length` does for --embed-bits."""
    bits = sum(stream_bits(stream, settings) for block in shape.blocks for stream in block)
    linears = sum(len(stream.rows) for block in shape.blocks for stream in block)
    itemsize = shape.dtype.itemsize
    tables = sum(rows * channels for rows, channels in shape.tables)
    rest = (shape.parameters - shape.linear_weights - tables) * itemsize
    rest += sum(_table_bytes(rows, channels, settings.embed_bits, itemsize) for rows, channels in shape.tables)
    tensors = math.ceil(bits / 8) + rest
    blobs = linears * HEADER_BYTES
    return Size(tensors, tensors + blobs + ENTRY_BYTES * shape.tensors, bits / max(shape.linear_weights, 1))


def _table_bytes(rows: int, channels: int, bits: int, itemsize: int) -> int:
    if bits == 16:
        return rows * channels * itemsize
    scales = channels // run_length(channels, bits)
    return HEADER_BYTES + rows * (channels * bits + SCALE_BITS * scales) // 8


def stream_bits(stream: StreamShape, settings: Compression) -> float:
    """Bits of the Linears of one stream, with the channel labels that they share."""
    groups = group_count(settings, stream.channels)
    labels = stream.channels * label_width(groups) if settings.grouping is not None and groups > 1 else 0
    total = float(labels)
    for rows in stream.rows:
        total += _mask_bits(rows * stream.channels, settings) + _linear_bits(rows, stream.channels, groups, settings)
    if settings.grouping is not None and settings.target_avg_bits is None:
        total -= labels  # they are paid for out of the codes
    return total


def _mask_bits(weights: int, settings: Compression) -> float:
    if settings.pattern:
        n, m = settings.pattern
        return weights / m * pattern_width(n, m)
    return float(weights) if settings.sparsity else 0.0


def _linear_bits(rows: int, channels: int, groups: int, settings: Compression) -> float:
    """Codes, scales and zeros of one Linear."""
    kept, wbits = rows * channels * kept_share(settings), settings.wbits
    if wbits == 16:
        return kept * 16
    codes = kept * (settings.target_avg_bits or wbits)
    if settings.profile is not None:
        return codes + groups * (SCALE_BITS * rows + 8)  # a group's zero fills a byte
    if settings.grouping is not None and settings.target_avg_bits is None:
        return codes + rows * (SCALE_BITS + wbits) - KEPT_BACK * rows * channels  # never above plain rows
    if settings.grouping is not None or settings.method == "mico":
        shared = groups * (SCALE_BITS + (GROUP_HEADER_BITS if settings.grouping else 0)) if groups > 1 else 0
        return codes + SCALE_BITS * rows + shared
    return codes + rows * groups * (SCALE_BITS + wbits)
