"""Packed checkpoints: a model folder whose Linears are bit-packed, that transformers loads with or without mico.

config.json          quantization_config mico: the streams whose Linears share channel labels; auto_map
model*.safetensors   one 1-D uint8 tensor a packed weight (mico/packed/blob.py), all other tensors as they were
modeling_mico.py     the code that loads it, for machines without mico
mico_manifest.json   sha256 of the weight files, and what the model is
README.md            the model card
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from mico.adapters.family import Family, lookup
from mico.errors import UserError
from mico.files import atomic_json, read_json, save_tensors, sha256_file
from mico.packed.blob import encode
from mico.packed.experts import any_expert
from mico.packed.hf import (
    METHOD,
    SHARD_BYTES,
    SHIPPED,
    MicoConfig,
    MicoQuantizer,
    packed_class,
    put,
    share_labels,
    shipped_source,
    tie_head,
)
from mico.packed.linear import EXECUTIONS, PackedEmbedding, PackedLinear, default_execution
from mico.packed.quantized import QuantizedWeight, is_equal_runs
from mico.settings import choose

MANIFEST = "mico_manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMAT, VERSION = "mico-packed", 1


def pack_model(model: Any, family: Family, parts: Iterable[Mapping[str, QuantizedWeight]], dtype: torch.dtype) -> None:
    """Turn a model in memory into the packed one, in place: `save_pretrained` then writes the packed checkpoint.

    parts: weights by module name (Linears or embeddings), those of a block together; their values in the model are
    dropped. dtype: what all other tensors are stored in where they fit exactly (that of the checkpoint it came from).
    """
    config = packed_config(family)
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
    if auto_map := _auto_map(model, family):
        model.config.auto_map = auto_map
    model.__class__ = packed_class(type(model))


def exactly(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` where that loses nothing, else in float16 likewise, else as it is; bytes stay."""
    if not tensor.is_floating_point():
        return tensor
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
    blob = packed_blob(name, weights, config)
    if isinstance(old, nn.Embedding):
        packed: nn.Module = PackedEmbedding(old.num_embeddings, old.embedding_dim, len(blob), dtype)
    else:
        bias = None if old.bias is None else exactly(old.bias.detach(), dtype)
        packed = PackedLinear(old.in_features, old.out_features, len(blob), bias)
    packed.weight = blob
    return packed


class ShardWriter:
    """The weight files of a checkpoint, written as their tensors come, under their names only when all are there.

    Tensors are cut into files as `save_pretrained` cuts them: in the order given, at most `limit` bytes each.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._waiting: dict[str, torch.Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._size = self.bytes = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be changed afterwards only when its file has been written."""
        if self._waiting and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._waiting[key] = tensor
        self._size += tensor.nbytes
        self.bytes += tensor.nbytes

    def _flush(self) -> None:
        file = self._folder / f"shard-{len(self._files)}"
        save_tensors(file, self._waiting, {"format": "pt"})
        self._files.append((file, list(self._waiting)))
        self._waiting, self._size = {}, 0

    def finish(self) -> None:
        """Write what is left, name the files, and index them when there are several."""
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, (file, keys) in enumerate(self._files, 1):
            name = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            file.rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            atomic_json(self._folder / INDEX, dict(metadata=dict(total_size=self.bytes), weight_map=weight_map))


