"""Modules that hold a packed weight and compute with it: what replaces nn.Linear and nn.Embedding in a loaded model.

The blob (mico/packed/blob.py) is the only tensor that is saved. What computes is made from it when it is first needed:
a kernel where calls have few rows, the dense weight where they have many, never both for long; always the dense weight
where no kernel is exact enough to replace it (float32) or exists. Suffixes: R rows, C channels, B batch.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mico.packed.blob import Header, decode, decode_rows
from mico.packed.cpu import prepare_cpu
from mico.packed.gpu import available, prepare_gpu
from mico.packed.inputs import GRID_BYTES, by_channel, decode_grid, on_grid
from mico.packed.quantized import QuantizedWeight

EXECUTIONS = ("auto", "packed", "dense", "lean")
PATHS = ("kernel", "dense", "unpacked")
EXECUTION_VARIABLE = "MICO_EXECUTION"
# Rows of activations up to which a kernel beats a dense weight that is there already, and from which it is quicker to
# make that weight for one call; measured at 4096 x 4096 (benchmarks/README.md). The GPU's kernel sees to the latter.
CROSSOVER = {"cpu": 8, "cuda": 32}
UNPACK_FROM = {"cpu": 512}
PATIENCE = 4  # more calls of many rows than of few after which the dense weight is kept; as many back let it go again
_BLOCK = 256  # rows that are made dense at a time: bounds the memory of the float32 intermediates


def default_execution() -> str:
    """How packed modules compute unless told otherwise: $MICO_EXECUTION or auto. Raises ValueError when unknown."""
    chosen = os.environ.get(EXECUTION_VARIABLE, "auto")
    if chosen not in EXECUTIONS:
        raise ValueError(f"{EXECUTION_VARIABLE}={chosen}: choose from {', '.join(EXECUTIONS)}")
    return chosen


class _Packed(nn.Module):
    """A blob, and the dense weight made from it."""

    weight: torch.Tensor
    label_C: torch.Tensor | None

    def __init__(self, size: int, device: Any = None, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device=device), persistent=persistent)
        self.register_buffer("label_C", None, persistent=False)  # given by the stream's first Linear where borrowed
        self._dense: torch.Tensor | None = None
        self._dense_key: tuple[Any, ...] | None = None

    def quantized(self) -> QuantizedWeight:
        """The weight that the blob holds. Raises ValueError when it is damaged."""
        return decode(self.weight, self.label_C)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight, (R, C), a new tensor."""
        quantized = self.quantized()
        weight_RC = torch.empty(quantized.codes_RC.shape, dtype=dtype, device=self.weight.device)
        for start in range(0, len(weight_RC), _BLOCK):
            here = slice(start, start + _BLOCK)
            weight_RC[here] = _rows(quantized, here).dequantize(dtype)
        return weight_RC

    def header(self) -> Header:
        return Header.of(self.weight)

    def forget(self) -> None:
        """Give up what was made from the blob; it is made again when needed."""
        self._dense = self._dense_key = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()  # the blob moves, or the activations change their dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.forget()  # another blob in the same memory

    def _key(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        """What a form made from the blob depends on: the blob's memory, and how often it was written to."""
        version = 0 if self.weight.is_inference() else self.weight._version
        return device, dtype, self.weight.data_ptr(), version

    def _kept_dense(self, dtype: torch.dtype) -> torch.Tensor:
        key = self._key(self.weight.device, dtype)
        if self._dense is None or self._dense_key != key:
            with torch.inference_mode(False), torch.no_grad():  # later calls may want gradients
                self._dense, self._dense_key = self.dense(dtype), key
        return self._dense

    @property
    def resident_bytes(self) -> int:
        """Bytes of what was made from the blob."""
        return 0 if self._dense is None else self._dense.nbytes


def _rows(quantized: QuantizedWeight, here: slice) -> QuantizedWeight:
    zero_RG, keep_RC, rows = quantized.zero_RG, quantized.keep_RC, len(quantized.codes_RC)
    return replace(
        quantized,
        codes_RC=quantized.codes_RC[here],
        row_scale_RG=quantized.row_scale_RG[here],
        zero_RG=zero_RG if zero_RG is None or len(zero_RG) != rows else zero_RG[here],
        keep_RC=None if keep_RC is None else keep_RC[here],
    )


class PackedLinear(_Packed):
    """y = x W^T + b with a packed W. The bias keeps the dtype it is stored in.

    input_grid: how x is quantized first (mico/packed/inputs.py), of `input_groups` runs of channels; None: not at all.

    execution: 'auto' as described above, 'packed' never keeps a dense weight where there is a kernel, 'dense' always
    does: bit-equal to the dense model in every dtype; 'lean' makes the same dense weight for every call anew.
    calls: how often each of 'kernel', 'dense' (kept) and 'unpacked' (made for one call) has served.
    temporary_bytes: of the dense weight that was made for the last call alone. No kernel has gradients: what needs
    them for its input is served by the dense weight.
    """

    input_grid: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, size: int, bias: torch.Tensor | None = None, device: Any = None,
        tied: bool = False, input_groups: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(size, device, persistent=not tied)
        self.tied = tied
        grid = torch.empty(GRID_BYTES * input_groups, dtype=torch.uint8, device=device) if input_groups else None
        self.register_buffer("input_grid", grid)
        self._inputs_3C: torch.Tensor | None = None
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.execution = default_execution()
        self._kernel: Any = None
        self._kernel_key: tuple[Any, ...] | None = None
        self._many = 0  # recent calls of many rows less those of few, between 0 and PATIENCE
        self._keeps_dense = False
        self.calls = dict.fromkeys(PATHS, 0)
        self.temporary_bytes = 0

    def forget(self) -> None:
        super().forget()
        self.temporary_bytes = 0
        self._kernel, self._kernel_key, self._many, self._keeps_dense = None, None, 0, False
        self._inputs_3C = None

    def input_grid_3G(self) -> torch.Tensor | None:
        """Bits, scale and zero of the runs of input channels, (3, G). Raises ValueError when they are damaged."""
        return None if self.input_grid is None else decode_grid(self.input_grid, self.in_features)

    def _on_grid(self, x: torch.Tensor) -> torch.Tensor:
        if self._inputs_3C is None:
            with torch.inference_mode(False), torch.no_grad():
                grid_3G = self.input_grid_3G()
                assert grid_3G is not None
                self._inputs_3C = by_channel(grid_3G, self.in_features)
        return on_grid(x, self._inputs_3C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., R)."""
        if self.input_grid is not None:
            x = self._on_grid(x)
        path = self._path(x)
        self.calls[path] += 1
        self.temporary_bytes = 0
        if path == "kernel":
            return self._kernel(x.reshape(-1, self.in_features), self.bias).view(*x.shape[:-1], self.out_features)
        if path == "dense":
            weight_RC = self._kept_dense(x.dtype)
        else:
            weight_RC = self.dense(x.dtype)
            self.temporary_bytes = weight_RC.nbytes
        return functional.linear(x, weight_RC, None if self.bias is None else self.bias.to(x.dtype))

    def _path(self, x: torch.Tensor) -> str:
        """What serves this call. Whatever kept form it does not need is given up where calls have changed for good."""
        rows = x.numel() // self.in_features
        if self.execution == "lean":
            return "unpacked"
        if self.execution == "dense" or not rows or x.shape[-1] != self.in_features or not has_kernel(x):
            return "dense"
        if x.requires_grad and torch.is_grad_enabled():
            return "dense"
        few = rows <= CROSSOVER[x.device.type]
        self._many = max(0, self._many - 1) if few else min(PATIENCE, self._many + 1)
        if self._many in (0, PATIENCE):
            self._keeps_dense = self._many == PATIENCE and self.execution == "auto"
        if self._keeps_dense:
            self._kernel, self._kernel_key = None, None
            return "dense"
        hopeless = self._kernel_key is not None and self._kernel is None
        if rows >= UNPACK_FROM.get(x.device.type, rows + 1) and not hopeless:
            return "unpacked"
        if self._kernel_for(x) is None:
            return "dense"
        self._dense = None
        return "kernel"

    def _kernel_for(self, x: torch.Tensor) -> Any:
        key = self._key(x.device, x.dtype)
        if self._kernel_key != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kernel, self._kernel_key = prepare(self, x.device, x.dtype), key
        return self._kernel

    @property
    def kind(self) -> str:
        """What computes now: the kernel's own name for it, 'dense', 'unpacked' for each call, or 'not called' yet."""
        if self.temporary_bytes:
            return "unpacked"
        if self._kernel is not None:
            return getattr(self._kernel, "kind", "kernel")
        return "not called" if self._dense is None else "dense"

    @property
    def resident_bytes(self) -> int:
        return super().resident_bytes + (0 if self._kernel is None else self._kernel.nbytes)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={self.weight.numel()}"


def has_kernel(x: torch.Tensor) -> bool:
    """Whether there is a kernel for activations of this dtype on this device."""
    if x.device.type == "cuda":
        return x.dtype in (torch.bfloat16, torch.float16) and available()
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def prepare(module: PackedLinear, device: torch.device, dtype: torch.dtype) -> Any:
    """The kernel for activations of which `has_kernel` is true; None where it cannot hold this weight."""
    return prepare_cpu(module.quantized()) if device.type == "cpu" else prepare_gpu(module.quantized(), device, dtype)


class PackedEmbedding(_Packed):
    """Rows of a packed table; only the rows asked for are turned into numbers."""

    def __init__(self, num_embeddings: int, embedding_dim: int, size: int, dtype: torch.dtype, device: Any = None):
        super().__init__(size, device)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.out_features, self.in_features = num_embeddings, embedding_dim  # as a matrix: a row a token

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> (..., C) in the model's dtype. Raises IndexError for an id without a row, as nn.Embedding does;
        on a GPU the device does, where asking would make it wait."""
        if ids.device.type != "cpu":
            ids = ids.where(ids >= 0, self.num_embeddings)  # a negative id would count from the end
        elif ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError(
                f"token ids from {int(ids.min())} to {int(ids.max())}: 0 to {self.num_embeddings - 1} exist"
            )
        return decode_rows(self.weight, ids.reshape(-1)).dequantize(self.dtype).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(torch.zeros(1, dtype=self.dtype, device="meta" if self.weight.is_meta else "cpu"))
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype  # model.to(torch.bfloat16) reaches what is made here, as it would a parameter
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bytes={self.weight.numel()}"
