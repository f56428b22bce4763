"""`import mico` is quick and makes transformers read packed checkpoints, in whatever order the two are imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mico
from mico.errors import UserError
from mico.packed.linear import PackedLinear
from tests.packed.making import Pair, logits, pair


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    both = pair(kind="mico")
    return both, both.save(tmp_path_factory.mktemp("plugin") / "run" / "model")


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- imports --------------------------------------------------------------------------------------------------------


def test_importing_mico_imports_nothing_slow() -> None:
    loaded = python("import sys, mico; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "mico" in loaded
    assert not set(loaded) & {"torch", "transformers", "numpy", "datasets", "sklearn", "scipy", "rich", "typer"}


def test_mico_may_be_imported_first_and_again() -> None:
    python("""
import importlib, sys, mico
importlib.reload(mico)
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs, AUTO_QUANTIZER_MAPPING as found
importlib.reload(mico)
assert configs["mico"].__module__ == found["mico"].__module__ == "mico.packed.hf", (configs, found)
assert not [one for one in sys.meta_path if type(one).__module__ == "mico.plugin" and "quantizers" in one.table]
""")


def test_two_checkpoints_bring_their_own_code_into_one_process_and_mico_comes_last(tmp_path: Path) -> None:
    """The code of the first registers, that of the second runs beside it; mico itself replaces them."""
    pairs = pair(kind="mico"), pair("opt", "grouped", 8)
    folders = [each.save(tmp_path / f"model-{number}") for number, each in enumerate(pairs)]
    code = """
import os, sys
os.environ["HF_HOME"] = sys.argv[3]
import torch
from transformers import AutoModelForCausalLM
def save(model, name):
    ids = torch.arange(12).view(2, -1) * 13 % model.config.vocab_size
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, name)
for folder in sys.argv[1:3]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    save(model, folder + ".pt")
assert "mico" not in sys.modules
import mico
from mico.packed.linear import PackedLinear
model = mico.load(sys.argv[1], execution="dense")
assert [one for one in model.modules() if isinstance(one, PackedLinear)], "mico's own code serves from now on"
save(model, sys.argv[1] + ".mico.pt")
"""
    python(code, *folders, tmp_path / "home")
    for each, folder in zip(pairs, folders, strict=True):
        assert torch.equal(torch.load(f"{folder}.pt"), logits(each.dense))
    assert torch.equal(torch.load(f"{folders[0]}.mico.pt"), logits(pairs[0].dense))


# --- mico.load ------------------------------------------------------------------------------------------------------


def test_load_takes_a_checkpoint_or_a_run_folder(made: tuple[Pair, Path]) -> None:
    both, folder = made
    for place in (folder, folder.parent, str(folder)):
        model = mico.load(place)
        assert not model.training and torch.equal(logits(model), logits(both.dense))
    assert mico.load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_takes_the_execution(made: tuple[Pair, Path]) -> None:
    _, folder = made
    for execution in ("auto", "packed", "dense"):
        linears = [one for one in mico.load(folder, execution=execution).modules() if isinstance(one, PackedLinear)]
        assert linears and {one.execution for one in linears} == {execution}
    with pytest.raises(UserError, match="execution fast: choose from auto, packed, dense") as caught:
        mico.load(folder, execution="fast")
    assert "\n" not in str(caught.value)


def test_an_unknown_execution_in_the_environment_is_refused_before_work(
    made: tuple[Pair, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mico.exports.source import read_packed

    monkeypatch.setenv("MICO_EXECUTION", "bad")
    monkeypatch.setattr("mico.checkpoint.sha256_file", lambda _: pytest.fail("work was done"))
    for act in (mico.load, mico.bench, read_packed):
        with pytest.raises(UserError, match="MICO_EXECUTION=bad: choose from auto, packed, dense"):
            act(str(made[1]))


@pytest.mark.parametrize("wanted", ["modeling_mico.X", ["modeling_mico.X"]])
def test_load_refuses_a_broken_config(made: tuple[Pair, Path], tmp_path: Path, wanted: object) -> None:
    folder = Path(shutil.copytree(made[1], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(auto_map=wanted)))
    with pytest.raises(UserError, match=r"'auto_map' is a (str|list), not an object: fetch the model again"):
        mico.load(folder)
    (folder / "config.json").write_text(json.dumps(config | dict(auto_map={"AutoModel": "other.Model"})))
    with pytest.raises(UserError, match="asks to run the model's own code"):
        mico.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read .*: fetch the model again$"):
        mico.load(folder)


def test_load_refuses_what_is_not_packed(made: tuple[Pair, Path], tmp_path: Path) -> None:
    made[0].dense.save_pretrained(tmp_path / "dense")
    for place in (tmp_path, tmp_path / "dense", tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{place}: no checkpoint packed by mico: give a run folder"):
            mico.load(place)
    other = json.loads((tmp_path / "dense" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "x"}
    }
    (tmp_path / "dense" / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="no checkpoint packed by mico"):
        mico.load(tmp_path / "dense")


def test_load_sees_damage_that_the_manifest_knows(made: tuple[Pair, Path], tmp_path: Path) -> None:
    from mico.checkpoint import write_manifest

    folder = Path(shutil.copytree(made[1], tmp_path / "model"))
    write_manifest(folder, {})
    assert mico.load(folder) is not None
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its sha256 is not that of mico_manifest"):
        mico.load(folder)


# --- other people's tools -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # lm-eval reads it and hands it back
def test_lm_eval_scores_a_packed_model_as_the_dense_one(made: tuple[Pair, Path]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    both, folder = made
    texts = [("document number one says", " two"), ("one and two are", " three and more"), ("", "the end of it")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=text, idx=place) for place, text in enumerate(texts)
    ]

    def scores(model: object) -> list[tuple[float, bool]]:
        measured = HFLM(pretrained=model, tokenizer=str(folder), device="cpu", batch_size=2)
        return measured.loglikelihood(requests, disable_tqdm=True)

    found = scores(str(folder))
    assert found == scores(both.dense) and all(score < 0 for score, _ in found)
