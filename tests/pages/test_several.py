"""Figures of a comparison: means, spreads and every seed, drawn where the values lie."""

from __future__ import annotations

import math

import pytest

from mico.comparison import Run, compare
from mico.pages import Figure, comparison_figures
from tests.comparison.reports import made, score

Canvas = pytest.importorskip("matplotlib.figure").Figure
ARMS = {"original": (46.0, 46.5, 47.0), "mi": (42.0, 42.5, 43.5)}


def runs() -> list[Run]:
    return [made(arm, seed, value) for arm, values in ARMS.items() for seed, value in enumerate(values)]


def drawn(figure: Figure) -> Canvas:
    canvas = Canvas()
    figure.draw(canvas)
    return canvas


def test_arms_show_mean_spread_and_seeds() -> None:
    figures = {figure.name: figure for figure in comparison_figures(compare(runs()))}
    assert list(figures) == ["arms-0", "quality-0"]
    (axes,) = drawn(figures["arms-0"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ARMS)
    rings = [list(line.get_xdata()) for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert rings == [list(values) for values in ARMS.values()]
    means = [sum(values) / 3 for values in ARMS.values()]
    filled = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert filled == pytest.approx(means)
    spans = [bar.get_segments()[0][:, 0] for bar in axes.collections]
    assert [(span[1] - span[0]) / 2 for span in spans] == pytest.approx([0.5, math.sqrt(7 / 12)])
    assert "original 46.50 ± 0.50, mi 42.67 ± 0.76; dense 30.00" in figures["arms-0"].alt


def test_sizes_stand_against_perplexities() -> None:
    figure = next(one for one in comparison_figures(compare(runs())) if one.name == "quality-0")
    (axes,) = drawn(figure).axes
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    assert points["mi"] == (1001, pytest.approx(42.6667, abs=1e-4)) and points["original"] == (1001, 46.5)
    assert points["dense"][1] == 30.0
    low, high = axes.get_xlim()
    assert low < 1001 * 0.985 and high > 1001 * 1.015  # equal sizes stand on one spot


def test_a_sweep_over_a_number_is_a_line() -> None:
    sweep = [
        made("mi", seed, 40 + 100 / groups + seed, grouping=dict(n_groups=groups))
        for groups in (20, 5, 10)
        for seed in (0, 1)
    ]
    sweep += [made("mi", 0, 47.0, grouping=dict(n_groups="auto"))]
    figure = next(one for one in comparison_figures(compare(sweep)) if one.name == "sweep-0")
    (axes,) = drawn(figure).axes
    (line,) = (line for line in axes.lines if line.get_marker() == "o")
    assert list(line.get_xdata()) == [5, 10, 20] and list(line.get_ydata()) == [60.5, 50.5, 45.5]
    assert axes.get_xlabel() == "n_groups" and "5 60.50 ± 0.71" in figure.alt


def test_a_sweep_of_two_options_is_a_line_a_value() -> None:
    found = [
        made("mi", 0, 40 + 10 * sparsity + bits, settings=dict(sparsity=sparsity, wbits=bits))
        for sparsity in (0.3, 0.5, 0.7)
        for bits in (3, 4)
    ]
    figure = next(one for one in comparison_figures(compare(found)) if one.name == "sweep-0")
    lines = [line for line in drawn(figure).axes[0].lines if line.get_label() != "dense"]
    assert len(lines) == 2 and all(list(line.get_xdata()) == [0.3, 0.5, 0.7] for line in lines)
    assert [list(line.get_ydata()) for line in lines] == [[46, 48, 50], [47, 49, 51]]


def test_what_is_not_finite_is_not_drawn() -> None:
    found = compare([made("original", 0, 45.0), made("mi", 0, 42.0), made("enhanced", 0, math.inf)])
    for arm in found["arms"]:  # as the JSON of a comparison tells it
        mean = arm["texts"]["docs"]["perplexity"]["mean"]
        arm["texts"]["docs"]["perplexity"]["mean"] = mean if math.isfinite(mean) else None
    assert all("enhanced" not in figure.alt for figure in comparison_figures(found))


def test_one_arm_or_no_text_has_no_figures() -> None:
    assert comparison_figures(compare([made("mi", 0, 42.0), made("mi", 1, 43.0)])) == []
    assert (
        comparison_figures(compare([made("mi", compressed={}, dense={}), made("original", compressed={}, dense={})]))
        == []
    )


def test_every_text_has_its_own_figures() -> None:
    texts = dict(docs=score(42.0), wiki=score(50.0))
    found = compare([made("mi", compressed=texts), made("original", compressed=texts)])
    assert [one.name for one in comparison_figures(found)] == ["arms-0", "quality-0", "arms-1", "quality-1"]
