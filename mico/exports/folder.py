"""A model folder as the hub holds it, around tensors of another format; and a look at what it loads to.

Shared by the exports that transformers loads.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mico.exports.source import PackedSource

GENERATION = "generation_config.json"
PROBE = 32  # tokens of the comparison of logits
SHARD = "5GB"


def model_dtype(source: PackedSource) -> torch.dtype:
    """The dtype that the model's numbers are kept in."""
    named = getattr(source.config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named)
    if isinstance(named, torch.dtype):
        return named
    return next(value.dtype for value in source.others.values() if value.is_floating_point())


def dense_linears(source: PackedSource, packed: Mapping[str, Any]) -> list[str]:
    """Names of the Linears of the model that are not in `packed`, in the order of the model."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]


def write_folder(
    source: PackedSource, out: Path, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]
) -> tuple[str, ...]:
    """Write weights, config with `quantization_config`, tokenizer and generation settings; return the file names."""
    from huggingface_hub import save_torch_state_dict
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(source.config)
    config.quantization_config = dict(quantization)
    config.dtype = model_dtype(source)
    if not config.architectures:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(out)
    save_torch_state_dict(dict(tensors), out, max_shard_size=SHARD)
    source.tokenizer.save_pretrained(out)
    if (source.folder / GENERATION).is_file():
        shutil.copyfile(source.folder / GENERATION, out / GENERATION)
    return tuple(sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()))


def dense_tensors(source: PackedSource, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights that the format has no codes for, as numbers of the model's dtype, and what rounding changed, by name."""
    dtype, tensors, errors = model_dtype(source), {}, {}
    for name in names:
        exact_RC = source.weights[name].dequantize()
        tensors[f"{name}.weight"] = exact_RC.to(dtype)
        error = float((tensors[f"{name}.weight"].float() - exact_RC).abs().max())
        if error:
            errors[name] = error
    return tensors, errors


def rounding_notes(errors: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    """What `dense_tensors` changed, one line a weight."""
    named = str(dtype).removeprefix("torch.")
    return [f"{name}: has no codes here, rounded to {named} by up to {error:.3g}" for name, error in errors.items()]


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """Logits of a fixed sequence of tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = min(PROBE, getattr(model.config, "max_position_embeddings", PROBE))
    ids_BT = (torch.arange(tokens)[None] * 7919 + 11) % vocabulary
    return model(input_ids=ids_BT, use_cache=False).logits.float()


def largest_errors(source: PackedSource, model: Any) -> dict[str, float]:
    """Largest difference of every packed weight of a loaded model from its native dequantization."""
    modules = dict(model.named_modules())
    return {
        name: float((modules[name].weight.detach().float() - weight.dequantize()).abs().max())
        for name, weight in source.weights.items()
    }


def stored_tensors(out: Path, module: str) -> dict[str, torch.Tensor]:
    """The tensors of one module as they lie in the weight files of a folder, by their name inside the module."""
    from safetensors import safe_open

    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                if key.rpartition(".")[0] == module:
                    found[key.rpartition(".")[2]] = file.get_tensor(key)
    return found
