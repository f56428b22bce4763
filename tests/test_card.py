"""The model card: figures are those of the report, and the hub can read its head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mico.card import base_model, model_card
from tests.workspace import Workspace, workspace


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture
def report(space: Workspace) -> dict[str, Any]:
    return json.loads((space.run / "report.json").read_text(encoding="utf-8"))


def test_the_checkpoint_holds_the_card_of_its_report(space: Workspace, report: dict[str, Any]) -> None:
    assert (space.run / "model" / "README.md").read_text(encoding="utf-8") == model_card(report)


def test_figures_are_those_of_the_report(report: dict[str, Any]) -> None:
    card = model_card(report)
    size, dense = report["size"], report["dense"]["wikitext2"]["perplexity"]
    compressed = report["compressed"]["wikitext2"]["perplexity"]
    row = next(line for line in card.splitlines() if line.startswith("| wikitext2"))
    numbers = [float(cell.replace(",", "")) for cell in re.findall(r"[\d.,]*\d", row.removeprefix("| wikitext2"))]
    assert numbers == pytest.approx([dense, compressed, compressed / dense], rel=0.01)
    assert f"{size['true_bits']:.3f} bits a weight" in card and f"Linears: {size['sparsity']:.3f}" in card
    assert f"a kept code: {size['nominal_bits']:.3f}" in card and f"mico {report['environment']['mico']}" in card
    for settings in ("method mico", f"seed {report['identity']['seed']}", report["calibration"]):
        assert settings in card


def test_the_head_is_yaml_that_names_the_base_model(report: dict[str, Any]) -> None:
    report |= dict(model="org/some-model")
    head = yaml.safe_load(model_card(report).split("---\n")[1])
    assert head == dict(
        library_name="transformers", pipeline_tag="text-generation", base_model="org/some-model",
        base_model_relation="quantized", tags=["mico", "quantized", "pruned"],
    )  # fmt: skip
    report["size"]["sparsity"] = 0
    assert yaml.safe_load(model_card(report).split("---\n")[1])["tags"] == ["mico", "quantized"]


def test_nothing_tells_of_the_folders_of_this_machine_in_its_head(space: Workspace, report: dict[str, Any]) -> None:
    head, name = model_card(report).split("---\n")[1], Path(report["folder"]).name
    assert str(space.root) not in head and f"# {name}" in model_card(report)
    assert f'from_pretrained("{name}")' in model_card(report)


def test_the_command_is_told_without_the_folders_of_this_machine(space: Workspace, report: dict[str, Any]) -> None:
    words = ["compress", str(space.model), f"--save={space.root}/out/run", "--calib", "c4", "../texts/", "org/name"]
    report |= dict(command=["/usr/bin/mico", *words])
    card = model_card(report)
    assert f"command: `mico compress {space.model.name} --save=run --calib c4 texts org/name`" in card
    assert f"- model: {space.model.name} (" in card and str(space.model) not in card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", "org/model"),
        ("tiny-llama", "tiny-llama"),
        ("/somewhere/on/a/disk/model", "model"),
        ("some/folder/model/", "model"),
    ],
)
def test_base_model(name: str, expected: str) -> None:
    assert base_model(name) == expected
