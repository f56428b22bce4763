"""Clusterings: planted structure, edge cases, determinism; and the control groupings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from mico.channels.grouping import _affinity, canonical, cluster, random_groups, sorted_groups, split_to
from mico.channels.information import copula_mi, gaussian_mi
from mico.errors import UserError
from mico.settings import CLUSTERINGS


def planted_rows(label_C: np.ndarray, rows: int = 3000, loading: float = 0.6, seed: int = 0) -> torch.Tensor:
    """Every group follows a factor of its own: correlation loading^2 inside a group, none across."""
    rng = np.random.default_rng(seed)
    factor_TG = rng.standard_normal((rows, label_C.max() + 1))
    noise_TC = rng.standard_normal((rows, len(label_C)))
    return torch.from_numpy(loading * factor_TG[:, label_C] + np.sqrt(1 - loading**2) * noise_TC)


def planted_mi(label_C: np.ndarray, **kwargs) -> torch.Tensor:
    rows_TC = planted_rows(label_C, **kwargs)
    return gaussian_mi(torch.cov(rows_TC.T), len(rows_TC))


def block_mi(label_C: np.ndarray, inside: float = 0.5, across: float = 0.0) -> torch.Tensor:
    """Noise-free MI: with `across` 0 the graph falls apart into one component a group."""
    label = torch.from_numpy(label_C)
    return torch.where(label[:, None] == label, inside, across).double().fill_diagonal_(0)


def shuffled_labels(groups: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(channels) % groups)


def agreement(expected_C: np.ndarray, found) -> float:
    return adjusted_rand_score(expected_C, found.groups.label_C.numpy())


def assert_valid(clustering, channels: int, count: int) -> None:
    label_C = clustering.groups.label_C
    assert label_C.dtype == torch.int64 and len(label_C) == channels
    assert clustering.groups.count == count == clustering.diagnostics["n_groups"]
    assert int(clustering.groups.sizes_G.min()) >= 1
    first = [int((label_C == g).nonzero()[0]) for g in range(count)]
    assert first == sorted(first)  # numbered by smallest member
    json.dumps(clustering.diagnostics)


@pytest.mark.parametrize("method", CLUSTERINGS)
@pytest.mark.parametrize("n_groups", [5, "auto"])
def test_planted_groups_and_their_number_are_found(method, n_groups):
    planted_C = shuffled_labels(5, 120)
    found = cluster(planted_mi(planted_C), n_groups, method)
    assert_valid(found, 120, 5)
    assert agreement(planted_C, found) == 1
    diagnostics = found.diagnostics
    assert diagnostics["within_mi"] > 20 * diagnostics["between_mi"]
    assert diagnostics["silhouette"] > 0 and diagnostics["davies_bouldin"] < 0.5
    assert diagnostics["sizes"] == [24] * 5 and diagnostics["method"] == method


def test_planted_groups_of_different_sizes_are_found_in_a_sparse_graph():
    planted_C = np.repeat(np.arange(4), (40, 80, 160, 220))  # the last three exceed the 64 neighbours
    found = cluster(planted_mi(planted_C), "auto")
    assert found.groups.count == 4 and agreement(planted_C, found) > 0.99


def test_the_lanczos_path_finds_what_the_dense_one_does(monkeypatch):
    mi_CC = planted_mi(shuffled_labels(6, 300), loading=0.5)
    dense = cluster(mi_CC, 6)
    monkeypatch.setattr("mico.channels.grouping.DENSE_EIGEN", 16)
    lanczos = cluster(mi_CC, 6)
    assert torch.equal(dense.groups.label_C, lanczos.groups.label_C)
    assert dense.diagnostics["davies_bouldin"] == pytest.approx(lanczos.diagnostics["davies_bouldin"], rel=1e-4)


def test_the_affinity_graph_is_symmetric_and_keeps_every_channel_s_nearest_neighbours():
    mi_CC = planted_mi(shuffled_labels(3, 300), loading=0.4)
    graph = _affinity(mi_CC).toarray()
    assert (graph == graph.T).all() and ((graph > 0).sum(1) > 64).any() and (graph == 0).mean() > 0.5
    for channel in range(0, 300, 50):
        nearest = mi_CC[channel].argsort(descending=True)[:64]
        np.testing.assert_allclose(graph[channel, nearest], 1 - np.exp(-2 * mi_CC[channel, nearest].numpy()))


def test_hierarchical_averages_so_that_a_bridge_does_not_join_two_groups():
    planted_C = np.repeat([0, 1], 8)
    mi_CC = torch.full((18, 18), 0.01, dtype=torch.float64)
    mi_CC[:16, :16] = block_mi(planted_C, across=0.01)
    bridge, straggler = 16, 17
    mi_CC[bridge, [0, 8]] = mi_CC[[0, 8], bridge] = 0.6
    mi_CC[straggler, :8] = mi_CC[:8, straggler] = 0.3
    found = cluster(mi_CC.fill_diagonal_(0), 2, "hierarchical").groups.label_C
    assert adjusted_rand_score(planted_C, found[:16]) == 1 and found[straggler] == found[0]


def test_within_and_between_mi_are_means_over_pairs():
    mi_CC = planted_mi(shuffled_labels(3, 30))
    found = cluster(mi_CC, 3)
    label = found.groups.label_C.tolist()
    pairs = [(i, j) for i in range(30) for j in range(i)]
    for key, same in (("within_mi", True), ("between_mi", False)):
        values = [float(mi_CC[i, j]) for i, j in pairs if (label[i] == label[j]) is same]
        assert found.diagnostics[key] == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("method", CLUSTERINGS)
def test_disconnected_groups_are_not_cut(method):
    planted_C = shuffled_labels(6, 60)
    for across in (0.0, 1e-4):
        assert agreement(planted_C, cluster(block_mi(planted_C, across=across), 6, method)) == 1
    merged = cluster(block_mi(planted_C), 4, method).groups.label_C.numpy()
    assert all(len(np.unique(merged[planted_C == g])) == 1 for g in range(6))


@pytest.mark.parametrize("method", CLUSTERINGS)
def test_many_isolated_channels_share_a_group_and_few_join_the_smallest(method):
    planted_C = shuffled_labels(3, 60)
    many_CC, few_CC = torch.zeros(90, 90, dtype=torch.float64), torch.zeros(64, 64, dtype=torch.float64)
    many_CC[:60, :60] = few_CC[:60, :60] = block_mi(planted_C)
    many = cluster(many_CC, 4, method)
    assert many.diagnostics["loners"] == 30
    assert agreement(np.concatenate([planted_C, np.full(30, 3)]), many) == 1
    assert cluster(many_CC, "auto", method).groups.count == 4
    few = cluster(few_CC, 3, method)
    assert few.diagnostics["loners"] == 4 and sorted(few.diagnostics["sizes"]) == [21, 21, 22]
    assert adjusted_rand_score(planted_C, few.groups.label_C[:60]) == 1


@pytest.mark.parametrize("method", CLUSTERINGS)
@pytest.mark.parametrize("mi", ["none", "equal", "planted"])
@pytest.mark.parametrize("count", [1, 2, 7, 39, 40])
def test_every_group_is_non_empty_even_among_indistinguishable_channels(method, mi, count):
    mi_CC = {
        "none": torch.zeros(40, 40, dtype=torch.float64),
        "equal": block_mi(np.zeros(40, dtype=np.int64), inside=6.5),
        "planted": block_mi(shuffled_labels(4, 40)),
    }[mi]
    found = cluster(mi_CC, count, method)
    assert_valid(found, 40, count)
    if count in (1, 40):
        assert found.diagnostics["silhouette"] is None and found.diagnostics["davies_bouldin"] is None
        assert found.diagnostics["between_mi" if count == 1 else "within_mi"] is None


@pytest.mark.parametrize("channels", [1, 2, 3, 9, 20])
def test_auto_settles_on_one_group_without_information_or_with_few_channels(channels):
    assert_valid(cluster(torch.zeros(channels, channels), "auto"), channels, 1)
    if channels < 16:
        assert_valid(cluster(block_mi(np.zeros(channels, dtype=np.int64)), "auto"), channels, 1)


def test_auto_reports_the_gaps_and_lets_the_silhouette_break_ties():
    nested_C = shuffled_labels(6, 96)
    halves_C = nested_C % 2
    # Six groups in two halves: the gap after 2 is a little larger than that after 6, but six groups are tighter.
    mi_CC = torch.maximum(block_mi(nested_C, inside=0.8, across=0.002), block_mi(halves_C, inside=0.12))
    found = cluster(mi_CC, "auto")
    chosen = found.diagnostics["chosen"]
    assert chosen["by"] == "silhouette" and set(chosen["silhouettes"]) == {"2", "6"}
    assert chosen["eigengaps"]["2"] > chosen["eigengaps"]["6"] > max(chosen["eigengaps"][k] for k in "345789")
    assert list(chosen["eigengaps"]) == [str(k) for k in range(2, 13)]
    assert agreement(nested_C, found) == 1
    halves = cluster(torch.maximum(mi_CC, block_mi(halves_C, inside=0.3)), "auto")
    assert halves.diagnostics["chosen"]["by"] == "eigengap" and agreement(halves_C, halves) == 1


@pytest.mark.parametrize("method", CLUSTERINGS)
def test_the_result_is_repeatable_and_leaves_global_random_state_alone(method):
    rows_TC = planted_rows(shuffled_labels(4, 1100), rows=200, loading=0.3)
    mi_CC = copula_mi(rows_TC)
    before = str(np.random.get_state(legacy=True)), torch.get_rng_state().clone()
    first, second = cluster(mi_CC, 4, method, seed=3), cluster(mi_CC, 4, method, seed=3)
    assert torch.equal(first.groups.label_C, second.groups.label_C)
    assert first.diagnostics == second.diagnostics
    assert str(np.random.get_state(legacy=True)) == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_permutation_of_the_channels_only_permutes_the_groups():
    mi_CC = planted_mi(shuffled_labels(4, 64))
    permutation = np.random.default_rng(1).permutation(64)
    moved = cluster(mi_CC[permutation][:, permutation], 4).groups.label_C.numpy()
    assert adjusted_rand_score(cluster(mi_CC, 4).groups.label_C.numpy()[permutation], moved) == 1


def test_mistakes_are_named():
    mi_CC = torch.zeros(8, 8)
    message = r"^--n-groups 9: the stream has 8 channels: choose at most 8$"
    for mistake in (
        lambda: cluster(mi_CC, 9),
        lambda: random_groups(8, 9, 0),
        lambda: sorted_groups(torch.zeros(8), 9),
    ):
        with pytest.raises(UserError, match=message):
            mistake()
    with pytest.raises(UserError, match="--n-groups 0: choose at least 1"):
        cluster(mi_CC, 0)
    with pytest.raises(UserError, match="--cluster dbscan: choose from spectral, hierarchical, kmeans"):
        cluster(mi_CC, 2, "dbscan")


# --- controls


@given(channels=st.integers(1, 60), data=st.data())
def test_controls_have_equal_sizes(channels, data):
    count = data.draw(st.integers(1, channels))
    seed = data.draw(st.integers(0, 2**32))
    drawn = random_groups(channels, count, seed)
    ranked = sorted_groups(torch.rand(channels, generator=torch.Generator().manual_seed(seed)), count)
    for groups in (drawn, ranked):
        assert groups.count == count and int(groups.sizes_G.max() - groups.sizes_G.min()) <= 1
    assert torch.equal(drawn.label_C, random_groups(channels, count, seed).label_C)


def test_random_groups_differ_by_seed_and_ignore_the_order_of_channels():
    assert not torch.equal(random_groups(64, 4, 0).label_C, random_groups(64, 4, 1).label_C)
    assert abs(adjusted_rand_score(np.arange(400) // 100, random_groups(400, 4, 0).label_C)) < 0.02


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.data())
def test_sorted_groups_are_consecutive_ranks(scores, data):
    groups = sorted_groups(torch.tensor(scores), data.draw(st.integers(1, len(scores))))
    for lower in range(groups.count - 1):
        top = max(s for s, g in zip(scores, groups.label_C.tolist(), strict=True) if g == lower)
        assert top <= min(s for s, g in zip(scores, groups.label_C.tolist(), strict=True) if g == lower + 1)


# --- labels


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_canonical_keeps_the_partition_and_numbers_it_by_first_member(labels):
    found = canonical(np.array(labels)).tolist()
    seen: dict[int, int] = {}
    assert found == [seen.setdefault(label, len(seen)) for label in labels]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_split_to_reaches_the_count_and_only_ever_splits(labels, data):
    count = data.draw(st.integers(len(set(labels)), len(labels)))
    found = split_to(np.array(labels), count)
    assert sorted(set(found.tolist())) == list(range(count))
    assert all(len({label for label, f in zip(labels, found, strict=True) if f == g}) == 1 for g in range(count))


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 24),
    density=st.floats(0, 1),
    method=st.sampled_from(CLUSTERINGS),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_mi_matrix_gives_valid_groups(channels, density, method, seed, data):
    rng = np.random.default_rng(seed)
    upper_CC = np.triu(rng.exponential(0.3, (channels, channels)) * (rng.random((channels, channels)) < density), 1)
    mi_CC = torch.from_numpy(upper_CC + upper_CC.T)
    count = data.draw(st.one_of(st.integers(1, channels), st.just("auto")))
    found = cluster(mi_CC, count, method, seed)
    assert_valid(found, channels, found.groups.count if count == "auto" else count)
    assert sum(found.diagnostics["sizes"]) == channels
    assert torch.equal(found.groups.label_C, cluster(mi_CC, count, method, seed).groups.label_C)
