"""The figures of one run, drawn from its report and from nothing else."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mico.channels.heat import heat_cells
from mico.costs import NESTED, total_seconds
from mico.pages.figures import ACCENT, INK, LINE, MUTED, PAPER, Figure, series, short, tint
from mico.pages.html import write_html
from mico.summary import linear_names, sections
from mico.tables import duration_text, perplexity_text, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Report = dict[str, Any]
STRIP = 96  # pixels of a row in the figure of widths
PER_ROW = 4  # panels beside one another
MAP, ACROSS, DOWN = 86, 1.08, 1.26  # pixels of a heat map's side, and from one map to the next in sides
LOG_RATIO = 20.0  # values that differ by more stand on a log scale


def report_figures(report: Report) -> list[Figure]:
    """What the report has data for: no empty figures."""
    makers = (_heat, _clusters, _widths, _errors, _quality, _divergence, _time, _memory)
    return [figure for maker in makers if (figure := maker(report)) is not None]


# --- channel groups -------------------------------------------------------------------------------------------------


def _heat(report: Report) -> Figure | None:
    maps = report.get("heat_maps") or []
    if not maps:
        return None
    streams = list(dict.fromkeys(one["stream"] for one in maps))
    blocks = list(dict.fromkeys(one["block"] for one in maps))
    peaks = [max(max(row) for row in heat_cells(one["cells"])) for one in maps]
    top = max(range(len(maps)), key=peaks.__getitem__)
    alt = (
        f"Heat maps of blocks {_listed(blocks)} and streams {_listed(streams)}; lines part the groups. The brightest "
        f"cell has {peaks[top]:.3g} nats a pair, in block {maps[top]['block']}, {maps[top]['stream']}."
    )
    caption = (
        "Channels in the order of their groups, each cell the mean over its pairs of channels; squares on the diagonal "
        "are groups. Colour grows with the square root of MI, up to the largest cell of a map, told below it in nats."
    )
    return Figure(
        "mi-heat", "Mutual information between channels", caption, alt, partial(_draw_heat, maps, blocks, streams),
        section="Channel groups", width=max(240, round(MAP * (0.2 + ACROSS * len(streams)))),
        height=round(MAP * (0.2 + DOWN * len(blocks))), wide=True,
    )  # fmt: skip


def _draw_heat(maps: list[dict[str, Any]], blocks: list[int], streams: list[str], canvas: Canvas) -> None:
    """All maps in one pair of axes, each a square of side 1: many axes would take many times as long."""
    axes = canvas.subplots()
    for one in maps:
        left, top = ACROSS * streams.index(one["stream"]), DOWN * blocks.index(one["block"])
        cells, channels = heat_cells(one["cells"]), sum(one["sizes"])
        peak = max(max(row) for row in cells)
        shares = [[math.sqrt(max(value, 0.0) / peak) if peak else 0.0 for value in row] for row in cells]
        axes.imshow(tint(shares), interpolation="none", extent=(left, left + 1, top + 1, top))
        ends = [end / channels for end in accumulate(one["sizes"])][:-1]
        axes.hlines([top + end for end in ends], left, left + 1, color=INK, linewidth=0.6)
        axes.vlines([left + end for end in ends], top, top + 1, color=INK, linewidth=0.6)
        axes.plot([left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top], color=LINE, linewidth=1)
        axes.text(left + 0.5, top + 1.04, f"≤ {peak:.3g}", color=MUTED, fontsize=9.5, ha="center", va="top")
    for place, stream in enumerate(streams):
        axes.text(ACROSS * place, -0.05, short(stream), fontsize=9.5)
    for place, block in enumerate(blocks):
        axes.text(-0.05, DOWN * place + 0.5, f"block {block}", color=MUTED, rotation=90, ha="right", va="center")
    axes.set(xlim=(-0.2, ACROSS * len(streams) - 0.06), ylim=(DOWN * len(blocks) - 0.03, -0.18))
    axes.set_axis_off()


def _clusters(report: Report) -> Figure | None:
    records = [record for record in report["groups"] if record.get("silhouette") is not None]
    if not records:
        return None
    lines = _by_block(records, "silhouette"), _by_block(records, "davies_bouldin")
    best = max(records, key=lambda record: record["silhouette"])
    worst = min(records, key=lambda record: record["silhouette"])
    alt = (
        f"Lines over the blocks, one a stream. Silhouette from {worst['silhouette']:.3f} (block {worst['block']}, "
        f"{worst['stream']}) to {best['silhouette']:.3f} (block {best['block']}, {best['stream']})."
    )
    caption = "Silhouette: the higher the better, 1 at most. Davies-Bouldin index: the lower the better."
    names = ("silhouette", "Davies-Bouldin")
    return Figure(
        "clusters", "How well the groups are separated", caption, alt, partial(_draw_lines, lines, names, False),
        section="Channel groups", height=330,
    )  # fmt: skip


def _by_block(records: list[dict[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """{stream: {block: value}}, of the experts of a block the mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if record.get(key) is not None:
            stream = _any_number(record["stream"])
            found.setdefault(stream, {}).setdefault(record["block"], []).append(record[key])
    return {name: {block: sum(values) / len(values) for block, values in line.items()} for name, line in found.items()}


