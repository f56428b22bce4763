"""Meters against naive float64 numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.channels.meters import DOUBLE_LIMIT, PairedMoments, Reservoir, SecondMoments, accumulator
from mico.errors import UserError


def rows(count: int, channels: int, seed: int = 0, mean: float = 0.7) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, channels)) @ rng.standard_normal((channels, channels))
    return torch.from_numpy(mixed + mean).float()


def gathered(batches: list[torch.Tensor]) -> SecondMoments:
    moments = SecondMoments.empty(batches[0].shape[1])
    for batch_TC in batches:
        moments.add(batch_TC)
    return moments


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_second_moments_agree_with_naive_sums():
    x_TC = rows(500, 9)
    naive = x_TC.double().numpy()
    moments = gathered(list(x_TC.split(64)))
    assert moments.count == 500 and moments.gram_CC.dtype == torch.float64
    close(moments.mean_C, naive.mean(0), 1e-6)
    close(moments.gram_CC, np.sum([np.outer(x, x) for x in naive], axis=0))
    close(moments.hessian_CC, np.sum([2 / 500 * np.outer(x, x) for x in naive], axis=0))
    close(moments.covariance_CC, np.cov(naive.T, bias=True))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.integers(0, 100))
def test_the_split_into_batches_does_not_matter(cuts, seed):
    x_TC = rows(200, 5, seed)
    bounds = [0, *sorted(cuts), 200]
    split = gathered([x_TC[a:b] for a, b in itertools.pairwise(bounds)])  # empty batches included
    whole = gathered([x_TC])
    assert split.count == whole.count
    torch.testing.assert_close(split.gram_CC, whole.gram_CC, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(split.sum_C, whole.sum_C, rtol=1e-5, atol=1e-3)


def test_many_batches_lose_no_precision():
    batch_TC = rows(10, 4)
    moments = gathered([batch_TC] * 5000)
    once = gathered([batch_TC])
    torch.testing.assert_close(moments.gram_CC, once.gram_CC * 5000, rtol=1e-12, atol=0)


def test_half_precision_activations_are_summed_in_single():
    x_TC = rows(3000, 3, mean=20).to(torch.bfloat16)
    close(gathered([x_TC]).gram_CC, x_TC.double().numpy().T @ x_TC.double().numpy())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_refused(bad):
    x_TC = rows(20, 3)
    x_TC[7, 1] = bad
    with pytest.raises(UserError, match=r"NaN or Inf.*--dtype float32") as raised:
        gathered([x_TC])
    assert "\n" not in str(raised.value)


def test_a_refused_batch_leaves_the_moments_as_they_were():
    moments = gathered([rows(20, 3)])
    before = moments.gram_CC.clone(), moments.sum_C.clone(), moments.count
    with pytest.raises(UserError):
        moments.add(torch.full((2, 3), torch.nan))
    assert torch.equal(moments.gram_CC, before[0]) and torch.equal(moments.sum_C, before[1])
    assert moments.count == before[2]


def test_wide_streams_accumulate_in_single_precision():
    assert accumulator(4).dtype == torch.float64
    assert accumulator(DOUBLE_LIMIT + 1, device="meta").dtype == torch.float32


def test_paired_moments_agree_with_naive_sums_and_hold_out_every_fourth_batch():
    dense_TC, x_TC = rows(90, 6, seed=1), rows(90, 6, seed=2)
    paired = PairedMoments(6)
    for x, dense in zip(x_TC.split(9), dense_TC.split(9), strict=True):
        paired.add(x, dense)
    held_T = np.arange(90) // 9 % 4 == 3
    x, dense = x_TC.double().numpy(), dense_TC.double().numpy()
    assert (paired.fit.count, paired.held.count, paired.total.count) == (72, 18, 90)
    for moments, cross_CC, mask in (
        (paired.fit, paired.fit_cross_CC, ~held_T),
        (paired.held, paired.held_cross_CC, held_T),
        (paired.total, paired.cross_CC, np.full(90, True)),
    ):
        close(moments.gram_CC, x[mask].T @ x[mask])
        close(moments.mean_C, x[mask].mean(0))
        close(cross_CC, np.sum([np.outer(d, c) for d, c in zip(dense[mask], x[mask], strict=True)], axis=0))
    close(paired.dense_mean_C, dense.mean(0))


def test_paired_moments_of_equal_paths_are_plain_moments():
    x_TC = rows(60, 4)
    paired = PairedMoments(4)
    for batch_TC in x_TC.split(20):
        paired.add(batch_TC, batch_TC)
    torch.testing.assert_close(paired.cross_CC, paired.total.gram_CC)
    torch.testing.assert_close(paired.total.gram_CC, gathered([x_TC]).gram_CC, rtol=1e-5, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), limit=st.integers(1, 40))
def test_the_reservoir_is_bounded_and_evenly_thinned_however_rows_arrive(sizes, limit):
    total = sum(sizes)
    row_TC = torch.arange(total).float()[:, None].repeat(1, 2)
    reservoir = Reservoir(2, rows=limit)
    for batch_TC in row_TC.split(sizes):
        reservoir.add(batch_TC)
        assert len(reservoir.rows_TC) <= limit
    stride = reservoir.stride
    assert reservoir.rows_TC[:, 0].tolist() == list(range(0, total, stride))
    assert stride == 1 or total > limit * stride // 2  # no thinner than it has to be
    assert reservoir.seen == total and reservoir.rows_TC.dtype == torch.float16


def test_the_reservoir_touches_no_random_state():
    before = torch.get_rng_state().clone()
    Reservoir(3, rows=8).add(rows(100, 3))
    assert torch.equal(torch.get_rng_state(), before)
