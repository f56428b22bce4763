"""What every export starts from: a packed checkpoint, read; and what every export ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mico.adapters import auto_class, family_of
from mico.adapters.family import Family
from mico.errors import UserError
from mico.loading import load_config, load_tokenizer, quiet
from mico.loading.packed import checked_packed_folder
from mico.loading.safety import reason
from mico.packed.hf import quantized_inputs, unpacked
from mico.packed.linear import PackedEmbedding, PackedLinear
from mico.packed.quantized import QuantizedWeight


@dataclass(frozen=True)
class Exported:
    """What an export wrote and how it was checked.

    files: names inside the output folder; exact: every weight equals the native dequantization; max_error: the
    largest difference from it; notes: tensors that are not exact and why, and what read the files back.
    """

    target: str
    files: tuple[str, ...]
    exact: bool
    max_error: float
    notes: tuple[str, ...]


class _Weights(Mapping[str, QuantizedWeight]):
    """The packed weights of a model by module name, decoded when asked for: they are large."""

    def __init__(self, modules: dict[str, PackedLinear | PackedEmbedding]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> QuantizedWeight:
        return self._modules[name].quantized()

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def numbers(self) -> int:
        return sum(module.out_features * module.in_features for module in self._modules.values())


@dataclass(frozen=True)
class PackedSource:
    """A packed checkpoint.

    config: without quantization_config and auto_map; weights: by module name ('model.layers.0.mlp.up_proj'), a tied
    head not among them; others: every other tensor by its key ('model.norm.weight', biases), as it is stored.
    """

    folder: Path
    config: Any
    tokenizer: Any
    family: Family
    weights: Mapping[str, QuantizedWeight]
    others: Mapping[str, torch.Tensor]

    def numbers(self) -> int:
        """How many numbers a dense copy holds."""
        packed = self.weights.numbers() if isinstance(self.weights, _Weights) else 0
        return packed + sum(tensor.numel() for tensor in self.others.values())

    def dense_state(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Dense tensors by their original keys; dtype None: packed ones in float32, the others as stored."""
        state = {f"{name}.weight": self.weights[name].dequantize(dtype or torch.float32) for name in self.weights}
        return state | {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in self.others.items()}

    def dense_model(self, dtype: torch.dtype) -> Any:
        """The dense model with these values, in eval mode."""
        with quiet():
            model = _load(self.folder, self.config.model_type, dtype)
        return unpacked(model, dtype).to(dtype).eval()


def read_packed(name: str | Path) -> PackedSource:
    """Read a packed checkpoint, or the one in a run folder; its files are compared with the manifest first.

    Raises UserError when there is none, or it is damaged.
    """
    folder, _ = checked_packed_folder(name)
    config = load_config(str(folder), packed=True)
    tokenizer = load_tokenizer(str(folder), packed=True)
    try:
        with quiet():
            model = _load(folder, config.model_type, "auto")
    except Exception as error:  # what a damaged checkpoint says can fail in any way
        raise UserError(f"{folder}: the weights cannot be loaded: {reason(error)}") from error
    if quantized_inputs(model):
        raise UserError(
            f"{folder}: its activations are quantized, on grids that the packed checkpoint alone holds: use that, "
            "no export can do that"
        )
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedEmbedding)) and not getattr(module, "tied", False)
    }
    packed = {f"{name}.weight" for name in modules}
    tied = set(model.all_tied_weights_keys)
    others = {key: tensor for key, tensor in model.state_dict().items() if key not in packed | tied}
    del config.quantization_config
    if getattr(config, "auto_map", None):  # models whose class is mico's own have none
        del config.auto_map
    return PackedSource(folder, config, tokenizer, family_of(config), _Weights(modules), others)


def _load(folder: Path, model_type: str, dtype: Any) -> Any:
    return auto_class(model_type).from_pretrained(folder, dtype=dtype, local_files_only=True)
