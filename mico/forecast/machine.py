"""What this machine does in a second, measured on small pieces of the real work in about five seconds."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mico.channels.meters import SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.channels.products import linear
from mico.methods.sweep import Segment, factorize, sweep
from mico.packed.blob import decode, encode
from mico.packed.grid import minmax_grid, symmetric_grid

LEAST_SECONDS = 0.25  # that a measurement lasts
SIDE = 1024  # channels of the small problems
FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Machine:
    """Rates: *_flops in multiply-adds times two a second; seconds a weight or a (row, column) where named so.

    forward_flops: of the model's products in its dtype; factor_flops: C³ over the time of a factorization in float64
    (half the time in float32); column_seconds and cell_seconds: of a sweep, a column and one weight in it; symmetric_*:
    of fitting a symmetric grid; pass_bytes: of a pass over float32 numbers, read or written; read, write: of a disk.
    """

    forward_flops: float
    float32_flops: float
    float64_flops: float
    factor_flops: float
    column_seconds: float
    cell_seconds: float
    symmetric_seconds: float
    pack_seconds: float
    unpack_seconds: float
    pass_bytes: float
    read: float
    write: float
    hash: float


def measure(device: torch.device, dtype: torch.dtype, folder: Path) -> Machine:
    """Measure a device, and the disk of `folder` (the nearest parent that exists)."""
    generator = torch.Generator().manual_seed(0)
    x_TC = torch.randn(2 * SIDE, SIDE, generator=generator).to(device)
    few_TC = x_TC[:SIDE].contiguous()
    half_TC = few_TC.to(dtype)
    moments = SecondMoments.empty(SIDE, device)
    moments.add(x_TC)
    product = 2.0 * SIDE**3
    hessian_CC = moments.hessian_CC
    wide_CC = hessian_CC.double()
    read, write, hashing = _disk(folder)
    column, cell = _sweeping(few_TC, hessian_CC)
    symmetric, pack, unpack = _packing(few_TC)
    return Machine(
        forward_flops=product / _seconds(lambda: linear(half_TC, half_TC), device),
        float32_flops=product / _seconds(lambda: linear(few_TC, few_TC), device),
        float64_flops=product / _seconds(lambda: wide_CC @ wide_CC, device),
        factor_flops=SIDE**3 / _seconds(lambda: factorize(hessian_CC, 0.01), device),
        column_seconds=column, cell_seconds=cell, symmetric_seconds=symmetric, pack_seconds=pack,
        unpack_seconds=unpack, pass_bytes=_pass_bytes(device), read=read, write=write, hash=hashing,
    )  # fmt: skip


def _seconds(work: Callable[[], object], device: torch.device | str = "cpu", least: float | None = None) -> float:
    """Seconds of one call: the fastest of as many as fit into `least`, after one that does not count."""
    work()
    least = LEAST_SECONDS if least is None else least
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < least:
        before = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best


def _sweeping(few_TC: torch.Tensor, hessian_CC: torch.Tensor) -> tuple[float, float]:
    """Seconds a column and seconds a cell, from sweeps of few and of many rows."""
    channels = 256
    factor = factorize(hessian_CC[:channels, :channels], 0.01)
    label_C = torch.zeros(channels, dtype=torch.int64)
    seconds = []
    for copies in (1, 16):
        weight_RC = few_TC[:, :channels].repeat(copies, 1)[: 256 if copies == 1 else None]
        grid = minmax_grid(weight_RC, label_C, (4,))
        segments = [Segment(slice(0, len(weight_RC)), 0.5, None)]
        spent = _seconds(lambda w=weight_RC, s=segments, g=grid: sweep(w, factor, s, [g]), weight_RC.device)  # type: ignore[misc]
        seconds.append((len(weight_RC), spent / channels))
    (few, short), (many, long) = seconds
    cell = max((long - short) / (many - few), 0.0)
    return max(short - cell * few, 0.0), cell


def _packing(few_TC: torch.Tensor) -> tuple[float, float, float]:
    """Seconds a weight of fitting a symmetric grid, of packing and of unpacking half of the weights at 4 bits."""
    rows = 512
    weight_RC = few_TC[:rows]
    plan = LayerPlan(ChannelGroups.contiguous(SIDE, SIDE // 4), (4,) * 4)
    one_RC = torch.ones_like(weight_RC)
    fitting = _seconds(
        lambda: symmetric_grid(weight_RC, one_RC, plan.groups.label_C, plan.bits_G), weight_RC.device, least=0.0
    )
    grid = minmax_grid(weight_RC, torch.zeros(SIDE, dtype=torch.int64), (4,))
    quantized = grid.quantized(weight_RC.abs().mul(4).to(torch.uint8) & 15, weight_RC > 0, None)
    blob = encode(quantized)
    packing = _seconds(lambda: encode(quantized))
    return fitting / weight_RC.numel(), packing / rows / SIDE, _seconds(lambda: decode(blob).dequantize()) / rows / SIDE


def _pass_bytes(device: torch.device) -> float:
    values = torch.zeros(2**24, device=device)
    return 3 * values.nbytes / _seconds(lambda: values * values.add(1), device)


def _disk(folder: Path) -> tuple[float, float, float]:
    """Bytes a second read from, written to and hashed on the disk below `folder`."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    data = os.urandom(FILE_BYTES)
    hashing = _seconds(lambda: hashlib.sha256(data), least=0.0)
    with tempfile.TemporaryFile(dir=place if os.access(place, os.W_OK) else None) as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):  # so that what was just written comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        file.read()
        read = time.perf_counter()
    seconds = (read - written, written - started, hashing)
    reading, writing, digesting = (FILE_BYTES / max(spent, 1e-9) for spent in seconds)
    return reading, writing, digesting
