"""Verb: finished run folders, or what mico eval wrote, in; one report, or arms compared, out (mico report)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from mico.callable import callable_module
from mico.comparison import Evaluated, Run, compare, nothing_compared, visual_rows, visual_sections
from mico.comparison import sections as compared
from mico.errors import UserError
from mico.files import atomic_json, atomic_write, check_writable, read_json, writing
from mico.metrics.sections import evaluation_sections, tasks_section
from mico.summary import sections
from mico.tables import Section, print_sections
from mico.tables import markdown as as_markdown

callable_module(__name__)
REPORT, PAGE = "report.json", "report.html"
RESULTS = "results.json"  # of mico eval
EVALUATION = Path("eval") / RESULTS  # of `mico eval RUN`, inside the run folder
NEEDED_OF_SUITE = {"suite", "tokens", "figures", "questions", "of"}
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

    A folder may also be what `mico eval --suite ... --output-path` wrote, of a dense model or any other: what all of
    them were asked about images stands in one table (docs/vision.md).
    Runs that differ in nothing but the seed are one arm; every arm is tested against that of the first run, or
    against `baseline`: the name of an arm, or one of the folders. markdown: a file for what is shown; html: one for
    a page of it with figures, which needs no network; figures: a folder for them as PNG and SVG; json: a file for what
    is returned, the plain values behind every cell (docs/report.md). Raises UserError naming a folder that holds
    neither, or an option that cannot be met.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise UserError("report needs at least one run folder, for example results/tiny-llama-mico-1a2b3c4d")
    for option, file in (("--json", json), ("--markdown", markdown), ("--html", html)):
        if file is not None:
            check_writable(option, file)
    if figures is not None:
        _make_folder("--figures", Path(figures))
    read = _distinct([_read(path) for path in paths])
    runs = [one for one in read if isinstance(one, Run)]
    if baseline is not None and not runs:
        raise UserError(f"--baseline {baseline}: there is no run of mico compress among the folders: leave it out")
    values = compare(runs, baseline) if runs else nothing_compared()
    values = _finite(values | dict(visual=visual_rows(_evaluations(read, values))))
    found = [] if not runs else _one(runs[0]) if len(runs) == 1 else compared(values)
    if not runs and len(read) == 1:
        found = _suites_alone(read[0])
    found = [*found, *visual_sections(values["visual"])]
    if json is not None:
        atomic_json(json, values)
    if markdown is not None:
        atomic_write(markdown, as_markdown(found).encode())
    if html is not None or figures is not None:
        _draw(html, figures, runs, found, values)
    if len(read) == len(runs) == 1 and not any((json, markdown, html, figures)):
        found = [*found, *_page(runs[0])]
    print_sections(found, console or RichConsole(file=sys.stdout, highlight=False))
    return values


def _one(run: Run) -> list[Section]:
    """The report of one run, with what `mico eval` of it found."""
    found = _sections(run.report)
    place = next(index for index, section in enumerate(found) if section.title == "Size")  # behind perplexity
    return [*found[:place], *_evaluated(run), *found[place:]]


def _sections(report: dict[str, Any]) -> list[Section]:
    if not _of_widths(report):
        return sections(report)
    from mico.qat.cmibq.told import cmibq_sections

    return cmibq_sections(report)


def _of_widths(report: dict[str, Any]) -> bool:
    """Whether a run tells of answers and learned widths, in place of perplexity."""
    return report["settings"].get("method") == "cmibq"


def _evaluations(read: Sequence[Run | Evaluated], values: dict[str, Any]) -> list[Evaluated]:
    """What was asked about images, of runs under the names of their arms."""
    arms = {run["folder"]: run["arm"] for run in values["runs"]}
    return [
        one if isinstance(one, Evaluated) else Evaluated(one.folder, one.evaluation or {}, arms[one.folder], one.seed)
        for one in read
    ]


def _page(run: Run) -> list[Section]:
    """Where the page of a run lies, if it has one."""
    page = Path(run.folder) / PAGE
    return [Section("Page", lines=(str(page),))] if page.is_file() else []


def _evaluated(run: Run) -> list[Section]:
    return [] if run.evaluation is None else _measured(run.evaluation, Path(run.folder) / EVALUATION)


def _suites_alone(one: Run | Evaluated) -> list[Section]:
    """All that one evaluation holds."""
    assert isinstance(one, Evaluated)
    return _measured(one.results, Path(one.folder) / RESULTS)


def _measured(results: dict[str, Any], file: Path) -> list[Section]:
    tasks = {"tasks": results.get("results", {}), "n-shot": results.get("n-shot", {})}
    if "mico" not in results:  # written by lm-eval itself
        return [tasks_section(dict(model=str(file.parent)) | tasks)]
    try:
        return evaluation_sections(results["mico"] | tasks)
    except KeyError as error:
        raise _no_evaluation(file, f"{error} is missing") from error


def _draw(
    html: str | None, figures: str | None, runs: Sequence[Run], found: list[Section], values: dict[str, Any]
) -> None:
    """The page and the files of its figures."""
    from mico.pages import (  # matplotlib takes its time
        comparison_figures,
        headline,
        report_figures,
        save_figures,
        visual_figures,
        write_html,
    )

    alone = runs[0].report if len(runs) == 1 else None
    if alone is not None and _of_widths(alone):
        from mico.qat.cmibq.told import cmibq_figures as report_figures
        from mico.qat.cmibq.told import cmibq_headline as headline
    drawn = comparison_figures(values) if alone is None else report_figures(alone)
    drawn = [*drawn, *visual_figures(values["visual"])]
    if figures is not None:
        save_figures(drawn, figures)
    if html is None:
        return
    if alone is not None:
        data = alone if runs[0].evaluation is None else alone | dict(evaluation=runs[0].evaluation)
        data = data if not values["visual"] else data | dict(visual=values["visual"])
        write_html(html, found[0].title, found, drawn, data, headline(alone))
    else:
        names = [arm["options"]["model"] for arm in values["arms"]] or [row["model"] for row in values["visual"]]
        models = ", ".join(dict.fromkeys(names))
        write_html(html, f"mico: {models} compared", found, drawn, values)


# --- folders --------------------------------------------------------------------------------------------------------


def _read(path: str) -> Run | Evaluated:
    """The run whose folder, or whose report.json, `path` is; else what mico eval left in that folder."""
    file = Path(path) if Path(path).name == REPORT else Path(path) / REPORT
    if not file.is_file() and (file.parent / RESULTS).is_file():
        return _read_alone(file.parent)
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
    return _checked(folder / EVALUATION)


def _read_alone(folder: Path) -> Evaluated:
    """An evaluation of no run of the report. Raises UserError when no suite is in it."""
    found = Evaluated(str(folder), _checked(folder / RESULTS))
    if not found.suites:
        raise UserError(f"{folder / RESULTS}: no suite was asked there: run mico eval with --suite, or leave it out")
    return found


def _checked(file: Path) -> dict[str, Any]:
    """results.json. Raises UserError when it is none."""
    found = read_json(file, _again(file))
    own = found.get("mico", {})
    parts = [(name, found.get(name, {})) for name in ("results", "n-shot", "versions", "n-samples", "mico")]
    parts.append(("mico.texts", own.get("texts", {}) if isinstance(own, dict) else {}))
    parts += [one for name, part in parts if name in ("results", "mico.texts") for one in _items(part)]
    for name, part in parts:
        if not isinstance(part, dict):
            raise _no_evaluation(file, f"{name} is no object")
    suites = found.get("mico", {}).get("suites") or []
    if not isinstance(suites, list) or any(
        not isinstance(one, dict) or not set(one) >= NEEDED_OF_SUITE for one in suites
    ):
        raise _no_evaluation(file, "mico.suites is no list of records")
    return found


def _items(part: Any) -> list[tuple[str, Any]]:
    return list(part.items()) if isinstance(part, dict) else []


def _no_evaluation(file: Path, why: str) -> UserError:
    return UserError(f"{file} is no result of mico eval ({why}): {_again(file)}")


def _again(file: Path) -> str:
    """What to do about a results.json that cannot be used."""
    inside = file.parent.name == EVALUATION.parent.name
    return f"delete it, or run {f'mico eval {file.parent.parent}' if inside else 'its mico eval'} again"


def _distinct(runs: Sequence[Run | Evaluated]) -> list[Run | Evaluated]:
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
