"""Export to compressed-tensors' pack-quantized format: what vLLM, SGLang and transformers load.

Every Linear holds whole multiples of one scale a row and group of consecutive channels, its codes packed densely
into 32-bit words along a row. vLLM joins the Linears that read one tensor (q, k, v; gate, up), so those share one
scheme. Only weights that this holds exactly are written; the others are named before anything is.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mico.console import Console
from mico.errors import UserError
from mico.exports.folder import (
    dense_linears,
    dense_tensors,
    largest_errors,
    model_dtype,
    probe_logits,
    rounding_notes,
    write_folder,
)
from mico.exports.integers import Inexact, Integers, check_bits, check_scales, integers, refuse
from mico.exports.source import Exported, PackedSource
from mico.loading import quiet
from mico.packed.bits import pack
from mico.packed.quantized import QuantizedWeight

FORMAT = "pack-quantized"
TOLERANCE = 1e-6
WORD = 32  # bits
SERVED = {torch.float32: torch.float16}  # the dtype that a model is computed in, where it is not its own

# What vLLM reads and accepts for weights of whole numbers without activation quantization (its WNA16 scheme).
GROUP_SIZES = (128, 64, 32)  # of its Marlin kernels; None is one group a row
_TOP: dict[str, tuple[Any, ...]] = {
    "quant_method": ("compressed-tensors",), "format": (FORMAT,), "quantization_status": ("compressed",),
    "kv_cache_scheme": (None,), "global_compression_ratio": (None,),
}  # fmt: skip
_GROUP: dict[str, tuple[Any, ...]] = {
    "input_activations": (None,), "output_activations": (None,), "format": (FORMAT,)
}  # fmt: skip
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": tuple(range(2, 9)), "type": ("int",), "symmetric": (True,), "strategy": ("group", "channel"),
    "group_size": (*GROUP_SIZES, None), "dynamic": (False,), "actorder": (None,), "block_structure": (None,),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Scheme:
    """How the codes of a Linear are stored: bits a code, channels a group (0: the whole row)."""

    bits: int
    group_size: int

    def described(self) -> dict[str, Any]:
        """The `weights` of a config group."""
        return dict(
            num_bits=self.bits, type="int", symmetric=True, strategy="group" if self.group_size else "channel",
            group_size=self.group_size or None, dynamic=False, actorder=None, block_structure=None,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The scheme of every Linear that gets codes; how many lie in wider codes than their own, and are pruned."""

    schemes: dict[str, Scheme]
    widened: int
    pruned: int


def export_compressed_tensors(source: PackedSource, out: Path, console: Console) -> Exported:
    """Write a model folder for vLLM into `out`, load it with transformers, compare it with the native weights.

    Raises UserError before anything is written, naming the weights that the format cannot hold exactly.
    """
    version = _library()
    dtype = model_dtype(source)
    planned = plan(source, SERVED.get(dtype, dtype), console)
    schemes = planned.schemes
    config = quantization_config(schemes, dense_linears(source, schemes), source.family.blocks, version)
    complaints = refused_by_vllm(config)
    assert not complaints, complaints
    tensors, rounded = dense_tensors(source, [name for name in source.weights if name not in schemes])
    with console.bar("write", len(schemes)) as advance:
        for name, scheme in schemes.items():
            tensors |= packed_tensors(name, _fitted(source.weights[name], scheme), scheme, dtype)
            advance(name)
    tensors |= {key: value for key, value in source.others.items() if key not in tensors}
    files = write_folder(source, out, tensors, config)
    with console.stage("check"):
        error, checked = _verify(source, out, schemes, rounded)
    notes = (*_notes(planned, dtype), *rounding_notes(rounded, dtype), checked)
    return Exported("vllm", files, not rounded, error, notes)


def _library() -> str:
    """Version of compressed-tensors, which the format and the check need."""
    try:
        import compressed_tensors
    except ImportError as error:
        raise UserError("--to vllm needs the compressed-tensors package: pip install compressed-tensors") from error
    return str(compressed_tensors.__version__)


# --- which scheme for which Linear ----------------------------------------------------------------------------------


