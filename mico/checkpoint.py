"""Packed checkpoints: a model folder whose Linears are bit-packed, that transformers loads with or without mico.

config.json          quantization_config mico: the streams whose Linears share channel labels; auto_map
model*.safetensors   one 1-D uint8 tensor a packed weight (mico/packed/blob.py), all other tensors as they were
modeling_mico.py     the code that loads it, for machines without mico
mico_manifest.json   sha256 of the weight files, and what the model is
README.md            the model card
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mico.adapters.family import Family
from mico.errors import UserError
from mico.files import atomic_json, read_json, sha256_file
from mico.packed.blob import encode
from mico.packed.hf import METHOD, SHIPPED, MicoConfig, MicoQuantizer, packed_class, put, share_labels, tie_head
from mico.packed.linear import EXECUTIONS, PackedEmbedding, PackedLinear
from mico.packed.quantized import QuantizedWeight, is_equal_runs
from mico.settings import choose

MANIFEST = "mico_manifest.json"
FORMAT, VERSION = "mico-packed", 1
SHARD_SIZE = "5GB"


def pack_model(model: Any, family: Family, parts: Iterable[Mapping[str, QuantizedWeight]], dtype: torch.dtype) -> None:
    """Turn a model in memory into the packed one, in place: `save_pretrained` then writes the packed checkpoint.

    parts: weights by module name (Linears or embeddings), those of a block together; their values in the model are
    dropped. dtype: what all other tensors are stored in where they fit exactly (that of the checkpoint it came from).
    """
    config = MicoConfig(streams=[stream.linears for stream in family.streams if len(stream.linears) > 1])
    tied = _tied_head(model)
    for weights in parts:
        for name, quantized in weights.items():
            put(model, name, _packed(model, name, quantized, config, weights, dtype))
    if tied and isinstance(source := model.get_submodule(tied[1]), PackedEmbedding):
        tie_head(model, tied[0], len(source.weight))
    for parameter in model.parameters():
        parameter.data = exactly(parameter.data, dtype)
    share_labels(model, config)
    quantizer = MicoQuantizer(config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    model.config.quantization_config = config
    name = type(model).__name__
    model.config.auto_map = {"AutoModelForCausalLM": f"{Path(SHIPPED).stem}.{name}"}
    model.__class__ = packed_class(type(model))


def exactly(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` where that loses nothing, else in float16 where that does not, else as it is."""
    for candidate in (dtype, torch.float16):
        smaller = tensor.to(candidate)
        if torch.equal(smaller.to(tensor.dtype), tensor):
            return smaller
    return tensor


def _tied_head(model: Any) -> tuple[str, str] | None:
    """Module names of a head and the embedding whose weight it shares."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        return target.removesuffix(".weight"), source.removesuffix(".weight")
    return None


def _packed(
    model: Any, name: str, quantized: QuantizedWeight, config: MicoConfig, weights: Mapping[str, QuantizedWeight],
    dtype: torch.dtype,
) -> nn.Module:  # fmt: skip
    old = model.get_submodule(name)
    leader = config.leader(name)
    borrow = leader != name and not is_equal_runs(quantized.label_C, len(quantized.bits_G))
    assert not borrow or torch.equal(weights[leader].label_C.cpu(), quantized.label_C.cpu()), name
    blob = encode(quantized, borrow_labels=borrow)
    if isinstance(old, nn.Embedding):
        packed: nn.Module = PackedEmbedding(old.num_embeddings, old.embedding_dim, len(blob), dtype)
    else:
        bias = None if old.bias is None else exactly(old.bias.detach(), dtype)
        packed = PackedLinear(old.in_features, old.out_features, len(blob), bias)
    packed.weight = blob
    return packed


def set_execution(model: nn.Module, execution: str | None) -> None:
    """Choose how packed modules compute; None leaves what they were made with. Raises UserError when unknown."""
    if execution is None:
        return
    choose("execution", execution, EXECUTIONS)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.execution = execution
            module.forget()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record what the checkpoint is and the sha256 of its weight files. Written last."""
    files = sorted(folder.glob("*.safetensors"))
    digests = {file.name: dict(bytes=file.stat().st_size, sha256=sha256_file(file)) for file in files}
    atomic_json(folder / MANIFEST, dict(format=FORMAT, version=VERSION, **facts, files=digests))


def verify_checkpoint(folder: Path) -> None:
    """Compare the weight files with the manifest, when there is one. Raises UserError naming the file that differs."""
    if not (folder / MANIFEST).is_file():
        return
    for name, entry in read_json(folder / MANIFEST).get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} does not exist, {MANIFEST} lists it: restore it or compress again")
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            raise UserError(f"{file} is damaged: its sha256 is not that of {MANIFEST}: restore it or compress again")
