"""Mutual information between the channels of one stream, in nats. Suffixes: C channels, T rows, P pairs.

Four estimators of the same quantity:

- gaussian: closed form from the second moments, one pass over the data, no rows kept. The default.
- copula: the same after every channel is mapped to normal scores by its ranks, so that monotone distortions and
  outliers do not matter.
- histogram: plug-in estimate on equal-frequency bins. It sees dependence of any shape, but B bins keep only part of
  it: 95 % at 16 bins and 98 % at 32 when |rho| <= 0.5, 86 % at 16 when rho = 0.99 (more rows do not help there).
- knn: Kraskov-Stögbauer-Grassberger; no bins and no model, the referee of the others, slow.

Every result is symmetric with a zero diagonal, and zero where a channel is dead. Values that
independent channels would reach by chance in more than one pair of a hundred are dropped to zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma, ndtri
from scipy.stats import chi2, rankdata

from mico.channels.meters import DOUBLE_LIMIT, SecondMoments
from mico.errors import UserError
from mico.settings import MI_METHODS, choose

MAX_CORRELATION = 1 - 1e-6  # equal channels share at most 6.56 nats, so that one pair cannot outweigh all the others
NOISE_QUANTILE = 0.99
FLOAT32_VARIANCE = 1e-5  # a variance below this share of the second moment is cancellation in a float32 Gram matrix
MIN_ROWS = 64
BLOCK_CHANNELS = 64  # of histograms and ranks: bounds the memory besides codes and result to some 100 MB
KNN_CHANNELS = 1024
KNN_ROWS, KNN_FEWEST_ROWS, KNN_PAIR_ROWS = 2048, 256, 30_000_000
KNN_NULL_PAIRS = 100


Estimator = Callable[[SecondMoments, "torch.Tensor | None"], torch.Tensor]


def gaussian_mi(covariance_CC: torch.Tensor, count: int) -> torch.Tensor:
    """MI of jointly Gaussian channels: I = -1/2 log1p(-rho^2) (Cover & Thomas, Elements of Information Theory, 8.5).

    Args:
        covariance_CC: centred second moments; a channel with variance <= 0 is dead.
        count: how many rows they average. Under independence 2·count·I follows chi-square with one degree of freedom;
            values below its 99 % quantile are dropped to 0.

    Returns:
        mi_CC in nats, float64 (float32 above 8192 channels).
    """
    assert count > 0, count
    dtype = torch.float64 if len(covariance_CC) <= DOUBLE_LIMIT else torch.float32
    covariance_CC = covariance_CC.to(dtype)
    variance_C = covariance_CC.diagonal()
    scale_C = torch.where(variance_C > 0, variance_C, torch.inf).rsqrt()
    rho_CC = covariance_CC * scale_C[:, None]
    rho_CC *= scale_C
    rho_CC = (rho_CC + rho_CC.T).mul_(0.5).clamp_(-MAX_CORRELATION, MAX_CORRELATION)
    mi_CC = rho_CC.square_().neg_().log1p_().mul_(-0.5)
    mi_CC.fill_diagonal_(0)
    return torch.threshold_(mi_CC, chi2.ppf(NOISE_QUANTILE, 1) / (2 * count), 0.0)


def normal_scores(rows_TC: torch.Tensor) -> torch.Tensor:
    """Every channel mapped to standard normal by its ranks, Phi^-1(rank / (T + 1)); ties share their mean rank."""
    scores_TC = torch.empty(rows_TC.shape, dtype=torch.float32)
    for start in range(0, rows_TC.shape[1], BLOCK_CHANNELS):
        rank_TC = rankdata(rows_TC[:, start : start + BLOCK_CHANNELS].float().cpu().numpy(), axis=0)
        scores_TC[:, start : start + BLOCK_CHANNELS] = torch.from_numpy(ndtri(rank_TC / (len(rows_TC) + 1)))
    return scores_TC.to(rows_TC.device)


def copula_mi(rows_TC: torch.Tensor) -> torch.Tensor:
    """Gaussian-copula MI in nats: `gaussian_mi` of the normal scores; unchanged by monotone maps of a channel.

    A lower bound on the true MI when the copula is not Gaussian (Ince et al. 2017, Human Brain Mapping 38).
    """
    scores_TC = normal_scores(rows_TC)
    scores_TC -= scores_TC.mean(0)
    return gaussian_mi(scores_TC.T @ scores_TC / len(scores_TC), len(scores_TC))


def equal_frequency_codes(rows_TC: torch.Tensor, bins: int) -> torch.Tensor:
    """The bin (int64, 0..bins-1) of every value, bins holding equally many rows; equal values share one bin."""
    codes_TC = torch.empty(rows_TC.shape, dtype=torch.int64)
    for start in range(0, rows_TC.shape[1], BLOCK_CHANNELS):
        rank_TC = rankdata(rows_TC[:, start : start + BLOCK_CHANNELS].float().cpu().numpy(), axis=0)
        codes_TC[:, start : start + BLOCK_CHANNELS] = torch.from_numpy((rank_TC - 0.5) * bins / len(rows_TC)).long()
    return codes_TC.to(rows_TC.device)


def histogram_mi(rows_TC: torch.Tensor, bins: int = 16) -> torch.Tensor:
    """Plug-in MI on equal-frequency bins, less its bias (Bx-1)(By-1)/(2T), in nats (Panzeri & Treves 1996).

    Bx is the number of bins channel x fills: `bins`, or fewer where values repeat. Values that independent channels
    reach by chance (the G-test at 99 %) are dropped to 0. Joint counts are GEMMs of one-hot codes, a block of channels
    against a block of channels, so memory stays bounded at any C. As T grows the result converges to the MI of the
    binned channels, and that to the MI itself as the bins grow finer; for a given T more bins mean more variance.
    """
    codes_TC = equal_frequency_codes(rows_TC, bins)
    count, channels = codes_TC.shape
    starts = range(0, channels, BLOCK_CHANNELS)
    entropy_C, filled_C = _marginals(codes_TC, bins)
    mi_CC = torch.zeros(channels, channels, dtype=torch.float64 if channels <= DOUBLE_LIMIT else torch.float32)
    mi_CC = mi_CC.to(codes_TC.device)
    for left in starts:
        left_hot = _one_hot(codes_TC[:, left : left + BLOCK_CHANNELS], bins)
        rows = slice(left, left + BLOCK_CHANNELS)
        for right in starts[left // BLOCK_CHANNELS :]:
            columns = slice(right, right + BLOCK_CHANNELS)
            right_hot = left_hot if right == left else _one_hot(codes_TC[:, columns], bins)
            joint = _joint_entropy(left_hot.T @ right_hot, bins, count)
            block = _debias(
                entropy_C[rows, None] + entropy_C[columns] - joint, filled_C[rows], filled_C[columns], count
            )
            mi_CC[rows, columns] = block.to(mi_CC.dtype)
            mi_CC[columns, rows] = block.T.to(mi_CC.dtype)
    return mi_CC.fill_diagonal_(0)


def _marginals(codes_TC: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy (nats) and number of filled bins of every channel."""
    counts_BC = torch.stack([(codes_TC == code).sum(0) for code in range(bins)]).double()
    share_BC = counts_BC / len(codes_TC)
    return -torch.special.xlogy(share_BC, share_BC).sum(0), (counts_BC > 0).sum(0)