def plan(source: PackedSource, dtype: torch.dtype, console: Console) -> Plan:
    """The scheme of every quantized Linear of the blocks. Raises UserError naming those that have none.

    dtype: that scales must be exact in. Linears that are joined take the widest of their widths: wider codes hold
    the same levels.
    """
    schemes: dict[str, Scheme] = {}
    reasons: dict[str, str] = {}
    widened = pruned = 0
    sets = fused_sets(source)
    with console.bar("grids", len(sets)) as advance:
        for names in sets:
            weights = {name: source.weights[name] for name in names}
            own, why = _joined(weights, dtype)
            schemes, reasons = schemes | own, reasons | why
            widened += sum(scheme.bits > max(weights[name].bits_G) for name, scheme in own.items())
            pruned += sum(weights[name].keep_RC is not None for name in own)
            advance(names[0])
    refuse("vllm", reasons)
    if not schemes:
        raise UserError("--to vllm: no Linear of this model is quantized: export it with --to dense")
    return Plan(schemes, widened, pruned)


def fused_sets(source: PackedSource) -> list[list[str]]:
    """Names of the packed Linears of the blocks, those that read one tensor together."""
    prefix = f"{source.family.blocks}."
    sets: dict[tuple[str, str], list[str]] = {}
    streams = {path: stream.name for stream in source.family.streams for path in stream.linears}
    for name in source.weights:
        if name.startswith(prefix):
            index, path = name.removeprefix(prefix).split(".", 1)
            sets.setdefault((index, streams[path]), []).append(name)
    return list(sets.values())


