"""Groups of channels: clusters of shared information, and the controls that run beside them.

Suffixes: C channels, G groups, K eigenvectors. Everything is deterministic: labels are numbered by the smallest member,
random choices come from local generators, k-means runs on one thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import davies_bouldin_score, silhouette_score
from threadpoolctl import threadpool_limits

from mico.channels.plan import ChannelGroups
from mico.errors import UserError
from mico.settings import CLUSTERINGS, choose

NEIGHBOURS = 64  # of the affinity graph: all channels up to here, a sparse graph above
AUTO_LARGEST, AUTO_GROUP_SIZE = 20, 8  # auto looks at 2..min(20, C // 8) groups
TIED_GAP, TIED_CANDIDATES = 0.5, 3  # eigengaps of at least half the largest, at most three: the silhouette decides
SILHOUETTE_CHANNELS = 1024
DENSE_EIGEN = 1024  # a component of at most so many channels is solved densely


@dataclass(frozen=True)
class Clustering:
    """Groups and how good they are; `diagnostics` holds plain JSON values (keys in `cluster`)."""

    groups: ChannelGroups
    diagnostics: dict[str, Any]


@dataclass(frozen=True)
class _Graph:
    """The channels that share information with another one: their MI, and their spectral embedding."""

    mi_CC: torch.Tensor
    eigenvalues_K: np.ndarray  # of the normalised Laplacian, ascending
    vectors_CK: np.ndarray
    seed: int


def cluster(mi_CC: torch.Tensor, n_groups: int | str, method: str = "spectral", seed: int = 0) -> Clustering:
    """Group the channels of a stream so that those in a group share information.

    Channels that share none with any other (dead ones, or nothing above the noise) get a group of their own when they
    are at least half an average group, and otherwise go one by one to the smallest groups. Sizes are not balanced.

    Args:
        mi_CC: symmetric, non-negative, nats, zero diagonal.
        n_groups: how many (all non-empty, also when channels are indistinguishable), or "auto": the largest eigengap
            of the normalised Laplacian over 2..min(20, C // 8), the silhouette deciding between leading gaps.
        method: spectral (sparse nearest-neighbour graph, cluster_qr), hierarchical (average linkage on exp(-I)), or
            kmeans (on the rows of the similarity 1 - exp(-2I)).
        seed: of k-means and of the sample the silhouette is taken on.

    Returns:
        Clustering with diagnostics method, n_groups, sizes, loners (channels without shared information), silhouette,
        davies_bouldin (on the spectral embedding), within_mi, between_mi (mean nats of a pair inside / across groups),
        and chosen (how k came about). What is undefined, as the silhouette of one group, is None.

    Raises:
        UserError: more groups than channels, or an unknown method.
    """
    channels = len(mi_CC)
    choose("--cluster", method, CLUSTERINGS)
    if n_groups != "auto":
        _check(int(n_groups), channels)
    connected_C = (mi_CC.amax(1) > 0).cpu().numpy()
    active = np.flatnonzero(connected_C)
    loners = np.flatnonzero(~connected_C)
    largest = min(AUTO_LARGEST, channels // AUTO_GROUP_SIZE) + 1 if n_groups == "auto" else int(n_groups)
    graph = _graph(mi_CC, active, largest, seed)

    if n_groups == "auto":
        inner, chosen = _auto(graph, method, largest - 1)
        own = _own_group(len(loners), channels, inner + 1) and len(active) > 0
        count = max(1, inner + own)
        chosen |= {"loner_group": bool(own)}
    else:
        count, chosen = int(n_groups), {"by": "user"}
        own = _own_group(len(loners), channels, count) and len(active) > 0
        inner = min(count - own, len(active))

    label_C = np.zeros(channels, dtype=np.int64)
    if inner:
        label_C[active] = _partition(graph, method, inner)
    _place_loners(label_C, loners, max(1, inner), own)
    label_C = canonical(split_to(label_C, count))
    groups = ChannelGroups(torch.from_numpy(label_C))
    report = {"method": method, "n_groups": groups.count, "sizes": groups.sizes_G.tolist(), "loners": len(loners)}
    return Clustering(groups, report | _quality(mi_CC, graph, active, label_C, seed) | {"chosen": chosen})


def random_groups(channels: int, n_groups: int, seed: int) -> ChannelGroups:
    """Control: groups of equal size (to one channel) drawn at random. Raises UserError when n_groups > channels."""
    _check(n_groups, channels)
    shuffled_C = np.random.default_rng(seed).permutation(channels)
    return ChannelGroups(torch.from_numpy(canonical(shuffled_C * n_groups // channels)))


def sorted_groups(score_C: torch.Tensor, n_groups: int) -> ChannelGroups:
    """Groups of equal size (to one channel) and consecutive rank; group 0 has the lowest scores, ties by index.

    Used for grouping by range, by alpha (U_ii) and by importance. Raises UserError when n_groups > C.
    """
    _check(n_groups, len(score_C))
    rank_C = torch.empty(len(score_C), dtype=torch.int64)
    rank_C[torch.argsort(score_C.cpu(), stable=True)] = torch.arange(len(score_C))
    return ChannelGroups(rank_C * n_groups // len(score_C))


def canonical(label_C: np.ndarray) -> np.ndarray:
    """The same partition with labels 0..G-1 in the order of each group's first channel."""
    _, first_G, compact_C = np.unique(label_C, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_G))[compact_C].astype(np.int64)


