"""The tables hold the plain values, every one of them, in Markdown as on the terminal."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from mico.comparison import compare, sections
from mico.comparison.tables import p_text, stat_text
from mico.tables import Section, duration_text, markdown
from tests.comparison.reports import made, score, three_arms


def table(page: str, title: str) -> list[dict[str, str]]:
    """The rows of one table of a Markdown page, read back from its text."""
    part = page.split(f" {title}\n\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def numbers(cell: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d[\d.]*(?:e-?\d+)?", cell.replace(",", ""))]


def section(found: dict[str, Any], title: str) -> Section:
    return next(one for one in sections(found) if one.title.startswith(title))


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_markdown_and_values_agree(seeds: int) -> None:
    found = compare(three_arms(seeds))
    page = markdown(sections(found))
    rows = table(page, f"{3 * seeds} runs, 3 arms")
    for arm, row in zip(found["arms"], rows, strict=True):
        stat, bits = arm["texts"]["docs"]["perplexity"], arm["size"]["true_bits"]
        wanted = [stat["mean"]] + ([stat["sd"]] if seeds > 1 else [])
        assert row["arm"] == arm["name"] and row["n"] == str(seeds)
        assert numbers(row["docs"]) == pytest.approx(wanted, abs=0.00501)
        assert numbers(row["true bits"])[0] == pytest.approx(bits["mean"], abs=0.000501)
        assert ("±" in row["docs"]) == (seeds > 1)
    for test, row in zip(found["tests"], table(page, "Paired t-test against original"), strict=True):
        assert (row["arm"], row["of"], row["n"]) == (test["arm"], "docs", str(seeds))
        assert numbers(row["difference"]) == pytest.approx([test["difference"]], abs=0.00501)
        assert numbers(row["change"]) == pytest.approx([100 * (test["ratio"] - 1)], abs=0.00501)
        if seeds == 1:
            assert row["t"] == row["p"] == row["95 % interval"] == "-"
            continue
        interval = [100 * (test[name] - 1) for name in ("ratio_low", "ratio_high")]
        assert numbers(row["95 % interval"]) == pytest.approx(interval, abs=0.00501)
        assert numbers(row["t"]) == pytest.approx([test["t"]], abs=0.00501)
        assert numbers(row["p"]) == pytest.approx([test["p"]], abs=5e-5)
    times = table(page, "Time")
    assert [numbers(row["MI"])[0] for row in times] == [arm["cost"]["mi_seconds"]["mean"] for arm in found["arms"]]


def test_the_lowest_mean_stands_out() -> None:
    found = compare(three_arms())
    assert section(found, "9 runs").strong == {(2, 2)}
    assert section(compare([made()]), "1 run, 1 arm").strong == frozenset()


def test_figures_of_seeds_in_words() -> None:
    stat = dict(mean=46.449, sd=0.306, n=3)
    assert stat_text(stat, lambda value: f"{value:.2f}") == "46.45 ± 0.31"
    assert stat_text(stat | dict(sd=None, n=1), duration_text, 3) == "46.4 s (n 1)"
    assert stat_text(stat, duration_text) == "46.4 ± 0.3 s"
    assert stat_text(dict(mean=130.0, sd=10.0, n=2), duration_text) == "2.2 min ± 10.0 s"
    assert stat_text(None, duration_text) == "-" and stat_text(stat | dict(mean=None, sd=None), str) == "not finite"
    assert [p_text(p) for p in (None, 0.5, 0.00012, 0.0000123)] == ["-", "0.5000", "0.0001", "1.2e-05"]


def test_ablation_tables_hold_the_figures_of_their_arms() -> None:
    runs = [
        made(
            "mi", seed, 40 + k + seed, grouping=dict(n_groups=k), folder=f"{k}-{seed}",
            compressed=dict(docs=score(40 + k + seed), ptb=score(90 - k + seed)),
            dense=dict(docs=score(30.0), ptb=score(60.0)),
        )
        for k, seed in itertools.product((5, 10, 20), (0, 1))
    ]  # fmt: skip
    rows = table(markdown(sections(compare(runs))), "Perplexity by n_groups")
    assert [(row["n_groups"], row["docs"], row["ptb"]) for row in rows] == [
        (str(k), f"{40.5 + k:.2f} ± 0.71", f"{90.5 - k:.2f} ± 0.71") for k in (5, 10, 20)
    ]
    assert section(compare(runs), "Perplexity by n_groups").strong == {(0, 1), (2, 2)}


def test_crossed_ablations_have_a_table_a_text() -> None:
    runs = [
        made(arm, seed, 40 + 10 * sparsity + seed, settings=dict(sparsity=sparsity), folder=f"{arm}{sparsity}{seed}")
        for arm, sparsity, seed in itertools.product(("original", "mi"), (0.3, 0.5, 0.7), (0, 1))
        if (arm, sparsity) != ("mi", 0.7)
    ]
    rows = table(markdown(sections(compare(runs))), "Perplexity of docs by arm and sparsity")
    assert rows[0] == {
        "arm \\ sparsity": "original",
        "0.3": "43.50 ± 0.71",
        "0.5": "45.50 ± 0.71",
        "0.7": "47.50 ± 0.71",
    }
    assert rows[1]["0.7"] == "-" and rows[1]["0.3"] == "43.50 ± 0.71"


def test_tasks_and_divergence_are_shown_where_they_are() -> None:
    values = {"acc,none": 0.625, "acc_stderr,none": 0.0125}
    kl = dict(docs=score(40.0, kl_divergence=0.125, top1_agreement=0.75))
    evaluated = made(evaluation={"results": {"quiz": values}, "mico": {"texts": kl}})
    page = markdown(sections(compare([evaluated, made("original")])))
    assert table(page, "Tasks") == [
        {"arm": "mi", "quiz acc": "0.6250 (0.0125)"}, {"arm": "original", "quiz acc": "-"},
    ]  # fmt: skip
    assert table(page, "Against the dense model")[0] == {"arm": "mi", "docs KL": "0.1250", "docs top-1": "0.7500"}
    plain = markdown(sections(compare([made(), made("original")])))
    assert "Tasks" not in plain and "Against the dense model" not in plain


def test_notices_and_reasons_are_read() -> None:
    found = compare([made("original", true_bits=3.0), made("mi", true_bits=3.3)])
    assert section(found, "Attention").lines == tuple(found["notices"]) and "+10.0%" in found["notices"][0]
    assert "mi, docs: no test, one seed in common, two are needed" in section(found, "Paired").lines
    assert not any(one.title == "Attention" for one in sections(compare(three_arms())))
