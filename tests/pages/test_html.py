"""Pages: the same figures as the report, nothing from outside gets in or out, readable for everyone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from mico.errors import UserError
from mico.pages import Figure, headline, report_figures, write_html, write_run_page
from mico.summary import sections
from mico.tables import Section
from tests.pages.reports import Page, made, score
from tests.workspace import workspace

NASTY = "</script><b>x</b><!-- \u2028 & \"quotes\" 'and' <img src=http://evil/x onerror=alert(1)>"


def written(path: Path, report: dict[str, Any], figures: int = 0) -> Page:
    """The page of a report with its first figures."""
    found = sections(report)
    write_html(path / "page.html", found[0].title, found, report_figures(report)[:figures], report, headline(report))
    return Page((path / "page.html").read_text(encoding="utf-8"))


pytestmark = pytest.mark.filterwarnings("error::UserWarning:mico.pages")  # a figure that does not fit


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_run_page(path, made())
    return Page(path.read_text(encoding="utf-8"))


# --- the figures ----------------------------------------------------------------------------------------------------


def test_tables_hold_what_the_sections_hold(page: Page) -> None:
    found = page.tables()
    for section in sections(page.data()):
        head = "Setup" if section.title == "mico: tiny" else section.title
        rows = [list(row) for row in section.rows]
        heads = [[name or "value" for name in section.columns]] if any(section.columns) else []
        assert found.get(head, []) == heads + rows


def test_numbers_are_those_of_the_json(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """A real run: the cells read back as numbers against report.json, each by the digits that it shows."""
    report = json.loads((workspace(tmp_path_factory.getbasetemp()).run / "report.json").read_text())
    page = written(tmp_path, report)
    assert page.data() == report
    tables = page.tables()
    for text, dense, compressed, ratio, *_ in tables["Perplexity"][1:]:
        values = report["dense"][text]["perplexity"], report["compressed"][text]["perplexity"]
        assert (dense, compressed) == tuple(f"{value:,.2f}" for value in values)
        assert ratio == f"×{values[1] / values[0]:.3f}"
    heads, *rows = tables["Error per layer"]
    errors = {(line["block"], line["layer"].split(".")[-1]): line["error"] for line in report["layers"]}
    shown = {(int(row[0]), f"{name}_proj"): cell for row in rows for name, cell in zip(heads[1:], row[1:], strict=True)}
    assert shown.keys() == errors.keys()
    for place, cell in shown.items():
        assert float(cell) == pytest.approx(errors[place], abs=0.5e-4 if errors[place] >= 1e-3 else 0, rel=0.05)
    times = {name.removeprefix("· "): cell for name, cell, *_ in tables["Time and memory"][1:]}
    for name, seconds in report["seconds"].items():
        assert times[name] == (f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"), name
    sizes = dict(tables["Size"])
    assert sizes["true bits a weight"] == f"{report['size']['true_bits']:.3f}"
    assert float(sizes["sparsity"]) == pytest.approx(report["size"]["sparsity"], abs=5e-4)


def test_the_headline_repeats_the_tables(page: Page) -> None:
    shown = dict(zip([one.text for one in page.all("dt")], [one.text for one in page.all("dd")], strict=True))
    assert shown["perplexity, docs"].split() == ["36.12", "dense", "30.25,", "×1.194"]
    assert shown["true bits a weight"] == "3.127 sparsity 0.500" and shown["time"] == "2.3 min peak 890 MB"


def test_long_json_is_compressed_and_the_page_stays_small(tmp_path: Path) -> None:
    report = made(80)
    report["layers"] = [line | dict(history=[0.125] * 500) for line in report["layers"]]
    page = written(tmp_path, report)
    assert len(json.dumps(report)) > 1_000_000 and len(page.source) < 1_000_000
    assert page.data() == report and page.all("script", id="data")[0].attributes["data-encoding"]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    report = made(compressed=dict(docs=score(math.inf), wiki=score(math.nan)))
    data = written(tmp_path, report).data()
    assert [one["perplexity"] for one in data["compressed"].values()] == [None, None]
    assert data["dense"] == report["dense"]


# --- nothing gets in, nothing gets out ------------------------------------------------------------------------------


def test_names_do_no_harm(tmp_path: Path) -> None:
    settings = made()["settings"] | dict(method=NASTY)
    report = made(
        model=NASTY, arm=NASTY, folder=NASTY, command=["mico", "compress", NASTY], settings=settings,
        dense={NASTY: score(30.0)}, compressed={NASTY: score(31.0)}, fallbacks=[dict(layer=NASTY, what=NASTY)],
        heat_maps=[one | dict(stream=NASTY) for one in made()["heat_maps"][:1]],
    )  # fmt: skip
    page = written(tmp_path, report, figures=9)
    assert page.data() == report
    assert len(page.all("script")) == 2 and not page.all("b") and not page.all("img")
    assert page.all("h1")[0].text == f"mico: {NASTY}" == page.all("title")[0].text
    assert page.tables()["Setup"][0][1] == NASTY
    assert not any(name.startswith("on") for one in page.elements for name in one.attributes)


def test_nothing_is_fetched(page: Page) -> None:
    for one in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert re.match(r"(#|data:image/png;base64,|$)", one.attributes.get(name, "")), (one.tag, one.attributes)
    style, script = (page.all(tag)[-1].text for tag in ("style", "script"))
    assert not re.search(r"url\(|@import", style) and not re.search(r"fetch|XMLHttp|localStorage|cookie", script)


def test_the_policy_allows_the_own_script_alone(page: Page) -> None:
    (policy,) = (one.attributes["content"] for one in page.all("meta") if one.attributes.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.all("script")[-1].text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/page\.html cannot be written"):
        write_html(tmp_path / "no" / "page.html", "t", [], [], {})


# --- readable for everyone ------------------------------------------------------------------------------------------


def test_headers_have_a_scope_and_numbers_stand_right(page: Page) -> None:
    assert {one.attributes.get("scope") for one in page.all("th")} == {"col", "row"}
    tables = [one for one in page.all("div", role="region")]
    assert tables and all(one.attributes["aria-label"] and one.attributes["tabindex"] == "0" for one in tables)
    right = {one.text for one in page.all("th", scope="col") if "num" in one.attributes.get("class", "")}
    assert {"dense", "compressed", "ratio", "silhouette", "true bits", "q", "down"} <= right
    assert not right & {"text", "stream", "block", "widths (groups)"}
    strong = [one.text for one in page.all("td") if "strong" in one.attributes.get("class", "")]
    assert {"36.12", "88.75"} <= set(strong)


def test_links_lead_somewhere_and_ids_are_unique(page: Page) -> None:
    ids = [one.attributes["id"] for one in page.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    targets = [one.attributes["href"][1:] for one in page.all("a")]
    assert len(targets) > 8 and set(targets) <= set(ids)
    for one in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(one.attributes.get(name, "").split()) <= set(ids)


def test_every_figure_is_told_in_words(page: Page) -> None:
    pictures = page.all("svg")
    texts = [one.text for one in page.all("desc")]
    assert len(pictures) == len(texts) == len(page.all("figure")) >= 6 and all(len(text) > 20 for text in texts)
    assert all(one.attributes["role"] == "img" for one in pictures)


def test_the_command_can_be_copied(page: Page) -> None:
    assert [one.text for one in page.all("code")] == ["mico compress tiny --save results/tiny-run"]
    assert len(page.all("button", class_="copy")) == 1
    assert all("hidden" in one.attributes for one in page.all("button"))  # without scripts there is nothing to press


def test_figures_stand_with_their_section_or_after_the_first(tmp_path: Path) -> None:
    def dot(canvas: Any) -> None:
        canvas.subplots().plot([1, 2], [3, 4])

    parts = [Section("One", lines=("a",)), Section("Two", ("x", "y"), (("p", "1"), ("q", "2")))]
    figures = [Figure("loose", "L", "c", "a", dot), Figure("own", "O", "c", "a", dot, section="Two")]
    write_html(tmp_path / "page.html", "Page", parts, figures, {})
    page = Page((tmp_path / "page.html").read_text())
    order = [one.attributes["id"] for one in page.elements if one.tag in ("section", "figure")]
    assert order == ["one", "figures", "figure-loose", "two", "figure-own"]


NUMBERS = (
    "3.127 ± 0.000",
    "-0.51 to +1.03 %",
    "16/62.5/290",
    "1.51 MB",
    "×1.112",
    "0.50 ± 0.04 (n 2) (0.08)",
    "7.0e-05",
)
WORDS = ("4b×24 5b×29", "docs", "no GPU", "1.51 MB, 44.4% of dense", "")


@pytest.mark.parametrize("cell", [*NUMBERS, "2.6 min", "-", "not finite", *WORDS])
def test_what_counts_as_a_number(cell: str, tmp_path: Path) -> None:
    write_html(tmp_path / "page.html", "t", [Section("s", ("a", "b"), (("x", "1"), ("y", cell)))], [], {})
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert ["num" in one.attributes.get("class", "") for one in page.all("td")] == [cell not in WORDS] * 2


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_is_aa(scheme: int) -> None:
    style = resources.files("mico.pages").joinpath("style.css").read_text()
    pairs = re.findall(r"--([a-z]+(?:-\d)?): light-dark\((#\w{6}), (#\w{6})\)", style)
    colors = {name: pair[scheme] for name, *pair in pairs}
    for ground in ("paper", "raised"):
        assert all(contrast(colors[name], colors[ground]) >= 4.5 for name in ("ink", "muted", "accent"))
    assert all(contrast(colors[f"series-{index}"], colors["paper"]) >= 4.5 for index in range(1, 9))


def test_browsers_without_light_dark_get_the_light_colours() -> None:
    style = resources.files("mico.pages").joinpath("style.css").read_text()
    first = dict(re.findall(r"--([\w-]+): (#\w+);", style[: style.index("@supports")]))
    later = {name: light for name, light in re.findall(r"--([\w-]+): light-dark\((#\w+),", style)}
    assert first == later
