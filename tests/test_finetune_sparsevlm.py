"""`mico finetune --method sparsevlm` end to end: trained, killed and resumed, merged, read back, measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback

import mico
from mico.errors import UserError
from mico.files import sha256_file
from mico.finetune import sections
from mico.loading import load_processor
from mico.tables import markdown
from tests.pictures import archive, instruct, llava_folder
from tests.test_finetune import free_port

STEPS: dict[str, Any] = dict(
    method="sparsevlm", retain_tokens=3, max_steps=6, save_steps=2, learning_rate=3e-3, lora_rank=4,
    per_device_train_batch_size=4, device="cpu", eval_share=0.25, lora_dropout=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    return dict(train_file=str(instruct(folder)), image_folder=str(folder / "images"))


def train(model: Path, pairs: dict[str, str], folder: Path, **options: Any) -> dict[str, Any]:
    return mico.finetune(str(model), **STEPS | pairs | dict(save=str(folder)) | options)


@pytest.fixture(scope="module")
def whole(model: Path, pairs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(model, pairs, folder)
    return folder


def test_answers_are_better_known_under_pruning_than_before(model: Path, whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    before, after = report["answers"]["before"], report["answers"]["after"]
    assert after["pruned"]["loss"] < before["pruned"]["loss"] - 0.05
    assert before["pruned"]["loss"] != before["all"]["loss"] and before["all"]["answers"] == 5
    results = json.loads((whole / "all_results.json").read_text())
    assert results["eval_loss"] < json.loads((whole / "before_results.json").read_text())["eval_loss"]
    assert results["eval_loss"] == report["training"]["eval"]["eval_loss"] and results["resumed_from"] == 0
    text = markdown(sections(report))
    assert (whole / "report.md").read_text() == text and "| 3 visual tokens |" in text
    assert "retain=3, method='sparsevlm', version='2.0'" in (whole / "model" / "README.md").read_text()


def test_the_model_written_is_the_adapters_on_the_one_it_was_made_of(model: Path, whole: Path) -> None:
    written = AutoModelForImageTextToText.from_pretrained(whole / "model")
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), str(whole / "adapter"))
    ids = torch.tensor([[5, 6, 300, 300, 300, 300, 7, 8, 9]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, expected = (one(input_ids=ids, pixel_values=pixels).logits for one in (written, adapted))
    assert torch.allclose(found, expected, atol=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, whole / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) == 2 * 7
    assert all(".layers." in name and "language_model" in name and name.endswith("_proj.weight") for name in changed)
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model) and config["r"] == 4
    processors = [load_processor(folder) for folder in (model, whole)]
    assert processors[0].to_json_string() == processors[1].to_json_string()


def test_the_run_is_measured_by_eval_under_pruning(whole: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(suite="grids", limit=2, retain_tokens=3, output_path=str(tmp_path), device="cpu")
    assert mico.evaluate(str(whole), **options)["suites"][0]["equal_tokens"] == 3


def test_a_training_cut_off_ends_as_if_it_had_not_been(
    model: Path, pairs: dict[str, str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mico.qat import pruned

    class Stop(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step == 5:
                raise KeyboardInterrupt

    start = pruned.PrunedTrainer.__init__

    def stopping(self, **more):  # type: ignore[no-untyped-def]
        start(self, **more)
        self.add_callback(Stop())

    monkeypatch.setattr(pruned.PrunedTrainer, "__init__", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(model, pairs, tmp_path / "cut")
    monkeypatch.undo()
    again = train(model, pairs, tmp_path / "cut")
    assert again["training"]["train"]["resumed_from"] == 4
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert sha256_file(tmp_path / "cut" / name) == sha256_file(whole / name)
    expected = json.loads((whole / "report.json").read_text())
    assert again["answers"] == expected["answers"]
    assert again["training"]["train"]["train_loss"] == expected["training"]["train"]["train_loss"]
    assert train(model, pairs, tmp_path / "cut") == again  # finished: reused
    shutil.rmtree(tmp_path / "cut" / "model")  # all steps done, killed while saving: nothing is trained again
    third = train(model, pairs, tmp_path / "cut")
    assert third["training"]["train"]["train_runtime"] == 0.0
    assert sha256_file(tmp_path / "cut" / "model" / "model.safetensors") == sha256_file(
        whole / "model" / "model.safetensors"
    )
    with pytest.raises(UserError, match="retain_tokens: there 3, here 2"):
        train(model, pairs, tmp_path / "cut", retain_tokens=2)


def test_bfloat16_and_gradient_checkpointing_train_alike(model: Path, pairs: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = dict(bf16=True, lora_dropout=0.0, sparsevlm_version="1.0", max_steps=3)
    found = [
        train(model, pairs, tmp_path / str(again), gradient_checkpointing=again, **options) for again in (False, True)
    ]
    losses = [report["training"]["eval"]["eval_loss"] for report in found]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert losses[0] < found[0]["training"]["before"]["eval_loss"]
    stored = load_file(tmp_path / "False" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}  # as the model is stored


def test_two_processes_train_as_one_with_doubled_accumulation(
    model: Path, pairs: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(max_steps=2, save_steps=2, logging_steps=1, lora_dropout=0.0)
    options |= dict(per_device_train_batch_size=2)
    train(model, pairs, tmp_path / "one", gradient_accumulation_steps=2, **options)
    given = STEPS | pairs | options | dict(save=tmp_path / "two")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "mico"]
    done = subprocess.run(
        [sys.executable, *command, "finetune", str(model), *flags], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    curves = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "training" / "checkpoint-2" / "trainer_state.json").read_text())
        curves.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(curves[0]) == 2 and curves[1] == pytest.approx(curves[0], abs=1e-3)


def test_what_cannot_be_trained_is_refused(model: Path, pairs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--method sparsevlm: tiny-llama .* sees no images"):
        mico.finetune("tiny-llama", method="sparsevlm")
    with pytest.raises(UserError, match="--method sparsevlm needs --train-file"):
        mico.finetune(str(model), method="sparsevlm")
    with pytest.raises(UserError, match="--w-bits 2: --method sparsevlm has no such option"):
        train(model, pairs, tmp_path / "a", w_bits=2)
    with pytest.raises(UserError, match="--teacher tiny-llama: --method sparsevlm has no such option"):
        train(model, pairs, tmp_path / "b", teacher="tiny-llama")
    with pytest.raises(UserError, match="--retain-tokens 3: --method paretoq has no such option"):
        mico.finetune("tiny-llama", retain_tokens=3)
    with pytest.raises(UserError, match="--retain-tokens 5: a picture has 4 visual tokens, so none would be pruned"):
        train(model, pairs, tmp_path / "g", retain_tokens=5)
    with pytest.raises(UserError, match="no picture in it"):
        file = tmp_path / "text.json"
        said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
        file.write_text(json.dumps([dict(conversations=said)] * 4))
        train(model, dict(train_file=str(file)), tmp_path / "c")
    with pytest.raises(UserError, match=r"train.txt: LLaVA-Instruct .json or .jsonl"):
        train(model, dict(train_file="train.txt"), tmp_path / "d")
    with pytest.raises(UserError, match=r"step \d: the loss is (nan|inf): lower --learning-rate"):
        train(model, pairs, tmp_path / "e", learning_rate=1e30, max_grad_norm=0.0)
    packed = shutil.copytree(model, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method="mico"))))
    with pytest.raises(UserError, match=r"is packed, .*: train the dense model and compress the result"):
        train(packed, pairs, tmp_path / "f")
    following = dict(model_type="llava_next", image_grid_pinpoints=[[8, 16]])
    (packed / "config.json").write_text(json.dumps(config | following))
    with pytest.raises(UserError, match=r"\(llava_next\) differ in their numbers of visual tokens: say by --retain-to"):
        train(packed, pairs, tmp_path / "h", retain_tokens=None)


def test_a_reference_model_trains_on_grids_by_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mico.qat.sparsevlm_job.is_reference", lambda _: True)
    monkeypatch.setattr("mico.qat.answers.PICTURES", 4)
    monkeypatch.setattr("mico.qat.answers.HELD_PICTURES", 2)
    report = mico.finetune(str(model), method="sparsevlm", device="cpu", save=str(tmp_path / "run"))
    assert report["tokens"]["retain"] == 1 and report["answers"]["after"]["pruned"]["answers"] == 16
    assert report["training"]["train"]["epoch"] == 1.0 and report["data"].count("32 answers to train on") == 1


def test_a_picture_that_cannot_be_read_is_named_and_may_be_replaced(model: Path, tmp_path: Path) -> None:
    pairs = dict(train_file=str(instruct(tmp_path)), image_folder=str(tmp_path / "images"))
    bad = tmp_path / "images" / "5.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"5.png: the picture cannot be read"):
        train(model, pairs, tmp_path / "run")
    bad.write_bytes(whole)
    assert train(model, pairs, tmp_path / "run")["rows_cut"] == 0


def test_an_archive_of_pairs_trains(model: Path, tmp_path: Path) -> None:
    report = train(model, dict(train_file=str(archive(tmp_path / "pairs.tar"))), tmp_path / "run", max_steps=1)
    assert report["data"].count("4 answers to train on, 4 of them about a picture, 2 to evaluate on") == 1
