"""Export to GPTQ's format: one width and one group size for all Linears, codes packed along the input channels.

Symmetric grids are written with one middle zero, others with their own zero points. Only weights that this holds
exactly are written; the others are named before anything is. Suffixes: R rows, C channels, G groups, W words.
"""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mico.console import Console
from mico.errors import UserError
from mico.exports.compressed_tensors import GROUP_SIZES, WORD, fused_sets, pack_words
from mico.exports.folder import dense_tensors, model_dtype, rounding_notes, stored_tensors, write_folder
from mico.exports.integers import REMEDY, Inexact, check_bits, check_scales, integers, refuse
from mico.exports.source import Exported, PackedSource
from mico.loading import quiet
from mico.packed.quantized import QuantizedWeight

WIDTHS = (2, 3, 4, 8)
TOLERANCE = 1e-6
LIBRARIES = ("gptqmodel", "optimum")
V1, V2 = "gptq", "gptq_v2"  # qzeros hold zero - 1, or zero


@dataclass(frozen=True)
class Layout:
    """What all Linears share. group_size: -1 is one group a row; kind: V1 or V2."""

    bits: int
    group_size: int
    symmetric: bool
    kind: str

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return dict(
            quant_method="gptq", bits=self.bits, group_size=self.group_size, desc_act=False, sym=self.symmetric,
            lm_head=False, checkpoint_format=self.kind, true_sequential=True, pack_dtype="int32",
        )  # fmt: skip


@dataclass(frozen=True)
class Coded:
    """weight[r, c] = scale[r, g] * (code[r, c] - zero[r, g]), nothing pruned: those codes are their zero."""

    code_RC: torch.Tensor
    zero_RG: torch.Tensor
    scale_RG: torch.Tensor


@dataclass(frozen=True)
class Facts:
    """What the layout of one weight depends on. bits: around an exact zero; own_bits: with its own zero points.

    least_zero: the smallest zero point, None without any.
    """

    shape: tuple[int, int]
    group_size: int
    groups: int
    bits: int
    own_bits: int
    least_zero: int | None


def export_gptq(source: PackedSource, out: Path, console: Console) -> Exported:
    """Write a GPTQ model folder into `out` and compare what lies there with the native weights.

    Raises UserError before anything is written, naming the weights that the format cannot hold exactly.
    """
    layout, own_bits = plan(source, console)
    names = list(own_bits)
    tensors, rounded = dense_tensors(source, [name for name in source.weights if name not in names])
    with console.bar("write", len(names)) as advance:
        for name in names:
            tensors |= packed_tensors(name, source.weights[name], layout)
            advance(name)
    tensors |= {key: value for key, value in source.others.items() if key not in tensors}
    files = write_folder(source, out, tensors, layout.config())
    grid = "symmetric" if layout.symmetric else "with zero points"
    notes = [f"{len(names)} Linears of {layout.bits} bits, {grid}, checkpoint_format {layout.kind}"]
    if widened := sum(layout.bits > bits for bits in own_bits.values()):
        notes.append(f"{widened} Linears lie in wider codes than their own, with the same values: GPTQ has one width")
    with console.stage("check"):
        error = _verify_files(source, out, names, layout)
        checked = _verify_loaded(source, out, names)
    notes += [*rounding_notes(rounded, model_dtype(source)), checked]
    return Exported("gptq", files, not rounded, max([error, *rounded.values()]), tuple(notes))


# --- one layout for all ---------------------------------------------------------------------------------------------


def plan(source: PackedSource, console: Console) -> tuple[Layout, dict[str, int]]:
    """The narrowest layout that holds every Linear of the blocks, and the width that each has of its own.

    Raises UserError naming those that fit none.
    """
    found: dict[str, Facts] = {}
    reasons: dict[str, str] = {}
    names = [name for together in fused_sets(source) for name in together]
    with console.bar("grids", len(names)) as advance:
        for name in names:
            try:
                found[name] = _facts(source.weights[name])
            except Inexact as reason:
                reasons[name] = str(reason)
            advance(name)
    refuse("gptq", reasons)
    if not found:
        raise UserError("--to gptq: no Linear of this model is packed: export it with --to dense")
    uneven = {n: f"its shape is {f.shape}" for n, f in found.items() if any(side % WORD for side in f.shape)}
    refuse("gptq", uneven, f"multiples of {WORD} are needed, export with --to vllm or --to dense")
    return _layout(list(found.values())), {name: facts.own_bits for name, facts in found.items()}


def _facts(weight: QuantizedWeight) -> Facts:
    if not weight.quantized:
        raise Inexact("it is pruned but not quantized")
    found = integers(weight)
    check_scales(found, torch.float16, factored=weight.group_scale_G is not None)
    if weight.zero_RG is None:
        check_bits(found)
    rows, channels = weight.codes_RC.shape
    least = None if weight.zero_RG is None else int(weight.zero_RG.min())
    own_bits = math.ceil(max(weight.bits_G))
    return Facts((rows, channels), found.group_size, found.scale_RG.shape[1], found.bits, own_bits, least)


