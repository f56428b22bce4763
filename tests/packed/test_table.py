"""Embeddings and heads at 8 and 4 bits: whole rows that can be read alone, close to what a search by hand finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.errors import UserError
from mico.packed import table
from mico.packed.blob import decode, decode_rows, encode
from mico.packed.table import LONGEST_RUN, quantize_table, run_length


def random_table(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize(
    ("channels", "bits", "expected"),
    [(64, 8, 64), (50, 8, 50), (7, 8, 7), (64, 4, 64), (4096, 4, 64), (96, 4, 32), (50, 4, 2), (2, 4, 2)],
)
def test_runs_fill_whole_bytes_and_rows(channels: int, bits: int, expected: int) -> None:
    run = run_length(channels, bits)
    assert run == expected and channels % run == 0 and run * bits % 8 == 0 and (bits == 8 or run <= LONGEST_RUN)


@pytest.mark.parametrize("channels", [1, 7, 51])
def test_rows_that_cannot_be_packed_one_by_one_are_refused(channels: int) -> None:
    with pytest.raises(UserError, match=f"--embed-bits 4: rows of {channels} channels do not fill whole bytes, use 8"):
        quantize_table(random_table(3, channels), 4)


def naive_error(run: np.ndarray, bits: int) -> float:
    """The least squared error of a run on levels +-(k + 1/2) times a scale, of many scales."""
    half = 2 ** (bits - 1)
    scales = np.abs(run).max() / half * np.linspace(0.3, 1.3, 400)
    codes = np.clip(np.floor(run[None] / scales[:, None]), -half, half - 1) + 0.5
    return float((((codes * scales[:, None]) - run[None]) ** 2).sum(1).min())


@pytest.mark.parametrize("bits", [8, 4])
def test_every_run_is_about_as_close_as_any_scale_brings_it(bits: int) -> None:
    weight_RC = random_table(12, 96)
    made = quantize_table(weight_RC, bits)
    run = run_length(96, bits)
    assert made.zero_RG is None and made.keep_RC is None and made.group_scale_G is None
    assert made.bits_G == (bits,) * (96 // run) and made.row_scale_RG.shape == (12, 96 // run)
    errors_N = ((made.dequantize() - weight_RC) ** 2).view(-1, run).sum(1).numpy()
    best_N = np.array([naive_error(part, bits) for part in weight_RC.view(-1, run).double().numpy()])
    assert (errors_N <= best_N * 1.2).all() and errors_N.sum() <= best_N.sum() * 1.05


@settings(max_examples=25)
@given(rows=st.integers(1, 9), channels=st.integers(1, 40), bits=st.sampled_from([4, 8]), seed=st.integers(0, 999))
def test_rows_are_read_alone_as_in_the_whole(rows: int, channels: int, bits: int, seed: int) -> None:
    channels *= 2 if bits == 4 else 1
    made = quantize_table(random_table(rows, channels, seed), bits)
    blob = encode(made)
    assert torch.equal(decode(blob).dequantize(), made.dequantize())
    ids_N = torch.randint(0, rows, (5,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decode_rows(blob, ids_N).dequantize(), made.dequantize()[ids_N])
    told = sum(made.stored_bits().values())
    assert told == rows * channels * bits + 16 * made.row_scale_RG.numel() and len(blob) == 20 + told // 8


def test_parts_searched_apart_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_RC = random_table(20, 32)
    whole = quantize_table(weight_RC, 4)
    monkeypatch.setattr(table, "ROWS_AT_ONCE", 100)
    parts = quantize_table(weight_RC, 4)
    assert torch.equal(parts.codes_RC, whole.codes_RC) and torch.equal(parts.row_scale_RG, whole.row_scale_RG)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_single_large_values(bits: int) -> None:
    weight_RC = torch.zeros(3, 16)
    weight_RC[1, 5], weight_RC[2] = 1000.0, 1e-7
    found = quantize_table(weight_RC, bits).dequantize()
    assert torch.isfinite(found).all() and found[0].abs().max() < 1e-6
    assert math.isclose(float(found[1, 5]), 1000.0, rel_tol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_sixteen_bits_are_fitted_in_full_precision(dtype: torch.dtype) -> None:
    weight_RC = random_table(6, 32).to(dtype)
    assert torch.equal(quantize_table(weight_RC, 4).codes_RC, quantize_table(weight_RC.float(), 4).codes_RC)