def _any_number(stream: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in stream.split("."))


# --- layers ---------------------------------------------------------------------------------------------------------


def _widths(report: Report) -> Figure | None:
    """Bits by layer and group; without a choice of widths there is nothing to see."""
    counts: dict[str, dict[int, Counter[int]]] = {}
    for line, name in zip(report["layers"], linear_names(report["layers"]), strict=True):
        row = counts.setdefault(name, {}).setdefault(line["block"], Counter())
        for width, size in zip(line["bits"], line["sizes"], strict=True):
            row[width] += size * line["rows"]
    total: Counter[int] = sum((row for rows in counts.values() for row in rows.values()), Counter())
    if len(total) < 2:
        return None
    weights = sum(total.values())
    shares = ", ".join(f"{width} bits {count / weights:.1%}" for width, count in sorted(total.items()))
    caption = (
        "A row a block, a panel a Linear: the share of its weights that lies in groups of a width, the narrow ones "
        f"first. All layers: {shares}."
    )
    alt = f"Strips coloured by width, a panel for each of {_listed(list(counts))}. Shares of the weights: {shares}."
    blocks = len({line["block"] for line in report["layers"]})
    rows = math.ceil(len(counts) / PER_ROW)
    return Figure(
        "bits", "Bits by layer and group", caption, alt, partial(_draw_widths, counts, sorted(total)),
        section="Bits", width=400, height=60 + rows * (44 + min(max(8 * blocks, 48), 150)), wide=True,
    )  # fmt: skip


def _draw_widths(counts: dict[str, dict[int, Counter[int]]], widths: list[int], canvas: Canvas) -> None:
    from matplotlib.patches import Patch

    rows, columns = math.ceil(len(counts) / PER_ROW), min(len(counts), PER_ROW)
    grid = canvas.subplots(rows, columns, squeeze=False)
    shade = {width: 0.12 + 0.88 * place / (len(widths) - 1) for place, width in enumerate(widths)}
    for axes in grid.flat:
        axes.set_axis_off()
    for place, (axes, (name, by_block)) in enumerate(zip(grid.flat, counts.items(), strict=False)):
        axes.set_axis_on()
        blocks = sorted(by_block)
        image = tint([[shade[width] for width in _strip(by_block[block])] for block in blocks])
        axes.imshow(image, interpolation="none", aspect="auto", extent=(0, 1, blocks[-1] + 0.5, blocks[0] - 0.5))
        axes.set(xticks=[], title=name)
        _whole_ticks(axes.yaxis)
        if place % PER_ROW:
            axes.tick_params(left=False, labelleft=False)
        else:
            axes.set_ylabel("block")
    patches = [Patch(facecolor=tint([[shade[w]]])[0][0], edgecolor=LINE, label=f"{w} bits") for w in widths]
    canvas.legend(handles=patches, loc="outside lower center", ncols=min(len(widths), 5))


def _strip(row: Counter[int]) -> list[int]:
    """The widths of one layer over STRIP pixels, narrow ones first, each by its share of the weights."""
    weights, ends = sum(row.values()), 0
    widths: list[int] = []
    for width, count in sorted(row.items()):
        ends += count
        widths += [width] * (round(STRIP * ends / weights) - len(widths))
    return widths


def _errors(report: Report) -> Figure | None:
    """Relative output error; training knows none."""
    layers = report["layers"]
    found: dict[str, dict[int, float]] = {}
    for line, name in zip(layers, linear_names(layers), strict=True):
        if _finite(line["error"]) and line["error"] > 0:
            row = found.setdefault(name, {})
            row[line["block"]] = max(line["error"], row.get(line["block"], 0.0))
    if not found:
        return None
    error, block, name = max((error, block, name) for name, row in found.items() for block, error in row.items())
    experts = " Of the experts of a block the worst." if any("experts" in line["layer"] for line in layers) else ""
    alt = f"Lines over the blocks, one a Linear. The largest is {error:.3g}, block {block}, {name}."
    caption = f"Squared error of a layer's output relative to the output, on a log scale.{experts}"
    rows = math.ceil(len(found) / PER_ROW)
    return Figure(
        "errors", "Error by layer", caption, alt, partial(_draw_lines, (found,), ("relative error",), True),
        section="Error per layer", height=230 + 18 * rows,
    )  # fmt: skip