def save_packed(
    folder: Path,
    model: Any,
    family: Family,
    tables: Mapping[str, QuantizedWeight],
    weights: Callable[[int], Mapping[str, QuantizedWeight]],
    dtype: torch.dtype,
    resident: Callable[[int | None], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Write the packed checkpoint of a model whose values are in place; return the bytes outside the packed Linears.

    tables: packed embeddings by module name; weights: the packed Linears of a block by module name; resident: inside,
    the other tensors of a block are in memory; one block is held at a time, but all of the towers, which lie before
    the language model. dtype: see `pack_model`.
    """
    config, writer = packed_config(family), ShardWriter(folder)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    keys = [key for key in model.state_dict() if key not in tied]
    inside = f"{family.blocks}."
    first = next(place for place, key in enumerate(keys) if key.startswith(inside))
    seers = {name: weight for index in range(family.offset) for name, weight in weights(index).items()}
    assert all(f"{name}.weight" in keys[:first] for name in seers), "towers come before the language model"
    with resident(None):
        rest = _add(writer, keys[:first], model, {**tables, **seers}, config, dtype, linears=seers)
    for index in range(len(lookup(model, family.blocks))):  # type: ignore[arg-type]
        packed = weights(family.offset + index)
        own = [key for key in keys if key.startswith(f"{inside}{index}.")]
        with resident(index):
            rest += _add(writer, own, model, packed, config, dtype, linears=packed)
    last = [key for key in keys[first:] if not key.startswith(inside)]
    with resident(None):
        rest += _add(writer, last, model, tables, config, dtype, linears={})
    writer.finish()
    _write_settings(folder, model, family, config, dtype)
    return rest


def _add(
    writer: ShardWriter, keys: Sequence[str], model: Any, packed: Mapping[str, QuantizedWeight], config: MicoConfig,
    dtype: torch.dtype, linears: Mapping[str, QuantizedWeight],
) -> int:  # fmt: skip
    """Hand tensors to the writer, packed where there are codes; return the bytes of those that are no Linear's part."""
    state, rest = model.state_dict(), 0
    found: dict[str, torch.Tensor] = {}
    for key in keys:
        name, _, part = key.rpartition(".")
        wanted = part == "weight" and name in packed
        found[key] = packed_blob(name, packed, config) if wanted else exactly(state[key].detach(), dtype).cpu()
        rest += 0 if name in linears else found[key].nbytes
    for key, tensor in revert_weight_conversion(model, found).items():  # to the names of the base model's files
        writer.add(key, tensor)
    return rest


def _write_settings(folder: Path, model: Any, family: Family, config: MicoConfig, dtype: torch.dtype) -> None:
    """What `save_pretrained` writes beside the weights."""
    described = copy.deepcopy(model.config)
    described.quantization_config = config
    if auto_map := _auto_map(model, family):
        described.auto_map = auto_map
    described.dtype = str(dtype).removeprefix("torch.")
    described.architectures = [type(model).__name__]
    described.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if auto_map:
        (folder / SHIPPED).write_text(shipped_source(), encoding="utf-8")


def packed_config(family: Family) -> MicoConfig:
    """What config.json says of the packing: which Linears of a block share channel labels."""
    rows = [*family.streams, *(stream for tower in family.towers for stream in tower.streams)]
    shared = [stream.linears for stream in rows if len(stream.linears) > 1]
    return MicoConfig(streams=dict.fromkeys(tuple(any_expert(path)[0] for path in linears) for linears in shared))


def packed_blob(name: str, weights: Mapping[str, QuantizedWeight], config: MicoConfig) -> torch.Tensor:
    """The blob of one weight; labels that another Linear of the stream holds too are left to that one."""
    quantized, leader = weights[name], config.leader(name)
    borrow = leader != name and not is_equal_runs(quantized.label_C, len(quantized.bits_G))
    assert not borrow or torch.equal(weights[leader].label_C.cpu(), quantized.label_C.cpu()), name
    return encode(quantized, borrow_labels=borrow)


def _auto_map(model: Any, family: Family) -> dict[str, str] | None:
    """Which class of the shipped code loads the model; None for a class of mico itself, which is not in it."""
    name = type(model).__name__
    return {family.auto: f"{Path(SHIPPED).stem}.{name}"} if hasattr(transformers, name) else None


def set_execution(model: nn.Module, execution: str | None) -> None:
    """Choose how packed modules compute; None leaves what they were made with. Raises UserError when unknown."""
    check_execution(execution)
    if execution is None:
        return
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.execution = execution
            module.forget()


def check_execution(execution: str | None = None) -> None:
    """Raise UserError when this way to compute, or the one that the environment asks for, is not known."""
    if execution is not None:
        choose("execution", execution, EXECUTIONS)
    try:
        default_execution()
    except ValueError as error:
        raise UserError(str(error)) from None


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record what the checkpoint is and the sha256 of its weight files. Written last."""
    files = sorted(folder.glob("*.safetensors"))
    digests = {file.name: dict(bytes=file.stat().st_size, sha256=sha256_file(file)) for file in files}
    atomic_json(folder / MANIFEST, dict(format=FORMAT, version=VERSION, **facts, files=digests))


def verify_checkpoint(folder: Path) -> None:
    """Compare the weight files with the manifest, when there is one. Raises UserError naming the file that differs."""
    if not (folder / MANIFEST).is_file():
        return
    remedy = "restore it or compress again"
    files = read_json(folder / MANIFEST, remedy).get("files", {})
    if not isinstance(files, dict):
        raise UserError(f"{folder / MANIFEST}: 'files' is a {type(files).__name__}, not an object: {remedy}")
    for name, entry in files.items():
        file = folder / name
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise UserError(f"{folder / MANIFEST}: 'files': {name!r:.80} is without bytes and sha256: {remedy}")
        if not file.is_file():
            raise UserError(f"{file} does not exist, {MANIFEST} lists it: {remedy}")
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            raise UserError(f"{file} is damaged: its sha256 is not that of {MANIFEST}: {remedy}")
