"""Verb: finished run folders in; one report, or arms compared over their seeds, out (mico report)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from mico.callable import callable_module
from mico.comparison import Run, compare
from mico.comparison import sections as compared
from mico.errors import UserError
from mico.files import atomic_json, atomic_write, read_json
from mico.summary import check_writable, sections
from mico.tables import markdown as as_markdown
from mico.tables import print_sections

callable_module(__name__)
REPORT = "report.json"
EVALUATION = Path("eval") / "results.json"  # of `mico eval RUN`, inside the run folder
NEEDED = {"model", "arm", "settings", "identity", "dense", "compressed", "size", "layers", "seconds", "fallbacks"}
REMEDY = "restore it, or run its mico compress again with another --save"


def report(
    paths: str | Sequence[str],
    *,
    json: str | None = None,
    markdown: str | None = None,
    baseline: str | None = None,
    console: RichConsole | None = None,
) -> dict[str, Any]:
    """Show one run folder in full, or compare several, on `console` (stdout when None).

    Runs that differ in nothing but the seed are one arm; every arm is tested against that of the first run, or
    against `baseline`: the name of an arm, or one of the folders. markdown: a file for what is shown; json: one for
    what is returned, the plain values behind every cell (docs/report.md). Raises UserError naming a folder that holds
    no report of a compression, or an option that cannot be met.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise UserError("report needs at least one run folder, for example results/tiny-llama-mico-1a2b3c4d")
    for option, file in (("--json", json), ("--markdown", markdown)):
        if file is not None:
            check_writable(option, file)
    runs = _distinct([_read(path) for path in paths])
    values = _finite(compare(runs, baseline))
    found = sections(runs[0].report) if len(runs) == 1 else compared(values)
    if json is not None:
        atomic_json(json, values)
    if markdown is not None:
        atomic_write(markdown, as_markdown(found).encode())
    print_sections(found, console or RichConsole(file=sys.stdout, highlight=False))
    return values


# --- folders --------------------------------------------------------------------------------------------------------


def _read(path: str) -> Run:
    """The run whose folder, or whose report.json, `path` is."""
    file = Path(path) if Path(path).name == REPORT else Path(path) / REPORT
    if not file.is_file():
        what = "unfinished, or not a run folder of mico compress" if file.parent.is_dir() else "no such folder"
        raise UserError(f"{file} does not exist ({what}): give the folders that mico compress wrote")
    found = read_json(file, REMEDY)
    absent = sorted(NEEDED - set(found))
    if absent:
        raise UserError(
            f"{file} is no report of a compression ({absent[0]} is missing): give a folder of mico compress"
        )
    evaluation = file.parent / EVALUATION
    remedy = f"delete it, or run mico eval {file.parent} again"
    return Run(str(file.parent), found, read_json(evaluation, remedy) if evaluation.exists() else None)


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Every folder once, as a pattern and a name beside it may give one twice."""
    return list({Path(run.folder).resolve(): run for run in reversed(runs)}.values())[::-1]


def _finite(value: Any) -> Any:
    """The same values with None for what is infinite or no number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
