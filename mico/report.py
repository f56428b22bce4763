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
from mico.files import atomic_json, atomic_write, check_writable, read_json, writing
from mico.metrics.sections import evaluation_sections, tasks_section
from mico.summary import sections
from mico.tables import Section, print_sections
from mico.tables import markdown as as_markdown

callable_module(__name__)
REPORT, PAGE = "report.json", "report.html"
EVALUATION = Path("eval") / "results.json"  # of `mico eval RUN`, inside the run folder
NEEDED = {"model", "arm", "settings", "calibration", "identity", "dense", "compressed", "size", "layers", "seconds"}
NEEDED |= {"fallbacks", "environment", "protocol"}
REMEDY = "restore it, or run its mico compress again with another --save"


def report(
    paths: str | Sequence[str],
    *,
    json: str | None = None,
    markdown: str | None = None,
    html: str | None = None,
    figures: str | None = None,
    baseline: str | None = None,
    console: RichConsole | None = None,
) -> dict[str, Any]:
    """Show one run folder in full, or compare several, on `console` (stdout when None).

    Runs that differ in nothing but the seed are one arm; every arm is tested against that of the first run, or
    against `baseline`: the name of an arm, or one of the folders. markdown: a file for what is shown; html: one for
    a page of it with figures, which needs no network; figures: a folder for them as PNG and SVG; json: a file for what
    is returned, the plain values behind every cell (docs/report.md). Raises UserError naming a folder that holds no
    report of a compression, or an option that cannot be met.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise UserError("report needs at least one run folder, for example results/tiny-llama-mico-1a2b3c4d")
    for option, file in (("--json", json), ("--markdown", markdown), ("--html", html)):
        if file is not None:
            check_writable(option, file)
    if figures is not None:
        _make_folder("--figures", Path(figures))
    runs = _distinct([_read(path) for path in paths])
    values = _finite(compare(runs, baseline))
    found = _one(runs[0]) if len(runs) == 1 else compared(values)
    if json is not None:
        atomic_json(json, values)
    if markdown is not None:
        atomic_write(markdown, as_markdown(found).encode())
    if html is not None or figures is not None:
        _draw(html, figures, runs, found, values)
    if len(runs) == 1 and not any((json, markdown, html, figures)):
        found = [*found, *_page(runs[0])]
    print_sections(found, console or RichConsole(file=sys.stdout, highlight=False))
    return values


def _one(run: Run) -> list[Section]:
    """The report of one run, with what `mico eval` of it found."""
    found = sections(run.report)
    place = next(index for index, section in enumerate(found) if section.title == "Perplexity") + 1
    return [*found[:place], *_evaluated(run), *found[place:]]


def _page(run: Run) -> list[Section]:
    """Where the page of a run lies, if it has one."""
    page = Path(run.folder) / PAGE
    return [Section("Page", lines=(str(page),))] if page.is_file() else []


def _evaluated(run: Run) -> list[Section]:
    if run.evaluation is None:
        return []
    tasks = {"tasks": run.evaluation.get("results", {}), "n-shot": run.evaluation.get("n-shot", {})}
    if "mico" not in run.evaluation:  # written by lm-eval itself
        return [tasks_section(dict(model=run.folder) | tasks)]
    try:
        return evaluation_sections(run.evaluation["mico"] | tasks)
    except KeyError as error:
        raise _no_evaluation(Path(run.folder), f"{error} is missing") from error


def _draw(
    html: str | None, figures: str | None, runs: Sequence[Run], found: list[Section], values: dict[str, Any]
) -> None:
    """The page and the files of its figures."""
    from mico.pages import comparison_figures, report_figures, save_figures, write_html  # matplotlib takes its time
    from mico.pages.run import headline

    alone = runs[0].report if len(runs) == 1 else None
    drawn = comparison_figures(values) if alone is None else report_figures(alone)
    if figures is not None:
        save_figures(drawn, figures)
    if html is None:
        return
    if alone is not None:
        data = alone if runs[0].evaluation is None else alone | dict(evaluation=runs[0].evaluation)
        write_html(html, found[0].title, found, drawn, data, headline(alone))
    else:
        models = ", ".join(dict.fromkeys(arm["options"]["model"] for arm in values["arms"]))
        write_html(html, f"mico: {models} compared", found, drawn, values)


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
    return Run(str(file.parent), found, _read_evaluation(file.parent))


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    """results.json of `mico eval FOLDER`; None where it was not run."""
    if not (folder / EVALUATION).exists():
        return None
    found = read_json(folder / EVALUATION, f"delete it, or run mico eval {folder} again")
    own = found.get("mico", {})
    parts = [(name, found.get(name, {})) for name in ("results", "n-shot", "versions", "n-samples", "mico")]
    parts.append(("mico.texts", own.get("texts", {}) if isinstance(own, dict) else {}))
    parts += [one for name, part in parts if name in ("results", "mico.texts") for one in _items(part)]
    for name, part in parts:
        if not isinstance(part, dict):
            raise _no_evaluation(folder, f"{name} is no object")
    return found


def _items(part: Any) -> list[tuple[str, Any]]:
    return list(part.items()) if isinstance(part, dict) else []


def _no_evaluation(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder / EVALUATION} is no result of mico eval ({why}): delete it, or run mico eval {folder} again"
    )


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Every folder once, as a pattern and a name beside it may give one twice."""
    return list({Path(run.folder).resolve(): run for run in reversed(runs)}.values())[::-1]


def _make_folder(option: str, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: this is a file, give a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _finite(value: Any) -> Any:
    """The same values with None for what is infinite or no number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
