"""Tables with lines under them, shown on a terminal or written as Markdown, and figures short enough for them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = "-"


@dataclass(frozen=True)
class Section:
    """One table with a title, and lines under it. `strong`: (row, column) of the cells that stand out; `code`: the
    lines are commands."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[str, ...] = ()
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    code: bool = False


def print_sections(found: Iterable[Section], console: Console) -> None:
    """Show sections on a terminal of any width; text wraps, nothing is cut."""
    for section in found:
        console.print(Text(section.title, style="bold cyan"))
        if section.rows:
            console.print(_rich_table(section))
        for line in section.lines:
            console.print(Text(line, style="" if not section.rows else "dim"))
        console.print()


def _rich_table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=any(section.columns), pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(section.columns):
        cells = [row[index] for row in section.rows]
        numbers = index > 0 and all(cell[:1] in "0123456789-×" for cell in cells) and max(map(len, cells)) < 16
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for number_of_row, row in enumerate(section.rows):
        cells_of_row = enumerate(row)
        table.add_row(
            *(Text(cell, style="bold" if (number_of_row, i) in section.strong else "") for i, cell in cells_of_row)
        )
    return table


def markdown(found: Iterable[Section]) -> str:
    """The same sections as a Markdown page; the first title is the page's."""
    page: list[str] = []
    for index, section in enumerate(found):
        page += [f"{'##' if index else '#'} {section.title}", ""]
        if section.rows:
            heads = section.columns
            page += [_markdown_row(heads), "|" + "---|" * len(heads)]
            for i, row in enumerate(section.rows):
                cells = (f"**{cell}**" if (i, j) in section.strong else cell for j, cell in enumerate(row))
                page.append(_markdown_row(cells))
            page.append("")
        if section.lines and not section.rows:
            page += [f"    {line}" for line in section.lines] + [""]
        else:
            page += [part for line in section.lines for part in (line, "")]
    return "\n".join(page).rstrip() + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- figures in words -----------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number short enough for a table; None is a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def perplexity_text(value: float) -> str:
    """Two decimals, without a tail of digits for a wrecked model."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def size_text(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration_text(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def spread(values: Sequence[float]) -> str:
    """'min/median/max', or the one value that they all have."""
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return f"{min(values):g}/{statistics.median(values):g}/{max(values):g}"
