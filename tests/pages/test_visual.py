"""The figure of a suite under pruned visual tokens: a line a model and method, from its rows."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mico.comparison.visual import Evaluated, visual_rows
from mico.pages import visual_figures
from mico.pages.figures import inline_svg
from tests.comparison.evaluations import asked, packed, results

Canvas = pytest.importorskip("matplotlib.figure").Figure
DENSE = results(
    asked(score=0.8),
    asked(score=0.75, retain=72),
    asked(score=0.7, retain=36),
    asked(score=0.6, retain=36, version="1.0"),
)
THREE = packed(asked(score=0.78), asked(score=0.6, retain=72), asked(score=0.5, retain=18))


def test_a_line_a_model_and_method_that_ends_with_all_tokens() -> None:
    (figure,) = visual_figures(visual_rows([Evaluated("dense", DENSE), Evaluated("three", THREE)]))
    assert figure.section == "pope by visual tokens"
    canvas = Canvas()
    figure.draw(canvas)
    (axes,) = canvas.axes
    *lines, dense = axes.lines
    found = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}
    assert found == {
        "tiny, dense, sparsevlm 2.0": [(36, 0.7), (72, 0.75), (144, 0.8)],
        "tiny, dense, sparsevlm 1.0": [(36, 0.6), (144, 0.8)],
        "tiny-3, 3.000 bits, sparsevlm 2.0": [(18, 0.5), (72, 0.6), (144, 0.78)],
    }
    assert list(dense.get_ydata()) == [0.8, 0.8] and axes.get_ylabel() == "F1"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["18", "36", "72", "144"]
    assert "36 70.0%, 72 75.0%, 144 80.0%" in figure.alt
    ElementTree.fromstring(inline_svg(figure))


def test_no_empty_figures() -> None:
    assert visual_figures([]) == []
    assert visual_figures(visual_rows([Evaluated("dense", results(asked(), asked("gqa")))])) == []
    assert visual_figures(visual_rows([Evaluated("dense", results(asked(retain=36)))])) == []
