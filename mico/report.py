"""Verb: finished run folders in, one report or one table that compares them out (mico report)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from mico.callable import callable_module
from mico.errors import UserError
from mico.files import atomic_json, atomic_write, read_json
from mico.summary import check_writable, flat, sections
from mico.tables import NOTHING, Section, duration_text, number, perplexity_text, print_sections, size_text
from mico.tables import markdown as as_markdown

callable_module(__name__)
REPORT = "report.json"


def report(
    paths: str | Sequence[str],
    *,
    json: str | None = None,
    markdown: str | None = None,
    console: RichConsole | None = None,
) -> list[dict[str, Any]]:
    """Show one run folder in full, or several as one row each, on `console` (stdout when None).

    Returns the flat summary of every run with its folder, which is also what `json` gets; `markdown`
    gets what is shown. Raises UserError naming a folder that holds no report of a compression.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise UserError("report needs at least one run folder, for example results/tiny-llama-mico-1a2b3c4d")
    for option, file in (("--json", json), ("--markdown", markdown)):
        if file is not None:
            check_writable(option, file)
    reports = [_read(Path(path)) for path in paths]
    found = sections(reports[0]) if len(reports) == 1 else [comparison(reports, paths)]
    summaries = [dict(folder=path) | flat(one) for path, one in zip(paths, reports, strict=True)]
    if json is not None:
        atomic_json(json, summaries)
    if markdown is not None:
        atomic_write(markdown, as_markdown(found).encode())
    print_sections(found, console or RichConsole(file=sys.stdout, highlight=False))
    return summaries


def _read(path: Path) -> dict[str, Any]:
    file = path if path.name == REPORT else path / REPORT
    if not file.is_file():
        what = "unfinished, or not a run folder of mico compress" if path.is_dir() else "no such folder"
        raise UserError(f"{file} does not exist ({what}): give the folders that mico compress wrote")
    found = read_json(file)
    absent = sorted({"model", "settings", "identity", "dense", "compressed", "size", "layers", "seconds"} - set(found))
    if absent:
        raise UserError(
            f"{file} is no report of a compression ({absent[0]} is missing): give a folder of mico compress"
        )
    return found


# --- several runs ---------------------------------------------------------------------------------------------------


def comparison(reports: Sequence[dict[str, Any]], paths: Sequence[str]) -> Section:
    """One row a run with what came out; below, its folder and the options in which the runs differ."""
    options = [_options(one) for one in reports]
    names = list(dict.fromkeys(name for one in options for name in one))
    differing = [name for name in names if len({str(one.get(name)) for one in options}) > 1]
    texts = list(dict.fromkeys(name for one in reports for name in one["compressed"]))
    rows, legend = [], []
    for index, (one, chosen) in enumerate(zip(reports, options, strict=True), 1):
        summary = flat(one)
        settings = ", ".join(f"{name} {chosen[name]}" for name in differing if chosen.get(name) is not None)
        legend.append(f"{index}: {paths[index - 1]}" + (f" ({settings})" if settings else ""))
        rows.append(
            (
                str(index),
                one["arm"] or one["settings"]["method"],
                *(_score(summary, text) for text in texts),
                number(summary["nominal_bits"], 2),
                number(summary["true_bits"], 3),
                size_text(summary["packed_bytes"]),
                duration_text(summary["seconds"]),
            )
        )
    best = frozenset((_lowest(reports, text), 2 + column) for column, text in enumerate(texts))
    columns = ("", "run", *texts, "nominal", "true bits", "packed", "time")
    lines = [*legend, *(f"dense: {_dense(one)}" for one in _distinct(reports))]
    lines.append(
        f"Perplexity by protocol {reports[0]['protocol']}, the lowest of a text in bold; packed: size at true bits."
    )
    return Section(f"{len(reports)} runs", columns, tuple(rows), tuple(lines), best)


def _options(one: dict[str, Any]) -> dict[str, Any]:
    """Model, calibration and settings of a run under the names of their options, grouping flattened."""
    settings = dict(one["settings"])
    grouping = settings.pop("grouping") or {}
    settings["pattern"] = ":".join(map(str, settings["pattern"])) if settings["pattern"] else None
    calibration = {name: value for name, value in one["identity"].items() if name not in ("model", "text_sha256")}
    return (
        dict(model=one["model"])
        | settings
        | {"grouping": grouping.get("kind")}
        | grouping_options(grouping)
        | calibration
    )


def grouping_options(grouping: dict[str, Any]) -> dict[str, Any]:
    """The rest of a grouping's fields; information and clustering matter to grouping by MI alone."""
    relevant = ("n_groups", "mi_method", "cluster") if grouping.get("kind") == "mi" else ("n_groups",)
    return {name: grouping.get(name) for name in relevant}


def _score(summary: dict[str, Any], text: str) -> str:
    return perplexity_text(summary["compressed"][text]) if text in summary["compressed"] else NOTHING


def _lowest(reports: Sequence[dict[str, Any]], text: str) -> int:
    values = [one["compressed"].get(text, {}).get("perplexity", float("inf")) for one in reports]
    return values.index(min(values))


def _distinct(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One report for every dense model and set of its perplexities."""
    return list({_dense(one): one for one in reports}.values())


def _dense(one: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {perplexity_text(score['perplexity'])}" for name, score in one["dense"].items())
    return f"{one['model']}: {scores}"
