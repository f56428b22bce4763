"""Load a model: everything that can be refused without its weights is refused before they are read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mico.adapters import auto_class, family_of, family_row
from mico.adapters.family import Family, linears_of, lookup
from mico.checkpoint import (
    check_execution,
    verify_checkpoint,
)  # its import also registers the plugin of packed checkpoints
from mico.errors import UserError, out_of_memory
from mico.loading.free import free_memory
from mico.loading.names import PROCESSOR_FILES, local_folder, source_of
from mico.loading.safety import check_folder, check_remote_code, fingerprint, reason, some, tensor_shapes
from mico.loading.silence import quiet
from mico.loading.streaming import MEMORY_SHARE, BlockStore, shell
from mico.packed.experts import unfuse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SEQLEN = 2048
_FFN = ("moe_intermediate_size", "intermediate_size", "ffn_dim")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured: eval mode, no gradients, no cache, on `device` in `dtype`."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any
    family: Family
    name: str  # as the user wrote it
    source: str  # hub id with its revision, or the folder
    seqlen: int
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    folder: Path  # where config and weights lie on this machine
    store: BlockStore | None = None  # where the blocks come from when the model is streamed

    @contextmanager
    def part(self, index: int | None) -> Iterator[nn.Module]:
        """Inside, the weights of a block (None: all outside the blocks) are in memory.

        They are dropped afterwards when the model is streamed.
        """
        if self.store is None:
            yield self.model if index is None else lookup(self.model, self.family.place(index)[0])
            return
        try:
            yield self.store.fill(index)
        finally:
            self.store.empty(index)

    def running(self) -> AbstractContextManager[None]:
        """Inside, `model` can be called as a whole."""
        return nullcontext() if self.store is None else self.store.running()


def _checked_folder(name: str, weights: bool, offline: bool, trust_remote_code: bool, packed: bool) -> Path:
    folder = local_folder(name, weights=weights, offline=offline, trust_remote_code=trust_remote_code)
    config = check_folder(folder, packed)
    if "mm_vision_tower" in config:
        raise UserError(f"{folder}: a LLaVA checkpoint in its original format: convert it with `mico import-llava`")
    family = family_row(config.get("model_type"))
    if not trust_remote_code:
        check_remote_code(folder, family.ships_code)
    return folder


def load_config(name: str, *, offline: bool = False, trust_remote_code: bool = False, packed: bool = False) -> Any:
    """The transformers config of a model whose family is supported; no weights are fetched or read.

    packed: here and below, accept a checkpoint packed by mico too.
    """
    folder = _checked_folder(name, False, offline, trust_remote_code, packed)
    return _config(folder, trust_remote_code)


def _config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    code = _runs_code(folder, trust_remote_code)
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
    except Exception as error:  # a config can be wrong in any way
        raise UserError(f"{folder / 'config.json'} describes no valid model: {reason(error)}") from error


def _runs_code(folder: Path, trust_remote_code: bool) -> bool:
    """Whether the code that comes with a model may run: asked for, and not done by a class that is here already."""
    return trust_remote_code and not family_row(check_folder(folder, packed=True).get("model_type")).ships_code


def load_tokenizer(name: str, *, offline: bool = False, trust_remote_code: bool = False, packed: bool = False) -> Any:
    """The tokenizer of a model; no weights are fetched or read."""
    folder = _checked_folder(name, False, offline, trust_remote_code, packed)
    return _tokenizer(folder, trust_remote_code)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer: one of {', '.join(_TOKENIZER_FILES)} is expected")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer formats fail in many ways, a missing optional library among them
        raise UserError(f"{folder}: the tokenizer cannot be read: {reason(error)}") from error


def context_length(config: Any, seqlen: int | None = None) -> int:
    """The sequence length to use: `seqlen` if the model can take it, else its maximum, at most 2048."""
    maximum = longest_text(config) or DEFAULT_SEQLEN
    if seqlen is None:
        return min(maximum, DEFAULT_SEQLEN)
    if not 2 <= seqlen <= maximum:
        raise UserError(f"--seqlen {seqlen}: must be from 2 to the model's maximum, {maximum}")
    return seqlen


def longest_text(config: Any) -> int | None:
    """The most tokens a model takes at once, None where its config does not tell. Raises UserError for no number."""
    maximum = getattr(config.get_text_config(), "max_position_embeddings", None)
    if maximum is not None and (not isinstance(maximum, int) or maximum < 1):
        raise UserError(f"config.json: max_position_embeddings {maximum!r:.40}: must be a whole number from 1")
    return maximum


def pick_device(device: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU. Raises UserError for a device this machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        return chosen
    except Exception as error:  # RuntimeError, AssertionError or a backend's own type
        raise UserError(f"--device {device}: not usable here ({reason(error)}): try auto or cpu") from error


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seqlen: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    packed: bool = False,
    stream: bool | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer. Everything that can be refused without the weights is refused first.

    dtype 'auto': float32 on the CPU, the checkpoint's own on a GPU. stream: keep the blocks on disk and read each when
    it is needed; None: when the whole model would take most of the free memory. Raises UserError as the checks above
    do, and when weights are missing, of another shape, or not finite, naming the parameter.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from auto, {', '.join(DTYPES)}")
    if packed:
        check_execution()
    place = pick_device(device)
    config = load_config(name, offline=offline, trust_remote_code=trust_remote_code, packed=packed)
    family, length = family_of(config), context_length(config, seqlen)
    folder = _checked_folder(name, True, offline, trust_remote_code, packed)
    config = _config(folder, trust_remote_code)  # weights can lie in another revision than the one looked at first
    tokenizer = _tokenizer(folder, trust_remote_code)
    trust_remote_code = _runs_code(folder, trust_remote_code)
    shapes = tensor_shapes(folder)
    if getattr(config, "quantization_config", None):  # sizes are stated by the packed weights, checked as they load
        verify_checkpoint(folder)
    else:
        _check_size(folder, config, shapes, trust_remote_code)
    wanted: Any = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    packed_config = bool(getattr(config, "quantization_config", None))
    concrete = config.dtype or torch.float32 if wanted == "auto" else wanted
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * concrete.itemsize
    store = None
    if not packed_config and (size > MEMORY_SHARE * free_memory(place) if stream is None else stream):
        store = _shell(folder, config, family, concrete, place, trust_remote_code)
    try:
        model = store.model if store else _weights(folder, config, wanted, trust_remote_code)
        unfuse(model)
        if store is None:
            model.to(place)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        remedy = "use another --device" if packed else "use --stream"
        raise UserError(f"model {name} does not fit into the memory of {place}: {remedy}") from None
    return LoadedModel(
        model, tokenizer, family, name, source_of(name, folder), length, fingerprint(folder), model.dtype, place,
        folder, store,
    )  # fmt: skip


def _shell(
    folder: Path, config: Any, family: Family, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> BlockStore:
    def make(config: Any, dtype: torch.dtype) -> Any:
        return auto_class(config.model_type).from_config(
            config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=trust_remote_code
        )

    store = shell(config, folder, family.blocks, dtype, device, make)
    store.model.config.get_text_config().use_cache = False
    return store


def _weights(folder: Path, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    try:
        with quiet():
            loaded: Any = auto_class(config.model_type).from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
                local_files_only=True, trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # what a config says can fail in any way
        if out_of_memory(error):
            raise
        raise UserError(f"{folder}: the weights cannot be loaded: {reason(error)}") from error
    model, report = loaded
    if report["mismatched_keys"]:
        key, stored, described = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{folder}: '{key}' has shape {tuple(stored)}, config.json describes {tuple(described)}")
    if report["missing_keys"]:
        raise UserError(f"{folder}: weights missing: {some(sorted(report['missing_keys']))}: fetch the model again")
    for key, parameter in model.named_parameters():
        low, high = torch.aminmax(parameter.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{folder}: '{key}' holds NaN or infinite weights in {model.dtype}: fetch the model again")
    model.config.get_text_config().use_cache = False
    return model.eval().requires_grad_(False)


def _check_size(folder: Path, config: Any, shapes: dict[str, tuple[int, ...]], trust_remote_code: bool) -> None:
    """Compare what the config describes with what the files hold, on the meta device: no memory is spent on either."""
    layers = config.get_text_config().num_hidden_layers
    if layers > len(shapes):
        raise UserError(f"{folder}: config.json has {layers} layers, the weights {len(shapes)} tensors")
    try:
        with quiet(), torch.device("meta"):
            model = auto_class(config.model_type).from_config(
                config, attn_implementation="sdpa", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a config can be wrong in any way
        raise UserError(f"{folder / 'config.json'} describes no valid model: {reason(error)}") from error
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    if described > stored:
        absent = sorted(name for name, _ in model.named_parameters() if name not in shapes)
        what = f"missing: {some(absent)}" if absent else "the shapes differ"
        raise UserError(
            f"{folder}: config.json describes {described:,} parameters, the weights hold {stored:,}; {what}"
        )


def coverage(model: nn.Module, family: Family) -> float:
    """Share of the weights between embeddings and head that the family's streams cover.

    Counted are all matrices of the language model (fused ones too), its router among them, and their biases; not what
    sees images and stays dense, which `describe` states.
    """
    covered = list(_covered(model, family))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    apart = {id(parameter) for end in (*ends, *_vision(model, family)) for parameter in end.parameters()}
    total = 0
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in apart]
        if not isinstance(module, nn.Embedding) and any(parameter.dim() > 1 for parameter in own):
            total += sum(parameter.numel() for parameter in own)
    return sum(parameter.numel() for linear in covered for parameter in linear.parameters()) / total


def _covered(model: nn.Module, family: Family) -> Iterator[nn.Linear]:
    """The Linears of all streams, those of towers first."""
    layers = len(list(lookup(model, family.blocks).children()))
    for path, streams in map(family.place, range(family.offset + layers)):
        block = lookup(model, path)
        for stream in streams:
            yield from linears_of(block, stream).values()


def stream_widths(config: Any, trust_remote_code: bool = False, family: Family | None = None) -> dict[str, int]:
    """Input channels of every stream, from the config of a model alone; family: one with towers."""
    family = family or family_of(config)
    code = trust_remote_code and not family.ships_code
    with quiet(), torch.device("meta"):
        model = auto_class(config.model_type).from_config(config, trust_remote_code=code)
    unfuse(model)
    found: dict[str, int] = {}
    for path, streams in [(tower.path(0), tower.streams) for tower in family.towers] + [family.place(family.offset)]:
        block = lookup(model, path)
        found |= {s.name: next(iter(linears_of(block, s).values())).in_features for s in streams}
    return found


def copy_processor(source: Path, target: Path) -> None:
    """Copy what prepares images for a model, as it is, beside a copy of the model."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _vision(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules that see images and stay dense."""
    compressed = [tower.blocks for tower in family.towers]
    return [
        lookup(model, path) for path in family.vision if not any(blocks.startswith(path) for blocks in compressed)
    ]  # fmt: skip


def describe(model: Any, family: Family) -> dict[str, Any]:
    """The architecture of a model in plain JSON values, for the report.

    coverage: the share of the Linears that gets compressed, as `coverage` counts it; vision: parameters of a model that
    sees images which stay dense, experts: those of a layer; both are there only where the model has any.
    """
    config = model.config.get_text_config()
    facts = {
        "family": family.name,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "ffn": next(getattr(config, name) for name in _FFN if getattr(config, name, None)),
        "vocabulary": config.vocab_size,
        "tied_head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "coverage": round(coverage(model, family), 4),
    }
    if experts := {stream.expert for stream in family.streams} - {None}:
        facts["experts"] = len(experts)
    if family.vision:
        facts["vision"] = sum(p.numel() for module in _vision(model, family) for p in module.parameters())
    if family.towers:
        facts["towers"] = ", ".join(tower.name for tower in family.towers)
    return facts
