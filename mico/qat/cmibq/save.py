"""What CM-IBQ leaves: the packed checkpoint with grids of its activations, read back and measured; and its state.

Suffixes: G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mico.adapters import auto_class
from mico.adapters.family import Family
from mico.checkpoint import exactly, save_packed, set_execution
from mico.errors import UserError
from mico.files import atomic_json, save_tensors
from mico.loading import LoadedModel, copy_processor, quiet
from mico.packed.linear import PackedLinear
from mico.packed.quantized import QuantizedWeight, label_bits
from mico.qat.cmibq.knapsack import TOLERANCE
from mico.qat.cmibq.quantizer import QuantLinear
from mico.qat.cmibq.settings import Settings
from mico.qat.cmibq.sites import MODALITIES, Site
from mico.qat.cmibq.stages import whole_state
from mico.qat.cmibq.static import ActivationGrid
from mico.qat.cmibq.wrap import CMIBQ, bit_map, quant_linears, quantized_weights
from mico.qat.modules import put_module
from mico.runs import RunFolder
from mico.solve import weight_record

MASTERS, STATE = "masters", "state.safetensors"
BIT_MAP = "bits.json"


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits on the CPU."""
    model.eval()
    asked = {name: x.to(model.device) for name, x in batch.items() if name != "labels"}
    return model(**asked, use_cache=False).logits.float().cpu()


@torch.no_grad()
def round_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what is not packed (embeddings, norms, biases) to the dtype it is stored in; values stay float32."""
    packed = {id(module.weight) for module in quant_linears(model).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in packed and not name.startswith("cmibq.") and ".weight_quantizer." not in name:
            parameter.copy_(parameter.to(dtype))


def save_quantized(
    model: Any, loaded: LoadedModel, family: Family, run: RunFolder, name: str, dtype: torch.dtype,
    probe: Mapping[str, torch.Tensor], keep_state: bool,
) -> tuple[Any, list[dict[str, Any]], int, dict[str, Any]]:  # fmt: skip
    """Write the packed model into the folder `name` of a run, and read it back.

    model: wrapped, widths chosen, adapters merged; it is used up. family: with towers. keep_state: for a second stage.
    Its logits on `probe` must equal those of the training modules bit for bit, and the averages found in the file must
    keep to the targets (RuntimeError otherwise). Returns the model read back, a record a Linear, the bytes outside the
    packed Linears, and the bit map.
    """
    cmibq: CMIBQ = model.to("cpu").cmibq
    cmibq.distribute()  # widths are where the model is
    bits = bit_map(model) | dict(tokens=site_tokens(cmibq))
    linears, weights = quant_linears(model), quantized_weights(model)
    with run.publish() as staging, quiet():
        if keep_state:
            (staging / MASTERS).mkdir()
            save_tensors(staging / MASTERS / STATE, whole_state(model))
        round_rest(model, dtype)
        expected = logits(model, probe)
        grids = {path: grid for grid in cmibq.activation_grids().values() for path in grid.linears}
        for path, module in linears.items():
            put_module(model, path, _bare(module, grids[path]))
        del model.cmibq
        (staging / name).mkdir()
        model.config.get_text_config().use_cache = True
        rest = save_packed(staging / name, model, family, {}, lambda index: _inside(weights, family, index), dtype)
        loaded.tokenizer.save_pretrained(staging / name)
        copy_processor(loaded.folder, staging / name)
        atomic_json(staging / BIT_MAP, bits)
    records = [
        _record(path, weights[path], module, grids[path], family, index, dtype)
        for index in range(_blocks(model, family))
        for path, module in linears.items()
        if path in _inside(weights, family, index)
    ]
    written = read_back(run.path / name, model.config._attn_implementation)
    difference = float((logits(written, probe) - expected).abs().max())
    if difference != 0:
        raise RuntimeError(f"{run.path / name}: logits differ from those of the trained model by {difference:g}")
    bits["file"] = measured_bits(written, cmibq.sites, bits["tokens"])
    _check_targets(bits["file"], cmibq.settings)
    return written, records, rest, bits


def read_back(folder: Path, attention: str) -> Any:
    """The packed model in float32, computed with dense weights."""
    from transformers import AutoConfig

    with quiet():
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        written = auto_class(kind).from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
    set_execution(written, "dense")
    return written


def _blocks(model: Any, family: Family) -> int:
    return family.offset + len(model.get_submodule(family.blocks))


def _inside(weights: Mapping[str, QuantizedWeight], family: Family, index: int) -> dict[str, QuantizedWeight]:
    path, _ = family.place(index)
    return {name: weight for name, weight in weights.items() if name.startswith(f"{path}.")}


def _bare(module: QuantLinear, grid: ActivationGrid) -> nn.Linear:
    """A Linear that holds the bias and the grid of its input alone: its weight is written from the packed form."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.bias = module.bias
    linear.register_buffer("input_grid", grid.encoded())
    return linear


