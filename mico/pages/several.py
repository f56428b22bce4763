"""The figures of a comparison, drawn from the values of `mico.comparison.compare` and from nothing else."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from mico.pages.figures import ACCENT, INK, MUTED, PAPER, Figure, series, short
from mico.tables import perplexity_text, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Comparison = dict[str, Any]
LEGEND_ARMS = 12  # more of them would fill the figure with names


def comparison_figures(found: Comparison) -> list[Figure]:
    """What a comparison has data for, texts in the order of its tables; no empty figures."""
    texts = list(dict.fromkeys(text for arm in found["arms"] for text in arm["texts"]))
    makers = (_arms, _sizes, _options)
    made = (maker(found, text, index) for index, text in enumerate(texts) for maker in makers)
    return [figure for figure in made if figure is not None]


def _measured(found: Comparison, text: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(arm, perplexity, size) of the arms whose perplexity is a number; both with mean and sd over the seeds."""
    arms = []
    for arm in found["arms"]:
        score = arm["texts"].get(text, {}).get("perplexity")
        if score is not None and _finite(score["mean"]):
            arms.append((arm["name"], score, arm["size"]["packed_bytes"]))
    return arms


def _dense(found: Comparison, text: str) -> float | None:
    """The dense perplexity, where all arms share one model."""
    values = [dense["texts"].get(text) for dense in found["dense"]]
    return values[0] if len(values) == 1 and _finite(values[0]) else None


# --- perplexity by arm ----------------------------------------------------------------------------------------------


def _arms(found: Comparison, text: str, index: int) -> Figure | None:
    arms = _measured(found, text)
    if len(arms) < 2:
        return None
    dense = _dense(found, text)
    told = ", ".join(f"{name} {_stat(score)}" for name, score, _ in arms)
    caption = "Every seed a ring; mean and standard deviation over the seeds above them."
    if dense is not None:
        told += f"; dense {perplexity_text(dense)}"
        caption += f" Dense model: {perplexity_text(dense)}."
    return Figure(
        f"arms-{index}", f"Perplexity of {text} by arm", caption, f"Points, one row an arm: {told}.",
        partial(_draw_arms, [(name, score) for name, score, _ in arms]), height=54 + 40 * len(arms),
    )  # fmt: skip


