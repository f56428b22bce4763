"""Reports of a real run: nothing is lost on narrow terminals, nothing that went wrong is hidden."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from mico.costs import total_seconds
from mico.summary import command_text, flat, print_report, sections, write_markdown
from mico.tables import Section, duration_text, markdown, perplexity_text, size_text, spread
from tests.workspace import Workspace, workspace

Report = dict[str, Any]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture
def report(space: Workspace) -> Report:
    return json.loads((space.run / "report.json").read_text(encoding="utf-8"))


def shown(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


def section(report: Report, title: str) -> Section:
    return next(found for found in sections(report) if found.title.startswith(title))


def words(text: str) -> str:
    """The text without line breaks and padding, as wrapping leaves it."""
    return " ".join(text.split())


# --- flat -----------------------------------------------------------------------------------------------------------


def test_flat_holds_the_figures_of_the_run(report: Report, space: Workspace) -> None:
    found = flat(report)
    assert list(found) == [
        "model", "arm", "method", "dense", "compressed", "nominal_bits", "true_bits", "bytes", "packed_bytes",
        "sparsity", "seconds", "peak_host_bytes", "protocol", "cost",
    ]  # fmt: skip
    assert (found["arm"], found["method"], found["protocol"]) == ("mi", "mico", "sparsegpt")
    assert found["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found["bytes"] == sum(file.stat().st_size for file in (space.run / "model").glob("*.safetensors"))
    stored = sum(sum(line["stored"].values()) for line in report["layers"])
    weights = load_file(space.run / "model" / "model.safetensors")
    linears = {line["layer"] for line in report["layers"]}
    rest = sum(value.nbytes for key, value in weights.items() if key.removesuffix(".weight") not in linears)
    assert found["packed_bytes"] == stored // 8 + rest == pytest.approx(found["bytes"], rel=0.05)
    assert found["true_bits"] == pytest.approx(stored / sum(line["weights"] for line in report["layers"]))
    assert found["seconds"] == report["seconds"]["total"] >= report["seconds"]["compress"] > 0


def test_total_counts_no_stage_twice() -> None:
    assert total_seconds({"load": 1.0, "groups": 5.0, "clustering": 4.0, "compress": 2.0, "allocate": 1.5}) == 8.0
    assert total_seconds({"load": 1.0, "total": 9.0}) == 9.0


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_every_cell_is_readable(report: Report, width: int) -> None:
    text = shown(report, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    together = words(text)
    for found in sections(report):
        if "model" not in found.title and found.title != "mico":  # long values of the first table wrap inside a column
            assert all(words(cell) in together for row in found.rows[1:] for cell in row if len(cell) < 20)
        assert all(line in together for line in map(words, found.lines[:1])) or found.title == "Command"


def test_main_figures_are_told(report: Report) -> None:
    text = words(shown(report, 120))
    dense, compressed = (report[name]["wikitext2"]["perplexity"] for name in ("dense", "compressed"))
    assert f"wikitext2 {dense:,.2f} {compressed:,.2f} ×{compressed / dense:.3f}" in text
    assert "protocol sparsegpt: wikitext2 from" in text and "windows of 128" in text
    assert f"true bits a weight {report['size']['true_bits']:.3f}" in text
    assert "Llama, 2 layers, hidden 64, 4 heads (2 kv), ffn 96" in text
    size = report["size"]
    assert f"at true bits {size_text(size['packed_bytes'])}" in text
    assert f"weight files written {size_text(size['bytes'])}" in text
    assert "Silhouette" in text or "silhouette" in text
    assert "· clustering" in text and "peak host memory" in text


def test_the_worst_layer_stands_out(report: Report) -> None:
    report["layers"][9]["error"] = 0.987
    found = section(report, "Error")
    assert found.columns == ("block", "q", "k", "v", "o", "gate", "up", "down")
    assert found.strong == {(1, 3)} and found.rows[1][3] == "0.9870"
    assert "Worst: 0.9870 at block 1, self_attn.v_proj" in found.lines[0]
    assert "**0.9870**" in markdown([found])


def test_layers_of_one_name_are_told_apart(report: Report) -> None:
    for line in report["layers"]:
        line["layer"] = line["layer"].replace("mlp.up_proj", "cross_attn.q_proj")
    found = section(report, "Error")
    assert "self_attn.q_proj" in found.columns and "cross_attn.q_proj" in found.columns


def test_bits_and_groups_add_up(report: Report) -> None:
    rows = {row[0]: row for row in section(report, "Bits").rows}
    groups = {row[0]: row for row in section(report, "Channel groups").rows}
    made = [record for record in report["groups"] if record["stream"] == "attn_in"]
    widths = sum(int(part.split("×")[1]) for part in rows["attn_in"][2].split())
    assert widths == 3 * sum(record["n_groups"] for record in made)  # q, k and v
    assert groups["attn_in"][2] == rows["attn_in"][1] == spread([size for record in made for size in record["sizes"]])
    assert float(rows["attn_in"][5]) == pytest.approx(0.5, abs=0.01)


def test_without_groups_there_is_no_table_of_them(report: Report) -> None:
    report["groups"] = []
    assert "Channel groups" not in shown(report)
    control = dict(block=0, stream="attn_in", n_groups=8, sizes=[8] * 8, method="importance")
    report["groups"] = [control]
    found = section(report, "Channel groups")
    assert found.rows == (("attn_in", "8", "8", "-", "-", "-", "-"),) and "importance" in found.lines[0]


def test_fallbacks_are_never_silent(report: Report) -> None:
    assert "none: every layer went by the book" in shown(report)
    report["fallbacks"] = [dict(layer=f"model.layers.{i}.mlp.up_proj", what="damping raised") for i in range(7)]
    text = shown(report)
    assert "Fallbacks: 7" in text and "model.layers.4.mlp.up_proj: damping raised" in text
    assert "and 2 more (report.json)" in text


def test_a_wrecked_model_and_a_short_text_are_told(report: Report) -> None:
    report["compressed"]["wikitext2"] |= dict(perplexity=math.inf, shortfall=1234)
    text = words(shown(report, 120))
    assert " inf ×inf" in text and "1,234 tokens short of the protocol" in text


def test_divergence_is_shown_where_it_was_measured(report: Report) -> None:
    for score in report["compressed"].values():
        for field in ("kl_divergence", "top1_agreement", "kl_tokens"):
            score.pop(field, None)
    assert section(report, "Perplexity").columns == ("text", "dense", "compressed", "ratio")
    report["compressed"]["wikitext2"] |= dict(kl_divergence=0.1875, top1_agreement=0.7283, kl_tokens=2048)
    found = section(report, "Perplexity")
    assert found.columns[4:] == ("KL", "top-1") and found.rows[0][4:] == ("0.188", "72.8%")
    assert found.lines[-1].endswith("over tokens: wikitext2 2,048")
    report["compressed"]["ptb"] = {
        name: report["compressed"]["wikitext2"][name] for name in report["dense"]["wikitext2"]
    }
    report["dense"]["ptb"] = report["dense"]["wikitext2"]
    assert section(report, "Perplexity").rows[1][4:] == ("-", "-")


def test_markdown_says_the_same(report: Report, tmp_path: Path) -> None:
    write_markdown(report, tmp_path / "report.md")
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# mico: ") and "\n## Perplexity\n\n| text | dense | compressed | ratio |" in page
    for found in sections(report):
        assert found.title in page
        assert all(line in page for line in found.lines)
        assert all(cell.replace("|", "\\|") in page for row in found.rows for cell in row)
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_run_folder_holds_the_markdown(report: Report, space: Workspace) -> None:
    assert (space.run / "report.md").read_text(encoding="utf-8") == markdown(sections(report))


def test_figures_in_words() -> None:
    assert [size_text(n) for n in (0, 999, 64268, 999_600, 13.5e9)] == ["0 B", "999 B", "64.3 kB", "1 MB", "13.5 GB"]
    assert [duration_text(s) for s in (0.04, 119, 180, 7200)] == ["0.0 s", "119.0 s", "3.0 min", "2.0 h"]
    assert [perplexity_text(p) for p in (27.656, 12345.6, 3e9)] == ["27.66", "12,345.60", "3e+09"]
    assert (spread([8, 8]), spread([1, 2, 10, 30])) == ("8", "1/6/30")
    assert command_text(["/usr/bin/mico", "compress", "a b"]) == "mico compress 'a b'"
    assert command_text(["x/mico/__main__.py", "eval"]) == "mico eval"
    assert command_text(["x/pytest/__main__.py"]).startswith("python ")
    assert command_text(["train.py"]) == "python train.py"