def _one_hot(codes_TC: torch.Tensor, bins: int) -> torch.Tensor:
    """(T, channels·bins) float32; counts of up to 2^24 rows are exact in it."""
    return torch.nn.functional.one_hot(codes_TC, bins).flatten(1).float()


def _joint_entropy(joint: torch.Tensor, bins: int, count: int) -> torch.Tensor:
    """Entropy (nats) of every channel pair from the (left·bins, right·bins) joint counts."""
    share = joint.div_(count).unflatten(1, (-1, bins)).unflatten(0, (-1, bins))
    return -(share * share.clamp(min=1 / (2 * count)).log_()).sum((1, 3), dtype=torch.float64)


def _debias(mi: torch.Tensor, filled_left: torch.Tensor, filled_right: torch.Tensor, count: int) -> torch.Tensor:
    """Subtract the expectation under independence, and drop what is not significant."""
    freedom = (filled_left - 1)[:, None] * (filled_right - 1)
    unique, index = freedom.unique(return_inverse=True)
    floor = chi2.ppf(NOISE_QUANTILE, np.maximum(unique.cpu().numpy(), 1)) / (2 * count)
    noise = mi <= torch.from_numpy(floor).to(mi)[index]
    return (mi - freedom / (2 * count)).clamp_(min=0).masked_fill_(noise, 0)


def knn_mi(rows_TC: torch.Tensor, k: int = 3, seed: int = 0) -> torch.Tensor:
    """MI of every pair by estimator 1 of Kraskov, Stögbauer & Grassberger 2004 (Phys. Rev. E 69), in nats.

    Channels are mapped to normal scores first, which leaves MI as it is and makes one scale fit all. Rows are thinned
    evenly to 2048, or fewer so that pairs times rows stays near 3·10^7, but no fewer than 256: about 5 minutes on one
    core at 1024 channels. Values that shuffled rows reach too are dropped to 0. Raises UserError above 1024 channels.
    """
    channels = rows_TC.shape[1]
    if channels > KNN_CHANNELS:
        raise UserError(f"--mi-method knn: {channels} channels exceed {KNN_CHANNELS}: use gaussian or copula")
    affordable = KNN_PAIR_ROWS // max(1, channels * (channels - 1) // 2)
    rows = min(len(rows_TC), KNN_ROWS, max(KNN_FEWEST_ROWS, affordable))
    rows_TC = rows_TC[torch.linspace(0, len(rows_TC) - 1, rows, dtype=torch.float64).long()]
    scores_CT = normal_scores(rows_TC).double().cpu().numpy().T
    alive = np.flatnonzero(np.ptp(scores_CT, axis=1) > 0)
    # Repeated values have no nearest neighbour; noise far below the spacing of the ranks tells them apart.
    scores_CT = scores_CT + 1e-6 * np.random.default_rng(seed).standard_normal(scores_CT.shape)
    sorted_CT = np.sort(scores_CT, axis=1)
    floor = _knn_noise(scores_CT[alive], k, seed)
    mi_CC = torch.zeros(channels, channels, dtype=torch.float64)
    for position, x in enumerate(alive):
        for y in alive[position + 1 :]:
            value = ksg(scores_CT[x], scores_CT[y], k, sorted_CT[x], sorted_CT[y])
            mi_CC[x, y] = mi_CC[y, x] = value if value > floor else 0.0
    return mi_CC.to(rows_TC.device)


