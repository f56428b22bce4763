"""The rows of visual.py as tables: a suite each, and the mean over suites."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mico.comparison.tables import stat_text
from mico.comparison.visual import BITS, Row
from mico.tables import NOTHING, Section, number, size_text

SCORE = 4  # its column
ALL, DENSE = "all", "dense"  # visual tokens; weights


def visual_sections(rows: Sequence[Row]) -> list[Section]:
    """A table for every suite, and one of their means where there are several; nothing without rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr([row[name] for name in ("suite", "data", "limit")]), []).append(row)
    titles = [group[0]["suite"] for group in groups.values()]
    found = [
        _suite(group, number_of if titles.count(group[0]["suite"]) > 1 else None)
        for number_of, group in enumerate(groups.values(), 1)
    ]
    return [*found, *_means(rows)]


def title_of(suite: str, place: int | None = None) -> str:
    """Of a suite's table; `place` where it was asked in several ways."""
    return f"{suite} by visual tokens" + (f" ({place})" if place else "")


def score_text(measure: str) -> Callable[[float], str]:
    """How a suite's figure is written."""
    return (lambda value: number(value, 1)) if measure == "points" else (lambda value: f"{value:.1%}")


def bits_text(row: Row) -> str:
    """'3.132': true bits a weight; '3.132 a 4.00' where activations are quantized too."""
    found = [row["figures"].get(name) for name in BITS]
    parts = [(bits["mean"], digits) for bits, digits in zip(found, (3, 2), strict=True) if bits is not None]
    return " a ".join(number(*part) for part in parts) or DENSE


def flops_text(count: float) -> str:
    """'8.35 T', '667 M'."""
    return size_text(count).removesuffix("B").replace("k", "K")


def _tokens(row: Row) -> str:
    """Budget and method: '192 sparsevlm 2.0', 'all'."""
    return ALL if row["tokens"] is None else f"{row['tokens']['retain']} {row['method']}"


def _suite(rows: Sequence[Row], place: int | None) -> Section:
    measure, peak = rows[0]["measure"], any("peak_device_bytes" in row["figures"] for row in rows)
    columns = ("model", "bits", "visual tokens", "layer", measure, "kept", "s", "faster", "KV", "FLOPs")
    cells = [(*_cells(row), *([_plain(row, "peak_device_bytes", size_text)] if peak else [])) for row in rows]
    return Section(
        title_of(rows[0]["suite"], place), columns + (("peak memory",) if peak else ()), tuple(cells),
        tuple(_lines(rows)), _best(rows),
    )  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    figures, ratios = row["figures"], row["ratios"]
    faster = 1 / ratios["latency"] if "latency" in ratios else None
    return (
        row["model"], bits_text(row), _tokens(row),
        _plain(row, "processed_tokens", lambda value: number(value, 1)),
        stat_text(figures["score"], score_text(row["measure"])),
        f"{ratios['score']:.1%}" if "score" in ratios else NOTHING,
        _plain(row, "latency", lambda value: number(value, 3)), NOTHING if faster is None else f"×{faster:.2f}",
        _plain(row, "kv_bytes", size_text), _plain(row, "prefill_flops", flops_text),
    )  # fmt: skip


def _plain(row: Row, name: str, text: Callable[[float], str]) -> str:
    found = row["figures"].get(name)
    return NOTHING if found is None else text(found["mean"])


def _best(rows: Sequence[Row]) -> frozenset[tuple[int, int]]:
    """The highest score of every budget, where several compete for it."""
    strong = set()
    for budget in {row["tokens"]["retain"] for row in rows if row["tokens"]}:
        scores = {
            place: row["figures"]["score"]["mean"]
            for place, row in enumerate(rows)
            if row["tokens"] and row["tokens"]["retain"] == budget
        }
        if len(set(scores.values())) > 1:
            strong |= {(place, SCORE) for place, score in scores.items() if score == max(scores.values())}
    return frozenset(strong)


def _lines(rows: Sequence[Row]) -> list[str]:
    """What has to be known before the figures are believed."""
    asked = {f"{row['questions']:,} of {row['of']:,}" for row in rows}
    lines = [f"Questions: {', '.join(sorted(asked))}."]
    seen = sorted({row["figures"]["visual_tokens"]["mean"] for row in rows if "visual_tokens" in row["figures"]})
    if seen:
        lines[0] += f" Visual tokens of a prompt: {', '.join(f'{value:g}' for value in seen)}."
    against = list(dict.fromkeys(row["reference"] for row in rows if row["reference"]))
    if against:
        lines.append(f"Kept and faster: against all visual tokens of {', '.join(against)}.")
    lines.append(
        "Layer: visual tokens that a layer processes, mean over layers. Bits: true bits a weight. s: seconds a "
        "question, prefill and answer. KV and FLOPs: of a prompt, in the layers of the language model."
    )
    for name, what in (("device", "devices"), ("batch_sizes", "batch sizes"), ("dtype", "dtypes")):
        values = {str(row[name]).strip("[]") for row in rows}
        if len(values) > 1:
            lines.append(f"Seconds are not comparable: {what} {', '.join(sorted(values))}.")
    if any("activation_bits" in row["figures"] for row in rows):
        lines.append("Bits behind an a: of an activation.")
    if any(row["n"] > 1 for row in rows):
        lines.append("Mean ± sample standard deviation over the seeds.")
    return lines


def _means(rows: Sequence[Row]) -> list[Section]:
    """What is kept in the mean over the suites, where a model was asked several with the same visual tokens."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], _tokens(row)), []).append(row)
    suites = {row["suite"] for row in rows}
    cells = [
        (
            model, bits_text(several[0]), tokens, _mean(several, "score"), _mean(several, "kv_bytes"),
            _mean(several, "prefill_flops"),
        )
        for (model, tokens), several in groups.items()
        if {row["suite"] for row in several} == suites and len(several) == len(suites)
    ]  # fmt: skip
    if len(suites) < 2 or not cells:
        return []
    lines = (f"Means over {', '.join(sorted(suites))} of what is left of the figures with all visual tokens.",)
    return [
        Section("Kept, all suites", ("model", "bits", "visual tokens", "score", "KV", "FLOPs"), tuple(cells), lines)
    ]


def _mean(rows: Sequence[Row], name: str) -> str:
    found: list[Any] = [row["ratios"].get(name) for row in rows]
    return NOTHING if None in found else f"{statistics.fmean(found):.1%}"
