"""Packed modules: what serves a call, what is kept and for how long, and that it all equals the dense weight."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mico.packed import linear
from mico.packed.blob import encode
from mico.packed.linear import CROSSOVER, PATIENCE, UNPACK_FROM, PackedEmbedding, PackedLinear, default_execution
from mico.packed.quantized import QuantizedWeight
from mico.packed.table import quantize_table
from tests.packed.making import KINDS, random_weight

ROWS, CHANNELS = 80, 96
FEW, MANY = CROSSOVER["cpu"], CROSSOVER["cpu"] + 1


def packed(kind: str = "mico", execution: str = "auto", biased: bool = True) -> tuple[PackedLinear, QuantizedWeight]:
    make = torch.Generator().manual_seed(3)
    label_C = torch.randint(0, 3, (CHANNELS,), generator=make)
    quantized = random_weight(torch.randn(ROWS, CHANNELS, generator=make), kind, label_C, 5)
    blob = encode(quantized)
    bias = torch.randn(ROWS, generator=make).bfloat16() if biased else None
    module = PackedLinear(CHANNELS, ROWS, len(blob), bias)
    module.weight, module.execution = blob, execution
    return module, quantized


def activations(rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(rows)).to(dtype)


def last(module: PackedLinear, rows: int) -> str:
    """What served a call of so many rows."""
    before = dict(module.calls)
    module(activations(rows))
    return next(path for path, count in module.calls.items() if count != before[path])


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_execution_is_bit_equal(kind, dtype):
    module, quantized = packed(kind, "dense")
    weight_RC = quantized.dequantize(dtype)
    for shape in ((1,), (2, 3), (1, 30)):
        x = torch.randn(*shape, CHANNELS).to(dtype)
        assert torch.equal(module(x), functional.linear(x, weight_RC, module.bias.to(dtype)))
    assert module.calls == {"kernel": 0, "dense": 3, "unpacked": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_than_the_kernels_are_bit_equal_by_themselves(dtype):
    module, quantized = packed()
    x = activations(2, dtype)
    assert torch.equal(module(x), functional.linear(x, quantized.dequantize(dtype), module.bias.to(dtype)))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_come_close(kind):
    module, quantized = packed(kind)
    x = activations(4)
    exact = functional.linear(x.double(), quantized.dequantize().double(), module.bias.double())
    found = module(x.view(2, 2, CHANNELS)).view(4, ROWS)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) < 0.01 * float(exact.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_dense_by_blocks_of_rows_equals_dequantize(kind, monkeypatch):
    module, quantized = packed(kind)
    monkeypatch.setattr(linear, "_BLOCK", 32)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(module.dense(dtype), quantized.dequantize(dtype))


def test_no_rows_and_wrong_widths():
    module, _ = packed()
    assert module(torch.zeros(2, 0, CHANNELS, dtype=torch.bfloat16)).shape == (2, 0, ROWS)
    with pytest.raises(RuntimeError, match="shapes"):
        module(torch.zeros(2, CHANNELS + 1, dtype=torch.bfloat16))


# --- what serves a call ---------------------------------------------------------------------------------------------


def test_one_long_prompt_does_not_end_the_kernel():
    module, _ = packed()
    assert [last(module, rows) for rows in (FEW, UNPACK_FROM["cpu"], 1, MANY, 1)] == [
        "kernel", "unpacked", "kernel", "kernel", "kernel"
    ]  # fmt: skip
    assert module._dense is None and module.kind in ("bytes", "4-bit digits")


def test_many_rows_again_and_again_keep_the_dense_weight_and_nothing_else():
    module, quantized = packed()
    assert [last(module, MANY) for _ in range(PATIENCE + 2)] == ["kernel"] * (PATIENCE - 1) + ["dense"] * 3
    assert module.kind == "dense" and module.resident_bytes == 2 * ROWS * CHANNELS
    x = activations(MANY)
    assert torch.equal(module(x), functional.linear(x, quantized.dequantize(torch.bfloat16), module.bias))
    assert [last(module, 1) for _ in range(PATIENCE + 1)] == ["dense"] * (PATIENCE - 1) + ["kernel"] * 2
    assert module._dense is None and module.resident_bytes == module._kernel.nbytes


def test_calls_that_alternate_stay_with_the_kernel():
    module, _ = packed()
    assert {last(module, rows) for rows in (MANY, 1) * 10} == {"kernel"}


def test_packed_execution_never_keeps_a_dense_weight():
    module, _ = packed(execution="packed")
    paths = [last(module, rows) for rows in [MANY] * (PATIENCE + 2) + [UNPACK_FROM["cpu"]] * 2]
    assert paths == ["kernel"] * (PATIENCE + 2) + ["unpacked"] * 2 and module._dense is None


def test_weights_without_a_kernel_stay_dense():
    module, _ = packed("pruned", "packed")
    assert [last(module, rows) for rows in (1, MANY, UNPACK_FROM["cpu"], 1)] == ["dense"] * 4
    assert module.kind == "dense"


# --- life -----------------------------------------------------------------------------------------------------------


def test_another_dtype_drops_what_was_made():
    module, _ = packed()
    module(activations(1))
    assert module.resident_bytes > 0 and module.kind != "not called"
    blob = module.weight.clone()
    module.to(torch.float16)
    assert module.resident_bytes == 0 and module.kind == "not called" and torch.equal(module.weight, blob)
    module(activations(1, torch.float16))
    assert module.kind == "dense"


def test_a_copy_is_independent():
    module, _ = packed()
    x = activations(3)
    expected = module(x)
    twin = copy.deepcopy(module)
    module.weight.zero_()
    assert torch.equal(twin(x), expected)
    assert twin.weight.data_ptr() != module.weight.data_ptr()


def test_another_blob_makes_another_kernel():
    module, _ = packed()
    before = module(activations(2))
    other, quantized = packed()
    again = encode(QuantizedWeight(
        quantized.codes_RC, quantized.row_scale_RG * 2, *(getattr(quantized, name) for name in (
            "group_scale_G", "zero_RG", "bits_G", "label_C", "keep_RC", "pattern"))
    ))  # fmt: skip
    module.weight, module.bias, other.bias = again, None, None
    assert torch.equal(module(activations(2)), other(activations(2)) * 2)
    assert not torch.equal(module(activations(2)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_state_dict_makes_another_form(dtype):
    module, _ = packed("grouped")
    x = activations(2, dtype)
    before = module(x)
    other, quantized = packed("grouped")
    other.weight = encode(replace(quantized, row_scale_RG=quantized.row_scale_RG * 2))
    for change in (module.load_state_dict, lambda state: module.weight.copy_(state["weight"])):
        module.weight.copy_(packed("grouped")[0].weight)
        assert torch.equal(module(x), before) and module.resident_bytes > 0
        change(other.state_dict())
        assert torch.equal(module(x), other(x)) and not torch.equal(module(x), before)


@pytest.mark.parametrize("execution", ["auto", "packed", "dense", "lean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_after_a_first_call_under_inference_mode(dtype, execution):
    module, quantized = packed(execution=execution)
    x = activations(2, dtype)
    with torch.inference_mode():
        module(x)
    x.requires_grad_()
    module(x).sum().backward()
    ones = torch.ones(2, ROWS, dtype=dtype)
    assert torch.equal(x.grad, ones @ quantized.dequantize(dtype))
    with torch.no_grad():
        assert last(module, 2) == ("kernel" if execution in ("auto", "packed") else dict(lean="unpacked").get(
            execution, "dense"
        ))  # fmt: skip


def test_a_dense_weight_for_one_call_is_told():
    module, _ = packed(execution="lean")
    assert module.kind == "not called" and module.temporary_bytes == 0
    module(activations(1))
    assert module.kind == "unpacked" and module.temporary_bytes == 2 * ROWS * CHANNELS and module.resident_bytes == 0
    module.execution = "auto"
    module(activations(1))
    assert module.kind in ("bytes", "4-bit digits") and module.temporary_bytes == 0


def test_execution_from_the_environment(monkeypatch):
    monkeypatch.setenv("MICO_EXECUTION", "packed")
    assert default_execution() == "packed" and packed()[0].execution == "auto"  # chosen over it
    monkeypatch.setenv("MICO_EXECUTION", "fast")
    with pytest.raises(ValueError, match="MICO_EXECUTION=fast: choose from auto, packed, dense"):
        default_execution()


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_rows_equal_the_dense_table(bits, dtype):
    table = quantize_table(torch.randn(50, 64, generator=torch.Generator().manual_seed(1)), bits)
    blob = encode(table)
    module = PackedEmbedding(50, 64, len(blob), torch.float32)
    module.weight = blob
    ids = torch.tensor([[0, 49, 7], [7, 7, 23]])
    module.to(dtype)
    assert module.dtype == dtype and torch.equal(module(ids), functional.embedding(ids, table.dequantize(dtype)))
    assert torch.equal(module.weight, blob) and module(ids[:0]).shape == (0, 3, 64)


@pytest.mark.parametrize("ids", [[-1], [50], [0, 51], [[3], [-4]]])
def test_embedding_ids_without_a_row(ids):
    blob = encode(quantize_table(torch.randn(50, 64), 8))
    module = PackedEmbedding(50, 64, len(blob), torch.float32)
    module.weight = blob
    with pytest.raises(IndexError, match=r"token ids from .*: 0 to 49 exist"):
        module(torch.tensor(ids))
    with pytest.raises(IndexError):
        functional.embedding(torch.tensor(ids), torch.zeros(50, 64))
