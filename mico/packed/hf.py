"""The transformers plugin: `from_pretrained` on a packed checkpoint builds packed modules.

Without it transformers only warns about the unknown method "mico" and then fails, as no dense weight is 1-D. This
file and those it imports are also shipped inside every checkpoint, joined to one (mico/packed/bundle.py), so that
`trust_remote_code=True` loads it where mico is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mico.packed.blob import decode_labels
from mico.packed.experts import any_expert, fuse, per_expert, put, unfuse
from mico.packed.inputs import GRID_BYTES
from mico.packed.linear import PackedEmbedding, PackedLinear

METHOD = "mico"
LAYOUT_VERSION = 1
SHARD_BYTES = 512 * 10**6  # a weight file is whole in memory while it is written
SHIPPED = "modeling_mico.py"  # this code inside a checkpoint


class MicoConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: layouts lie in the weights themselves.

    streams: paths inside a block of the Linears that share channel labels; the first of each holds them. "experts.*."
    stands for every expert.
    """

    def __init__(self, version: int = LAYOUT_VERSION, streams: Iterable[Iterable[str]] = (), **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.streams = [list(stream) for stream in streams]
        if version != LAYOUT_VERSION:
            raise ValueError(f"quantization_config: mico layout {version}, this code reads {LAYOUT_VERSION}: update it")

    def to_dict(self) -> dict[str, Any]:
        return dict(quant_method=METHOD, version=self.version, streams=self.streams)

    def leader(self, name: str) -> str:
        """The Linear that holds the channel labels of `name`; `name` itself where it shares them with none."""
        whole, expert = any_expert(name)
        for first, *others in self.streams:
            for path in others:
                if whole.endswith(f".{path}"):
                    return (whole[: -len(path)] + first).replace("experts.*.", f"experts.{expert}.")
        return name


class MicoQuantizer(HfQuantizer):
    """Swaps packed modules in before weights are loaded, and hands out shared labels afterwards."""

    requires_calibration = True
    quantization_config: MicoConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **more: Any
    ) -> Any:
        if not checkpoint_files:
            raise ValueError("a packed model is loaded from its safetensors files, give its folder")
        unfuse(model)
        headers = _renamed(model, _headers(checkpoint_files))
        _check_complete(model, headers)
        names = dict(_module_names(model, headers))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for target, source in list(tied.items()):  # a tied head is stored once, with the embedding
            embedding = source.removesuffix(".weight")
            if embedding in names:
                tie_head(model, target.removesuffix(".weight"), headers[names[embedding]][1][0])
        for name, key in names.items():
            put(model, name, _packed_module(model.get_submodule(name), headers, key, name))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        share_labels(model, self.quantization_config)
        model.__class__ = packed_class(type(model))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Packed experts stay one tensor a Linear."""
        return per_expert(super().update_weight_conversions(weight_conversions, model))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return unpacked(model, dtype or model.dtype)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _headers(files: Iterable[str]) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of safetensors files, from their first bytes alone."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        found |= {key: (entry["dtype"], entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    return found


def _renamed(model: Any, headers: dict[str, tuple[str, list[int]]]) -> dict[str, tuple[str, list[int]]]:
    """The headers by the names tensors have in the model: some models (LLaVA) are stored in an older layout."""
    steps = [step for step in per_expert(get_model_conversion_mapping(model)) if isinstance(step, WeightRenaming)]
    return {rename_source_key(key, steps, [])[0]: header for key, header in headers.items()}


def _module_names(model: Any, headers: dict[str, tuple[str, list[int]]]) -> Iterable[tuple[str, str]]:
    """(module, key) of every packed weight; a base model is loaded from the keys of a model with a head."""
    prefix = f"{model.base_model_prefix}."
    for key, (dtype, shape) in headers.items():
        if dtype != "U8" or len(shape) != 1 or not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            try:
                model.get_submodule(candidate)
            except AttributeError:
                continue
            yield candidate, key
            break


def _check_complete(model: Any, headers: dict[str, tuple[str, list[int]]]) -> None:
    """Raise ValueError naming a tensor that the files lack, which transformers would fill with random numbers.

    Heads other than that of the language model may be new.
    """
    prefix = f"{model.base_model_prefix}."
    stored = {key.removeprefix(prefix) for key in headers}
    base = getattr(model, model.base_model_prefix, model)
    wanted = {name: prefix + name for name, _ in base.named_parameters()}
    head, tied = model.get_output_embeddings(), getattr(model, "all_tied_weights_keys", None) or {}
    keys = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    wanted |= {key: key for key in keys if key not in tied}
    for key, name in wanted.items():
        if key not in stored:
            raise ValueError(f"{name} is not in the checkpoint: its weight files are incomplete, fetch it again")


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _packed_module(old: nn.Module, headers: dict[str, tuple[str, list[int]]], key: str, name: str) -> nn.Module:
    size = headers[key][1][0]
    if isinstance(old, nn.Embedding):
        return PackedEmbedding(old.num_embeddings, old.embedding_dim, size, old.weight.dtype, old.weight.device)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"{name}: a packed weight for a {type(old).__name__}; Linears and Embeddings can be packed")
    bias, stem = None, key.removesuffix(".weight")
    if old.bias is not None:
        stored = headers.get(f"{stem}.bias")
        bias = torch.empty_like(old.bias, dtype=_DTYPES[stored[0]] if stored else old.bias.dtype)
    grid = headers.get(f"{stem}.input_grid")
    groups = 0 if grid is None else grid[1][0] // GRID_BYTES
    return PackedLinear(old.in_features, old.out_features, size, bias, old.weight.device, input_groups=groups)


def tie_head(model: Any, name: str, size: int) -> None:
    """Make the head `name` one that shares the embedding's blob, which it gets from `share_labels`.

    transformers ties parameters alone, so its own entry for the pair goes.
    """
    head = model.get_submodule(name)
    put(model, name, PackedLinear(head.in_features, head.out_features, size, device=head.weight.device, tied=True))
    model.all_tied_weights_keys.pop(f"{name}.weight")


def share_labels(model: Any, config: MicoConfig) -> None:
    """Give a tied head its blob and Linears the labels that they borrow, and check every blob against its module.

    Raises ValueError naming the module whose blob is damaged or of another shape.
    """
    labels: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, PackedLinear) and module.tied:
            module.weight = model.get_input_embeddings().weight
    for name, module in modules.items():
        if not isinstance(module, (PackedLinear, PackedEmbedding)) or module.weight.is_meta:
            continue
        leader = config.leader(name)
        try:
            head, shape = module.header(), (module.out_features, module.in_features)
            if (head.rows, head.channels) != shape:
                raise ValueError(f"packed {head.rows} x {head.channels}, the model has {shape[0]} x {shape[1]}")
            if isinstance(module, PackedLinear):
                module.input_grid_3G()
            if head.borrows and leader not in labels:
                labels[leader] = decode_labels(modules[leader].weight)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
        if head.borrows:
            module.label_C = labels[leader].to(module.weight.device)


def unpacked(model: Any, dtype: torch.dtype) -> Any:
    """The model with dense Linears and embeddings in place of packed ones, tied as before, its experts fused.

    Raises ValueError where activations are quantized, which dense Linears cannot do.
    """
    if name := quantized_inputs(model):
        raise ValueError(f"{name}: the activations of this model are quantized, dense Linears would not do that")
    dense: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (PackedLinear, PackedEmbedding)):
            continue
        parameter = dense.setdefault(module.weight.data_ptr(), nn.Parameter(module.dense(dtype), requires_grad=False))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _dense_module(module, parameter, dtype))
    fuse(model)
    if getattr(model, "hf_quantizer", None) is not None:  # saved, it shall not say that it is packed
        model.hf_quantizer.remove_quantization_config(model)
    own = type(model)
    if issubclass(own, PackedModel):
        model.__class__ = own.__mro__[2]
    if getattr(model.config, "auto_map", None):
        del model.config.auto_map
    return model


def quantized_inputs(model: nn.Module) -> str | None:
    """Name of the first Linear whose input is quantized, None where there is none."""
    packed = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))
    return next((name for name, module in packed if module.input_grid is not None), None)


def _dense_module(module: Any, weight: nn.Parameter, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, PackedEmbedding):
        embedding = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        embedding.weight = weight
        return embedding
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = weight
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return linear


# --- model classes --------------------------------------------------------------------------------------------------


class PackedModel:
    """Mixed into the class of a packed model: a saved folder again holds the code that loads it."""

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """As the class below; also writes modeling_mico.py where the config names it."""
        if not args:
            options.setdefault("max_shard_size", SHARD_BYTES)  # the files are those that mico compress wrote
        result = super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        if getattr(self.config, "auto_map", None):  # type: ignore[attr-defined]
            (Path(save_directory) / SHIPPED).write_text(shipped_source(), encoding="utf-8")
        return result

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As the class below; labels that Linears share come from the new blobs."""
        result = super().load_state_dict(*args, **options)  # type: ignore[misc]
        share_labels(self, self.hf_quantizer.quantization_config)  # type: ignore[attr-defined]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, (PackedLinear, PackedEmbedding)):
                module.forget()
        return result

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
        """As the class below. Raises ValueError where the embeddings or the head are packed."""
        ends = (self.get_input_embeddings(), self.get_output_embeddings())  # type: ignore[attr-defined]
        if new_num_tokens is not None and any(isinstance(end, (PackedEmbedding, PackedLinear)) for end in ends):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}): the token embeddings of this model are packed and keep "
                "their size: resize the dense model and compress it again"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **options)  # type: ignore[misc]


def shipped_source() -> str:
    """The text of modeling_mico.py: this file where it is that already, else the join of mico's own files."""
    if Path(__file__).name == SHIPPED:
        return Path(__file__).read_text(encoding="utf-8")
    return import_module("mico.packed.bundle").bundle()


_CLASSES: dict[str, type] = {}


def packed_class(base: type) -> type:
    """The class of packed models of a transformers class, of the same name."""
    if issubclass(base, PackedModel):
        return base
    if base.__name__ not in _CLASSES:
        _CLASSES[base.__name__] = type(base.__name__, (PackedModel, base), {"__module__": __name__})
    return _CLASSES[base.__name__]


def __getattr__(name: str) -> Any:
    """Classes are made when they are looked up: by `auto_map` and by pickle."""
    base = getattr(transformers, name, None) if not name.startswith("_") else None
    if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
        return packed_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if METHOD not in AUTO_QUANTIZER_MAPPING or Path(__file__).name != SHIPPED:  # mico itself goes before shipped copies
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MicoConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = MicoQuantizer