def _knn_noise(scores_CT: np.ndarray, k: int, seed: int) -> float:
    """The 99 % quantile over random pairs whose rows are shuffled against each other; at least 0."""
    rng = np.random.default_rng(seed)
    pairs_P2 = rng.integers(len(scores_CT), size=(KNN_NULL_PAIRS, 2)) if len(scores_CT) else ()
    null_P = [ksg(scores_CT[x], rng.permutation(scores_CT[y]), k) for x, y in pairs_P2]
    return max(0.0, float(np.quantile(null_P, NOISE_QUANTILE))) if null_P else 0.0


def ksg(
    x_T: np.ndarray, y_T: np.ndarray, k: int, sorted_x_T: np.ndarray | None = None, sorted_y_T: np.ndarray | None = None
) -> float:
    """psi(k) + psi(T) - <psi(n_x + 1) + psi(n_y + 1)>; n counts rows strictly nearer than the k-th joint neighbour.

    Distances are max-norm; may be slightly negative. The sorted columns are made here unless given.
    """
    points_T2 = np.column_stack([x_T, y_T])
    tree = cKDTree(points_T2, balanced_tree=False, compact_nodes=False)
    # The shrunk radius leaves out the k-th neighbour itself in spite of rounding in x ± radius.
    radius_T = tree.query(points_T2, k=k + 1, p=np.inf)[0][:, -1] * (1 - 1e-9)
    near_x_T = _within(x_T, np.sort(x_T) if sorted_x_T is None else sorted_x_T, radius_T)
    near_y_T = _within(y_T, np.sort(y_T) if sorted_y_T is None else sorted_y_T, radius_T)
    return float(digamma(k) + digamma(len(x_T)) - (digamma(near_x_T) + digamma(near_y_T)).mean())


def _within(x_T: np.ndarray, sorted_T: np.ndarray, radius_T: np.ndarray) -> np.ndarray:
    """How many rows lie within the radius of every row, itself included."""
    return np.searchsorted(sorted_T, x_T + radius_T, "right") - np.searchsorted(sorted_T, x_T - radius_T, "left")


def _gaussian(moments: SecondMoments, rows_TC: torch.Tensor | None) -> torch.Tensor:
    covariance_CC = moments.covariance_CC
    variance_C = covariance_CC.diagonal()
    variance_C[variance_C <= FLOAT32_VARIANCE * moments.gram_CC.diagonal() / moments.count] = 0
    return gaussian_mi(covariance_CC, moments.count)


def _from_rows(method: str, estimator: Callable[[torch.Tensor], torch.Tensor]) -> Estimator:
    def estimate(moments: SecondMoments, rows_TC: torch.Tensor | None) -> torch.Tensor:
        found = 0 if rows_TC is None else len(rows_TC)
        if rows_TC is None or found < MIN_ROWS:
            raise UserError(
                f"--mi-method {method}: needs at least {MIN_ROWS} sampled rows, got {found}: "
                "raise --nsamples or --seqlen, or use gaussian"
            )
        return estimator(rows_TC)

    return estimate


ESTIMATORS: dict[str, Estimator] = {
    "gaussian": _gaussian,
    "copula": _from_rows("copula", copula_mi),
    "histogram": _from_rows("histogram", histogram_mi),
    "knn": _from_rows("knn", knn_mi),
}
assert tuple(ESTIMATORS) == MI_METHODS


def mutual_information(method: str, moments: SecondMoments, rows_TC: torch.Tensor | None = None) -> torch.Tensor:
    """MI in nats between the channels of a stream by one of MI_METHODS.

    Args:
        method: gaussian reads only `moments`; the others only `rows_TC`.
        moments: of every row seen.
        rows_TC: a sample of at least 64 rows (`Reservoir.rows_TC`).

    Returns:
        mi_CC, symmetric, zero diagonal, on the device of what it read.

    Raises:
        UserError: unknown method, too few rows, or too many channels for knn.
    """
    choose("--mi-method", method, MI_METHODS)
    return ESTIMATORS[method](moments, rows_TC)
