"""What a run of CM-IBQ says at its end: answers, widths by part and by site, and the page with the map of widths."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mico.pages.figures import LINE, Figure, tint
from mico.pages.html import write_html
from mico.pages.run import headline, report_figures
from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.sites import MODALITIES
from mico.qat.cmibq.wrap import LOGGED
from mico.summary import sections
from mico.tables import Section, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

PAIRS = ("activations", "weights")
TITLE = "Widths by site"


def cmibq_sections(report: dict[str, Any]) -> list[Section]:
    """The report of a compression, with answers and widths where it tells of perplexity."""
    own = [quality(report), widths(report)]
    found = sections(report)
    place = next(index for index, section in enumerate(found) if section.title == "Perplexity")
    return [*found[:place], *own, *found[place + 1 :]]


def quality(report: dict[str, Any]) -> Section:
    """Held-out answers with the dense model and with the quantized one."""
    dense, quantized = report["answers"]["dense"], report["answers"]["quantized"]
    rows = (
        ("loss", number(dense["loss"]), number(quantized["loss"])),
        ("right", f"{dense['right']:.1%}", f"{quantized['right']:.1%}"),
    )
    lines = [
        f"{dense['answers']:,} answers held out, {dense['tokens']:,} tokens. Loss: cross-entropy a token. Right: "
        "answers whose every token is the likeliest one after those before it. Quantized: weights and activations, as "
        "read back from the files written."
    ]
    if report["left_out"]:
        lines.append(f"{report['left_out']:,} answers of the data are about no picture, and left out.")
    if report["rows_cut"]:
        lines.append(f"{report['rows_cut']:,} rows taught nothing: their answers lie behind --seqlen.")
    return Section("Answers", ("", "dense", "quantized"), rows, tuple(lines), frozenset({(0, 2), (1, 2)}))


def widths(report: dict[str, Any]) -> Section:
    """Average widths, as they were found in the files."""
    found, asked = report["quantization"]["averages"], report["quantization"]["settings"]
    targets = dict(activations=asked["target_bits_act"], weights=asked["target_bits_weight"])
    rows = []
    for kind in PAIRS:
        parts = found[f"{kind}_by_modality"]
        cells = (number(parts[name]) if name in parts else "" for name in MODALITIES)
        rows.append((kind, number(targets[kind]), number(found[kind]), *cells))
    lines = (
        "Bits a value in the files written: of activations weighted by multiplications, of weights by their number. "
        f"Widths of every group: bits.json; the map of them: {Path(report['folder']) / 'report.html'}.",
    )
    columns = ("average bits", "target", "all", *(LOGGED[name] for name in MODALITIES))
    return Section(TITLE, columns, tuple(rows), lines, frozenset({(0, 2), (1, 2)}))


# --- the page -------------------------------------------------------------------------------------------------------


def write_page(path: Path, report: dict[str, Any]) -> None:
    """The report as one HTML file. Raises UserError when it cannot be written."""
    found = cmibq_sections(report)
    write_html(path, found[0].title, found, cmibq_figures(report), report, cmibq_headline(report))


def cmibq_figures(report: dict[str, Any]) -> list[Figure]:
    """The map of widths before the figures of any compression."""
    return [bit_figure(report["bit_map"]), *report_figures(report)]


def cmibq_headline(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a reader asks first."""
    averages = report["quantization"]["averages"]
    dense, quantized = report["answers"]["dense"], report["answers"]["quantized"]
    return [
        ("right answers", f"{quantized['right']:.1%}", f"dense {dense['right']:.1%}"),
        ("loss of an answer's token", number(quantized["loss"]), f"dense {number(dense['loss'])}"),
        ("bits an activation", number(averages["activations"]), f"weights {number(averages['weights'])}"),
        *headline(report),
    ]


def bit_figure(bits: dict[str, Any]) -> Figure:
    """A row a site, a cell a group, for activations and for weights; colour tells the width."""
    strips: dict[str, list[list[int]]] = {kind: [] for kind in PAIRS}
    for site in bits["sites"]:
        strips["activations"].append(site["activations"])
        strips["weights"].append([width for row in site["weights"].values() for width in row])
    ends = [
        sum(site["modality"] in MODALITIES[: place + 1] for site in bits["sites"]) for place in range(len(MODALITIES))
    ]
    averages = ", ".join(f"{kind} {number(bits['averages'][kind])} bits on average" for kind in PAIRS)
    caption = (
        "A row a site, from the first block of the vision tower down to the last of the language model; lines part the "
        "vision tower, the projector and the language model. Cells: groups of input channels; of weights, runs of "
        "columns of every Linear that reads the site."
    )
    height = 90 + min(600, max(120, 9 * len(bits["sites"])))
    return Figure(
        "widths", "Widths of activations and weights", caption, f"Two maps of widths by site and group: {averages}.",
        partial(_draw, strips, ends), section=TITLE, width=420, height=height, wide=True,
    )  # fmt: skip


def _draw(strips: dict[str, list[list[int]]], ends: list[int], canvas: Canvas) -> None:
    from matplotlib.patches import Patch

    shade = {width: 0.12 + 0.88 * place / (len(BITS) - 1) for place, width in enumerate(BITS)}
    for place, (axes, (kind, rows)) in enumerate(zip(canvas.subplots(1, len(strips)), strips.items(), strict=True)):
        columns = max(map(len, rows))
        stretched = [[shade[row[cell * len(row) // columns]] for cell in range(columns)] for row in rows]
        axes.imshow(tint(stretched), interpolation="none", aspect="auto", extent=(0, 1, len(rows), 0))
        axes.hlines([end for end in ends[:-1] if end], 0, 1, color=LINE, linewidth=1.2)
        axes.set(xticks=[], title=kind, ylabel="" if place else "site")
        if place:
            axes.set_yticks([])
    patches = [Patch(facecolor=tint([[shade[w]]])[0][0], edgecolor=LINE, label=f"{w} bits") for w in BITS]
    canvas.legend(handles=patches, loc="outside lower center", ncols=len(BITS))
