"""A page as one HTML file that needs nothing else: no network, no server, no storage.

Everything that comes from outside (model names, paths, settings) is escaped; the Content-Security-Policy forbids any
request and any script but the page's own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from mico.files import atomic_write
from mico.pages.figures import Figure, inline_svg
from mico.tables import NOTHING, Section

FIGURE = r"[-+−×≤]?\d[\d.,eE+\-]*"
NUMBER = re.compile(rf"{FIGURE}(/{FIGURE}| to {FIGURE})*( ?[%×]| [a-zA-Z]{{1,3}})?( ± .*)?( \(.*\))?")
SAFE = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"})  # JSON's own escapes
LARGEST = 1_000_000  # characters of JSON that a page holds as they are
LONG = 24  # rows of a table that scrolls in a box of its own

Headline = Sequence[tuple[str, str, str]]  # (what, its value, what to compare it with)


def write_html(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    figures: Sequence[Figure],
    data: dict[str, Any],
    headline: Headline = (),
) -> None:
    """Write one page, whole or not at all.

    sections: tables in their order, each followed by the figures that name its title; other figures come after the
    first section. data: plain values behind the page, embedded in it as JSON and offered for saving.
    headline: a few figures that stand above everything. Raises UserError when the file cannot be written.
    """
    atomic_write(path, page(title, sections, figures, data, headline).encode())


def page(
    title: str, sections: Sequence[Section], figures: Sequence[Figure], data: dict[str, Any], headline: Headline = ()
) -> str:
    """The HTML of a page; the same input always gives the same text."""
    style, script = _resource("style.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = _parts(title, sections, figures)
    contents = "".join(f'<li><a href="#{name}">{escape(head)}</a></li>' for name, head, _ in parts)
    body = "\n".join(_part(*part) for part in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="mico">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the report</a>
<header>
<h1>{escape(title)}</h1>
<div class="tools"><button type="button" id="theme" hidden>Dark</button>
<button type="button" id="save" hidden>Save JSON</button></div>
</header>
{_headline(headline)}<div class="page">
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main id="content">
{body}
</main>
</div>
<footer>Written by mico. Every figure on this page comes from the JSON inside it.</footer>
{_data(data)}
<script>{script}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return resources.files("mico.pages").joinpath(name).read_text(encoding="utf-8")


def _data(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in, nor start a comment there; compressed where it is long.

    NaN and infinities, which JSON does not know, become null.
    """
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if len(text) > LARGEST:
        packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
        return f'<script type="text/plain" id="data" data-encoding="gzip base64">{packed}</script>'
    return f'<script type="application/json" id="data">{text.translate(SAFE)}</script>'


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _headline(headline: Headline) -> str:
    if not headline:
        return ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong> <span>{escape(note)}</span></dd></div>"
        for name, value, note in headline
    )
    return f'<dl class="headline">{items}</dl>\n'


# --- sections -------------------------------------------------------------------------------------------------------


def _parts(title: str, sections: Sequence[Section], figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """(id, heading, content) of every part of the page."""
    titles = {section.title for section in sections}
    parts, used = [], set[str]()
    loose = [figure for figure in figures if figure.section not in titles]
    for index, section in enumerate(sections):
        # The title of the page stands above it already.
        head = "Setup" if section.title == title else section.title
        own = [figure for figure in figures if figure.section == section.title]
        parts.append((_anchor(head, used), head, _section(section, head) + _figures(own)))
        if index == 0 and loose:
            parts.append((_anchor("Figures", used), "Figures", _figures(loose)))
    return parts


def _part(name: str, head: str, inner: str) -> str:
    title = f'<h2 id="{name}-head">{escape(head)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-head">{title}\n<div class="body">{inner}</div></section>'


def _anchor(head: str, used: set[str]) -> str:
    """A name for links that no other part of the page has."""
    stem = re.sub(r"[^a-z0-9]+", "-", head.lower()).strip("-") or "part"
    name, count = stem, 1
    while name in used:
        name, count = f"{stem}-{count + 1}", count + 1
    used.add(name)
    return name


def _section(section: Section, head: str) -> str:
    """Table and lines; they stand beside the figures where both fit."""
    if section.code:
        lines = "".join(_command(line) for line in section.lines)
    else:
        kind = ' class="note"' if section.rows else ""
        lines = "".join(f"<p{kind}>{_breakable(line)}</p>" for line in section.lines)
    wide = " wide" if section.code or not section.rows else ""
    return f'<div class="text{wide}">{_table(section, head) if section.rows else ""}{lines}</div>'


def _command(line: str) -> str:
    return (
        f'<div class="command"><pre tabindex="0"><code>{escape(line)}</code></pre>'
        '<button type="button" class="copy" hidden>Copy</button></div>'
    )


def _table(section: Section, head: str) -> str:
    heads = any(section.columns)
    right = [
        heads and index > 0 and all(_is_number(row[index]) for row in section.rows)
        for index in range(len(section.columns))
    ]
    top = ""
    if heads:
        cells = (
            f'<th scope="col"{_classes(right[i])}>{escape(name) or "<span class=quiet>value</span>"}</th>'
            for i, name in enumerate(section.columns)
        )
        top = f"<thead><tr>{''.join(cells)}</tr></thead>"
    rows = "\n".join(_row(section, number, right) for number in range(len(section.rows)))
    kind = "table" + (" long" if len(section.rows) > LONG else "") + ("" if heads else " pairs")
    return (
        f'<div class="{kind}" role="region" aria-label="{escape(head)}, table" tabindex="0">'
        f"<table>{top}<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(section: Section, number: int, right: Sequence[bool]) -> str:
    first, *rest = section.rows[number]
    part = first.startswith("·")
    cells = [f'<th scope="row"{_classes(False, (number, 0) in section.strong, part)}>{_breakable(first)}</th>']
    for column, cell in enumerate(rest, 1):
        look = _classes(right[column], (number, column) in section.strong, part)
        cells.append(f"<td{look}>{_breakable(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _classes(right: bool, strong: bool = False, part: bool = False) -> str:
    names = [name for name, wanted in (("num", right), ("strong", strong), ("part", part)) if wanted]
    return f' class="{" ".join(names)}"' if names else ""


def _is_number(cell: str) -> bool:
    return cell in (NOTHING, "not finite") or NUMBER.fullmatch(cell) is not None


def _breakable(text: str) -> str:
    """Escaped text in which long paths and names may wrap."""
    return re.sub(r"(?<=\w\w)([/_])(?=\w)", r"\1<wbr>", escape(text)) if len(text) > LONG else escape(text)


# --- figures --------------------------------------------------------------------------------------------------------


def _figures(figures: Sequence[Figure]) -> str:
    wide, narrow = ("".join(_figure(one) for one in figures if one.wide is wide) for wide in (True, False))
    rows = (("figures wide", wide), ("figures", narrow))
    return "".join(f'<div class="{kind}">{row}</div>' for kind, row in rows if row)


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="figure-{escape(figure.name)}"><figcaption><strong>{escape(figure.title)}</strong> '
        f"<span>{escape(figure.caption)}</span></figcaption>{inline_svg(figure)}</figure>"
    )
