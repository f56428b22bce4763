"""Questions about images, as plain values: accuracy x visual tokens x weight bits x latency x KV bytes x prefill FLOPs.

Every record that `mico eval --suite` left, of dense models and of compressed ones, in rows that can stand beside one
another: one row a suite, model or arm, and choice of visual tokens, with mean and sd over the seeds of an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mico.comparison.measures import FINGERPRINT_DIGITS
from mico.comparison.values import merged
from mico.loading.names import resolve

Row = dict[str, Any]
COSTS = (
    "latency", "seconds", "new_tokens", "visual_tokens", "prompt_tokens", "equal_tokens", "processed_tokens",
    "kv_bytes", "prefill_flops", "peak_device_bytes",
)  # fmt: skip
BITS = ("true_bits", "activation_bits")  # of a compressed model
COMPARED = ("score", "latency", "kv_bytes", "prefill_flops")  # of which rows tell their ratio to the reference
SAME = ("suite", "data", "limit")  # what two rows must share to be compared


@dataclass(frozen=True)
class Evaluated:
    """results.json of `mico eval` in `folder`. arm, seed: of the run that was measured, where the report has it."""

    folder: str
    results: dict[str, Any]
    arm: str | None = None
    seed: int = 0

    @property
    def own(self) -> dict[str, Any]:
        """What mico measured itself."""
        found: dict[str, Any] = self.results.get("mico") or {}
        return found

    @property
    def suites(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.own.get("suites") or []
        return found

    @property
    def model(self) -> tuple[str, str]:
        """What tells models apart: the fingerprint and the dtype."""
        return str(self.own.get("fingerprint")), str(self.own.get("dtype"))


def headline(suite: str, figures: dict[str, Any]) -> tuple[str, float]:
    """The one figure of a suite that the field tells, and its name: points of MME, mean F1 of POPE, else accuracy."""
    if suite == "mme":
        return "points", figures["perception"] + figures["cognition"]
    return ("F1", figures["f1"]) if suite == "pope" else ("accuracy", figures["accuracy"])


def visual_rows(found: Sequence[Evaluated]) -> list[Row]:
    """The rows, suites and models as they come, all visual tokens first, then the most; docs/vision.md has the names.

    Folders of one model (by its weights, not its name) are one, and those of a run in the report belong to its arm.
    """
    arms = {one.model: (one.arm, one.seed) for one in found if one.arm is not None}
    found = [one if one.arm else Evaluated(one.folder, one.results, *arms.get(one.model, (None, 0))) for one in found]
    labels = _labels(found)
    members: dict[str, list[tuple[Evaluated, dict[str, Any]]]] = {}
    for one in found:
        for record in one.suites:
            key = repr((labels[one.arm or one.model], [record.get(name) for name in SAME], record["tokens"]))
            members.setdefault(key, []).append((one, record))
    rows = [_row(labels[several[0][0].arm or several[0][0].model], several) for several in members.values()]
    _order(rows)
    for row in rows:
        row["reference"], row["ratios"] = _against(row, rows)
    return rows


def _labels(found: Sequence[Evaluated]) -> dict[Any, str]:
    """A name for every arm, and for every model by what tells it apart from others of that name."""
    names: dict[Any, str] = {one.arm: one.arm for one in found if one.arm is not None}
    models = {one.model: _short(one.own.get("model"), str) for one in found if one.arm is None and one.suites}
    for (fingerprint, dtype), name in models.items():
        alike = [other for other, same in models.items() if same == name]
        if len({other for other, _ in alike}) > 1:
            name = f"{name} ({fingerprint[:FINGERPRINT_DIGITS]})"
        if [other for other, _ in alike].count(fingerprint) > 1:
            name = f"{name}, {dtype}"
        names[fingerprint, dtype] = name
    return names


def _short(model: Any, named: Callable[[str], str] = resolve) -> str:
    """A model's name without the path before it; of a run folder's model/ the name of the run."""
    path = Path(named(str(model)))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _row(label: str, members: Sequence[tuple[Evaluated, dict[str, Any]]]) -> Row:
    """One row of records that differ in nothing but the seed; several of one seed count once, with their mean."""
    first, record = members[0]
    by_seed: dict[int, list[dict[str, float]]] = {}
    for one, found in members:
        values: dict[str, Any] = {"score": headline(found["suite"], found["figures"])[1]}
        values |= {name: one.own.get(name) for name in BITS} | {name: found.get(name) for name in COSTS}
        known = {name: float(value) for name, value in values.items() if value is not None}
        by_seed.setdefault(one.seed, []).append(known)
    base = first.own.get("base_model")
    return dict(
        suite=record["suite"], data=record.get("data"), limit=record.get("limit"), questions=record["questions"],
        of=record["of"], model=label, name=_short(first.own.get("model")), base=_short(base) if base else None,
        tokens=record["tokens"],
        method=method_name(record["tokens"]), measure=headline(record["suite"], record["figures"])[0],
        folders=list(dict.fromkeys(one.folder for one, _ in members)), seeds=sorted(by_seed), n=len(by_seed),
        dtype=first.own.get("dtype"), device=first.own.get("device"),
        batch_sizes=sorted({found.get("batch_size") or 0 for _, found in members}), figures=merged(by_seed),
    )  # fmt: skip


def method_name(tokens: dict[str, Any] | None) -> str | None:
    """'sparsevlm 2.0', 'fastv', 'sparsevlm 2.0, adaptive'; None where no token goes."""
    if tokens is None:
        return None
    name = f"{tokens['method']} {tokens['version']}" if tokens["method"] == "sparsevlm" else str(tokens["method"])
    return f"{name}, adaptive" if tokens["adaptive"] else name


def _order(rows: list[Row]) -> None:
    places = {name: list(dict.fromkeys(row[name] for row in rows)) for name in ("suite", "model", "method")}

    def key(row: Row) -> tuple[Any, ...]:
        suite, model, method = (places[name].index(row[name]) for name in places)
        retain = row["tokens"]["retain"] if row["tokens"] else 0
        return suite, repr(row["data"]), repr(row["limit"]), model, row["tokens"] is not None, method, -retain

    rows.sort(key=key)


def _against(row: Row, rows: Sequence[Row]) -> tuple[str | None, dict[str, float]]:
    """The dense model that this one was made from, with all its visual tokens, else this model itself with all of them;
    and the ratios of this row's means to its."""
    whole = [one for one in rows if one["tokens"] is None and all(one[name] == row[name] for name in SAME)]
    dense = [one for one in whole if row["base"] and one["base"] is None and one["name"] == row["base"]]
    found = dense if len(dense) == 1 else [one for one in whole if one["model"] == row["model"]]
    if not found:
        return None, {}
    means = [
        {name: one["figures"][name]["mean"] for name in COMPARED if name in one["figures"]} for one in (row, found[0])
    ]
    return found[0]["model"], {name: means[0][name] / of for name, of in means[1].items() if of and name in means[0]}
