"""Runs in, plain values out: arms with mean and sd over their seeds, paired tests against one of them, ablations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mico.comparison.arms import Arm, ablations, group
from mico.comparison.measures import Labels, Run, dense_values, measures, task_labels, text_labels
from mico.comparison.notices import notices
from mico.comparison.paired import paired_test, statistic
from mico.errors import UserError
from mico.summary import flat

FORMAT, VERSION = "mico-comparison", 1


def compare(runs: Sequence[Run], baseline: str | None = None) -> dict[str, Any]:
    """The comparison of finished runs as plain values, for JSON and for tables; docs/report.md explains every name.

    baseline: the arm that the others are tested against, by its name or one of its folders; None: that of the first
    run. Raises UserError when no arm is called so.
    """
    arms = group(runs)
    texts, tasks = text_labels(runs), task_labels(runs)
    takes = measures(texts, tasks)
    records = []
    for arm in arms:
        by_seed = arm.by_seed
        figures = {
            name: merged({seed: [take(run) for run in again] for seed, again in by_seed.items()})
            for name, take in takes.items()
        }
        facts = dict(name=arm.name, options=arm.options, seeds=list(by_seed), n=len(by_seed))
        fallbacks = sum(len(run.report["fallbacks"]) for run in arm.runs)
        records.append(facts | dict(folders=[run.folder for run in arm.runs], fallbacks=fallbacks) | figures)
    base = _baseline(arms, baseline)
    return dict(
        format=FORMAT, version=VERSION, baseline=base, arms=records, tests=_tests(records, base),
        ablations=ablations(arms), dense=_dense(arms, texts), notices=notices(arms, records, base, texts),
        runs=[_run(arm, run) for arm in arms for run in arm.runs],
    )  # fmt: skip


def nothing_compared() -> dict[str, Any]:
    """The same values of no run at all, for a report of evaluations alone."""
    lists: dict[str, Any] = {name: [] for name in ("arms", "tests", "ablations", "dense", "notices", "runs")}
    return dict(format=FORMAT, version=VERSION, baseline=None) | lists


def _baseline(arms: list[Arm], wanted: str | None) -> str:
    if wanted is None:
        return arms[0].name
    for arm in arms:
        if wanted == arm.name or wanted.rstrip("/") in [run.folder.rstrip("/") for run in arm.runs]:
            return arm.name
    known = ", ".join(f"'{arm.name}'" for arm in arms)
    raise UserError(f"--baseline {wanted}: no such arm, choose from {known}, or one of the folders")


def merged(by_seed: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Nested figures of every seed (a list: runs of one seed, whose mean counts as one) as nested statistics."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for several in by_seed.values() for one in several for name in one):
        cells = {seed: [one[name] for one in several if name in one] for seed, several in by_seed.items()}
        cells = {seed: values for seed, values in cells.items() if values}
        if any(isinstance(value, dict) for values in cells.values() for value in values):
            found[name] = merged(cells)
        else:
            found[name] = statistic({seed: statistics.fmean(values) for seed, values in cells.items()})
    return found


def _run(arm: Arm, run: Run) -> dict[str, Any]:
    """One run by itself: where it lies, and its own figures (`summary.flat`)."""
    return dict(folder=run.folder, seed=run.seed) | flat(run.report) | dict(arm=arm.name)


# --- tests ----------------------------------------------------------------------------------------------------------


def _tests(records: list[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """Every arm against the baseline: perplexities on the log scale, metrics of tasks as they are."""
    against = next(record for record in records if record["name"] == base)
    found = []
    for record in records:
        if record is against:
            continue
        for kind, name, figure in _compared(record, against):
            sides = [one[kind].get(name, {}).get(figure) for one in (record, against)]
            a, b = (dict(zip(side["seeds"], side["values"], strict=True)) if side else {} for side in sides)
            about = dict(arm=record["name"], baseline=base, kind=kind, name=name, figure=figure)
            found.append(about | paired_test(a, b, log=kind == "texts"))
    return found


def _compared(record: dict[str, Any], against: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What both arms were measured by, as (kind, name, figure)."""
    texts = [("texts", name, "perplexity") for name in record["texts"] if name in against["texts"]]
    tasks = [
        ("tasks", task, metric)
        for task, values in record["tasks"].items()
        for metric in values
        if not metric.endswith(" stderr") and metric in against["tasks"].get(task, {})
    ]
    return texts + tasks


def _dense(arms: list[Arm], texts: Labels) -> list[dict[str, Any]]:
    """{model, texts: {text: perplexity}} of every dense model."""
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        for run in arm.runs:
            found.setdefault(arm.options["model"], {}).update(dense_values(run, texts))
    return [dict(model=model, texts=values) for model, values in found.items()]
