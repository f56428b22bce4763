"""Figures: what is drawn is what the report tells, and the files and inline pictures are sound."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from mico.errors import UserError
from mico.pages import Figure, report_figures, save_figures
from mico.pages.figures import inline_svg
from tests.pages.reports import LINEARS, SIZES, STREAMS, made, score

matplotlib = pytest.importorskip("matplotlib")
Canvas = pytest.importorskip("matplotlib.figure").Figure
NAMES = ["q", "k", "v", "o", "gate", "up", "down"]


def drawn(figure: Figure) -> Canvas:
    canvas = Canvas()
    figure.draw(canvas)
    return canvas


def named(report: dict, name: str) -> Figure:
    return next(figure for figure in report_figures(report) if figure.name == name)


def test_a_report_has_the_figures_that_it_has_data_for() -> None:
    everything = made(
        compressed=dict(docs=score(36.0, kl_divergence=0.25, top1_agreement=0.75)), dense=dict(docs=score(30.0))
    )
    names = [figure.name for figure in report_figures(everything)]
    assert names == ["mi-heat", "clusters", "bits", "errors", "quality", "divergence", "time", "memory"]
    bare = made(groups=[], heat_maps=[], compressed={}, dense={})
    bare["layers"] = [line | dict(bits=[4, 4, 4], error=0.0) for line in bare["layers"]]
    assert [figure.name for figure in report_figures(bare)] == ["time", "memory"]
    assert "mi-heat" not in [
        figure.name for figure in report_figures({k: v for k, v in made().items() if k != "heat_maps"})
    ]


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_errors_are_lines_over_the_blocks() -> None:
    report = made(4)
    (axes,) = drawn(named(report, "errors")).axes
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == NAMES
    for name, path in zip(NAMES, LINEARS, strict=True):
        expected = [line["error"] for line in report["layers"] if line["layer"].endswith(path)]
        assert list(lines[name].get_ydata()) == expected and list(lines[name].get_xdata()) == [0, 1, 2, 3]
    assert "0.112, block 3, down" in named(report, "errors").alt


def test_of_experts_the_worst_error_is_shown() -> None:
    report = made(1)
    line = report["layers"][-1]
    experts = [line | dict(layer=f"model.layers.0.mlp.experts.{e}.down_proj", error=0.1 * (e + 1)) for e in range(3)]
    (axes,) = drawn(named(report | dict(layers=report["layers"][:-1] + experts), "errors")).axes
    assert list(axes.lines[-1].get_ydata()) == [pytest.approx(0.3)]


def test_heat_maps_show_every_cell_and_the_ends_of_groups() -> None:
    report = made(5)
    figure = named(report, "mi-heat")
    (axes,) = drawn(figure).axes
    assert len(axes.images) == 3 * len(STREAMS)
    image = axes.images[0].get_array()
    cells = np.array([[max(r, c) * 12 + min(r, c) for c in range(12)] for r in range(12)]) / 1000
    assert np.allclose(image[..., 3], np.sqrt(cells / cells.max()), atol=1e-6)
    ends = [segment[0][1] for segment in axes.collections[0].get_segments()]
    assert ends == list(np.cumsum(SIZES)[:-1] / 12)
    told = [text.get_text() for text in axes.texts]
    assert told.count("≤ 0.143") == 12 and {*STREAMS, "block 0", "block 2", "block 4"} < set(told)
    assert "0.143 nats" in figure.alt


def test_widths_fill_strips_by_their_share() -> None:
    report = made(1)
    report["layers"] = [
        line | dict(bits=[8, 2, 4], sizes=[6, 3, 3]) if line["layer"].endswith("q_proj") else line | dict(bits=[4] * 3)
        for line in report["layers"]
    ]
    figure = named(report, "bits")
    image = drawn(figure).axes[0].images[0].get_array()
    counts = np.unique(image[0, :, 3], return_counts=True)[1]
    assert list(counts / counts.sum()) == [0.25, 0.25, 0.5] and list(image[0, :, 3]) == sorted(image[0, :, 3])
    rows = [line["rows"] for line in report["layers"]]
    total = 12 * sum(rows)
    shares = [3 * rows[0] / total, (12 * sum(rows[1:]) + 3 * rows[0]) / total, 6 * rows[0] / total]
    told = [float(share) / 100 for share in re.findall(r"bits ([\d.]+)%", figure.alt)]
    assert told == pytest.approx(shares, abs=6e-4)


def test_clusters_are_lines_a_stream() -> None:
    report = made(3)
    silhouette, davies = drawn(named(report, "clusters")).axes
    for axes, key in ((silhouette, "silhouette"), (davies, "davies_bouldin")):
        for line in axes.lines:
            expected = [record[key] for record in report["groups"] if record["stream"] == line.get_label()]
            assert list(line.get_ydata()) == expected and len(expected) == 3


def test_quality_goes_from_dense_to_compressed() -> None:
    (axes,) = drawn(named(made(), "quality")).axes
    assert [list(line.get_ydata()) for line in axes.lines[::2]] == [[30.25, 36.125], [41.5, 88.75]]
    assert all(list(line.get_xdata()) == [3_411_000, 1_513_000] for line in axes.lines[::2])
    assert axes.get_yscale() == "linear"
    wrecked = made(compressed=dict(docs=score(1e6), wiki=score(math.inf)))
    (axes,) = drawn(named(wrecked, "quality")).axes
    assert axes.get_yscale() == "log" and len(axes.lines) == 2


def test_bars_are_as_long_as_their_stages() -> None:
    (axes,) = drawn(named(made(), "time")).axes
    lengths = {
        label.get_text(): bar.get_width() for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)
    }
    assert lengths == {"load": 0.5, "groups": 12.25, "· clustering": 11.5, "compress": 73.0}
    assert [text.get_text() for text in axes.texts] == ["0.5 s", "12.2 s", "11.5 s", "73.0 s"]


def test_divergence_has_a_panel_a_figure() -> None:
    compared = score(36.0, kl_divergence=0.25, top1_agreement=0.75)
    report = made(compressed=dict(docs=compared, wiki=score(50.0, kl_divergence=0.5)))
    panels = drawn(named(report, "divergence")).axes
    assert [[bar.get_width() for bar in axes.patches] for axes in panels] == [[0.25, 0.5], [0.75]]


# --- pictures -------------------------------------------------------------------------------------------------------


def test_inline_pictures_follow_the_page_and_share_no_id() -> None:
    pictures = [inline_svg(figure) for figure in report_figures(made())]
    ids: list[str] = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        own = [one.attrib["id"] for one in root.iter() if "id" in one.attrib]
        ids += own
        targets = re.findall(r"url\(#([^)]+)\)", picture) + re.findall(r'href="#([^"]+)"', picture)
        assert set(targets) <= set(own) and "width" not in root.attrib and "viewBox" in root.attrib
        assert "<text" in picture and "currentColor" in picture and "var(--muted)" in picture
        assert not re.search(r"#(1d1e20|5c5f66|dcdee2|1f5fc2|fffffe)", picture), "a colour that stays light in the dark"
        assert "DejaVu" not in picture and "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert len(ids) == len(set(ids))
    assert pictures == [inline_svg(figure) for figure in report_figures(made())]


def test_files_are_the_same_every_time_and_twice_the_size(tmp_path: Path) -> None:
    figures = report_figures(made(1))[:4:3]
    before = dict(matplotlib.rcParams)
    paths = save_figures(figures, tmp_path / "a" / "figures")
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in paths] == ["mi-heat.png", "mi-heat.svg", "errors.png", "errors.svg"]
    again = save_figures(figures, tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    for figure, path in zip(figures, paths[::2], strict=True):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 2 * figure.width
    picture = paths[1].read_text()
    assert figures[0].title in picture and "var(--" not in picture and "<dc:date>" not in picture


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("")
    with pytest.raises(UserError, match="this is a file: give another name"):
        save_figures([], tmp_path / "figures")
