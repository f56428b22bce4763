"""Figures drawn by matplotlib: one drawing gives the inline SVG of a page and the PNG and SVG files beside it.

In a page the colours of the light scheme are replaced by the page's own variables, so that a figure follows the
page into the dark. Sizes are CSS pixels; figures are about as wide as a phone, where their text stays readable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mico.errors import UserError
from mico.files import atomic_write, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

WIDTH, HEIGHT = 360, 250
LONGEST_NAME = 26
INK, MUTED, LINE, PAPER, ACCENT = "#1d1e20", "#5c5f66", "#dcdee2", "#fffffe", "#1f5fc2"
SERIES = (ACCENT, "#b4520a", "#17803f", "#7a3fd0", "#bd1440", "#0d7285", "#57534f", "#66750f")
MARKERS = "osD^vPX*"
PIXELS_PER_INCH = 72  # of matplotlib's SVG
_STYLE: Any = {  # of matplotlib's rcParams
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mico",  # ids that are the same in every run
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than most: nothing collides in another font
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.linewidth": 1,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "image.composite_image": False,  # every image keeps its own pixels
}
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(SERIES, 1)
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Figure:
    """One figure of a page.

    name: of its files and ids, unique on a page; alt: what it shows, in words, for those who do not see it;
    draw: fills an empty matplotlib figure; section: the title of the section it belongs to ("" is none);
    width and height in CSS pixels; wide: it takes the whole width of a page where others stand in two columns.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Canvas], None]
    section: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    wide: bool = False


def inline_svg(figure: Figure) -> str:
    """The figure as an `<svg>` for a page: no size of its own, the page's colours, ids that no other figure has."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(_rendered(figure, "svg"))
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    for child in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(child)
    _masked_images(root)
    _own_ids(root, figure.name)
    for position, (tag, text) in enumerate((("title", figure.title), ("desc", figure.alt))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{figure.name}-{tag}"})
        element.text = text
        root.insert(position, element)
    root.attrib |= {"role": "img", "aria-labelledby": f"{figure.name}-title {figure.name}-desc", "class": "figure"}
    root.attrib.pop("version", None)
    return _page_colours(ElementTree.tostring(root, encoding="unicode"))


def save_figures(figures: Sequence[Figure], folder: str | Path) -> list[Path]:
    """Write `<name>.png` (at twice the size) and `<name>.svg` of every figure; return the paths.

    Raises UserError naming the folder when it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: figures go into a folder, and this is a file: give another name")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        for kind in ("png", "svg"):
            paths.append(folder / f"{figure.name}.{kind}")
            atomic_write(paths[-1], _rendered(figure, kind, title=figure.title))
    return paths


def _rendered(figure: Figure, kind: str, title: str | None = None) -> bytes:
    """The figure's bytes, the same at every call; with a title it stands for itself, on white."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        matplotlib.rcParams.update(_STYLE)
        above = 24 if title else 0
        size = (figure.width / PIXELS_PER_INCH, (figure.height + above) / PIXELS_PER_INCH)
        layout = ConstrainedLayoutEngine(w_pad=3 / PIXELS_PER_INCH, h_pad=3 / PIXELS_PER_INCH)
        canvas = Canvas(figsize=size, layout=layout)
        figure.draw(canvas)
        if title:
            canvas.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
        buffer = io.BytesIO()
        look: dict[str, Any] = dict(facecolor="white") if title else dict(transparent=True)
        metadata: Any = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        canvas.savefig(buffer, format=kind, dpi=2 * PIXELS_PER_INCH, metadata=metadata, **look)
    return buffer.getvalue()


def _masked_images(root: ElementTree.Element) -> None:
    """Every image becomes the mask of a rectangle in the accent colour: opacity from `tint`, colour from the page."""
    parents = [parent for parent in root.iter() if parent.find(f"{{{_SVG}}}image") is not None]
    images = [(parent, image) for parent in parents for image in parent.findall(f"{{{_SVG}}}image")]
    for number, (parent, image) in enumerate(images):
        place = {name: image.attrib[name] for name in ("x", "y", "width", "height") if name in image.attrib}
        move = image.attrib.pop("transform", "")
        group = ElementTree.Element(f"{{{_SVG}}}g", {"transform": move})
        mask = ElementTree.SubElement(group, f"{{{_SVG}}}mask", {"id": f"image-{number}", "style": "mask-type: alpha"})
        ElementTree.SubElement(
            group, f"{{{_SVG}}}rect", place | {"fill": "var(--series-1)", "mask": f"url(#image-{number})"}
        )
        parent[list(parent).index(image)] = group
        mask.append(image)


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Prefix the ids that are referred to with the figure's name and drop the others."""
    elements = list(root.iter())
    link = f"{{{_XLINK}}}href"
    used = {element.attrib[link][1:] for element in elements if element.attrib.get(link, "").startswith("#")}
    used |= {found for element in elements for value in element.attrib.values() for found in _REFERENCE.findall(value)}
    for element in elements:
        if (own := element.attrib.pop("id", None)) in used:
            element.attrib["id"] = f"{name}-{own}"
        if target := element.attrib.pop(link, None):  # a plain href, which HTML knows without a namespace
            element.attrib["href"] = f"#{name}-{target[1:]}" if target.startswith("#") else target
        for key, value in element.attrib.items():
            element.attrib[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)


def _page_colours(svg: str) -> str:
    """The same picture with the page's colours and font in the place of the light scheme's and matplotlib's."""
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    return re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)


# --- what drawings share ---------------------------------------------------------------------------------------------


def tint(values: Sequence[Sequence[float]]) -> list[list[tuple[float, float, float, float]]]:
    """Shares 0..1 as the accent colour of that opacity, which reads on a light and on a dark page alike."""
    red, green, blue = (int(ACCENT[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return [[(red, green, blue, min(max(value, 0.0), 1.0)) for value in row] for row in values]


def series(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th line."""
    return dict(color=SERIES[index % len(SERIES)], marker=MARKERS[index % len(MARKERS)])


def short(name: str) -> str:
    """A name that leaves room for the figure beside it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
