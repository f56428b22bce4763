"""The CPU kernels compute with the weights that `dequantize` states, for every kind of packed weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.packed import cpu
from mico.packed.bits import TERNARY, levels
from mico.packed.cpu import prepare_cpu
from mico.packed.quantized import QuantizedWeight, equal_runs

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, TERNARY)
KINDS = ("factored", "row", "zeros", "shared zeros")
MASKS = (None, "half", "2:4", "rows")
INEXACT = 0.02  # where scales of rows and groups do not separate, the kernel rounds both they and scale * zero


def weight(
    rows: int, channels: int, bits_G: tuple[float, ...], kind: str, mask: str | None = None, permuted: bool = False,
    seed: int = 0,
) -> QuantizedWeight:  # fmt: skip
    """Random codes. 'rows' prunes the first three rows whole."""
    make = torch.Generator().manual_seed(seed)
    label_C = equal_runs(channels, len(bits_G))
    bits_G = bits_G[: int(label_C.max()) + 1]
    groups = len(bits_G)
    if permuted:
        label_C = label_C[torch.randperm(channels, generator=make)]
    counts_G = torch.tensor([levels(bits) for bits in bits_G])
    codes_RC = (torch.rand(rows, channels, generator=make) * counts_G[label_C]).to(torch.uint8)
    keep_RC = None
    if mask == "2:4":
        keep_RC = (torch.rand(rows, channels // 4, 4, generator=make).argsort(-1) < 2).view(rows, channels)
    elif mask is not None:
        keep_RC = torch.rand(rows, channels, generator=make) < 0.5
        if mask == "rows":
            keep_RC[:3] = False
    if keep_RC is not None:
        codes_RC *= keep_RC
    row_RG = (torch.rand(rows, 1 if kind == "factored" else groups, generator=make) / 8 + 0.01).half()
    group_G = (torch.rand(groups, generator=make) + 0.5).half() if kind == "factored" else None
    zero_RG = None
    if kind == "zeros":
        zero_RG = (torch.rand(rows, groups, generator=make) * counts_G).to(torch.uint8)
    elif kind == "shared zeros":
        zero_RG = (counts_G // 2)[None].to(torch.uint8)
    return QuantizedWeight(
        codes_RC, row_RG, group_G, zero_RG, bits_G, label_C, keep_RC, (2, 4) if mask == "2:4" else None
    )


def check(quantized: QuantizedWeight, batch: int = 3, biased: bool = False) -> None:
    """Compare with a product in float64."""
    rows, channels = quantized.codes_RC.shape
    kernel = prepare_cpu(quantized)
    if kernel is None:
        assert max(quantized.bits_G) == 8  # nothing narrower may go without a kernel
        return
    x_BC = (torch.randn(batch, channels, generator=torch.Generator().manual_seed(7)) + 0.5).bfloat16()
    bias_R = torch.randn(rows, generator=torch.Generator().manual_seed(8)) if biased else None
    before_BC = x_BC.clone()
    found_BR = kernel(x_BC, bias_R)
    assert found_BR.dtype == torch.bfloat16 and torch.equal(x_BC, before_BC)
    dense_RC = quantized.dequantize().double()
    product_BR = x_BC.double() @ dense_RC.T
    exact_BR = product_BR + (0 if bias_R is None else bias_R.double())
    separable = quantized.row_scale_RG.shape[1] == 1
    # Activations times factors, the kernel's output and the result are rounded to 8 bits: relative to what is summed.
    summed_BR = (x_BC.double().square() @ dense_RC.square().T).sqrt() + product_BR.abs() + exact_BR.abs()
    room_BR = (0.01 if separable else INEXACT) * (summed_BR + 1e-6)
    if not separable and quantized.zero_RG is not None:  # scale * zero, rounded, times a sum of activations
        room_BR += 2.0**-9 * 8 * float(quantized.row_scale_RG.float().max()) * x_BC.double().abs().sum(1, keepdim=True)
    assert bool(((found_BR.double() - exact_BR).abs() <= room_BR).all())
    if quantized.keep_RC is not None and bias_R is None:
        assert not found_BR[:, ~quantized.keep_RC.any(1)].any()  # exact zeros


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width(bits, kind, mask):
    check(weight(33, 100, (bits,), kind, mask))
    check(weight(16, 64, (bits,) * 2, kind, mask, permuted=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bits_G", [(2, 3, 4, 5, 6, 7, 8), (3, 3, TERNARY), (5, 4), (4,) * 4])
def test_mixed_widths_and_permuted_groups(bits_G, permuted, kind, mask):
    check(weight(48, 256, bits_G, kind, mask, permuted), biased=permuted)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 70), quads=st.integers(1, 40), batch=st.integers(1, 40), kind=st.sampled_from(KINDS),
    bits_G=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=5).map(tuple), mask=st.sampled_from(MASKS),
    permuted=st.booleans(), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_batch(rows, quads, batch, kind, bits_G, mask, permuted, biased, seed):
    check(weight(rows, 4 * quads, bits_G, kind, mask, permuted, seed), batch, biased)


def test_rows_are_packed_in_blocks_as_in_one_piece(monkeypatch):
    quantized = weight(150, 96, (4, 3), "factored", None, True)
    whole = prepare_cpu(quantized)
    monkeypatch.setattr(cpu, "BLOCK", 64)
    parts = prepare_cpu(quantized)
    x_BC = torch.randn(2, 96).bfloat16()
    assert torch.equal(whole(x_BC, None), parts(x_BC, None))


def test_memory_of_the_layouts():
    """Bytes a weight beside the half byte, byte and two bytes that the layouts are about."""
    count = 256 * 1024
    four, eight = weight(256, 1024, (4,), "zeros"), weight(256, 1024, (8,), "zeros")
    mixed, masked = weight(256, 1024, (2, 3, 4, 7), "factored"), weight(256, 1024, (4,), "factored", "half")
    assert prepare_cpu(four).kind == "4-bit digits" and 0.5 <= prepare_cpu(four).nbytes / count < 0.53
    assert prepare_cpu(eight).kind == "bytes" and 1 <= prepare_cpu(eight).nbytes / count < 1.11
    assert prepare_cpu(mixed).kind == "4-bit digits" and 0.625 <= prepare_cpu(mixed).nbytes / count < 0.72
    assert prepare_cpu(masked).kind == "bytes" and prepare_cpu(masked).nbytes / count < 1.02
    assert prepare_cpu(weight(256, 1024, (8,), "factored", "half")) is None  # two bytes a weight gain nothing


def test_without_gathers_where_channels_keep_their_order():
    assert prepare_cpu(weight(64, 256, (4,), "row")).order_K is None
    assert prepare_cpu(weight(64, 256, (2, 3, 4, 1), "factored", permuted=True)).order_K is None
    assert prepare_cpu(weight(64, 256, (4, 4, 7, 6), "factored", "half", permuted=True)).order_K is None


def test_large_means_do_not_cancel_in_bytes():
    """Activations far from zero: what centring a code adds must not be rounded away with them."""
    quantized = weight(64, 512, (8,), "zeros")
    x_BC = (torch.randn(2, 512, generator=torch.Generator().manual_seed(1)) + 30).bfloat16()
    found, exact = prepare_cpu(quantized)(x_BC, None).double(), x_BC.double() @ quantized.dequantize().double().T
    torch.testing.assert_close(found, exact, rtol=2.0**-7, atol=float(exact.abs().max()) * 2.0**-9)


def test_values_of_16_bits_have_no_kernel():
    values_RC = torch.randn(16, 64).bfloat16()
    empty = torch.zeros(0, 1, dtype=torch.float16)
    assert prepare_cpu(QuantizedWeight(values_RC, empty, None, None, (16,), torch.zeros(64, dtype=torch.long))) is None


def test_a_row_whose_scales_are_all_0():
    quantized = weight(32, 64, (4, 4), "zeros")
    quantized.row_scale_RG[3] = 0
    kernel = prepare_cpu(quantized)
    assert kernel is not None
    found_BR = kernel(torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), None)
    assert torch.isfinite(found_BR).all() and (found_BR[:, 3] == 0).all() and (found_BR[:, 4] != 0).all()
