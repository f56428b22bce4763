"""Rows over models, bits and visual tokens: what stands beside what, and against which figures it is measured."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from mico.comparison.visual import Evaluated, headline, visual_rows
from mico.comparison.visual_tables import visual_sections
from mico.metrics.vision.suites import SUITES
from tests.comparison.evaluations import FIGURES, asked, packed, results


def rows(*found: Any) -> list[dict[str, Any]]:
    return visual_rows([Evaluated(f"folder{place}", one) for place, one in enumerate(found)])


@pytest.mark.parametrize(
    ("suite", "told"), [("mme", ("points", 1500.0)), ("pope", ("F1", 0.8)), ("gqa", ("accuracy", 0.8))]
)
def test_every_suite_has_one_figure_that_is_told(suite: str, told: tuple[str, float]) -> None:
    assert headline(suite, FIGURES[suite](1400.0 if suite == "mme" else 0.8)) == told


@pytest.mark.parametrize("suite", SUITES)
def test_the_figure_is_among_those_that_the_suite_has(suite: str) -> None:
    name, value = headline(suite, SUITES[suite].score([]) | dict(f1=0.0))
    assert value == 0 and name in ("points", "F1", "accuracy")


def test_rows_are_measured_against_all_tokens_of_the_dense_model() -> None:
    dense = results(asked(score=0.8), asked(score=0.72, retain=36))
    three = packed(asked(score=0.7), asked(score=0.6, retain=36))
    found = rows(dense, three)
    assert [(row["model"], row["method"]) for row in found] == [
        ("tiny", None), ("tiny", "sparsevlm 2.0"), ("tiny-3", None), ("tiny-3", "sparsevlm 2.0")
    ]  # fmt: skip
    assert {row["reference"] for row in found} == {"tiny"}
    assert [row["ratios"]["score"] for row in found] == pytest.approx([1, 0.9, 0.875, 0.75])
    assert [row["ratios"]["kv_bytes"] for row in found] == pytest.approx([1, 0.25, 1, 0.25])
    assert [row["figures"].get("true_bits", {}).get("mean") for row in found] == [None, None, 3.0, 3.0]


def test_without_its_dense_model_a_packed_one_is_measured_against_itself() -> None:
    found = rows(packed(asked(score=0.5), asked(score=0.4, retain=36)))
    assert [row["reference"] for row in found] == ["tiny-3", "tiny-3"]
    assert found[1]["ratios"]["score"] == pytest.approx(0.8)
    (alone,) = rows(packed(asked(score=0.4, retain=36)))
    assert alone["reference"] is None and alone["ratios"] == {}


def test_a_model_is_the_same_by_its_short_name_and_by_its_hub_id() -> None:
    dense = results(asked(score=0.8), model="llava-hf/llava-1.5-7b-hf")
    three = packed(asked(score=0.6), base_model="llava-1.5-7b", model="runs/three/model")
    found = rows(dense, three)
    assert [row["model"] for row in found] == ["llava-1.5-7b-hf", "three"]
    assert found[1]["reference"] == "llava-1.5-7b-hf" and found[1]["ratios"]["score"] == pytest.approx(0.75)


def test_what_was_asked_otherwise_is_not_compared() -> None:
    found = rows(results(asked(), asked(retain=36, limit=0.5), asked(retain=24, data="another digest")))
    assert [row["reference"] for row in found if row["tokens"]] == [None, None]
    assert [section.title for section in visual_sections(found)] == [
        f"pope by visual tokens ({place})" for place in (1, 2, 3)
    ]


def test_folders_of_one_model_are_one_and_budgets_stand_from_the_most_to_the_least() -> None:
    one, two = results(asked(retain=24), asked(retain=48)), results(asked(), asked(retain=36), model="elsewhere/tiny")
    found = rows(one, two)
    assert [row["tokens"] and row["tokens"]["retain"] for row in found] == [None, 48, 36, 24]
    assert {row["model"] for row in found} == {"tiny"} and {row["reference"] for row in found} == {"tiny"}
    assert found[0]["folders"] == ["folder1"]


def test_models_of_one_name_are_told_apart() -> None:
    found = rows(results(asked()), results(asked(), fingerprint="a" * 64), results(asked(), dtype="bfloat16"))
    assert [row["model"] for row in found] == [
        "tiny (ffffffff), float32",
        "tiny (aaaaaaaa)",
        "tiny (ffffffff), bfloat16",
    ]


def test_seeds_of_an_arm_are_one_row() -> None:
    scores = (0.7, 0.6, 0.65)
    runs = [
        Evaluated(f"run{seed}", packed(asked(score=score), fingerprint=str(seed) * 64), "mi", seed)
        for seed, score in enumerate(scores)
    ]
    again = Evaluated("apart", packed(asked(score=0.5, retain=36), fingerprint="1" * 64))
    found = visual_rows([again, *runs, Evaluated("dense", results(asked(score=0.8)))])
    whole = next(row for row in found if row["model"] == "mi" and row["tokens"] is None)
    assert whole["n"] == 3 and whole["figures"]["score"]["values"] == list(scores)
    assert whole["figures"]["score"]["sd"] == pytest.approx(statistics.stdev(scores))
    assert whole["ratios"]["score"] == pytest.approx(0.65 / 0.8) and whole["reference"] == "tiny"
    pruned = next(row for row in found if row["tokens"])
    assert pruned["model"] == "mi" and pruned["seeds"] == [1]  # by the fingerprint of the run


def test_bits_of_activations_stand_beside_those_of_weights() -> None:
    (table,) = visual_sections(rows(packed(asked(), bits=3.1234, activation_bits=4.0), results(asked())))
    assert [row[1] for row in table.rows] == ["3.123 a 4.00", "dense"] and "Bits behind an a" in table.lines[-1]


def test_tables_show_every_cost_and_what_is_not_even() -> None:
    dense = results(asked(), asked(score=0.72, retain=36, batch_size=4), asked("mme", 1400.0), asked("mme", 1250.0, 36))
    three = packed(asked(score=0.76, retain=36, peak_device_bytes=5_000_000), asked("mme", 1200.0, 36))
    pope, mme, means = visual_sections(rows(dense, three))
    assert pope.title == "pope by visual tokens" and mme.title == "mme by visual tokens"
    assert pope.columns == (
        "model", "bits", "visual tokens", "layer", "F1", "kept", "s", "faster", "KV", "FLOPs", "peak memory"
    )  # fmt: skip
    costs = ("0.125", "×4.00", "250 kB", "500 M")
    assert pope.rows == (
        ("tiny", "dense", "all", "150.0", "80.0%", "100.0%", "0.500", "×1.00", "1 MB", "2 G", "-"),
        ("tiny", "dense", "36 sparsevlm 2.0", "37.5", "72.0%", "90.0%", *costs, "-"),
        ("tiny-3", "3.000", "36 sparsevlm 2.0", "37.5", "76.0%", "95.0%", *costs, "5 MB"),
    )
    assert pope.strong == {(2, 4)} and mme.strong == {(1, 4)}
    assert any("batch sizes 4, 8" in line for line in pope.lines) and any("tiny" in line for line in pope.lines)
    assert [row[4] for row in mme.rows] == ["1500.0", "1350.0", "1300.0"] and len(mme.columns) == 10
    assert [row[3] for row in means.rows] == ["100.0%", "90.0%", "90.8%"]
    assert not visual_sections([])
