"""mico report on a real run and on copies of it with other figures: what is shown, what is written, what is refused."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mico
from mico import cli
from mico.errors import UserError
from mico.runs import RunFolder
from mico.summary import print_report
from mico.tables import perplexity_text
from tests.comparison.evaluations import asked, packed, results
from tests.workspace import Workspace, workspace

Report = dict[str, Any]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture
def report(space: Workspace) -> Report:
    return json.loads((space.run / "report.json").read_text(encoding="utf-8"))


def words(text: str) -> str:
    """The text without line breaks and padding, as wrapping leaves it."""
    return " ".join(text.split())


def put(folder: Path, report: Report, evaluation: dict[str, Any] | None = None) -> str:
    """A run folder that holds nothing but its figures."""
    (folder / "eval").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    if evaluation is not None:
        (folder / "eval" / "results.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return str(folder)


@pytest.fixture
def two_runs(report: Report, space: Workspace, tmp_path: Path) -> list[str]:
    """The real run, and a folder with a report as another arm would give it."""
    other = copy.deepcopy(report)
    other["arm"], other["settings"]["method"], other["settings"]["grouping"] = "original", "sparsegpt", None
    other["compressed"]["wikitext2"]["perplexity"] *= 2
    other["compressed"]["ptb"] = copy.deepcopy(other["compressed"]["wikitext2"])
    other["dense"]["ptb"] = other["dense"]["wikitext2"]
    return [str(space.run), put(tmp_path / "original", other)]


def test_one_run_is_shown_in_full(
    report: Report, space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(space.run / "report.json", tmp_path)  # what `mico eval` left in the shared run is another test's
    assert cli.main(["report", str(tmp_path)]) == 0
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    assert words(capsys.readouterr().out).startswith(words(console.export_text()))


def test_runs_are_compared(two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--json={tmp_path / 'both.json'}", f"--markdown={tmp_path / 'both.md'}"]
    assert cli.main(["report", *two_runs, *files]) == 0
    text = words(capsys.readouterr().out)
    assert "method mico" in text and "method sparsegpt" in text and "grouping mi" in text
    assert "wbits" not in text  # the same in both
    both = json.loads((tmp_path / "both.json").read_text())
    assert [run["folder"] for run in both["runs"]] == two_runs and both["runs"][1]["arm"] == "original"
    best = perplexity_text(both["arms"][0]["texts"]["wikitext2"]["perplexity"]["mean"])
    page = (tmp_path / "both.md").read_text()
    assert f"| mi | 1 | **{best}** | - | " in page
    chosen = "method mico, grouping mi, n_groups auto, mi_method gaussian, cluster spectral"
    assert f"mi: {chosen}; seed 0; {two_runs[0]}" in page
    assert "original, wikitext2: no test, one seed in common, two are needed" in page


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_comparison_on_three_texts_fits_80_columns(report: Report, tmp_path: Path, seeds: int) -> None:
    for part in ("dense", "compressed"):
        score = report[part]["wikitext2"]
        report[part] = {name: score | dict(perplexity=12.56) for name in ("wikitext2", "ptb", "c4")}
    report["arm"] = "enhanced"
    paths = []
    for seed in range(seeds):
        report["identity"]["seed"] = seed
        for score in report["compressed"].values():
            score["perplexity"] += seed
        paths.append(put(tmp_path / str(seed), copy.deepcopy(report)))
    console = Console(width=80, record=True, file=io.StringIO())
    mico.report([*paths, *paths], console=console)  # a folder given twice is one run
    if seeds > 1:
        row = next(line for line in console.export_text().splitlines() if line.startswith(" enhanced"))
        assert row.split()[:5] == ["enhanced", "3", "13.89", "±", "1.53"] and len(row) <= 80


def test_folders_without_a_report_are_refused(two_runs: list[str], space: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/report.json does not exist \(no such folder\)"):
        mico.report([two_runs[0], str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"report.json does not exist \(unfinished, or not a run folder"):
        mico.report(str(tmp_path))
    with pytest.raises(UserError, match=r"statistics/report.json is no report of a compression \(arm is missing"):
        mico.report(str(space.root / "statistics"))
    for damage in ("{", "[]", "", "\x00"):
        (tmp_path / "report.json").write_text(damage)
        with pytest.raises(UserError, match=r"report\.json (cannot be read|holds a list).*restore it, or run its mico"):
            mico.report(str(tmp_path))
    with pytest.raises(UserError, match=r"--json .*: this is a folder, give a file"):
        mico.report(two_runs, json=str(tmp_path))
    with pytest.raises(UserError, match=r"--html .*: this is a folder, give a file"):
        mico.report(two_runs, html=str(tmp_path))
    with pytest.raises(UserError, match=r"--figures .*: this is a file, give a folder"):
        mico.report(two_runs, figures=f"{two_runs[1]}/report.json")
    with pytest.raises(UserError, match=r"--baseline enhanced: no such arm, choose from 'mi', 'original', or one of"):
        mico.report(two_runs, baseline="enhanced")


def test_a_damaged_evaluation_is_told(report: Report, tmp_path: Path) -> None:
    folder = put(tmp_path / "run", report)
    (tmp_path / "run" / "eval" / "results.json").write_text('{"results": ')
    with pytest.raises(
        UserError, match=r"eval/results.json cannot be read .*: delete it, or run mico eval .*run again"
    ):
        mico.report(folder)


def test_the_baseline_is_an_arm_or_a_folder(two_runs: list[str]) -> None:
    console = Console(file=io.StringIO())
    for baseline in ("original", two_runs[1], f"{two_runs[1]}/"):
        assert mico.report(two_runs, baseline=baseline, console=console)["baseline"] == "original"
    assert mico.report(two_runs, console=console)["baseline"] == "mi"
    assert mico.report(two_runs[::-1], console=console)["baseline"] == "original"


def test_written_json_is_json_whatever_the_model_became(report: Report, two_runs: list[str], tmp_path: Path) -> None:
    report["compressed"]["wikitext2"]["perplexity"] = math.inf
    wrecked = put(tmp_path / "wrecked", report | dict(arm="enhanced", settings=report["settings"] | dict(wbits=2)))
    console = Console(width=120, record=True, file=io.StringIO())
    returned = mico.report([two_runs[0], wrecked], json=str(tmp_path / "values.json"), console=console)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "values.json").read_text(), parse_constant=refuse)
    assert written == json.loads(json.dumps(returned))
    assert written["arms"][1]["texts"]["wikitext2"]["perplexity"]["mean"] is None
    text = words(console.export_text())
    assert "enhanced: the perplexity of wikitext2 is not finite" in text and "enhanced 1 not finite" in text


def embedded(page: str) -> dict[str, Any]:
    """The JSON inside a page."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_a_page_and_figures_of_one_run(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"alias": "quiz", "acc,none": 0.625, "acc_stderr,none": 0.0125}
    run = put(tmp_path / "run", report, {"results": {"quiz": values}, "n-shot": {"quiz": 5}})
    assert cli.main(["report", run, f"--html={run}/report.html", f"--figures={tmp_path / 'figures'}"]) == 0
    shown = words(capsys.readouterr().out)
    assert "quiz 5 acc 0.6250 ±0.0125" in shown and "Page" not in shown
    page = Path(run, "report.html").read_text(encoding="utf-8")
    inside = embedded(page)
    assert inside.pop("evaluation")["results"]["quiz"] == values
    assert inside == report
    assert perplexity_text(report["compressed"]["wikitext2"]["perplexity"]) in page and "0.6250" in page
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    assert files and {Path(name).stem for name in files if name.endswith(".png")} == {
        Path(name).stem for name in files if name.endswith(".svg")
    }
    assert cli.main(["report", run, f"--markdown={tmp_path / 'again.md'}"]) == 0
    assert "Page" not in words(capsys.readouterr().out) and "Page" not in (tmp_path / "again.md").read_text()
    assert cli.main(["report", run]) == 0
    assert f"Page{run}/report.html" in "".join(capsys.readouterr().out.split())  # told once it is there


