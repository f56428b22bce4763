"""Verb: speed and memory of a packed model beside the dense one that holds the same weights (mico bench).

Suffixes: B batch, P prompt tokens.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from mico.callable import callable_module
from mico.checkpoint import set_execution
from mico.console import Console, peak_host_bytes
from mico.errors import UserError
from mico.files import atomic_json, check_writable
from mico.loading import load_config, load_model, longest_text, pick_device
from mico.loading.packed import packed_folder
from mico.packed.blob import MASK
from mico.packed.hf import quantized_inputs, unpacked
from mico.packed.linear import CROSSOVER, EXECUTIONS, PATIENCE, PackedEmbedding, PackedLinear
from mico.settings import choose
from mico.tables import Section, size_text

callable_module(__name__)
ARMS = ("dense", "packed")
FEW_TOKENS = min(CROSSOVER.values())  # on which logits are compared


def bench(
    model: str,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: str | Sequence[int] = "1",
    execution: str = "auto",
    repeats: int = 3,
    device: str = "auto",
    dtype: str = "bfloat16",
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the packed checkpoint in `model` (or in the run folder `model`) and its dense equivalent in turn.

    batch_size: whole numbers, or text such as '1,64'. Tokens are random; decoding is greedy, with a cache.
    Returns plain JSON values, also written to `json`; tokens a second are medians with their range. Raises UserError
    before any weight is read when the folder holds no packed model or an option is wrong.
    """
    console = console or Console()
    batches = _batches(batch_size)
    for option, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"--{option} {value}: must be at least 1")
    choose("--execution", execution, EXECUTIONS)
    if json is not None:
        check_writable("--json", json)
    pick_device(device)
    folder, _ = packed_folder(model)
    _check_length(folder, prompt_tokens + new_tokens)
    start_bytes = peak_host_bytes()
    with console.stage("load"):
        packed = load_model(str(folder), device=device, dtype=dtype, packed=True).model
    set_execution(packed, execution)
    if not any(isinstance(module, PackedLinear) for module in packed.modules()):
        raise UserError(f"model {model}: none of its Linears is packed: there is nothing to compare")
    if quantized_inputs(packed):
        raise UserError(
            f"model {model}: its activations are quantized, no dense model computes that: nothing to compare"
        )
    prompts = {batch: random_ids(packed, batch, prompt_tokens) for batch in batches}
    with console.stage("first use"):  # makes what computes; the dense model is not there yet, for the sake of the peak
        found_logits = few_logits(packed)
        for ids_BP in prompts.values():
            generate(packed, ids_BP, new_tokens)
    packed_peak_bytes = peak_host_bytes()
    with console.stage("load dense"):
        dense = unpacked(load_model(str(folder), device=device, dtype=dtype, packed=True).model, packed.dtype)
    exact_logits = few_logits(dense)
    results = []
    with console.stage("measure"), console.bar("bench", len(batches) * (repeats + 1) * len(ARMS)) as advance:
        for batch, ids_BP in prompts.items():
            results.append(compare(dense, packed, ids_BP, new_tokens, repeats, advance) | {"batch_size": batch})
    report = {
        "model": model,
        "device": str(packed.device),
        "dtype": str(packed.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "execution": execution,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "deviation": {
            "largest": float((found_logits - exact_logits).abs().max()),
            "largest_logit": float(exact_logits.abs().max()),
        },
        "linears": _linears(packed),
        "peak_bytes": {"before": start_bytes, "packed": packed_peak_bytes, "both": peak_host_bytes()},
        "batches": results,
    }
    if json is not None:
        atomic_json(json, report)
    return report


def _batches(given: str | Sequence[int]) -> tuple[int, ...]:
    words = given.split(",") if isinstance(given, str) else [str(number) for number in given]
    if not words or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--batch-size {given}: whole numbers from 1 with commas between them, as 1,64")
    return tuple(dict.fromkeys(int(word) for word in words))


def _check_length(folder: Path, length: int) -> None:
    longest = longest_text(load_config(str(folder), packed=True)) or length
    if length > longest:
        raise UserError(f"--prompt-tokens and --new-tokens: {length} tokens together, the model takes {longest}")


# --- speed ----------------------------------------------------------------------------------------------------------


def random_ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """(B, P) random tokens on the model's device, the same ones every time."""
    make = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (batch, tokens), generator=make).to(model.device)