def _joined(weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Schemes of the Linears of one set, and reasons of those that have none; neither where all are dense."""
    own: dict[str, Scheme] = {}
    reasons: dict[str, str] = {}
    for name, weight in weights.items():
        try:
            if weight.quantized:
                own[name] = _scheme(weight, dtype)
        except Inexact as reason:
            reasons[name] = str(reason)
    if reasons or not own:
        return {}, reasons
    others = [
        name for name in weights if name not in own or own[name].group_size != next(iter(own.values())).group_size
    ]
    if others:
        return {}, {next(iter(own)): f"vLLM joins it with {', '.join(others)}, which is stored in another way"}
    widest = max(scheme.bits for scheme in own.values())
    return {name: Scheme(widest, scheme.group_size) for name, scheme in own.items()}, {}


def _scheme(weight: QuantizedWeight, dtype: torch.dtype) -> Scheme:
    found = integers(weight)
    check_bits(found)
    check_scales(found, dtype, factored=weight.group_scale_G is not None)
    if found.scale_RG.shape[1] == 1:
        return Scheme(found.bits, 0)
    size = next((size for size in GROUP_SIZES if found.group_size % size == 0), None)
    if size is None:
        raise Inexact(f"its groups of {found.group_size} channels do not divide into groups of 32, 64 or 128")
    return Scheme(found.bits, size)


def _fitted(weight: QuantizedWeight, scheme: Scheme) -> Integers:
    found = integers(weight)
    return found.in_groups_of(scheme.group_size) if scheme.group_size else found


# --- tensors and config ---------------------------------------------------------------------------------------------


def packed_tensors(name: str, found: Integers, scheme: Scheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """weight_packed (R, words) int32, weight_scale (R, G) in the model's dtype, weight_shape of one Linear."""
    return {
        f"{name}.weight_packed": pack_words(found.level_RC + 2 ** (scheme.bits - 1), scheme.bits),
        f"{name}.weight_scale": found.scale_RG.to(dtype),
        f"{name}.weight_shape": torch.tensor(found.level_RC.shape),
    }


def pack_words(code_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as dense little-endian streams of 32-bit words, (R, ceil(C * bits / 32)) int32."""
    rows, channels = code_RC.shape
    padded_RC = torch.nn.functional.pad(code_RC.to(torch.uint8), (0, -channels % WORD))
    words_RW = pack(padded_RC, bits).view(torch.int32).view(rows, -1)
    return words_RW[:, : -(-channels * bits // WORD)].clone(memory_format=torch.contiguous_format)


def quantization_config(schemes: Mapping[str, Scheme], ignored: list[str], blocks: str, version: str) -> dict[str, Any]:
    """The `quantization_config` of config.json: one config group a scheme, its Linears by name patterns."""
    groups = {}
    for number, scheme in enumerate(sorted(set(schemes.values()))):
        names = [name for name, own in schemes.items() if own == scheme]
        targets = ["Linear"] if len(names) == len(schemes) else _patterns(names, blocks)
        groups[f"group_{number}"] = dict(
            targets=targets, weights=scheme.described(), input_activations=None, output_activations=None, format=FORMAT
        )
    return dict(
        quant_method="compressed-tensors", format=FORMAT, quantization_status="compressed", config_groups=groups,
        ignore=ignored, kv_cache_scheme=None, global_compression_ratio=None, version=version,
    )  # fmt: skip


def _patterns(names: list[str], blocks: str) -> list[str]:
    """Regular expressions that match exactly these Linears: one for all paths that lie in the same blocks."""
    indexes: dict[str, list[str]] = {}
    for name in names:
        index, path = name.removeprefix(f"{blocks}.").split(".", 1)
        indexes.setdefault(path, []).append(index)
    together: dict[tuple[str, ...], list[str]] = {}
    for path, found in indexes.items():
        together.setdefault(tuple(found), []).append(re.escape(path))
    return [
        f"re:{re.escape(blocks)}\\.(?:{'|'.join(found)})\\.(?:{'|'.join(paths)})$" for found, paths in together.items()
    ]


def refused_by_vllm(config: Mapping[str, Any]) -> list[str]:
    """What vLLM would not accept in a `quantization_config`, field by field; empty when it takes it all."""
    found = _refused(config, _TOP, "", free=("config_groups", "ignore", "version"))
    if not all(isinstance(name, str) for name in config["ignore"]):
        found.append("ignore: names are expected")
    for label, group in config["config_groups"].items():
        found += _refused(group, _GROUP, f"{label}.", free=("targets", "weights"))
        found += _refused(group["weights"], _WEIGHTS, f"{label}.weights.")
        if not group["targets"] or not all(isinstance(target, str) for target in group["targets"]):
            found.append(f"{label}.targets: names or patterns are expected")
        grouped = group["weights"].get("group_size") is not None
        if grouped != (group["weights"].get("strategy") == "group"):
            found.append(f"{label}.weights.group_size: goes with strategy group, and only with it")
    return found


def _refused(
    values: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]], where: str, free: tuple[str, ...] = ()
) -> list[str]:
    missing = [f"{where}{key}: missing" for key in (*accepted, *free) if key not in values]
    unknown = [f"{where}{key}: unknown" for key in values if key not in accepted and key not in free]
    wrong = [
        f"{where}{key}: {values[key]!r} is not one of {accepted[key]}"
        for key in accepted
        if key in values
        and not any(values[key] is a or (values[key] == a and type(values[key]) is type(a)) for a in accepted[key])
    ]
    return missing + unknown + wrong


# --- what is said, and the check ------------------------------------------------------------------------------------


def _notes(planned: Plan, dtype: torch.dtype) -> list[str]:
    counts = Counter(scheme.bits for scheme in planned.schemes.values())
    notes = [", ".join(f"{count} Linears of {bits} bits" for bits, count in sorted(counts.items()))]
    if planned.widened:
        notes.append(f"{planned.widened} Linears lie in wider codes than their own, with the same values")
    if planned.pruned:
        notes.append(f"{planned.pruned} Linears are pruned: their zeros are exact, but every zero takes a code here")
    if not counts.keys() <= {4, 8}:
        notes.append("widths other than 4 and 8: transformers, and vLLM with its Humming kernels, but not SGLang")
    if dtype == torch.float32:
        notes.append("a float32 model: vLLM computes in 16 bits, its --dtype float16 holds every scale")
    return notes


def _verify(
    source: PackedSource, out: Path, schemes: Mapping[str, Scheme], rounded: Mapping[str, float]
) -> tuple[float, str]:
    """Largest error of a weight, and what was compared. Raises RuntimeError naming a weight that is not as it was."""
    from transformers import AutoModelForCausalLM

    expected = probe_logits(_with_rounding(source, rounded))
    with quiet(), redirect_stderr(io.StringIO()):  # the bars of compressed-tensors have no switch
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
        found = probe_logits(model)  # the first forward unpacks the weights
    errors, difference = largest_errors(source, model), float((found - expected).abs().max())
    worst = max(schemes, key=lambda name: errors[name])
    if errors[worst] > TOLERANCE:
        raise RuntimeError(f"{out}: {worst} differs by {errors[worst]:g} after loading with compressed-tensors")
    if difference > TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"{out}: logits differ by {difference:g} after loading with compressed-tensors")
    checked = (
        f"loaded by transformers with compressed-tensors in float32: {len(schemes)} Linears differ by at most "
        f"{errors[worst]:.3g}, logits by {difference:.3g}{' from those of a model rounded alike' if rounded else ''}"
    )
    return max(errors.values()), checked


@torch.no_grad()
def _with_rounding(source: PackedSource, rounded: Iterable[str]) -> Any:
    """The native model in float32, these weights as `dense_tensors` rounds them."""
    model, dtype = source.dense_model(torch.float32), model_dtype(source)
    for name in rounded:
        weight_RC = model.get_submodule(name).weight  # a tied head shares it
        weight_RC.copy_(weight_RC.to(dtype))
    return model
