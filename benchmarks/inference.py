"""The inference part of benchmarks/speed.py: decoding with packed weights against bfloat16, and masks against both.

    python -m benchmarks.speed inference [--layers 2 --hidden 4096 --ffn 11008 --threads N --batch 1,64 ...]
    python -m benchmarks.speed inference --sparse

A stack of Llama blocks with random weights, rounded to nearest in every layout, saved as a packed checkpoint and loaded
from disk. Packed and dense take turns in one process. Vocabulary 4096: a head of usual size would weigh more than so
few blocks; it and the embedding stay in bfloat16 on both sides. Suffixes: R rows, C channels, G groups.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mico.adapters import family_of
from mico.bench import compare, generate, random_ids
from mico.checkpoint import pack_model
from mico.loading import quiet
from mico.packed.bits import levels
from mico.packed.blob import decode, encode
from mico.packed.cpu import prepare_cpu
from mico.packed.grid import minmax_grid, quantize
from mico.packed.linear import PackedLinear
from mico.packed.quantized import QuantizedWeight, equal_runs

HEAD_CHANNELS = 128
FULL = 1 << 60  # a group size that takes in every channel
COPIES = 4  # of a weight that --sparse goes through in turn, so that none stays in the cache
CALLS, LONGEST = 24, 2.0  # calls that are timed, fewer once they took so many seconds
WIDTH = 170  # of a table that goes into a file


@dataclass(frozen=True)
class Stack:
    """The random model and what is measured on it."""

    layers: int = 2
    hidden: int = 4096
    ffn: int = 11008
    vocabulary: int = 4096
    threads: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    processor_time: int = 0  # 1: of one thread, which busy neighbours distort less than wall time

    def model(self) -> LlamaForCausalLM:
        """Random weights in bfloat16; every block has the same ones, which changes no time and saves some."""
        heads = max(1, self.hidden // HEAD_CHANNELS)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=self.prompt_tokens + self.new_tokens + 64, dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
        first = model.model.layers[0].state_dict()
        for block in model.model.layers[1:]:
            block.load_state_dict(first)
        return model


# --- layouts --------------------------------------------------------------------------------------------------------


def rounded(weight_RC: torch.Tensor, bits: int, group_size: int = FULL) -> QuantizedWeight:
    """Nearest points of a min-max grid with stored zeros: one grid a row, or one for every run of channels."""
    channels = weight_RC.shape[1]
    groups = -(-channels // group_size)
    grid = minmax_grid(weight_RC, equal_runs(channels, groups), (bits,) * groups)
    scale_RC, zero_RC = grid.scale_RG[:, grid.label_C], grid.zero_point_RG[:, grid.label_C]
    codes_RC = quantize(weight_RC, scale_RC, zero_RC, torch.tensor(2.0**bits - 1))
    return grid.quantized(codes_RC, None, None)


def factored(weight_RC: torch.Tensor, bits_G: tuple[int, ...], kept: float = 1.0) -> QuantizedWeight:
    """Half-integer levels, scales of rows times those of groups, groups of channels from anywhere; masked at random."""
    rows, channels = weight_RC.shape
    make = torch.Generator().manual_seed(channels)
    label_C = equal_runs(channels, len(bits_G))[torch.randperm(channels, generator=make)]
    row_R1 = weight_RC.abs().amax(1, keepdim=True).half()
    counts_G = torch.tensor([float(levels(bits)) for bits in bits_G])
    group_G = (2 / counts_G).half()
    scale_RC = row_R1.float() * group_G.float()[label_C]
    counts_C = counts_G[label_C]
    codes_RC = (weight_RC / scale_RC + (counts_C - 1) / 2).round_().clamp_(min=0).minimum(counts_C - 1).to(torch.uint8)
    keep_RC = None if kept == 1 else torch.rand(rows, channels, generator=make) < kept
    if keep_RC is not None:
        codes_RC *= keep_RC
    return QuantizedWeight(codes_RC, row_R1, group_G, None, bits_G, label_C, keep_RC)


@dataclass(frozen=True)
class Variant:
    """A layout, and the goals at batch 1: times the dense tokens a second, and of the dense weight memory."""

    name: str
    make: Callable[[torch.Tensor], QuantizedWeight]
    speed: float | None = None
    memory: float | None = None


MIXED = (2, 2, 3, 4, 4, 4, 5, 8)
VARIANTS = {
    "4": Variant("4 bits, one grid a row", lambda w: rounded(w, 4), 2.5, 0.35),
    "4g": Variant("4 bits, groups of 128", lambda w: rounded(w, 4, 128), 2.5, 0.35),
    "3": Variant("3 bits, one grid a row", lambda w: rounded(w, 3), 1.5),
    "mixed": Variant("2 to 8 bits, mean 4, permuted groups", lambda w: factored(w, MIXED), 1.5),
    "masked": Variant("4 bits, half pruned, permuted groups", lambda w: factored(w, (4,) * 8, 0.5)),
    "8": Variant("8 bits, one grid a row", lambda w: rounded(w, 8)),
}
BATCH_GOAL = 0.95  # of dense, at batches above 8


def packed_from_disk(stack: Stack, variant: Variant, folder: Path) -> tuple[Any, float]:
    """The model in this layout, saved and loaded again, and the seconds from loading to the first token."""
    model = stack.model()
    family = family_of(model.config)
    blocks = model.get_submodule(family.blocks)
    made = {
        name: variant.make(linear.weight.float())
        for name, linear in blocks[0].named_modules()
        if isinstance(linear, nn.Linear)
    }
    parts = (
        {f"{family.blocks}.{index}.{name}": weight for name, weight in made.items()} for index in range(stack.layers)
    )
    pack_model(model, family, parts, torch.bfloat16)
    model.save_pretrained(folder)
    del model, blocks, made
    gc.collect()
    started = perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    generate(loaded, random_ids(loaded, 1, 1), 1)
    return loaded, perf_counter() - started


# --- the table ------------------------------------------------------------------------------------------------------


def inference(stack: Stack, batches: Sequence[int], names: Sequence[str], console: Console) -> Table:
    """Measure the layouts one after the other beside the dense model."""
    torch.set_num_threads(stack.threads)
    title = (
        f"inference, bfloat16 | Llama {stack.layers} x {stack.hidden} (ffn {stack.ffn}, vocabulary {stack.vocabulary})"
        f" | {stack.prompt_tokens} tokens in, {stack.new_tokens} out | threads {stack.threads},"
        f"{' processor time,' * stack.processor_time}"
        f" median of {stack.repeats} (min-max), torch {torch.__version__}"
    )
    columns = ("layout", "batch", "decode dense, tokens/s", "decode packed, tokens/s", "ratio", "goal",
               "prefill ratio", "weight memory", "goal", "GB/s", "Linears", "first token, s")  # fmt: skip
    clock = process_time if stack.processor_time else perf_counter
    table, dense = Table(*columns, title=title), stack.model()
    for name in names:
        variant = VARIANTS[name]
        with quiet(), tempfile.TemporaryDirectory() as folder, console.status(variant.name):
            packed, first = packed_from_disk(stack, variant, Path(folder))
            for batch in batches:
                ids_BP = random_ids(dense, batch, stack.prompt_tokens)
                found = compare(dense, packed, ids_BP, stack.new_tokens, stack.repeats, clock=clock)
                table.add_row(*_row(variant, batch, found, first))
            del packed
            gc.collect()
    return table


def _row(variant: Variant, batch: int, found: dict[str, Any], first: float) -> Iterator[str]:
    dense, packed = found["dense"], found["packed"]

    def ratio(key: str) -> float:
        return packed[f"{key}_tokens_per_s"]["median"] / dense[f"{key}_tokens_per_s"]["median"]

    speed = variant.speed if batch == 1 else BATCH_GOAL if batch > 8 else None
    yield from (variant.name, str(batch))
    for arm in (dense, packed):
        rate = arm["decode_tokens_per_s"]
        yield f"{rate['median']:.2f} ({rate['min']:.2f}-{rate['max']:.2f})"
    yield f"{ratio('decode'):.2f}"
    yield "" if speed is None else f">= {speed}"
    yield f"{ratio('prefill'):.2f}"
    yield f"{packed['weight_bytes'] / dense['weight_bytes']:.3f}"
    yield "" if variant.memory is None or batch != 1 else f"<= {variant.memory}"
    yield f"{packed['decode_GB_per_s']:.1f}"
    yield ", ".join(f"{count} {kind}" for kind, count in sorted(found["paths"].items()))
    yield f"{first:.1f}"


# --- masks ----------------------------------------------------------------------------------------------------------


def sparse(size: int, threads: int, repeats: int) -> Table:
    """A matrix of size x size with half its weights pruned at random, times one vector, in every way there is."""
    torch.set_num_threads(threads)
    weight_RC = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    masked, full = factored(weight_RC, (4,), 0.5), factored(weight_RC, (4,))
    values_RC = masked.dequantize()
    x_C = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16()
    title = f"{size} x {size} times one vector, half pruned | threads {threads}, median of {repeats} x {CALLS} calls"
    table = Table("path", "ms (min-max)", "of bfloat16 dense", "memory", "largest error", title=title)
    exact_R, plain = values_RC.double() @ x_C.double(), 2 * size * size
    base = None
    for name, (calls, held, truth_R) in _ways(masked, full, values_RC, exact_R, x_C).items():
        try:
            calls[0]()
        except NotImplementedError:
            table.add_row(name, "not implemented")
            continue
        error = float((calls[0]().double().flatten() - truth_R).abs().max() / truth_R.abs().max())
        taken = [1000 * _seconds(calls) for _ in range(repeats)]
        middle = statistics.median(taken)
        base = base or middle
        table.add_row(name, f"{middle:.2f} ({min(taken):.2f}-{max(taken):.2f})", f"{middle / base:.2f}",
                      f"{held / plain:.2f}", f"{error:.0e}")  # fmt: skip
    return table


Way = tuple[list[Callable[[], torch.Tensor]], int, torch.Tensor]


def _ways(
    masked: QuantizedWeight, full: QuantizedWeight, values_RC: torch.Tensor, exact_R: torch.Tensor, x_C: torch.Tensor
) -> dict[str, Way]:
    """By name: calls on copies of the weight, the bytes of one copy, and what each should give."""
    x_1C = x_C[None]

    def dense(dtype: torch.dtype) -> Way:
        copies, x = [values_RC.to(dtype, copy=True) for _ in range(COPIES)], x_1C.to(dtype)
        return [lambda w=w: functional.linear(x, w) for w in copies], copies[0].nbytes, exact_R

    def csr(dtype: torch.dtype) -> Way:
        first = values_RC.to(dtype).to_sparse_csr()
        crow, column = first.crow_indices().int(), first.col_indices().int()
        copies = [
            torch.sparse_csr_tensor(crow.clone(), column.clone(), first.values().clone(), first.shape)
            for _ in range(COPIES)
        ]
        x, held = x_C.to(dtype), crow.nbytes + column.nbytes + first.values().nbytes
        return [lambda w=w: w @ x for w in copies], held, exact_R

    def kernel(weight: QuantizedWeight, truth_R: torch.Tensor) -> Way:
        copies = [prepare_cpu(weight) for _ in range(COPIES)]
        return [lambda w=w: w(x_1C, None) for w in copies], copies[0].nbytes, truth_R

    def unpacking() -> Way:
        blob = encode(masked)
        return [lambda: functional.linear(x_1C, decode(blob).dequantize(torch.bfloat16))], blob.nbytes, exact_R

    return {
        "dense, bfloat16": dense(torch.bfloat16),
        "dense, float32": dense(torch.float32),
        "torch.sparse CSR, float32": csr(torch.float32),
        "torch.sparse CSR, bfloat16": csr(torch.bfloat16),
        "bitmap and survivors' codes, unpacked in every call": unpacking(),
        "packed bytes, pruned weights as zeros": kernel(masked, exact_R),
        "packed 4-bit digits, nothing pruned": kernel(full, full.dequantize().double() @ x_C.double()),
    }


def _seconds(calls: list[Callable[[], torch.Tensor]]) -> float:
    """Median seconds of a call, the copies in turn."""
    taken = []
    for index in range(CALLS):
        started = perf_counter()
        calls[index % len(calls)]()
        taken.append(perf_counter() - started)
        if sum(taken) > LONGEST:
            break
    return statistics.median(taken)


# --- command line ---------------------------------------------------------------------------------------------------


def crossover(size: int, threads: int, repeats: int) -> Table:
    """Milliseconds of kernels and of the dense weight by rows of activations: what mico/packed/linear.py chooses by."""
    torch.set_num_threads(threads)
    weight_RC = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    made = {"4-bit digits": rounded(weight_RC, 4), "bytes": factored(weight_RC, (4,), 0.5)}
    kernels = {name: [prepare_cpu(weight) for _ in range(COPIES)] for name, weight in made.items()}
    dense = [weight_RC.bfloat16() for _ in range(COPIES)]
    table = Table(
        "rows", "dense, ms", *(f"{name}, ms" for name in kernels), title=f"{size} x {size}, threads {threads}"
    )
    for rows in (1, 2, 4, 6, 8, 12, 16, 32, 64, 256, 512):
        x_BC = torch.randn(rows, size, generator=torch.Generator().manual_seed(1)).bfloat16()
        ways = [[lambda w=w, x=x_BC: functional.linear(x, w) for w in dense]]
        ways += [[lambda w=w, x=x_BC: w(x, None) for w in copies] for copies in kernels.values()]
        table.add_row(str(rows), *(f"{1000 * min(_seconds(way) for _ in range(repeats)):.2f}" for way in ways))
    for name, weight in made.items():
        blob = encode(weight)
        module = PackedLinear(size, size, len(blob))
        module.weight = blob
        started = perf_counter()
        module.dense(torch.bfloat16)
        unpacked, started = perf_counter() - started, perf_counter()
        prepare_cpu(module.quantized())
        table.caption = f"{table.caption or ''} {name}: {1000 * unpacked:.0f} ms to make it dense,"
        table.caption += f" {1000 * (perf_counter() - started):.0f} ms to make the kernel."
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and print one table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed inference",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, value in vars(Stack(threads=torch.get_num_threads())).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--batch", default="1,64", help="default 1,64")
    parser.add_argument("--layouts", default=",".join(VARIANTS), help=f"default {','.join(VARIANTS)}")
    parser.add_argument("--sparse", action="store_true", help="one masked matrix in every way there is, instead")
    parser.add_argument("--crossover", action="store_true", help="kernels by rows of activations, instead")
    options, console = vars(parser.parse_args(arguments)), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    batches = [int(batch) for batch in options.pop("batch").split(",")]
    names, wants_sparse, wants_crossover = (
        options.pop("layouts").split(","),
        options.pop("sparse"),
        options.pop("crossover"),
    )
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"--layouts {min(unknown)}: choose from {', '.join(VARIANTS)}")
    stack = Stack(**options)
    if stack.processor_time and stack.threads != 1:
        parser.error("--processor-time 1 adds up threads: use --threads 1")
    if wants_sparse:
        console.print(sparse(stack.hidden, stack.threads, stack.repeats))
    elif wants_crossover:
        console.print(crossover(stack.hidden, stack.threads, stack.repeats))
    else:
        console.print(inference(stack, batches, names, console))