def split_to(label_C: np.ndarray, count: int) -> np.ndarray:
    """Halve the largest group until there are `count` groups (a clustering may return fewer than asked)."""
    label_C = canonical(label_C)
    while (found := int(label_C.max()) + 1) < count:
        members = np.flatnonzero(label_C == np.bincount(label_C).argmax())
        label_C[members[(len(members) + 1) // 2 :]] = found
    return label_C


def _check(n_groups: int, channels: int) -> None:
    if n_groups > channels:
        raise UserError(f"--n-groups {n_groups}: the stream has {channels} channels: choose at most {channels}")
    if n_groups < 1:
        raise UserError(f"--n-groups {n_groups}: choose at least 1")


def _own_group(loners: int, channels: int, count: int) -> bool:
    return count > 1 and 2 * loners * count >= channels and loners > 0


def _place_loners(label_C: np.ndarray, loners: np.ndarray, inner: int, own: bool) -> None:
    """Label the loners in place: one new group, or each to the group that is smallest at its turn."""
    if own or len(loners) == len(label_C):
        label_C[loners] = inner
        return
    sizes_G = np.bincount(np.delete(label_C, loners), minlength=inner)
    for channel in loners:
        label_C[channel] = sizes_G.argmin()
        sizes_G[label_C[channel]] += 1


# --- the graph and its spectrum


def _graph(mi_CC: torch.Tensor, active: np.ndarray, eigenvectors: int, seed: int) -> _Graph:
    index = torch.from_numpy(active).to(mi_CC.device)
    if len(active) < len(mi_CC):
        mi_CC = mi_CC[index][:, index]
    if not len(active):
        return _Graph(mi_CC, np.zeros(0), np.zeros((0, 0)), seed)
    eigenvalues_K, vectors_CK = _spectrum(_affinity(mi_CC), min(eigenvectors, len(active)), seed)
    return _Graph(mi_CC, eigenvalues_K, vectors_CK, seed)


def _affinity(mi_CC: torch.Tensor) -> csr_array:
    """Symmetric nearest-neighbour graph; the weight of an edge is the shared variance 1 - exp(-2I), in 0..1.

    For Gaussian channels that is rho^2 (the squared informational coefficient of correlation, Linfoot 1957).
    """
    channels = len(mi_CC)
    value, neighbour = mi_CC.topk(min(NEIGHBOURS, channels), dim=1)
    weight = -torch.expm1(-2 * value.double())
    row = np.repeat(np.arange(channels), value.shape[1])
    graph = coo_array((weight.cpu().numpy().ravel(), (row, neighbour.cpu().numpy().ravel())), (channels, channels))
    graph = csr_array(graph)
    graph.eliminate_zeros()
    return csr_array(graph.maximum(graph.T))


def _spectrum(affinity: csr_array, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest eigenvalues of I - D^-1/2 A D^-1/2, ascending, and their orthonormal vectors.

    Component by component: a Lanczos iteration over the whole graph would miss copies of the eigenvalue 0, of which
    every component has one.
    """
    scale_C = 1 / np.sqrt(affinity.sum(axis=1))
    normalised = csr_array(affinity.multiply(scale_C[:, None]).multiply(scale_C[None, :]))
    components, component_C = connected_components(affinity, directed=False)
    order = np.argsort(component_C, kind="stable")
    values: list[np.ndarray] = []
    owners: list[tuple[np.ndarray, np.ndarray]] = []
    for members in np.split(order, np.cumsum(np.bincount(component_C, minlength=components))[:-1]):
        inside = normalised if components == 1 else normalised[members][:, members]
        value_K, vector_CK = _leading(csr_array(inside), min(count, len(members)), seed)
        values += [1 - value_K]
        owners += [(members, vector) for vector in vector_CK.T]
    value_all = np.concatenate(values)
    chosen = np.argsort(value_all, kind="stable")[:count]
    vectors_CK = np.zeros((len(scale_C), len(chosen)))
    for column, position in enumerate(chosen):
        members, vector = owners[position]
        vectors_CK[members, column] = vector
    return value_all[chosen], vectors_CK


def _leading(matrix: csr_array, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues of a symmetric matrix, descending, with their vectors."""
    size = matrix.shape[0]
    if size <= DENSE_EIGEN or count > size // 4:
        # All of them by divide and conquer: the solver for a few (MRRR) fails on repeated eigenvalues.
        value, vector = np.linalg.eigh(matrix.toarray())
    else:
        start = np.random.default_rng(seed).standard_normal(size)
        value, vector = eigsh(matrix, k=count, which="LA", v0=start, tol=1e-8, maxiter=50 * size)
    order = np.argsort(-value, kind="stable")[:count]
    return value[order], vector[:, order]


# --- three ways to cut it


def _partition(graph: _Graph, method: str, count: int) -> np.ndarray:
    """Labels of the graph's channels; exactly `count` groups, numbered by first channel."""
    channels = len(graph.mi_CC)
    if count == 1:
        return np.zeros(channels, dtype=np.int64)
    if count == channels:
        return np.arange(channels, dtype=np.int64)
    return canonical(split_to(_PARTITIONS[method](graph, count), count))


def _spectral(graph: _Graph, count: int) -> np.ndarray:
    """cluster_qr, seed-free: pivoted QR picks one channel a cluster, the rest follow (Damle, Minden & Ying 2019)."""
    vectors_CK = graph.vectors_CK[:, :count]
    _, pivot = scipy.linalg.qr(vectors_CK.T, mode="r", pivoting=True)
    rotation_KK, _ = scipy.linalg.polar(vectors_CK[pivot[:count]].T)
    return np.abs(vectors_CK @ rotation_KK).argmax(axis=1)


def _hierarchical(graph: _Graph, count: int) -> np.ndarray:
    model = AgglomerativeClustering(count, metric="precomputed", linkage="average")
    return model.fit_predict(_distance(graph.mi_CC))


def _kmeans(graph: _Graph, count: int) -> np.ndarray:
    similarity_CC = -torch.expm1(-2 * graph.mi_CC.float())
    similarity_CC.fill_diagonal_(1)
    model = KMeans(count, n_init=4, random_state=graph.seed)
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct channels than groups: split_to mends it
        return model.fit_predict(similarity_CC.cpu().numpy())


_PARTITIONS: dict[str, Callable[[_Graph, int], np.ndarray]] = {
    "spectral": _spectral,
    "hierarchical": _hierarchical,
    "kmeans": _kmeans,
}
assert tuple(_PARTITIONS) == CLUSTERINGS


def _distance(mi_CC: torch.Tensor) -> np.ndarray:
    """exp(-I), which is sqrt(1 - rho^2) for Gaussian channels; float32, zero diagonal."""
    distance_CC = torch.exp(-mi_CC.float())
    return distance_CC.fill_diagonal_(0).cpu().numpy()


# --- how many, and how good


def _auto(graph: _Graph, method: str, largest: int) -> tuple[int, dict[str, Any]]:
    """The number of groups of the connected channels (0 when there are none), and how it was found."""
    gap_K = np.diff(graph.eigenvalues_K)  # gap_K[k - 1] separates k groups from k + 1
    candidates = np.arange(2, min(largest, len(gap_K)) + 1)
    if not len(candidates):
        return min(1, len(graph.mi_CC)), {"by": "too few channels that share information"}
    gaps = gap_K[candidates - 1]
    leading = candidates[np.argsort(-gaps, kind="stable")[:TIED_CANDIDATES]]
    tied = [int(k) for k in leading if gap_K[k - 1] >= TIED_GAP * gaps.max()]
    chosen: dict[str, Any] = {
        "by": "eigengap",
        "eigengaps": {str(k): float(gap) for k, gap in zip(candidates, gaps, strict=True)},
    }
    if len(tied) == 1:
        return tied[0], chosen
    scores = {k: _silhouette(graph.mi_CC, _partition(graph, method, k), graph.seed) for k in tied}
    best = max(tied, key=lambda k: -2.0 if scores[k] is None else scores[k])  # type: ignore[arg-type,return-value]
    return best, chosen | {"by": "silhouette", "silhouettes": {str(k): score for k, score in scores.items()}}


def _silhouette(mi_CC: torch.Tensor, label_C: np.ndarray, seed: int) -> float | None:
    """Mean silhouette on exp(-I), over at most 1024 channels drawn at random; None when undefined."""
    if len(label_C) > SILHOUETTE_CHANNELS:
        drawn = np.sort(np.random.default_rng(seed).choice(len(label_C), SILHOUETTE_CHANNELS, replace=False))
        index = torch.from_numpy(drawn).to(mi_CC.device)
        mi_CC, label_C = mi_CC[index][:, index], label_C[drawn]
    return _score(partial(silhouette_score, metric="precomputed"), _distance(mi_CC), label_C)


def _score(metric: Callable[..., float], data: np.ndarray, label_C: np.ndarray) -> float | None:
    """None where sklearn defines no score: one group, or every channel its own."""
    return float(metric(data, label_C)) if 2 <= len(np.unique(label_C)) < len(label_C) else None


def _quality(
    mi_CC: torch.Tensor, graph: _Graph, active: np.ndarray, label_C: np.ndarray, seed: int
) -> dict[str, float | None]:
    groups = int(label_C.max()) + 1
    embedding_CK = graph.vectors_CK[:, :groups]
    member_CG = torch.nn.functional.one_hot(torch.from_numpy(label_C), groups).to(mi_CC)
    sizes_G = np.bincount(label_C).astype(float)
    total_GG = member_CG.T @ (mi_CC @ member_CG)
    inside, everything = float(total_GG.trace()), float(total_GG.sum())
    pairs_inside, pairs = float((sizes_G * (sizes_G - 1)).sum()), len(label_C) * (len(label_C) - 1.0)
    return {
        "silhouette": _silhouette(mi_CC, label_C, seed),
        "davies_bouldin": _score(davies_bouldin_score, embedding_CK, label_C[active]),
        "within_mi": inside / pairs_inside if pairs_inside else None,
        "between_mi": (everything - inside) / (pairs - pairs_inside) if pairs > pairs_inside else None,
    }