def test_a_page_of_several_runs_holds_the_values(two_runs: list[str], tmp_path: Path) -> None:
    file = tmp_path / "arms.html"
    values = mico.report(two_runs, html=str(file), console=Console(file=io.StringIO()))
    page = file.read_text(encoding="utf-8")
    assert embedded(page) == json.loads(json.dumps(values))
    for arm in values["arms"]:
        assert perplexity_text(arm["texts"]["wikitext2"]["perplexity"]["mean"]) in page


def test_results_of_another_program_are_told(report: Report, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"mico": {}}, {"results": [1]}, {"mico": 3}, {"results": {"quiz": 1, "riddle": {}}}]
    wrong += [{"mico": {"texts": 1}}, {"mico": {"texts": {"docs": 1}}}, {"results": {}, "n-shot": 5}]
    for number, found in enumerate(wrong):
        folder = put(tmp_path / str(number), report, found)
        with pytest.raises(UserError, match=r"results.json is no result of mico eval .*: delete it, or run mico eval"):
            mico.report(folder)


def test_pages_written_anew_into_the_run_folder_are_no_damage(space: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(space.run, run, ignore=shutil.ignore_patterns("eval"))  # left there by tests of `mico eval`
    arguments = json.loads((run / "manifest.json").read_text())["arguments"]
    pages = [run / "report.html", run / "report.md"]
    before = [page.read_bytes() for page in pages]
    (run / "eval").mkdir()
    (run / "eval" / "results.json").write_text(json.dumps({"results": {"quiz": {"alias": "quiz", "acc,none": 0.5}}}))
    mico.report(str(run), html=str(pages[0]), markdown=str(pages[1]), console=Console(file=io.StringIO()))
    assert all(page.read_bytes() != old for page, old in zip(pages, before, strict=True))
    assert RunFolder.view(run, arguments) is not None
    pages[0].unlink()
    assert RunFolder.view(run, arguments) is None
    pages[0].write_text("")
    (run / "report.json").write_text("{}")
    assert RunFolder.view(run, arguments) is None


# --- suites of questions about images -------------------------------------------------------------------------------


def evaluated(folder: Path, results: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return str(folder)


def test_evaluations_alone_and_runs_stand_in_one_table(
    report: Report, two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = evaluated(tmp_path / "dense", results(asked(score=0.8), asked(score=0.7, retain=36)))
    three = put(tmp_path / "three", report, packed(asked(score=0.6, retain=36)))
    page, data, text = (str(tmp_path / f"all.{kind}") for kind in ("html", "json", "md"))
    command = ["report", two_runs[1], dense, three, "--html", page, "--json", data, "--markdown", text]
    assert cli.main([*command, "--figures", str(tmp_path / "figures")]) == 0
    shown = words(capsys.readouterr().out)
    assert "pope by visual tokens" in shown and "Bits: true bits a weight" in shown and "2 runs, 2 arms" in shown
    found = json.loads(Path(data).read_text())["visual"]
    assert [(row["model"], row["ratios"]["score"]) for row in found] == [
        ("tiny", 1.0), ("tiny", pytest.approx(0.875)), ("mi", pytest.approx(0.75))
    ]  # fmt: skip
    written = Path(text).read_text()
    assert "## pope by visual tokens" in written and "| tiny | dense | 36 sparsevlm 2.0 | 37.5 | **70.0%** |" in written
    html = Path(page).read_text(encoding="utf-8")
    assert "pope by visual tokens" in html and "pope: F1 by visual tokens" in html
    assert (tmp_path / "figures" / "visual-1.png").stat().st_size > 1000
    (alone,) = mico.report(three, html=page, console=Console(file=io.StringIO()))["visual"]
    assert alone["model"] == "mi" and alone["reference"] is None and '"visual":[' in Path(page).read_text("utf-8")


def test_evaluations_alone_need_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(tmp_path / "all", results(asked(score=0.8)))
    two = evaluated(tmp_path / "few", results(asked(score=0.6, retain=36)))
    html = tmp_path / "page.html"
    found = mico.report([one, two, one], html=str(html), console=Console(file=io.StringIO()))
    assert [row["folders"] for row in found["visual"]] == [[one], [two]] and found["arms"] == []
    assert "mico: tiny compared" in html.read_text(encoding="utf-8")
    assert cli.main(["report", one]) == 0
    shown = words(capsys.readouterr().out)
    assert "Suites of models/tiny" in shown and "Cost of a question" in shown and "pope by visual tokens" in shown
    with pytest.raises(UserError, match="--baseline x: there is no run"):
        mico.report([one], baseline="x")


@pytest.mark.parametrize(
    ("results", "told"),
    [
        (results(), "no suite was asked there"),
        (results(dict(suite="pope")), "mico.suites is no list of records.*run its mico eval again"),
        ({"mico": []}, "mico is no object"),
    ],
)
def test_evaluations_that_hold_no_suite_are_told(tmp_path: Path, results: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        mico.report(evaluated(tmp_path / "one", results))
