"""A model of experts through the verbs: calibrated, compressed, streamed, exported; a starved expert is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mico
from mico.errors import UserError
from mico.files import read_json, sha256_file
from mico.loading import quiet
from mico.packed.experts import is_fused
from mico.summary import sections
from mico.tables import markdown
from tests.tiny import random_model, train_tokenizer
from tests.workspace import Workspace, workspace

STARVED = 4  # the expert of block 1 that the router never chooses


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, made = tmp_path_factory.mktemp("mixtral"), random_model("mixtral", num_local_experts=STARVED + 1)
    left, right = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    rows = torch.stack([left, -left, right, -right, torch.zeros(32)])  # two of them are always above zero
    made.model.layers[1].mlp.gate.weight.data.copy_(rows)
    made.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(model: str, work: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    mico.compress(
        model, eval="none", arm="mi", save=str(folder), statistics=str(folder.parent / "statistics"),
        groups=str(folder.parent / "groups"), **work.options,
    )  # fmt: skip
    return folder


def starved(report: dict[str, Any]) -> list[str]:
    return [entry["layer"] for entry in report["fallbacks"] if entry["what"].startswith("block ")]


def test_every_expert_is_compressed_and_the_starved_one_is_named(run: Path) -> None:
    report = read_json(run / "report.json")
    tokens = {
        (line["block"], line["stream"]): line["tokens"] for line in report["layers"] if "experts" in line["stream"]
    }
    assert tokens[1, f"experts.{STARVED}.in"] == tokens[1, f"experts.{STARVED}.out"] == 0
    for block in (0, 1):
        assert sum(tokens[block, f"experts.{e}.in"] for e in range(STARVED + 1)) == 8 * 64 * 2
    path = f"model.layers.1.mlp.experts.{STARVED}.{{}}_proj".format
    assert starved(report) == [path("gate"), path("up"), path("down")]
    what = {entry["what"] for entry in report["fallbacks"] if entry["layer"] == path("gate")}
    assert what == {f"block 1, expert {STARVED}: 0 tokens, rounded to nearest"}
    assert report["architecture"]["coverage"] > 0.95
    assert report["architecture"]["experts"] == STARVED + 1


def test_the_report_tells_the_experts_of_a_layer_as_one(run: Path) -> None:
    text = markdown(sections(read_json(run / "report.json")))
    assert "experts.*.in" in text and "experts.0.in" not in text
    assert f"block 1, expert {STARVED}: 0 tokens, rounded to nearest" in text and "Of experts the worst." in text


def test_streamed_it_is_the_same_to_the_byte(run: Path, model: str, work: Workspace) -> None:
    other = run.parent / "streamed"
    mico.compress(model, eval="none", arm="mi", save=str(other), stream=True, **work.options)
    assert sha256_file(other / "model" / "model.safetensors") == sha256_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("arm", ["sparsegpt", "wanda"])
def test_other_methods_take_starved_experts_too(model: str, work: Workspace, tmp_path: Path, arm: str) -> None:
    report = mico.compress(model, eval="none", method=arm, sparsity=0.5, save=str(tmp_path / "run"), **work.options)
    assert len(starved(report)) == 3


def test_the_dense_export_is_a_model_of_transformers(run: Path, model: str, tmp_path: Path) -> None:
    report = mico.export(str(run), to="dense", save=str(tmp_path / "dense"), dtype="float32")
    assert report["exact"] and any("expert by expert" in line for line in report["notes"])
    ids = torch.arange(40).view(2, 20) * 7 % 300
    with quiet(), torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        packed = mico.load(run, execution="dense", dtype=torch.float32)
        assert is_fused(plain.model.layers[0].mlp.experts)
        torch.testing.assert_close(plain(ids).logits, packed(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["vllm", "gguf", "gptq"])
def test_exports_without_a_form_for_experts_say_so(run: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match=f"--to {to}: no form for the experts of Mixtral yet: use --to dense"):
        mico.export(str(run), to=to, save=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
