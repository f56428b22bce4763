"""Speed of mico against peers on random weights: `python -m benchmarks.speed [compress|inference] [options]`.

`inference` lies in benchmarks/inference.py; this is `compress`.
Every measurement runs in a fresh process and the arms take turns, so that neither inherits the other's memory and
both feel the same neighbours. The table gives medians with their range, and the ratio mico / peer.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import inference, naive_sparsegpt
from benchmarks.naive_sparsegpt import Clock
from mico.adapters import family_of
from mico.adapters.family import lookup
from mico.channels import products
from mico.channels.meters import SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.data import token_batches
from mico.methods import METHODS, Layer, StreamProblem
from mico.walk import walk

SPARSITY, BITS, PERCDAMP, BLOCKSIZE = 0.5, 4, 0.01, 128
STAGES = ("first pass", "Hessians", "factors", "sweeps", "second pass")
STAGE_OF = {"factorize": "factors", "sweep": "sweeps"}  # functions that the solver calls
HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Setting:
    """One random Llama and its calibration windows; heads of 64 channels."""

    layers: int = 4
    hidden: int = 1024
    ffn: int = 2816
    tokens: int = 16384
    seqlen: int = 512
    batch_size: int = 8
    threads: int = 1
    vocabulary: int = 4096
    plain_products: int = 0  # 1: mico without oneDNN (mico/channels/products.py), which leaves what its structure gains

    def model(self) -> LlamaForCausalLM:
        """The same random weights for every arm, in float32."""
        heads = max(1, self.hidden // HEAD_CHANNELS)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=self.seqlen,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    def ids_NT(self, windows: int | None = None, seed: int = 1) -> torch.Tensor:
        """Random windows, by default those to calibrate on."""
        shape = (windows or self.tokens // self.seqlen, self.seqlen)
        return torch.randint(self.vocabulary, shape, generator=torch.Generator().manual_seed(seed))


Arm = Callable[[LlamaForCausalLM, Setting, Clock], None]


def naive_arm(model: LlamaForCausalLM, setting: Setting, clock: Clock) -> None:
    """SparseGPT one Linear at a time (benchmarks/naive_sparsegpt.py)."""
    naive_sparsegpt.sparsegpt(
        model, model.model.layers, setting.ids_NT(),
        sparsity=SPARSITY, bits=BITS, percdamp=PERCDAMP, blocksize=BLOCKSIZE, clock=clock,
    )  # fmt: skip


def mico_arm(model: LlamaForCausalLM, setting: Setting, clock: Clock) -> None:
    """What `mico compress --arm original` does to the blocks: measure, solve, replace, propagate."""

    class TimedMoments(SecondMoments):
        def add(self, x_TC: torch.Tensor) -> None:
            with clock.stage("Hessians"):
                super().add(x_TC)

    onednn = products.ONEDNN and not setting.plain_products
    with _timed_solver(clock), mock.patch.object(products, "ONEDNN", onednn):
        blocks = walk(model, family_of(model.config), token_batches(setting.ids_NT(), setting.batch_size))
        for block in _timed(blocks, clock, "second pass"):
            with clock.stage("first pass"):
                meters = block.measure(TimedMoments.empty, tuple(block.streams))
            for stream, linears in block.streams.items():
                layers = tuple(_layer(path, linear) for path, linear in linears.items())
                problem = StreamProblem(layers, meters[stream], None, PERCDAMP, BLOCKSIZE)
                for layer, result in zip(layers, METHODS["sparsegpt"](problem), strict=True):
                    block.replace(layer.name, result.quantized, result.bias_R)


def _layer(path: str, linear: nn.Linear) -> Layer:
    plan = LayerPlan(ChannelGroups.single(linear.in_features), (BITS,), SPARSITY)
    return Layer(path, linear.weight.detach().clone(), None, plan)


def _timed(blocks: Iterator, clock: Clock, name: str) -> Iterator:
    """Time what the walk does between two blocks."""
    while True:
        with clock.stage(name):
            block = next(blocks, None)
        if block is None:
            return
        yield block


@contextmanager
def _timed_solver(clock: Clock) -> Iterator[None]:
    def timed(name: str, function: Callable) -> Callable:
        def run(*args: object) -> object:
            with clock.stage(name):
                return function(*args)

        return run

    module = sys.modules[METHODS["sparsegpt"].__module__]
    with ExitStack() as stack:
        for name, stage in STAGE_OF.items():
            stack.enter_context(mock.patch.object(module, name, timed(stage, getattr(module, name))))
        yield


ARMS: dict[str, Arm] = {"naive": naive_arm, "mico": mico_arm}


@dataclass(frozen=True)
class Measurement:
    """Seconds of wall clock and of processor time (all threads), the latter by stage, and peak resident bytes.

    damage: relative distance of the logits to the dense model's, on a window that was not calibrated on.
    """

    wall: float
    cpu: float
    stages: dict[str, float]
    peak_bytes: int
    damage: float


def measure(arm: str, setting: Setting, weights_file: Path | None = None) -> Measurement:
    """Run one arm in this process; keep the compressed Linears when a file is given."""
    torch.set_num_threads(setting.threads)
    model, clock = setting.model(), Clock()
    dense = _unseen_logits(model, setting)  # also loads the libraries and starts the threads
    wall, cpu = perf_counter(), process_time()
    ARMS[arm](model, setting, clock)
    wall, cpu = perf_counter() - wall, process_time() - cpu
    stages = {name: clock.seconds.get(name, 0.0) for name in STAGES}
    stages["first pass"] -= stages["Hessians"]  # its hooks ran inside
    stages["rest"] = cpu - sum(stages.values())
    if weights_file is not None:
        torch.save(compressed_weights(model), weights_file)
    scale = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    damage = float((_unseen_logits(model, setting) - dense).norm() / dense.norm())
    return Measurement(wall, cpu, stages, peak_bytes, damage)


@torch.no_grad()
def _unseen_logits(model: LlamaForCausalLM, setting: Setting) -> torch.Tensor:
    return model(input_ids=setting.ids_NT(windows=1, seed=2), use_cache=False).logits


def compressed_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of every Linear inside the blocks, by name."""
    blocks = lookup(model, family_of(model.config).blocks)
    return {name: m.weight.detach() for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Share of weights whose grid points (or zeros) differ; float32 rounding of one grid point does not count."""
    assert first.keys() == second.keys()
    unequal = sum(int((~torch.isclose(first[name], second[name], rtol=1e-5, atol=0)).sum()) for name in first)
    return unequal / sum(weight.numel() for weight in first.values())


def _in_fresh_process(arm: str, setting: Setting, weights_file: Path | None) -> Measurement:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, arm, setting, weights_file).result()


def compress(setting: Setting, repeats: int, console: Console) -> Table:
    """Run both arms in turn and return the table."""
    found: dict[str, list[Measurement]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        files = {arm: Path(folder) / f"{arm}.pt" for arm in ARMS}
        for repeat in range(repeats):
            for arm in ARMS:
                with console.status(f"repeat {repeat + 1} of {repeats}: {arm}"):
                    found[arm].append(_in_fresh_process(arm, setting, None if repeat else files[arm]))
        weights = [torch.load(files[arm]) for arm in ARMS]
    in_first = [{name: w for name, w in arm.items() if name.startswith("0.")} for arm in weights]
    shares = f"{differing(*weights):.2e} of all, {differing(*in_first):.2e} in block 0"
    return _table(setting, repeats, found, shares)


def _table(setting: Setting, repeats: int, found: dict[str, list[Measurement]], shares: str) -> Table:
    title = (
        f"compress, original arm: {SPARSITY:.0%} sparse, {BITS} bits | Llama {setting.layers} x {setting.hidden}"
        f" (ffn {setting.ffn}), {setting.tokens} tokens in windows of {setting.seqlen} | {_products(setting)} |"
        f" threads {setting.threads},"
        f" median of {repeats} (min-max), torch {torch.__version__}"
    )
    table = Table("", *ARMS, "mico / naive", title=title, caption=f"weights that differ: {shares}")

    def row(name: str, value: Callable[[Measurement], float], unit: str) -> None:
        columns = {arm: [value(m) for m in measurements] for arm, measurements in found.items()}
        medians = {arm: statistics.median(values) for arm, values in columns.items()}
        cells = [f"{medians[arm]:.2f} ({min(values):.2f}-{max(values):.2f})" for arm, values in columns.items()]
        ratio = medians["mico"] / medians["naive"] if medians["naive"] > 0 else float("nan")
        table.add_row(f"{name}, {unit}", *cells, f"{ratio:.2f}")

    row("wall time", lambda m: m.wall, "s")
    row("processor time", lambda m: m.cpu, "s")
    for stage in (*STAGES, "rest"):
        row(f"  {stage}", lambda m, stage=stage: m.stages[stage], "s")  # type: ignore[misc]
    row("peak memory", lambda m: m.peak_bytes / 2**30, "GiB")
    row("error of the logits", lambda m: 100 * m.damage, "%")
    return table


def _products(setting: Setting) -> str:
    return "mico with oneDNN" if products.ONEDNN and not setting.plain_products else "both with PyTorch's products"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and print the table."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["inference"]:
        inference.main(words[1:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("what", nargs="?", default="compress", choices=["compress", "inference"])
    for name, value in vars(Setting(threads=torch.get_num_threads())).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    options = vars(parser.parse_args(words))
    repeats, console = options.pop("repeats"), Console()
    if options.pop("what") == "inference":
        parser.error("inference comes first: python -m benchmarks.speed inference --help tells its options")
    console.print(compress(Setting(**options), repeats, console))


if __name__ == "__main__":
    main()