def _record(
    name: str, weight: QuantizedWeight, module: QuantLinear, grid: ActivationGrid, family: Family, block: int,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """What report.json tells of a Linear; the grid of its input counts with its bias."""
    path, streams = family.place(block)
    stream = next(row.name for row in streams if name.removeprefix(f"{path}.") in row.linears)
    beside = 0 if module.bias is None else 8 * exactly(module.bias.detach(), dtype).nbytes
    beside += 8 * grid.encoded().nbytes
    record = weight_record(block, stream, name, weight, label_bits(weight.label_C), beside)
    return record | dict(error=None, fallbacks=[])


# --- averages -------------------------------------------------------------------------------------------------------


def site_tokens(cmibq: CMIBQ) -> dict[str, float]:
    """Mean number of tokens a sample that pass a site, as calibration saw them."""
    facts, found, place = cmibq.activations.facts(), {}, 0
    for site, quantizer in zip(cmibq.sites, cmibq.inputs, strict=True):
        found[site.name] = float(facts.macs_I[place] / facts.params_I[place])
        place += len(quantizer.error_GK)  # type: ignore[arg-type]
    return found


def measured_bits(model: nn.Module, sites: Sequence[Site], tokens: Mapping[str, float]) -> dict[str, Any]:
    """Average widths as a packed model holds them: of activations by multiplications, of weights by their number.

    Raises RuntimeError where a Linear of a site is not packed, or not quantized as the others that read its input.
    """
    sums = {kind: {name: [0.0, 0.0] for name in MODALITIES} for kind in ("activations", "weights")}
    for site in sites:
        modules: list[Any] = [model.get_submodule(name) for name in site.linears]
        grids: list[Any] = [module.input_grid_3G() if isinstance(module, PackedLinear) else None for module in modules]
        if any(grid is None or not torch.equal(grid, grids[0]) for grid in grids):
            raise RuntimeError(f"site {site.name}: its Linears are not quantized alike in the file")
        run_C = torch.arange(site.channels) * grids[0].shape[1] // site.channels
        multiplied = tokens[site.name] * sum(module.out_features for module in modules)
        _add(sums["activations"][site.modality], grids[0][0][run_C], multiplied)
        for module in modules:
            weight = module.quantized()
            kept = module.out_features if weight.keep_RC is None else weight.keep_RC.sum(0).double()
            _add(sums["weights"][site.modality], torch.tensor(weight.bits_G)[weight.label_C], kept)
    found: dict[str, Any] = {}
    for kind, rows in sums.items():
        found[kind] = sum(row[0] for row in rows.values()) / sum(row[1] for row in rows.values())
        found[f"{kind}_by_modality"] = {name: row[0] / row[1] for name, row in rows.items() if row[1]}
    return found


def _add(sums: list[float], bits_C: torch.Tensor, weight: float | torch.Tensor) -> None:
    """Widths of channels into a weighted sum and its weight."""
    weight_C = torch.as_tensor(weight, dtype=torch.float64).expand(len(bits_C))
    sums[0] += float(bits_C.double() @ weight_C)
    sums[1] += float(weight_C.sum())


def _check_targets(found: Mapping[str, Any], settings: Settings) -> None:
    for kind, target in (("activations", settings.target_bits_act), ("weights", settings.target_bits_weight)):
        if not target - TOLERANCE - 1e-6 <= found[kind] <= target + 1e-6:
            raise RuntimeError(f"the file holds {found[kind]:.4f} bits a value of {kind}, {target:g} were asked for")


# --- what stage 2 starts from ---------------------------------------------------------------------------------------


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """What stage 1 left in a run folder. Raises UserError naming the file when it is missing or cut short."""
    from safetensors.torch import load_file

    file = folder / MASTERS / STATE
    try:
        return load_file(file)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{file} cannot be read ({reason}): restore it, or give the command of stage 1 again") from None
    except Exception as error:  # safetensors' own, of a damaged header
        raise UserError(
            f"{file} is damaged ({error!r:.120}): restore it, or give the command of stage 1 again"
        ) from None
