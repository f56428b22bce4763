"""Which runs make an arm, what arms are called, and the tables of ablations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mico.comparison import Run, compare
from mico.comparison.arms import ablations, group
from mico.errors import UserError
from tests.comparison.reports import made, three_arms


def parts(runs: list[Run]) -> set[frozenset[str]]:
    return {frozenset(run.folder for run in arm.runs) for arm in group(runs)}


RUN = st.builds(
    lambda arm, seed, sparsity, groups, version, copy: made(
        arm, seed, 40 + seed, folder=f"{arm}-{seed}-{sparsity}-{groups}-{version}-{copy}",
        settings=dict(sparsity=sparsity), grouping=dict(n_groups=groups) if arm != "original" else None,
        environment=dict(mico=version, torch="2", transformers="5"),
    ),
    st.sampled_from(["original", "enhanced", "mi"]), st.integers(0, 3), st.sampled_from([0.3, 0.5]),
    st.sampled_from(["auto", 5, 10]), st.sampled_from(["0.1.0", "0.2.0"]), st.integers(0, 1),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(RUN, min_size=1, max_size=12, unique_by=lambda run: run.folder), st.randoms(use_true_random=False))
def test_arms_depend_on_no_order(runs: list[Run], random: Any) -> None:
    mixed = list(runs)
    random.shuffle(mixed)
    assert parts(mixed) == parts(runs)
    # By hand: everything in the folder's name but seed and copy, and no groups where the arm has none.
    expected: dict[Any, set[str]] = {}
    for run in runs:
        arm, _, sparsity, groups, version, _ = run.folder.split("-")
        expected.setdefault((arm, sparsity, groups if arm != "original" else "", version), set()).add(run.folder)
    assert parts(runs) == {frozenset(folders) for folders in expected.values()}
    by_name = {arm["name"]: arm for arm in compare(runs)["arms"]}
    assert len(by_name) == len(expected)  # no two arms of one name
    for arm in compare(mixed)["arms"]:
        same = by_name[arm["name"]]
        assert {key: value for key, value in arm.items() if key != "options"} == {
            key: value for key, value in same.items() if key != "options"
        }
        assert arm["seeds"] == sorted(set(arm["seeds"])) and arm["n"] == len(arm["seeds"])


def test_the_first_run_leads() -> None:
    runs = three_arms()
    assert [arm.name for arm in group(runs)] == ["original", "enhanced", "mi"]
    assert compare(runs)["baseline"] == "original" and compare(runs[::-1])["baseline"] == "mi"
    assert compare(runs, "enhanced")["baseline"] == "enhanced" == compare(runs, "runs/enhanced-2/")["baseline"]
    with pytest.raises(UserError, match="--baseline best: no such arm, choose from 'original', 'enhanced', 'mi'"):
        compare(runs, "best")


def test_arms_are_called_by_what_tells_them_apart() -> None:
    runs = [made("mi", 0, grouping=dict(n_groups=n), folder=str(n)) for n in (5, 10)] + [made("original")]
    assert [arm.name for arm in group(runs)] == ["mi, n_groups 5", "mi, n_groups 10", "original"]
    many = [
        made("mi", folder="a", settings=dict(sparsity=0.3, wbits=3, blocksize=64)),
        made("mi", folder="b", settings=dict(sparsity=0.5, wbits=4, blocksize=128)),
    ]
    names = [arm.name for arm in group(many)]
    assert sorted(names) == ["mi 1", "mi 2"] and names == [arm.name for arm in group(many[::-1])][::-1]


def test_one_model_under_two_names_is_one_and_two_under_one_are_two() -> None:
    assert len(group([made(model="tiny"), made(seed=1, model="/models/tiny")])) == 1
    trained = [made(seed=seed, model=f"a-long-name-{seed}", identity=dict(seed=seed)) for seed in (0, 1)]
    for run in trained:
        del run.report["identity"]["model"]
    assert len(group(trained)) == 2  # without a fingerprint the name tells
    others = group([made(), made(seed=1, fingerprint="e" * 64)])
    assert [arm.options["model"] for arm in others] == ["tiny (ffffffff)", "tiny (eeeeeeee)"]


def test_the_arm_of_the_command_line_is_no_option() -> None:
    unnamed = made("mi", 1)
    unnamed.report["arm"] = None
    assert [arm.name for arm in group([made("mi", 0), unnamed])] == ["mi"]
    assert [arm.name for arm in group([unnamed])] == ["mico"]


def test_one_option_gives_a_table_of_it() -> None:
    runs = [
        made("mi", seed, 40 + seed, grouping=dict(n_groups=n), folder=f"{n}-{seed}")
        for n, seed in itertools.product((50, 5, "auto", 20), (0, 1))
    ]
    (table,) = ablations(group(runs))
    assert table["options"] == ["n_groups"] and table["rows"] == [5, 20, 50, "auto"] and table["columns"] == []
    assert table["cells"] == [[f"mi, n_groups {n}"] for n in (5, 20, 50, "auto")]


def test_two_options_give_rows_and_columns() -> None:
    runs = [
        made(arm, 0, settings=dict(sparsity=sparsity), folder=f"{arm}-{sparsity}")
        for arm, sparsity in [("original", 0.7), ("mi", 0.3), ("original", 0.3), ("enhanced", 0.5)]
    ]
    (table,) = ablations(group(runs))
    assert (table["options"], table["columns"]) == (["arm", "sparsity"], [0.3, 0.5, 0.7])
    assert table["rows"] == ["original", "mi", "enhanced"]
    assert table["cells"] == [
        ["original, sparsity 0.3", None, "original, sparsity 0.7"],
        ["mi", None, None],
        [None, "enhanced", None],
    ]
    swept = [
        made("mi", 0, grouping=dict(mi_method=method), settings=dict(sparsity=sparsity), folder=f"{method}-{sparsity}")
        for method, sparsity in itertools.product(("copula", "gaussian"), (0.5, 0.3))
    ]
    (table,) = ablations(group(swept))
    assert table["options"] == ["sparsity", "mi_method"] and table["columns"] == ["copula", "gaussian"]
    assert table["cells"][1][0] == "mi, sparsity 0.5, mi_method copula"


def test_arms_alone_or_three_options_give_none() -> None:
    assert ablations(group(three_arms())) == [] == ablations(group([made()]))
    three = [dict(sparsity=0.3), dict(wbits=3), dict(percdamp=0.1), dict()]
    assert ablations(group([made(settings=one, folder=str(one)) for one in three])) == []
