"""Parts of a model that is larger than memory, read from the weight files when they are needed.

The model is a shell on the meta device. A block, or what lies outside all blocks (embeddings, norms, head: part None),
is filled when it is needed and goes back to the meta device afterwards. Names and fused tensors are converted by
transformers, as in a whole load, so the values are the same bits.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from mico.adapters.family import lookup
from mico.errors import UserError
from mico.loading.safety import some, weight_map
from mico.loading.silence import quiet
from mico.packed.experts import fused_for_loading, per_expert

_MMAP_THRESHOLD, _MAPPED_FROM = -3, 1 << 20  # M_MMAP_THRESHOLD of malloc.h, bytes
MEMORY_SHARE = 0.8  # of the free memory that a whole model may take; above, its blocks are streamed


class BlockStore:
    """Fills and empties the parts of one shell model. `changed` may put other values into a part just filled."""

    def __init__(self, model: Any, folder: Path, blocks: str, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.folder, self._path, self.device = model, folder, blocks, device
        self.changed: Callable[[int | None, nn.Module], None] | None = None
        self._keys: dict[int | None, dict[Path, list[str]]] = {}
        self._checked: set[int | None] = set()
        self._settings = _settings(model, dtype, device)
        pattern = re.compile(rf"(?:^|\.){re.escape(blocks.rpartition('.')[2])}\.(\d+)\.")
        for file in sorted(weight_map(folder)):
            with _opened(folder / file) as handle:
                keys = list(handle.keys())
            for key in keys:
                match = None if "vision" in key else pattern.search(key)
                part = self._keys.setdefault(int(match[1]) if match else None, {})
                part.setdefault(folder / file, []).append(key)

    def fill(self, index: int | None) -> nn.Module:
        """Read one block (None: all outside the blocks) and return it. Raises UserError when a tensor is missing."""
        module = self.model if index is None else lookup(self.model, f"{self._path}.{index}")
        self._read(index)
        inside = f"{self._path}."
        absent = [
            name
            for name, parameter in module.named_parameters()
            if parameter.is_meta and not (index is None and name.startswith(inside))
        ]
        if absent:
            where = "" if index is None else f"{self._path}.{index}: "
            raise UserError(f"{self.folder}: weights missing: {where}{some(absent)}: fetch the model again")
        if index not in self._checked:
            self._check_finite(module, "" if index is None else f"{self._path}.{index}.")
            self._checked.add(index)
        module.eval().requires_grad_(False)
        if self.changed is not None:
            self.changed(index, module)
        return module

    def empty(self, index: int | None) -> None:
        """Give the memory of a part back."""
        part = self.model if index is None else lookup(self.model, f"{self._path}.{index}")
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        if index is None:
            self.model.tie_weights()
        _return_freed_memory()

    def _read(self, index: int | None) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with ExitStack() as stack, quiet():  # a file is mapped no longer than it is read: its pages count as memory
            state: dict[str, Any] = {}
            for file, keys in self._keys.get(index, {}).items():
                handle = stack.enter_context(_opened(file))
                state |= {key: handle.get_slice(key) for key in keys}
            # The settings are those of transformers, which knows fused experts alone.
            with nullcontext() if index is None else fused_for_loading(lookup(self.model, f"{self._path}.{index}")):
                convert_and_load_state_dict_in_model(self.model, state, self._settings)
            self.model._weight_conversions = per_expert(self.model._weight_conversions)
        if index is None:
            self.model.tie_weights()

    def _check_finite(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                continue
            low, high = torch.aminmax(parameter)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise UserError(
                    f"{self.folder}: '{prefix}{name}' holds NaN or infinite weights in {parameter.dtype}: "
                    "fetch the model again"
                )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model can be called: every block is filled just before its forward and emptied after it."""
        handles = []
        for index, block in enumerate(lookup(self.model, self._path).children()):
            handles.append(block.register_forward_pre_hook(lambda *_, index=index: self._fill_only(index)))
            handles.append(block.register_forward_hook(lambda *_, index=index: self.empty(index)))
        try:
            self.fill(None)
            yield
        finally:
            self.empty(None)
            for handle in handles:
                handle.remove()

    def _fill_only(self, index: int) -> None:
        self.fill(index)


def _return_memory_when_freed() -> None:
    """Keep the C library (glibc) from holding on to freed megabytes, as it does once it has freed larger pieces."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)


def _return_freed_memory() -> None:
    """Give pages that the C library keeps for later back to the system, where it can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _settings(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(model, None, None)
    return LoadStateDictConfig(dtype=dtype, device_map={"": device}, weight_mapping=mapping)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules are made without memory for their parameters; buffers, which no file holds, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


def shell(config: Any, folder: Path, blocks: str, dtype: torch.dtype, device: torch.device, make: Any) -> BlockStore:
    """A model without weights, and the store that fills it. make: builds the model from the config."""
    from transformers import GenerationConfig

    _return_memory_when_freed()
    with _parameters_on_meta():
        model = make(config, dtype)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    store = BlockStore(model, folder, blocks, dtype, device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    store.fill(None)  # what is missing is told at once
    store.empty(None)
    return store
