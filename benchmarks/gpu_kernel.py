"""The GPU kernel on random weights against dense bfloat16 and 2:4 products: `python -m benchmarks.gpu_kernel`.

Every arm multiplies by many copies of its weight in turn, so that none is found in the cache, inside one CUDA graph,
so that no launch is timed. GB/s are the arm's own bytes over its time; a product of few rows can at best reach the
copy's. The ratios are against that copy and against the dense product of the same rows, all from this run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from mico.packed.gpu import available, prepare_gpu, prepare_sparse24
from mico.packed.quantized import QuantizedWeight

BATCHES = (1, 4, 16, 64)
RESIDENT = 400 << 20  # bytes of copies of a weight: several times the cache of any device
COPY_BYTES = 1 << 30
REPLAYS, WARM = 20, 3
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Median seconds of one product, and the bytes of the weight it reads."""

    arm: str
    batch: int
    seconds: float
    nbytes: int


def weight(rows: int, channels: int, bits_G: Sequence[int], masked: bool, pattern: bool = False) -> QuantizedWeight:
    """Random codes in groups of equal size, permuted when there are several; half of the weights pruned if asked."""
    generator = torch.Generator().manual_seed(0)
    label_C = torch.arange(channels) * len(bits_G) // channels
    if len(bits_G) > 1:
        label_C = label_C[torch.randperm(channels, generator=generator)]
    levels_C = torch.tensor([2**bits for bits in bits_G])[label_C]
    codes_RC = (torch.rand(rows, channels, generator=generator) * levels_C).to(torch.uint8)
    keep_RC = None
    if pattern:
        keep_RC = torch.tensor([True, False, False, True]).repeat(rows, channels // 4)
    elif masked:
        keep_RC = torch.rand(rows, channels, generator=generator) > 0.5
    row_scale_RG = (torch.rand(rows, 1, generator=generator) * 0.01 + 0.01).half()
    group_scale_G = (torch.rand(len(bits_G), generator=generator) + 0.5).half()
    if keep_RC is not None:
        codes_RC = codes_RC * keep_RC
    return QuantizedWeight(
        codes_RC, row_scale_RG, group_scale_G, None, tuple(bits_G), label_C, keep_RC, (2, 4) if pattern else None
    )


def arms(rows: int, channels: int) -> Iterator[tuple[str, Callable[[], Product], int]]:
    """Name, maker of one copy, and bytes of a copy. Every arm has the weight it claims, in bfloat16 activations."""
    dtype, device = torch.bfloat16, "cuda"
    dense_RC = weight(rows, channels, (4,), False).dequantize(dtype).to(device)

    def dense() -> Product:
        own_RC = dense_RC.clone()
        return lambda x_BC: functional.linear(x_BC, own_RC)

    yield "dense bfloat16", dense, dense_RC.nbytes
    mixtures = {"2 bits": (2,), "3 bits": (3,), "4 bits": (4,), "8 bits": (8,), "2-8 bits mixed": (2, 3, 4, 4, 5, 8)}
    for masked in (False, True):
        for name, bits_G in mixtures.items():
            quantized = weight(rows, channels, bits_G, masked)
            prepared = prepare_gpu(quantized, device, dtype)
            assert prepared is not None

            yield name + (" + mask" if masked else ""), partial(deepcopy, prepared), prepared.nbytes
    sparse = weight(rows, channels, (4,), True, pattern=True)
    half = prepare_sparse24(sparse, device, dtype)
    yield "2:4 semi-structured", partial(prepare_sparse24, sparse, device, dtype), half.nbytes


def timed(run: Callable[[], object]) -> float:
    """Median seconds of a replay of `run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    seconds = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def _through(products: Sequence[Product], x_BC: torch.Tensor) -> None:
    for product in products:
        product(x_BC)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timed(lambda: target.copy_(source))


def measure(rows: int, channels: int, batches: Sequence[int]) -> Iterator[Measured]:
    """Every arm at every batch."""
    for name, make, nbytes in arms(rows, channels):
        products = [make() for _ in range(-(-RESIDENT // nbytes))]
        for batch in batches:
            x_BC = torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16)
            seconds = timed(partial(_through, products, x_BC))
            yield Measured(name, batch, seconds / len(products), nbytes)
        del products
        torch.cuda.empty_cache()


def table(measured: Sequence[Measured], weights: int, copy: float, title: str) -> Table:
    """One row an arm and batch; the dense arm of the same batch is the peer."""
    dense = {one.batch: one.seconds for one in measured if one.arm.startswith("dense")}
    shown = Table(title=title, caption=f"copy: {copy / 1e9:.0f} GB/s")
    for heading in ("weight", "M", "bytes / weight", "µs", "GB/s", "of copy", "dense / this"):
        shown.add_column(heading, justify="left" if heading == "weight" else "right")
    for one in measured:
        rate = one.nbytes / one.seconds
        shown.add_row(
            one.arm, str(one.batch), f"{one.nbytes / weights:.3f}", f"{one.seconds * 1e6:.1f}", f"{rate / 1e9:.0f}",
            f"{rate / copy:.2f}", f"{dense[one.batch] / one.seconds:.2f}",
        )  # fmt: skip
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="rows of activations")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not available():
        sys.exit("gpu_kernel: needs a CUDA device and Triton; there is none here, and nothing was measured")
    title = f"{given.rows} x {given.channels}, bfloat16 activations, {torch.cuda.get_device_name()}"
    measured = list(measure(given.rows, given.channels, given.batches))
    Console(width=110).print(table(measured, given.rows * given.channels, copy_bandwidth(), title))


if __name__ == "__main__":
    main()