def _layout(found: list[Facts]) -> Layout:
    """Symmetric where that takes no more bits than keeping every weight's own zero points."""
    size, widest = _group_size(found), max(facts.bits for facts in found)
    zeros = [facts.least_zero for facts in found if facts.least_zero is not None]
    own_bits = _container(max(facts.own_bits for facts in found)) if len(zeros) == len(found) else None
    if widest <= WIDTHS[-1] and (own_bits is None or _container(widest) <= own_bits):
        return Layout(_container(widest), size, True, V1)
    if own_bits is None:
        raise UserError(f"--to gptq has one grid, and some Linears keep zero points, others have none: {REMEDY}")
    return Layout(own_bits, size, False, V1 if min(zeros) > 0 else V2)


def _container(bits: int) -> int:
    return next(width for width in WIDTHS if width >= bits)


def _group_size(found: list[Facts]) -> int:
    """The largest group size that divides all."""
    if all(facts.groups == 1 for facts in found):
        return -1
    common = math.gcd(*(facts.group_size for facts in found))
    size = next((size for size in GROUP_SIZES if common % size == 0), None)
    if size is None:
        shown = ", ".join(map(str, sorted({facts.group_size for facts in found})))
        raise UserError(
            f"--to gptq has one group size, and groups of {shown} channels do not divide into 32, 64 or 128: {REMEDY}"
        )
    return size


# --- tensors --------------------------------------------------------------------------------------------------------


def coded(weight: QuantizedWeight, layout: Layout) -> Coded:
    """Codes, zeros and scales of one weight in a layout."""
    found = integers(weight)
    size = found.level_RC.shape[1] if layout.group_size == -1 else layout.group_size
    found = found.in_groups_of(size)
    if layout.symmetric:
        zero_RG = torch.full(found.scale_RG.shape, 2 ** (layout.bits - 1), dtype=torch.int16)
    else:
        assert weight.zero_RG is not None
        zero_RG = weight.zero_RG.to(torch.int16).expand(len(found.scale_RG), -1)
        zero_RG = zero_RG.repeat_interleave(found.scale_RG.shape[1] // zero_RG.shape[1], 1)
    return Coded(found.level_RC + zero_RG.repeat_interleave(size, 1), zero_RG, found.scale_RG)


def packed_tensors(name: str, weight: QuantizedWeight, layout: Layout) -> dict[str, torch.Tensor]:
    """qweight (C * bits / 32, R), qzeros (G, R * bits / 32) and scales (G, R) float16, g_idx (C,) of one Linear."""
    found = coded(weight, layout)
    stored_RG = found.zero_RG - int(layout.kind == V1)
    groups = found.scale_RG.shape[1]
    channels = torch.arange(found.code_RC.shape[1], dtype=torch.int32)
    return {
        f"{name}.qweight": pack_words(found.code_RC, layout.bits).T.contiguous(),
        f"{name}.qzeros": pack_words(stored_RG.T.contiguous(), layout.bits),
        f"{name}.scales": found.scale_RG.T.contiguous().to(torch.float16),
        f"{name}.g_idx": channels // (len(channels) // groups),
    }


# --- the check ------------------------------------------------------------------------------------------------------


def _verify_files(source: PackedSource, out: Path, names: list[str], layout: Layout) -> float:
    """Largest error of a weight as it lies on disk. Raises RuntimeError naming one that is not as it was."""
    errors = {name: _error(source.weights[name], stored_tensors(out, name), layout) for name in names}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > TOLERANCE:
        raise RuntimeError(f"{out}: {worst} differs by {errors[worst]:g} when it is unpacked")
    return errors[worst]


def _error(weight: QuantizedWeight, stored: dict[str, torch.Tensor], layout: Layout) -> float:
    code_RC, zero_GR = _unpacked(stored["qweight"].T, layout.bits), _unpacked(stored["qzeros"], layout.bits)
    zero_GR = zero_GR + int(layout.kind == V1)
    group_C = stored["g_idx"].long()
    scale_RC = stored["scales"].float().T[:, group_C]
    value_RC = scale_RC * (code_RC - zero_GR.T[:, group_C])
    return float((value_RC - weight.dequantize()).abs().max())


def _verify_loaded(source: PackedSource, out: Path, names: list[str]) -> str:
    """What the library of the format makes of the files, where it is installed. Raises RuntimeError as above."""
    if not all(find_spec(package) for package in LIBRARIES):
        return (
            "read back from disk bit by bit and equal; not loaded, since its libraries are not installed: "
            f"pip install {' '.join(LIBRARIES)}"
        )
    from transformers import AutoModelForCausalLM

    with quiet(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, device_map="cpu")
    modules, largest = dict(model.named_modules()), 0.0
    for name in names:
        value_RC = modules[name].dequantize_weight().T.float()  # float16 numbers: products are rounded once
        error = float((value_RC - source.weights[name].dequantize(torch.float16).float()).abs().max())
        if error > TOLERANCE:
            raise RuntimeError(f"{out}: {name} differs by {error:g} from its float16 values after loading")
        largest = max(largest, error)
    return f"loaded by transformers with gptqmodel in float16: {len(names)} Linears differ by at most {largest:.3g}"


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of every row of 32-bit words, bit by bit and so not the way they were packed; float32."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    places = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(octets), -1, bits)
    return torch.from_numpy(places @ (2 ** np.arange(bits, dtype=np.float32)))