def _draw_arms(arms: list[tuple[str, dict[str, Any]]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for row, (_, score) in enumerate(arms):
        values = [value for value in score["values"] if _finite(value)]
        axes.plot(values, [row + 0.18] * len(values), "o", markersize=5, markerfacecolor="none", color=MUTED)
        axes.errorbar(
            score["mean"], row - 0.12, xerr=score["sd"] or None, fmt="o", color=ACCENT, markersize=7, capsize=3,
        )  # fmt: skip
        axes.annotate(
            _stat(score), (score["mean"], row - 0.12), xytext=(0, 7), textcoords="offset points", ha="center",
            fontsize=9.5,
        )  # fmt: skip
    axes.set(yticks=range(len(arms)), yticklabels=[short(name) for name, _ in arms], xlabel="perplexity")
    axes.set_ylim(len(arms) - 0.5, -0.75)
    axes.margins(x=0.2)
    axes.grid(axis="x")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    _plain_ticks(axes.xaxis)


# --- size and quality -----------------------------------------------------------------------------------------------


def _sizes(found: Comparison, text: str, index: int) -> Figure | None:
    arms = _measured(found, text)
    if len(arms) < 2:
        return None
    told = ", ".join(f"{name} {size_text(size['mean'])} at {_stat(score)}" for name, score, size in arms)
    caption = "Size at true bits against perplexity, mean and standard deviation over the seeds; lower left is better."
    shown = min(len(arms), LEGEND_ARMS)
    return Figure(
        f"quality-{index}", f"Size and perplexity, {text}", caption, f"Points: {told}.",
        partial(_draw_sizes, arms, _dense(found, text)), height=220 + 17 * (math.ceil(shown / 2) + 1),
    )  # fmt: skip


def _draw_sizes(arms: list[tuple[str, dict[str, Any], dict[str, Any]]], dense: float | None, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for place, (name, score, size) in enumerate(arms):
        look = series(place)
        axes.errorbar(
            size["mean"], score["mean"], xerr=size["sd"] or None, yerr=score["sd"] or None, fmt="none", capsize=3,
            ecolor=look["color"],
        )  # fmt: skip
        label = short(name) if place < LEGEND_ARMS else None
        axes.plot(size["mean"], score["mean"], linestyle="none", markersize=7, label=label, **look)
    if dense is not None:
        axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
    axes.set(xlabel="size at true bits", ylabel="perplexity")
    axes.margins(x=0.15, y=0.12)
    axes.grid()
    _room(axes, [size["mean"] for _, _, size in arms])
    axes.xaxis.set_major_formatter(lambda value, _: size_text(value))
    _plain_ticks(axes.yaxis)
    canvas.legend(loc="outside lower center", ncols=2, handlelength=1.4, columnspacing=1.2)


def _room(axes: Axes, sizes: list[float]) -> None:
    """Sizes that are almost equal are not torn apart: the axis spans 2 % of them or more."""
    from matplotlib.ticker import MaxNLocator

    middle, span = (max(sizes) + min(sizes)) / 2, max(sizes) - min(sizes)
    if span < 0.02 * middle:
        axes.set_xlim(middle * 0.98, middle * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(4))


# --- a sweep --------------------------------------------------------------------------------------------------------


def _options(found: Comparison, text: str, index: int) -> Figure | None:
    """Perplexity against the numeric option in which the arms differ; a line for every value of a second option."""
    table = next((table for table in found["ablations"] if _axis(table) is not None), None)
    if table is None:
        return None
    lines = _lines(found, table, text)
    if not lines:
        return None
    option = table["options"][_axis(table)]
    told = "; ".join(
        f"{name + ': ' if name else ''}" + ", ".join(f"{value:g} {_stat(score)}" for value, score in line)
        for name, line in lines.items()
    )
    caption = "Mean and standard deviation over the seeds."
    return Figure(
        f"sweep-{index}", f"Perplexity of {text} by {option}", caption, f"Lines over {option}. {told}.",
        partial(_draw_options, option, lines, _dense(found, text)), height=240 + 18 * math.ceil(len(lines) / 2),
    )  # fmt: skip


def _axis(table: dict[str, Any]) -> int | None:
    """Which option of an ablation is the axis: the first whose values are two numbers or more."""
    for place, name in enumerate(("rows", "columns")):
        if len([value for value in table[name] if _number(value)]) >= 2:
            return place
    return None


def _lines(found: Comparison, table: dict[str, Any], text: str) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """{value of the other option, '' without one: [(value of the axis, perplexity)]}; values that are no numbers fall
    out (auto has no place on an axis; the table shows it)."""
    arms = {name: score for name, score, _ in _measured(found, text)}
    columns = table["columns"] or [None]
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row, cells in zip(table["rows"], table["cells"], strict=True):
        for column, name in zip(columns, cells, strict=True):
            value, other = (row, column) if _axis(table) == 0 else (column, row)
            if _number(value) and name in arms:
                label = "" if column is None else f"{table['options'][1 - (_axis(table) or 0)]} {other}"
                lines.setdefault(label, []).append((value, arms[name]))
    return {label: sorted(line, key=lambda point: point[0]) for label, line in lines.items() if len(line) > 1}


def _draw_options(
    option: str, lines: dict[str, list[tuple[float, dict[str, Any]]]], dense: float | None, canvas: Canvas
) -> None:
    axes = canvas.subplots()
    for place, (name, line) in enumerate(lines.items()):
        values = [value for value, _ in line]
        means, spreads = [score["mean"] for _, score in line], [score["sd"] or 0.0 for _, score in line]
        look = series(place)
        if any(spreads):
            axes.errorbar(values, means, yerr=spreads, fmt="none", capsize=3, ecolor=look["color"])
        axes.plot(values, means, label=short(name) or None, markeredgecolor=PAPER, markeredgewidth=0.6, **look)
    if dense is not None:
        axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
    axes.set(xlabel=option, ylabel="perplexity")
    marks = sorted({value for line in lines.values() for value, _ in line})
    axes.set_xticks(marks, [f"{value:g}" for value in marks])
    axes.margins(x=0.08, y=0.12)
    axes.grid(axis="y")
    _plain_ticks(axes.yaxis)
    if any(lines) or dense is not None:
        canvas.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.2)


# --- shared ---------------------------------------------------------------------------------------------------------


def _stat(score: dict[str, Any]) -> str:
    sd = score["sd"]
    return perplexity_text(score["mean"]) + (f" ± {perplexity_text(sd)}" if sd is not None else "")


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
