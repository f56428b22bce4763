"""Figures of suites under pruned visual tokens, drawn from the rows of `mico.comparison.visual` and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mico.comparison.visual_tables import DENSE, bits_text, score_text, title_of
from mico.pages.figures import INK, PAPER, Figure, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Row = dict[str, Any]
Line = list[tuple[float, float, float]]  # (mean visual tokens of a layer, score, its sd)
LONGEST_LABEL = 52
MOST_LINES = 8  # as many as there are colours


def visual_figures(rows: Sequence[Row]) -> list[Figure]:
    """Score against visual tokens, a figure a suite that has two points on a line or more."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr([row[name] for name in ("suite", "data", "limit")]), []).append(row)
    titles = [group[0]["suite"] for group in groups.values()]
    made = []
    for place, group in enumerate(groups.values(), 1):
        several = titles.count(group[0]["suite"]) > 1
        figure = _figure(group, place, title_of(group[0]["suite"], place if several else None))
        made += [figure] if figure else []
    return made


def _figure(rows: Sequence[Row], place: int, section: str) -> Figure | None:
    lines = _lines(rows)
    if not lines:
        return None
    suite, measure = rows[0]["suite"], rows[0]["measure"]
    text = score_text(measure)
    told = "; ".join(f"{name}: " + ", ".join(f"{x:g} {text(y)}" for x, y, _ in line) for name, line in lines.items())
    caption = (
        "Visual tokens are the mean over the layers as the field counts them (equal tokens); a line ends at the right "
        "with all of them. Upper left is better."
    )
    if len(lines) > MOST_LINES:
        caption += f" {len(lines) - MOST_LINES} more lines are in the table."
    shown = dict(list(lines.items())[:MOST_LINES])
    return Figure(
        f"visual-{place}", f"{suite}: {measure} by visual tokens", caption, f"Lines. {told}.",
        partial(_draw, shown, _dense(rows), measure), section=section, height=230 + 17 * (len(shown) + 1),
    )  # fmt: skip


def _lines(rows: Sequence[Row]) -> dict[str, Line]:
    """{model, bits and method: points by tokens}; every line of a model ends at its figure with all tokens."""
    lines: dict[str, Line] = {}
    for row in rows:
        if row["tokens"] is None or "equal_tokens" not in row["figures"]:
            continue
        bits = bits_text(row)
        name = f"{row['model']}, {bits if bits == DENSE else f'{bits} bits'}, {row['method']}"
        lines.setdefault(name, [_point(one) for one in rows if one["tokens"] is None and one["model"] == row["model"]])
        lines[name].append(_point(row))
    return {name: sorted(line) for name, line in lines.items() if len(line) > 1}


def _point(row: Row) -> tuple[float, float, float]:
    figures = row["figures"]
    return figures["equal_tokens"]["mean"], figures["score"]["mean"], figures["score"]["sd"] or 0.0


def _dense(rows: Sequence[Row]) -> float | None:
    """The score of the one dense model with all its visual tokens."""
    found = [row for row in rows if row["tokens"] is None and "true_bits" not in row["figures"]]
    return float(found[0]["figures"]["score"]["mean"]) if len(found) == 1 else None


def _draw(lines: dict[str, Line], dense: float | None, measure: str, canvas: Canvas) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = canvas.subplots()
    for place, (name, line) in enumerate(lines.items()):
        tokens, scores, spreads = zip(*line, strict=True)
        look = series(place)
        if any(spreads):
            axes.errorbar(tokens, scores, yerr=spreads, fmt="none", capsize=3, ecolor=look["color"])
        label = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
        axes.plot(tokens, scores, label=label, markeredgecolor=PAPER, markeredgewidth=0.6, **look)
    if dense is not None:
        axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense, all visual tokens")
    axes.set(xlabel="visual tokens", ylabel=measure)
    axes.set_xscale("log", base=2)
    marks = sorted({round(tokens) for line in lines.values() for tokens, _, _ in line})
    axes.set_xticks(_apart(marks), [f"{mark:g}" for mark in _apart(marks)])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: score_text(measure)(value))
    axes.margins(x=0.08, y=0.12)
    axes.grid(axis="y")
    canvas.legend(loc="outside lower center", ncols=1, handlelength=1.6)


def _apart(marks: Sequence[int]) -> list[int]:
    """Those marks of the axis, from the left, whose numbers do not touch."""
    kept: list[int] = []
    for mark in marks:
        if not kept or mark >= 1.15 * kept[-1]:
            kept.append(mark)
    return kept
