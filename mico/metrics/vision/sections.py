"""Suites as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mico.metrics.vision.suites import SUITES
from mico.tables import NOTHING, Section, number, size_text


def suites_sections(model: str, records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What every suite found, and what a question cost."""
    rows = [(label(one), *cells) for one in records for cells in SUITES[one["suite"]].rows(one["figures"])]
    lines = [line for one in records for line in _lines(one)]
    costs = tuple(_cost(one) for one in records)
    return [
        Section(f"Suites of {model}", ("suite", "measure", "value"), tuple(rows), tuple(lines)),
        Section(
            "Cost of a question", ("suite", "visual tokens", "a layer", "s", "prefill FLOPs", "KV cache"), costs,
            ("Means over the questions. A layer: visual tokens that a layer processes, averaged over the layers.",),
        ),
    ]  # fmt: skip


def label(record: Mapping[str, Any]) -> str:
    """The suite with its budget: 'pope, 192 tokens (sparsevlm 2.0)'."""
    tokens = record["tokens"]
    if tokens is None:
        return str(record["suite"])
    which = f"{tokens['method']} {tokens['version']}" if tokens["method"] == "sparsevlm" else tokens["method"]
    how = ", adaptive" if tokens["adaptive"] else ""
    return f"{record['suite']}, {tokens['retain']} tokens ({which}{how})"


def _cost(record: Mapping[str, Any]) -> tuple[str, ...]:
    flops, kept = record.get("prefill_flops"), record.get("kv_bytes")
    return (
        label(record), number(record["visual_tokens"], 0), number(record.get("processed_tokens"), 1),
        number(record["latency"], 3), NOTHING if flops is None else f"{flops:.3g}",
        NOTHING if kept is None else size_text(kept),
    )  # fmt: skip


def _lines(record: Mapping[str, Any]) -> list[str]:
    asked, figures = f"{record['questions']:,} of {record['of']:,} questions", record["figures"]
    lines = [f"{record['suite']}: {asked} (--limit)"] if record["questions"] < record["of"] else []
    if record["cut"]:
        lines.append(f"{record['suite']}: {record['cut']:,} answers were cut at the most tokens allowed")
    if record["batch_halvings"]:
        times, left = record["batch_halvings"], record["batch_size"]
        lines.append(f"{record['suite']}: memory ran out, the batch was halved {times} times, to {left}")
    if record.get("without_rater"):
        lines.append(
            f"{record['suite']}: no word stood out in {record['without_rater']:.1%} of the questions, all judged"
        )
    if figures.get("unpaired"):
        lines.append(f"{record['suite']}: {figures['unpaired']:,} questions without their pair count in acc alone")
    if figures.get("absent"):
        lines.append(f"{record['suite']}: no question of {', '.join(figures['absent'])}: they add nothing to the sums")
    return lines