@torch.no_grad()
def generate(
    model: Any, ids_BP: torch.Tensor, new_tokens: int, clock: Callable[[], float] = perf_counter
) -> tuple[float, float]:
    """Seconds of the prompt and of `new_tokens` greedy steps after it, by this clock."""
    _wait(ids_BP.device)
    started = clock()
    step = model(input_ids=ids_BP, use_cache=True, logits_to_keep=1)
    _wait(ids_BP.device)
    prompt_done = clock()
    for _ in range(new_tokens):
        ids_B1 = step.logits[:, -1:].argmax(-1)
        step = model(input_ids=ids_B1, past_key_values=step.past_key_values, use_cache=True)
    _wait(ids_BP.device)
    return prompt_done - started, clock() - prompt_done


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    dense: Any,
    packed: Any,
    ids_BP: torch.Tensor,
    new_tokens: int,
    repeats: int,
    advance: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Any]:
    """Both models in turn, after a run each that is not counted: by arm prefill, decode (tokens/s) and memory.

    Every arm starts from the state that its own last run left, so that a dense weight kept for large batches is there.
    """
    models = {"dense": dense, "packed": packed}
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats + 1):
        for arm in ARMS:
            taken = generate(models[arm], ids_BP, max(new_tokens, 0 if repeat else PATIENCE), clock)
            if repeat:
                seconds[arm].append(taken)
            advance(arm)
    batch, prompt = ids_BP.shape
    found: dict[str, Any] = {}
    for arm in ARMS:
        memory = weight_memory(models[arm])
        decode = [batch * new_tokens / taken for _, taken in seconds[arm]]
        found[arm] = {
            "prefill_tokens_per_s": _spread([batch * prompt / taken for taken, _ in seconds[arm]]),
            "decode_tokens_per_s": _spread(decode),
            "decode_GB_per_s": statistics.median(decode) / batch * memory.read_bytes / 1e9,
            "weight_bytes": memory.bytes,
            "file_bytes": memory.file_bytes,
        }
    found["paths"] = dict(Counter(module.kind for module in packed.modules() if isinstance(module, PackedLinear)))
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# --- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightMemory:
    """Bytes of a model's weights. bytes: what computes (kernels' layouts, dense weights, embeddings), packed weights
    that lie in memory of the process or are read by every call, and the largest dense weight made for one call alone;
    read_bytes: of them, what every step of decoding reads; file_bytes: packed weights that are pages of the
    checkpoint's file and read no more, which the system drops when it needs the memory."""

    bytes: int
    read_bytes: int
    file_bytes: int


def weight_memory(model: nn.Module) -> WeightMemory:
    """What a model holds now: use it first, so that its kernels are there."""
    computing = read = in_file = 0
    seen: set[int] = set()
    files = _mapped_files()
    unpacking = [module for module in model.modules() if isinstance(module, PackedLinear) and module.temporary_bytes]
    reread = {module.weight.data_ptr() for module in unpacking}  # blobs that every call turns into dense weights
    read += sum(module.temporary_bytes + module.weight.nbytes for module in unpacking)
    computing += max((module.temporary_bytes for module in unpacking), default=0)  # one at a time
    for module in model.modules():
        held = module.resident_bytes if isinstance(module, (PackedLinear, PackedEmbedding)) else 0
        computing, read = computing + held, read + held
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in {tensor.data_ptr(): tensor for tensor in own}.values():
            table = isinstance(module, (nn.Embedding, PackedEmbedding))  # a step reads a row of it a token
            again = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            blob = isinstance(module, PackedLinear) and tensor is module.weight
            read += 0 if table or blob else tensor.nbytes  # a tied head reads the embedding's table whole
            if again:
                continue
            is_packed = blob or isinstance(module, PackedEmbedding)
            if is_packed and tensor.data_ptr() not in reread and _in_file(tensor, files):
                in_file += tensor.nbytes
            else:
                computing += tensor.nbytes
    return WeightMemory(computing, read, in_file)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges that are pages of safetensors files; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    found = []
    for line in maps.read_text(errors="replace").splitlines() if maps.exists() else []:
        if line.endswith(".safetensors"):
            low, high = line.split()[0].split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


