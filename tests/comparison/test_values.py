"""The plain values of a comparison, by hand; what is not alike is not averaged, and is told."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from mico.comparison import Run, compare, sections
from mico.costs import costs
from mico.tables import markdown
from tests.comparison.reports import ENVIRONMENT, made, score, three_arms


def notices(runs: list[Run]) -> str:
    return "\n".join(compare(runs)["notices"])


def evaluation(acc: float, error: float = 0.01, **changes: Any) -> dict[str, Any]:
    """results.json of mico eval with one task."""
    values = {
        "alias": "quiz",
        "sample_len": 40,
        "acc,none": acc,
        "acc_stderr,none": error,
        "exact_match,strict": acc / 2,
    }
    return {"results": {"quiz": values}, "versions": {"quiz": 1}, "n-shot": {"quiz": 0}} | changes


def test_every_figure_by_hand() -> None:
    runs = three_arms()
    found = compare(runs)
    for arm in found["arms"]:
        own = [run for run in runs if run.report["arm"] == arm["name"]]
        values = [run.report["compressed"]["docs"]["perplexity"] for run in own]
        stat = arm["texts"]["docs"]["perplexity"]
        assert stat["values"] == values and stat["mean"] == pytest.approx(np.mean(values))
        assert stat["sd"] == pytest.approx(np.std(values, ddof=1)) and stat["n"] == 3
        assert arm["size"]["packed_bytes"]["mean"] == 1001 and arm["size"]["packed_bytes"]["sd"] == 1
        assert arm["cost"]["total_seconds"]["mean"] == 9.0 and arm["cost"]["solve_seconds"]["mean"] == 1.5
        assert arm["folders"] == [run.folder for run in own] and arm["seeds"] == [0, 1, 2]
    by_name = {arm["name"]: arm["texts"]["docs"]["perplexity"]["values"] for arm in found["arms"]}
    assert [test["arm"] for test in found["tests"]] == ["enhanced", "mi"]
    for test in found["tests"]:
        expected = ttest_rel(np.log(by_name[test["arm"]]), np.log(by_name["original"]))
        assert (test["t"], test["p"]) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
        assert (test["kind"], test["name"], test["figure"], test["scale"]) == ("texts", "docs", "perplexity", "log")
    assert found["dense"] == [dict(model="tiny", texts=dict(docs=30.0))] and found["notices"] == []


def test_a_seed_that_was_run_again_counts_once() -> None:
    runs = [made("mi", 0, 40.0), made("mi", 0, 42.0, folder="again"), made("mi", 1, 45.0)]
    arm = compare(runs)["arms"][0]
    assert arm["n"] == 2 and arm["texts"]["docs"]["perplexity"]["values"] == [41.0, 45.0]
    assert "mi: seed 0 is there 2 times (again, runs/mi-0): their mean counts as one" in notices(runs)


@pytest.mark.parametrize("change", [dict(seqlen=256), dict(protocol="gptq"), dict(sha256="cd" * 32), dict(bos=True)])
def test_what_was_measured_otherwise_is_never_averaged(change: dict[str, Any]) -> None:
    other = made("mi", 1, compressed=dict(docs=score(50.0, **change)), dense=dict(docs=score(31.0, **change)))
    runs = [made("mi", 0, 40.0), other, made("original", 0, 44.0), made("original", 1, 45.0)]
    arms = compare(runs)["arms"]
    (field,) = change
    labels = list(arms[0]["texts"])
    assert len(labels) == 2 and all(label.startswith(f"docs ({field} ") for label in labels)
    assert [arms[0]["texts"][label]["perplexity"]["values"] for label in labels] == [[40.0], [50.0]]
    assert "docs was not measured in one way" in notices(runs) and f"perplexity of {labels[1]} from 1 of 2" in notices(
        runs
    )
    assert {test["name"]: test["n"] for test in compare(runs)["tests"]} == {labels[0]: 1}


def test_unequal_bits_are_said_aloud() -> None:
    near = [made("original", true_bits=3.130), made("mi", true_bits=3.144)]
    far = [made("original", true_bits=3.130), made("mi", true_bits=3.147)]
    assert notices(near) == ""
    assert "not at equal true bits: mi 3.147 (+0.5%) against original 3.130" in notices(far)


def test_everything_else_that_differs_is_told() -> None:
    assert "different models: tiny, large" in notices([made(), made(model="large", fingerprint="e" * 64)])
    elsewhere = ENVIRONMENT | dict(platform="Windows", threads=2)
    assert "differ in platform, threads" in notices([made(), made(seed=1, environment=elsewhere)])
    assert "not in one" not in notices([made(), made(seed=1)])
    other = made("original", identity=dict(tokens_sha256="0" * 63 + "9"))
    assert "seed 0: the runs were not calibrated on the same tokens" in notices([made(), other])
    assert "the arms do not have the same seeds: mi 0, 1; original 0" in notices(
        [made(), made(seed=1), made("original")]
    )
    fallbacks = [dict(layer="a", what="damping raised"), dict(layer="b", what="x"), dict(layer="c", what="x")]
    assert "mi: 3 fallbacks in 1 run, 2 of them: x" in notices([made(fallbacks=fallbacks)])
    resumed = made(resumed_blocks=4, environment_changes=["torch: there 1, here 2"])
    assert "runs/mi-0: resumed after 4 blocks" in notices([resumed]) and "torch: there 1" in notices([resumed])


def test_evaluations_that_were_not_alike_are_told() -> None:
    def evaluated(arm: str, **block: Any) -> Run:
        dense = dict(model="base", fingerprint="d" * 64)
        return made(arm, evaluation={"results": {}, "mico": dict(dtype="float32", device="cpu", dense=dense) | block})

    assert "mico eval" not in notices([evaluated("mi"), evaluated("original"), made("enhanced")])
    half = [evaluated("mi"), evaluated("original", dtype="bfloat16")]
    assert "mico eval did not measure all runs with one dtype: bfloat16, float32" in notices(half)
    other = [evaluated("mi"), evaluated("original", dense=dict(model="other", fingerprint="e" * 64))]
    assert "mico eval did not compare all runs with one dense model: base, other" in notices(other)
    alone = [evaluated("mi"), evaluated("original", dense=None)]
    assert "dense model" not in notices(alone)


def test_other_versions_make_other_arms() -> None:
    newer = made(seed=1, environment=ENVIRONMENT | dict(mico="0.2.0"))
    assert [arm["name"] for arm in compare([made(), newer])["arms"]] == [
        "mi, version of mico 0.1.0", "mi, version of mico 0.2.0",
    ]  # fmt: skip


def test_answers_held_out_of_a_training_are_tested_as_tasks_are() -> None:
    def run(arm: str, seed: int, loss: float, count: int = 256) -> Run:
        known = dict(loss=loss, right=1 - loss, answers=count, tokens=2 * count)
        return made(arm, seed, compressed={}, dense={}, answers=dict(dense=known, quantized=known))

    runs = [run("original", seed, 0.3 + 0.01 * seed) for seed in range(3)]
    runs += [run("mi", seed, 0.2 + 0.02 * seed) for seed in range(3)]
    found = compare(runs)
    told = found["arms"][1]["tasks"]["answers held out"]
    assert told["loss"]["values"] == pytest.approx([0.2, 0.22, 0.24]) and told["right"]["n"] == 3
    tests = {test["figure"]: test for test in found["tests"]}
    wanted = ttest_rel([0.2, 0.22, 0.24], [0.3, 0.31, 0.32])
    assert tests["loss"]["p"] == pytest.approx(wanted.pvalue) and tests["loss"]["scale"] == "plain"
    text = markdown(sections(found))
    assert "answers held out loss" in text and "nats a token" in text and "lm-eval" not in text
    apart = compare([run("mi", 0, 0.2), run("mi", 1, 0.2, count=9)])["arms"][0]["tasks"]
    assert sorted(apart) == ["answers held out (answers 256)", "answers held out (answers 9)"]


def test_tasks_with_their_errors() -> None:
    values = dict(mi=(0.61, 0.63, 0.65), original=(0.52, 0.55, 0.53))
    runs = [made(arm, seed, evaluation=evaluation(acc)) for arm in values for seed, acc in enumerate(values[arm])]
    found = compare(runs)
    quiz = found["arms"][0]["tasks"]["quiz"]
    assert quiz["acc"]["mean"] == pytest.approx(0.63) and quiz["acc"]["sd"] == pytest.approx(0.02)
    assert quiz["acc stderr"]["mean"] == pytest.approx(0.01)
    assert list(quiz) == ["acc", "acc stderr", "exact_match (strict)"]
    test = next(test for test in found["tests"] if test["figure"] == "acc")
    expected = ttest_rel(values["original"], values["mi"])
    assert (test["scale"], test["t"]) == ("plain", pytest.approx(expected.statistic)) and test["ratio"] is None
    assert test["effect"] == pytest.approx(statistics.fmean(values["original"]) - statistics.fmean(values["mi"]))
    shots = evaluation(0.7, **{"n-shot": {"quiz": 5}})
    apart = compare([made(evaluation=evaluation(0.6)), made(seed=1, evaluation=shots)])["arms"][0]["tasks"]
    assert {label: one["acc"]["values"] for label, one in apart.items()} == {
        "quiz (shots 0)": [0.6], "quiz (shots 5)": [0.7],
    }  # fmt: skip


def test_runs_that_were_trained_are_arms_too() -> None:
    """Their identity is the seed alone, which stands among the settings as well."""
    runs = [made("mi", seed, 40.0 + seed) for seed in (0, 1)]
    for run in runs:
        run.report["settings"] |= dict(seed=run.seed, learning_rate=2e-5)
        run.report["identity"] = dict(seed=run.seed)
    other = made("mi", 2)
    other.report["identity"], other.report["calibration"] = dict(seed=2), "another text"
    assert [arm["seeds"] for arm in compare([*runs, other])["arms"]] == [[0, 1], [2]]


def test_divergence_and_texts_that_mico_eval_added() -> None:
    later = dict(docs=score(40.0, kl_divergence=0.12, top1_agreement=0.8), ptb=score(77.0))
    with_kl = made("mi", 0, 40.0, evaluation={"results": {}, "mico": {"texts": later}})
    texts = compare([with_kl, made("mi", 1, 41.0)])["arms"][0]["texts"]
    assert texts["docs"]["kl"]["values"] == [0.12] and texts["docs"]["top1"]["mean"] == 0.8
    few, many = (
        made(seed=seed, compressed=dict(docs=score(40.0, kl_divergence=0.1, top1_agreement=0.8, kl_tokens=tokens)))
        for seed, tokens in enumerate((2048, 1024))
    )
    assert "the KL divergence of docs is not over the same tokens: 1,024, 2,048" in notices([few, many])
    assert "KL" not in notices([few])
    assert texts["docs"]["perplexity"]["n"] == 2 and texts["ptb"]["perplexity"]["values"] == [77.0]


def test_a_wrecked_arm_has_no_test() -> None:
    found = compare([made("original", s, 40.0 + s) for s in (0, 1)] + [made("mi", s, math.inf) for s in (0, 1)])
    assert found["tests"][0]["p"] is None and found["tests"][0]["reason"] == "a value is not finite"
    assert "mi: the perplexity of docs is not finite" in found["notices"]


def test_costs_count_what_an_earlier_run_did() -> None:
    seconds = {"load": 0.5, "compress": 4.0, "total": 5.0}
    reused = {"statistics": 2.0, "groups": 3.5, "mutual information": 1.0, "clustering": 2.0}
    found = costs(made(seconds=seconds, reused_seconds=reused, activations=dict(history=10, moments=20)).report)
    assert (found["mi_seconds"], found["clustering_seconds"]) == (1.0, 2.0)
    assert (found["total_seconds"], found["reused_seconds"]) == (10.5, 5.5)
    assert (found["history_bytes"], found["moments_bytes"], found["peak_device_bytes"]) == (10, 20, None)
    old = costs(made(seconds=seconds, reused_seconds={"groups": 3.5}).report)
    assert old["mi_seconds"] is None and old["history_bytes"] is None  # not recorded is not zero
    assert costs(made("original", activations={}).report)["history_bytes"] == 0  # no statistics, nothing kept
    assert costs(made("original", seconds=seconds).report)["mi_seconds"] == 0.0
    shared = [dict(rank=r, device="cpu", peak_host_bytes=1, solving_seconds=1.0 + r, share=0.5) for r in (0, 1)]
    assert costs(made(processes=shared).report)["solve_seconds"] == 2.0
