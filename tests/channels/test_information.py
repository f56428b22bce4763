"""The four MI estimators against the Gaussian closed form and against naive implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma
from scipy.stats import multivariate_normal, norm

from mico.channels.information import (
    ESTIMATORS,
    MAX_CORRELATION,
    copula_mi,
    equal_frequency_codes,
    gaussian_mi,
    histogram_mi,
    knn_mi,
    ksg,
    mutual_information,
)
from mico.channels.meters import SecondMoments
from mico.errors import UserError
from mico.settings import MI_METHODS


def gaussian_rows(covariance: np.ndarray, count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.multivariate_normal(np.zeros(len(covariance)), covariance, count))


def pair_rows(rho: float, count: int, seed: int = 0) -> torch.Tensor:
    return gaussian_rows(np.array([[1, rho], [rho, 1]]), count, seed)


def closed_form(rho: float) -> float:
    return -0.5 * math.log(1 - rho * rho)


def correlated_covariance(channels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((channels, channels))
    return factor @ factor.T + 0.5 * np.diag(rng.uniform(0.1, 4, channels))


def moments_of(rows_TC: torch.Tensor) -> SecondMoments:
    moments = SecondMoments.empty(rows_TC.shape[1])
    moments.add(rows_TC)
    return moments


# --- gaussian


def test_gaussian_mi_is_the_closed_form_pair_by_pair():
    covariance = correlated_covariance(7)
    mi_CC = gaussian_mi(torch.from_numpy(covariance), count=10**9)
    assert mi_CC.dtype == torch.float64
    for x in range(7):
        for y in range(7):
            determinant = covariance[x, x] * covariance[y, y] - covariance[x, y] ** 2
            expected = 0.5 * math.log(covariance[x, x] * covariance[y, y] / determinant) if x != y else 0.0
            assert float(mi_CC[x, y]) == pytest.approx(expected, rel=1e-9)


def test_gaussian_mi_of_sampled_moments_approaches_the_closed_form():
    rows_TC = pair_rows(0.7, 200_000) * 3 + torch.tensor([5.0, -2.0])
    assert float(mutual_information("gaussian", moments_of(rows_TC))[0, 1]) == pytest.approx(closed_form(0.7), rel=0.02)


def test_noise_is_dropped_at_the_chi_square_quantile():
    mi_CC = gaussian_mi(torch.from_numpy(np.cov(np.random.default_rng(0).standard_normal((200, 2000)))), 2000)
    passed = float((mi_CC > 0).double().sum() / (200 * 199))
    assert 0.005 < passed < 0.016  # one pair of a hundred by design
    assert float(mi_CC[mi_CC > 0].min()) > 6.634 / (2 * 2000)


def test_a_weak_correlation_survives_only_with_enough_rows():
    covariance = torch.tensor([[1.0, 0.05], [0.05, 1.0]], dtype=torch.float64)
    assert float(gaussian_mi(covariance, 1_000)[0, 1]) == 0
    assert float(gaussian_mi(covariance, 10_000)[0, 1]) == pytest.approx(closed_form(0.05))


def test_dead_and_equal_channels():
    base = np.random.default_rng(0).standard_normal(500)
    covariance = np.cov(np.stack([base, 2 * base, np.zeros(500), np.random.default_rng(1).standard_normal(500)]))
    mi_CC = gaussian_mi(torch.from_numpy(covariance), 500)
    assert float(mi_CC[0, 1]) == pytest.approx(-0.5 * math.log1p(-(MAX_CORRELATION**2)))
    assert not mi_CC[2].any() and not mi_CC[:, 2].any() and not mi_CC.diagonal().any()
    assert torch.isfinite(mi_CC).all() and torch.equal(mi_CC, mi_CC.T)


def test_constant_channels_far_from_zero_count_as_dead():
    """Their variance is float32 rounding of the second moment, often positive, and correlates by accident."""
    constants = torch.linspace(1, 300, 40, dtype=torch.float64).expand(4000, 40)
    rows_TC = torch.cat([pair_rows(0.5, 4000), constants], dim=1)
    moments = SecondMoments.empty(42)
    for batch_TC in rows_TC.split(300):
        moments.add(batch_TC)
    mi_CC = mutual_information("gaussian", moments)
    assert not mi_CC[2:].any() and mi_CC[0, 1] > 0


def test_half_log_h_u_squared_is_the_information_shared_with_later_columns():
    """1/2 log(H_ii U_ii^2) = I(x_i; x_later) = -1/2 log(1 - R^2) of regressing x_i on the later columns."""
    covariance = correlated_covariance(24, seed=3)
    hessian_CC = torch.from_numpy(2 * covariance)
    upper_CC = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC)), upper=True)
    information_C = 0.5 * torch.log(hessian_CC.diagonal() * upper_CC.diagonal() ** 2)
    for i in range(24):
        later = slice(i + 1, None)
        explained = covariance[i, later] @ np.linalg.solve(covariance[later, later], covariance[later, i])
        r_squared = explained / covariance[i, i]
        assert float(information_C[i]) == pytest.approx(-0.5 * math.log1p(-r_squared), rel=1e-8, abs=1e-12)
    correlation = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    total_correlation = -0.5 * np.linalg.slogdet(correlation)[1]
    assert float(information_C.sum()) == pytest.approx(total_correlation, rel=1e-9)
    # With one later column the information is the pair's MI.
    mi_CC = gaussian_mi(hessian_CC, 10**9)
    assert float(information_C[-2]) == pytest.approx(float(mi_CC[-2, -1]), rel=1e-9)


# --- copula


def test_copula_is_unchanged_by_monotone_maps_and_agrees_with_gaussian_on_gaussian_rows():
    rows_TC = gaussian_rows(correlated_covariance(6), 20_000).float()
    bent_TC = rows_TC.clone()
    bent_TC[:, 0] = rows_TC[:, 0].exp()
    bent_TC[:, 1] = rows_TC[:, 1] ** 3
    bent_TC[:, 2] = -5 * rows_TC[:, 2]
    torch.testing.assert_close(copula_mi(bent_TC), copula_mi(rows_TC), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(copula_mi(rows_TC), gaussian_mi(torch.cov(rows_TC.T), 20_000), rtol=0.1, atol=2e-3)


def test_copula_withstands_the_outliers_that_blind_the_gaussian_estimate():
    rows_TC = pair_rows(0.8, 5000)
    rows_TC[::1000, 0] = 1e3
    gaussian = float(mutual_information("gaussian", moments_of(rows_TC))[0, 1])
    assert float(copula_mi(rows_TC)[0, 1]) == pytest.approx(closed_form(0.8), rel=0.1)
    assert gaussian < 0.1 * closed_form(0.8)


@pytest.mark.parametrize("lowest", [-torch.inf, 0.0, 0.7])  # as after a ReLU: ties, whose scores are not centred
def test_copula_agrees_with_a_naive_rank_transform(lowest):
    rows_TC = gaussian_rows(np.full((3, 3), 0.6) + 0.4 * np.eye(3), 400).clamp(min=lowest)

    def score(column: list[float], value: float) -> float:
        below, equal = sum(v < value for v in column), sum(v == value for v in column)
        return float(norm.ppf((below + (equal + 1) / 2) / 401))

    rho = np.corrcoef([[score(column, value) for value in column] for column in rows_TC.T.tolist()])
    expected = -0.5 * np.log1p(-(rho**2 - np.eye(3) * rho**2))
    np.testing.assert_allclose(copula_mi(rows_TC).numpy(), expected, rtol=1e-4, atol=1e-6)


# --- histogram


def naive_histogram(x: list[float], y: list[float], bins: int) -> float:
    count = len(x)

    def codes(values: list[float]) -> list[int]:
        order = sorted(range(count), key=values.__getitem__)
        code = [0] * count
        for rank, position in enumerate(order):
            code[position] = rank * bins // count
        return code

    joint = np.zeros((bins, bins))
    for a, b in zip(codes(x), codes(y), strict=True):
        joint[a, b] += 1 / count
    value = 0.0
    for a in range(bins):
        for b in range(bins):
            if joint[a, b] > 0:
                value += joint[a, b] * math.log(joint[a, b] / (joint[a].sum() * joint[:, b].sum()))
    return value - (bins - 1) ** 2 / (2 * count)


def test_histogram_agrees_with_a_naive_double_loop():
    covariance = np.full((5, 5), 0.6) + 0.4 * np.eye(5)
    rows_TC = gaussian_rows(covariance, 640).float()
    mi_CC = histogram_mi(rows_TC, bins=8)
    for x in range(5):
        for y in range(x):
            expected = naive_histogram(rows_TC[:, x].tolist(), rows_TC[:, y].tolist(), 8)
            assert float(mi_CC[x, y]) == pytest.approx(expected, abs=1e-5)


def binned_gaussian_mi(rho: float, bins: int) -> float:
    """The exact MI of two correlated normals cut at their quantiles: where the histogram must converge to."""
    edges = norm.ppf(np.linspace(0, 1, bins + 1)).clip(-9, 9)
    joint_cdf = multivariate_normal(cov=[[1, rho], [rho, 1]]).cdf(np.stack(np.meshgrid(edges, edges), -1))
    cell = np.diff(np.diff(joint_cdf, axis=0), axis=1).clip(1e-300)
    return float((cell * np.log(cell * bins**2)).sum())


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_histogram_converges_in_rows_to_the_binned_and_in_bins_to_the_true_information(rho):
    rows_TC = pair_rows(rho, 200_000)
    found = [float(histogram_mi(rows_TC, bins)[0, 1]) for bins in (4, 8, 16, 32)]
    for value, bins in zip(found, (4, 8, 16, 32), strict=True):
        assert value == pytest.approx(binned_gaussian_mi(rho, bins), abs=4e-3)
    assert found == sorted(found)
    assert 0.9 * closed_form(rho) < found[2] < closed_form(rho)  # the default keeps 93 to 96 % of it here
    assert found[3] == pytest.approx(closed_form(rho), rel=0.05)


def test_histogram_bias_correction_centres_independent_channels_on_zero():
    rows_TC = torch.from_numpy(np.random.default_rng(0).standard_normal((1000, 100)))
    mi_CC = histogram_mi(rows_TC, bins=8)  # without the correction every pair would show 0.0245 nats
    assert float((mi_CC > 0).double().mean()) < 0.03 and float(mi_CC.mean()) < 1e-3


def test_histogram_sees_dependence_without_correlation():
    x = np.random.default_rng(0).standard_normal(4000)
    rows_TC = torch.from_numpy(np.stack([x, x**2], 1))
    assert float(histogram_mi(rows_TC)[0, 1]) > 1.5
    assert float(mutual_information("gaussian", moments_of(rows_TC))[0, 1]) < 0.05


def test_histogram_blocks_do_not_change_the_result(monkeypatch):
    rows_TC = gaussian_rows(correlated_covariance(11), 400)
    whole_CC = histogram_mi(rows_TC, 8)
    monkeypatch.setattr("mico.channels.information.BLOCK_CHANNELS", 4)
    torch.testing.assert_close(histogram_mi(rows_TC, 8), whole_CC)
    assert torch.equal(whole_CC, whole_CC.T)


def test_repeated_values_share_a_bin_and_dead_channels_share_nothing():
    relu_TC = pair_rows(0.8, 2000).clamp(min=0)
    codes_TC = equal_frequency_codes(relu_TC, 16)
    assert len(codes_TC[relu_TC[:, 0] == 0, 0].unique()) == 1 and int(codes_TC.max()) == 15
    mi_CC = histogram_mi(torch.cat([relu_TC, torch.ones(2000, 1, dtype=torch.float64)], 1))
    assert float(mi_CC[0, 1]) > 0.15 and not mi_CC[2].any()


# --- knn


def naive_ksg(x: np.ndarray, y: np.ndarray, k: int) -> float:
    total = 0.0
    for i in range(len(x)):
        dx, dy = abs(x - x[i]), abs(y - y[i])
        radius = sorted(np.maximum(dx, dy))[k]  # position 0 is the row itself
        total += digamma((dx < radius).sum()) + digamma((dy < radius).sum())  # these counts include the row: n + 1
    return digamma(k) + digamma(len(x)) - total / len(x)


def test_knn_agrees_with_a_naive_double_loop():
    rows_TC = gaussian_rows(np.array([[1, 0.9, 0.6], [0.9, 1, 0.7], [0.6, 0.7, 1]]), 300)
    scores = np.stack([norm.ppf((column.argsort().argsort() + 1) / 301) for column in rows_TC.numpy().T])
    mi_CC = knn_mi(rows_TC, k=4)
    for x, y in ((0, 1), (0, 2), (1, 2)):
        assert float(mi_CC[x, y]) == pytest.approx(naive_ksg(scores[x], scores[y], 4), abs=2e-3)
    assert torch.equal(mi_CC, mi_CC.T) and not mi_CC.diagonal().any()


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.98])
def test_knn_converges_to_the_closed_form(rho):
    errors = []
    for rows in (128, 2048):
        pairs = [pair_rows(rho, rows, seed).numpy().T for seed in range(5)]
        errors.append(np.mean([abs(ksg(x, y, 3) - closed_form(rho)) for x, y in pairs]))
    assert errors[1] < 0.035
    assert errors[1] < errors[0]


def test_knn_drops_what_shuffled_rows_reach():
    rows_TC = torch.from_numpy(np.random.default_rng(0).standard_normal((400, 20)))
    rows_TC[:, 1] = rows_TC[:, 0] + 0.5 * rows_TC[:, 1]
    mi_CC = knn_mi(rows_TC)
    assert float(mi_CC[0, 1]) == pytest.approx(closed_form(1 / math.sqrt(1.25)), abs=0.15)
    assert float((mi_CC > 0).double().sum()) <= 2 + 2 * 8  # of 190 pairs one is related; 2 more are expected by chance


def test_knn_copes_with_ties_dead_channels_and_infinities():
    rows_TC = torch.cat([pair_rows(0.9, 500).clamp(min=0), torch.zeros(500, 1, dtype=torch.float64)], 1).half()
    rows_TC[0, 0] = torch.inf
    mi_CC = knn_mi(rows_TC)
    assert torch.isfinite(mi_CC).all() and not mi_CC[2].any() and mi_CC[0, 1] > 0.2


def test_knn_refuses_wide_streams_in_one_line():
    with pytest.raises(UserError, match=r"^--mi-method knn: 1025 channels exceed 1024: use gaussian or copula$"):
        knn_mi(torch.zeros(100, 1025))


# --- all of them


@pytest.mark.parametrize("method", MI_METHODS)
def test_every_method_ranks_pairs_as_the_closed_form_does(method):
    covariance = np.array([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]])
    rows_TC = gaussian_rows(covariance, 3000)
    mi_CC = mutual_information(method, moments_of(rows_TC), rows_TC.half())
    assert mi_CC.shape == (4, 4) and torch.equal(mi_CC, mi_CC.T) and float(mi_CC.min()) >= 0
    assert float(mi_CC[0, 1]) == pytest.approx(closed_form(0.9), rel=0.1)
    assert float(mi_CC[2, 3]) == pytest.approx(closed_form(0.5), rel=0.25)
    assert float(mi_CC[:2, 2:].max()) < 0.08  # knn at 2048 rows: standard deviation 0.02, the others less
    assert torch.equal(mi_CC, mutual_information(method, moments_of(rows_TC), rows_TC.half()))


def test_dispatch_names_what_is_wrong():
    assert tuple(ESTIMATORS) == MI_METHODS
    moments = moments_of(pair_rows(0.5, 100))
    with pytest.raises(UserError, match="--mi-method nearest: choose from gaussian, copula, histogram, knn"):
        mutual_information("nearest", moments)
    with pytest.raises(UserError, match="--mi-method copula: needs at least 64 sampled rows, got 0"):
        mutual_information("copula", moments)
    with pytest.raises(UserError, match="--mi-method histogram: needs at least 64 sampled rows, got 10"):
        mutual_information("histogram", moments, torch.zeros(10, 2))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), channels=st.integers(1, 6), method=st.sampled_from(MI_METHODS[:3]))
def test_scaling_and_shifting_a_channel_changes_nothing(seed, channels, method):
    rng = np.random.default_rng(seed)
    rows_TC = gaussian_rows(correlated_covariance(channels, seed), 128, seed).float()
    moved_TC = rows_TC * torch.from_numpy(rng.uniform(0.5, 2, channels)).float()
    before_CC = mutual_information(method, moments_of(rows_TC), rows_TC)
    after_CC = mutual_information(method, moments_of(moved_TC), moved_TC)
    kept_CC = (before_CC > 0) & (after_CC > 0)  # a value at the very noise floor may fall on either side
    torch.testing.assert_close(after_CC[kept_CC], before_CC[kept_CC], rtol=2e-3, atol=1e-4)
    assert float(torch.maximum(before_CC, after_CC)[~kept_CC].max()) <= 0.05