def _draw_lines(
    panels: tuple[dict[str, dict[int, float]], ...], names: tuple[str, ...], log: bool, canvas: Canvas
) -> None:
    """Panels below one another, values over the blocks, a line a name."""
    many = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, lines, name in zip(many, panels, names, strict=True):
        for index, (label, line) in enumerate(lines.items()):
            blocks = sorted(line)
            style = dict(linestyle="-" if index < 8 else "--", markevery=max(1, len(blocks) // 12))
            axes.plot(
                blocks, [line[b] for b in blocks], label=label, markeredgecolor=PAPER, markeredgewidth=0.6,
                **series(index), **style,
            )  # fmt: skip
        axes.set(ylabel=name, yscale="log" if log else "linear")
        axes.grid(axis="y")
        if log:
            _log_ticks(axes.yaxis)
    many[-1].set_xlabel("block")
    _whole_ticks(many[-1].xaxis)
    handles, labels = many[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=PER_ROW, handlelength=1.4, columnspacing=1.2)


# --- size, quality --------------------------------------------------------------------------------------------------


def _quality(report: Report) -> Figure | None:
    scores = {
        name: (report["dense"][name]["perplexity"], score["perplexity"])
        for name, score in report["compressed"].items()
        if name in report["dense"] and _finite(score["perplexity"])
    }
    if not scores:
        return None
    sizes = report["size"]["dense_bytes"], report["size"]["packed_bytes"]
    moves = {name: f"{short(name)} {perplexity_text(a)} → {perplexity_text(b)}" for name, (a, b) in scores.items()}
    alt = f"From dense to compressed, {size_text(sizes[0])} to {size_text(sizes[1])}: {'; '.join(moves.values())}."
    caption = "Hollow: the dense model at 16 bits. Filled: compressed, at true bits with all that stays dense."
    return Figure(
        "quality", "Size and perplexity", caption, alt, partial(_draw_quality, scores, sizes, moves),
        section="Perplexity", height=225 + 18 * len(scores),
    )  # fmt: skip


def _draw_quality(
    scores: dict[str, tuple[float, float]], sizes: tuple[int, int], moves: dict[str, str], canvas: Canvas
) -> None:
    axes = canvas.subplots()
    for index, (name, pair) in enumerate(scores.items()):
        style = series(index)
        axes.plot(sizes, pair, label=moves[name], markersize=7, **style)
        axes.plot(sizes[:1], pair[:1], markersize=7, markerfacecolor=PAPER, markeredgewidth=1.6, **style)
    flat = [value for pair in scores.values() for value in pair]
    axes.set(ylabel="perplexity", xlabel="bytes")
    axes.set_xlim(0, max(sizes) * 1.08)
    if max(flat) / min(flat) > LOG_RATIO:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    else:
        axes.set_ylim(min(flat) * 0.9, max(flat) * 1.08)
    axes.xaxis.set_major_locator(_few_ticks(5))
    axes.xaxis.set_major_formatter(lambda value, _: size_text(value) if value else "0")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.grid()
    canvas.legend(loc="outside lower center", ncols=1)


def _divergence(report: Report) -> Figure | None:
    """KL divergence and top-1 agreement with the dense model, where they were measured."""
    scores = {name: score for name, score in report["compressed"].items() if score.get("kl_divergence") is not None}
    if not scores:
        return None
    moved = {name: score["kl_divergence"] for name, score in scores.items()}
    panels = {"KL divergence, nats a token": {name: (value, f"{value:.4f}") for name, value in moved.items()}}
    agreed = {name: score["top1_agreement"] for name, score in scores.items() if "top1_agreement" in score}
    if agreed:
        panels["Top-1 agreement"] = {name: (value, f"{value:.2%}") for name, value in agreed.items()}
    alt = "; ".join(f"{title}: " + _told(bars) for title, bars in panels.items()) + "."
    caption = "How far the predictions moved from those of the dense model on the same text."
    height = 16 + sum(34 + 24 * len(bars) for bars in panels.values())
    return Figure(
        "divergence", "Distance from the dense model", caption, alt, partial(_draw_bars, panels),
        section="Perplexity", height=height,
    )  # fmt: skip


# --- costs ----------------------------------------------------------------------------------------------------------


def _time(report: Report) -> Figure | None:
    seconds = {name: value for name, value in report["seconds"].items() if name != "total"}
    bars: dict[str, tuple[float, str]] = {}
    for name in (name for name in seconds if name not in NESTED):
        bars[name] = seconds[name], duration_text(seconds[name])
        for part in (part for part in NESTED if NESTED[part] == name and part in seconds):
            bars[f"· {part}"] = seconds[part], duration_text(seconds[part])
    if not bars:
        return None
    total = duration_text(total_seconds(report["seconds"]))
    return Figure(
        "time", "Time by stage", f"Wall time, {total} in all. A dot marks a part of the stage above it.",
        f"Bars: {_told(bars)}.", partial(_draw_bars, {"": bars}),
        section="Time and memory", height=30 + 24 * len(bars),
    )  # fmt: skip


def _memory(report: Report) -> Figure | None:
    peaks = {name: size for name, size in report.get("stage_peaks", {}).items() if name in report["seconds"]}
    sizes = {
        **{f"by the end of {name}": size for name, size in peaks.items() if name not in NESTED and name != "total"},
        "peak host": report["peak_host_bytes"],
        "peak GPU": report["peak_device_bytes"],
        "dense model": report["size"]["dense_bytes"],
        "compressed": report["size"]["packed_bytes"],
    }
    bars = {name: (float(size), size_text(size)) for name, size in sizes.items() if size}
    caption = (
        "The most memory that the process had had by the end of each stage and of the run, beside the sizes of the "
        "dense model at 16 bits and of the compressed one."
    )
    return Figure(
        "memory", "Memory", caption, f"Bars: {_told(bars)}.", partial(_draw_bars, {"": bars}),
        section="Time and memory", height=30 + 24 * len(bars),
    )  # fmt: skip


def _draw_bars(panels: dict[str, dict[str, tuple[float, str]]], canvas: Canvas) -> None:
    """Horizontal bars, {title: {name: (length, its text)}}, every value written at the end of its bar."""
    ratios = [len(bars) + 1 for bars in panels.values()]
    many = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (title, bars) in zip(many, panels.items(), strict=True):
        names, lengths = list(bars), [length for length, _ in bars.values()]
        parts = [name.startswith("·") for name in names]
        drawn = axes.barh(range(len(names)), lengths, height=0.62, color=[MUTED if part else ACCENT for part in parts])
        axes.bar_label(drawn, [text for _, text in bars.values()], padding=5, fontsize=9.5)
        axes.invert_yaxis()
        axes.set_xlim(0, max(lengths) * 1.32 or 1)
        axes.set(xticks=[], title=title)
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.tick_params(left=False)
        axes.spines[["bottom", "left"]].set_visible(False)


# --- shared ---------------------------------------------------------------------------------------------------------


def _told(bars: dict[str, tuple[float, str]]) -> str:
    return ", ".join(f"{name.removeprefix('· ')} {text}" for name, (_, text) in bars.items())


def _listed(values: list[Any]) -> str:
    *head, last = map(str, values)
    return f"{', '.join(head)} and {last}" if head else last


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _few_ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _log_ticks(axis: Any) -> None:
    """1, 2, 5, 10, 20, ... or, over many decades, powers of ten; plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _whole_ticks(axis: Any) -> None:
    """A few ticks, at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True))


# --- the page -------------------------------------------------------------------------------------------------------


def write_run_page(path: str | Path, report: Report) -> None:
    """The whole report of one run as one HTML file (`write_html`). Raises UserError when it cannot be written."""
    found = sections(report)
    write_html(path, found[0].title, found, report_figures(report), report, headline(report))


def headline(report: Report) -> list[tuple[str, str, str]]:
    """What a reader asks first: perplexities, bits, size and time."""
    items = []
    for name, score in report["compressed"].items():
        dense = report["dense"][name]["perplexity"]
        note = f"dense {perplexity_text(dense)}, ×{score['perplexity'] / dense:.3f}"
        items.append((f"perplexity, {name}", perplexity_text(score["perplexity"]), note))
    size = report["size"]
    share = f"{size['packed_bytes'] / size['dense_bytes']:.1%} of dense"
    return [
        *items,
        ("true bits a weight", f"{size['true_bits']:.3f}", f"sparsity {size['sparsity']:.3f}"),
        ("size", size_text(size["packed_bytes"]), share),
        ("time", duration_text(total_seconds(report["seconds"])), f"peak {size_text(report['peak_host_bytes'])}"),
    ]