def _in_file(tensor: torch.Tensor, files: Iterable[tuple[int, int]]) -> bool:
    return tensor.device.type == "cpu" and any(low <= tensor.data_ptr() < high for low, high in files)


# --- what the packed model is ---------------------------------------------------------------------------------------


@torch.no_grad()
def few_logits(model: Any) -> torch.Tensor:
    """Float32 logits of so few tokens that kernels serve them where there are any."""
    return model(input_ids=random_ids(model, 1, FEW_TOKENS), use_cache=False).logits.float()


def _linears(packed: nn.Module) -> dict[str, int]:
    linears = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    return {
        "packed": len(linears),
        "masked": sum(module.header().has(MASK) for module in linears),
        "not_packed": sum(isinstance(module, nn.Linear) for module in packed.modules()),
    }


# --- the table ------------------------------------------------------------------------------------------------------


def section(report: Mapping[str, Any]) -> Section:
    """The result as a table: a block of rows a batch size, packed beside dense."""
    rows = [row for found in report["batches"] for row in _rows(found)]
    title = (
        f"Packed and dense: {report['prompt_tokens']} tokens in, {report['new_tokens']} out, {report['dtype']} on"
        f" {report['device']}, {report['threads']} threads, median of {report['repeats']} (min-max)"
    )
    columns = ("batch", "", *ARMS, "packed / dense")
    return Section(title, columns, tuple(rows), tuple(_lines(report)))


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def row(name: str, key: str, show: Callable[[Any], str], number: Callable[[Any], float]) -> tuple[str, ...]:
        dense, packed = (found[arm][key] for arm in ARMS)
        return (str(found["batch_size"]), name, show(dense), show(packed), f"×{number(packed) / number(dense):.2f}")

    def plain(value: float) -> float:
        return value

    return [
        row("prefill, tokens/s", "prefill_tokens_per_s", _rate, lambda spread: spread["median"]),
        row("decode, tokens/s", "decode_tokens_per_s", _rate, lambda spread: spread["median"]),
        row("weights read, GB/s", "decode_GB_per_s", lambda value: f"{value:.3g}", plain),
        row("weight memory", "weight_bytes", size_text, plain),
    ]


def _rate(spread: Mapping[str, float]) -> str:
    median, low, high = (f"{spread[name]:,.{1 if spread['median'] < 100 else 0}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


_HOW = {"not called": "not called", "unpacked": "unpacked for each call"}


def _lines(report: Mapping[str, Any]) -> Iterable[str]:
    for found in report["batches"]:
        paths = ", ".join(f"{count} {_HOW.get(kind, f'by {kind}')}" for kind, count in sorted(found["paths"].items()))
        yield f"batch {found['batch_size']}: packed Linears after decoding: {paths}"
    linears, deviation, peak = report["linears"], report["deviation"], report["peak_bytes"]
    if linears["not_packed"]:
        yield f"Linears that are not packed, dense on both sides: {linears['not_packed']} (the output head is one)"
    yield (
        f"execution {report['execution']}: logits of {FEW_TOKENS} tokens differ from those of the dense weights by at"
        f" most {deviation['largest']:.2g}, the largest logit is {deviation['largest_logit']:.3g}"
    )
    if file_bytes := report["batches"][-1]["packed"]["file_bytes"]:
        yield (
            f"not counted: {size_text(file_bytes)} of packed weights, pages of the checkpoint's file (mapped, not"
            " copied) that computing does not read again; the system drops them when it needs memory"
        )
    if peak["both"] is not None:
        before, packed, both = (size_text(peak[name]) for name in ("before", "packed", "both"))
        yield f"peak memory of the process: {before} before loading, {packed} with the packed model, {both} with both"
    if linears["masked"]:
        yield _mask_line(linears, report["device"])


def _mask_line(linears: Mapping[str, int], device: str) -> str:
    share = f"{linears['masked']} of {linears['packed']} packed Linears are pruned"
    if not device.startswith("cpu"):
        return f"{share}: what their masks bring on this device is not told apart here"
    return (
        f"{share}: their masks make the file smaller, and here they bring neither speed nor memory, as pruned weights"
        " are multiplied as zeros (python -m benchmarks.speed inference --sparse measures the alternatives)"
    )
