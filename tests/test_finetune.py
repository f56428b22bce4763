"""Quantization-aware training end to end: packed bit for bit, resumed to the same bytes, masks that stay."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import mico
from mico.errors import UserError
from mico.files import sha256_file
from mico.packed.linear import PackedLinear
from tests.tiny import numbered, save_model, train_tokenizer
from tests.workspace import Workspace, workspace

STEPS = dict(max_steps=6, save_steps=2, learning_rate=1e-3, per_device_train_batch_size=4, seqlen=32, device="cpu")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "train.jsonl"
    file.write_text("".join(json.dumps(dict(text=document)) + "\n" for document in numbered(400).documents))
    return str(file)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train(space: Workspace, text: str, folder: Path, model: Path | None = None, **options: object) -> dict:
    given = STEPS | dict(train_file=text, eval="wikitext2", data_dir=str(space.texts), save=str(folder)) | options
    return mico.finetune(str(model or space.model), **given)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_every_width_trains_and_loads_as_it_was_trained(
    space: Workspace, text: str, tmp_path: Path, bits: float
) -> None:
    report = train(space, text, tmp_path / "run", w_bits=bits, group_size=16)
    training = report["training"]
    assert training["eval"]["eval_loss"] < training["before"]["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14 and all(module.quantized().bits_G[0] == bits for module in packed)
    nominal = 1.6 if bits == 1.58 else bits  # five ternary digits a byte
    assert report["size"]["nominal_bits"] == pytest.approx(nominal, rel=0.01)
    assert report["size"]["true_bits"] == pytest.approx(nominal + 1, rel=0.01)  # a 16-bit scale for 16 weights
    again = mico.evaluate(str(tmp_path / "run"), eval="wikitext2", data_dir=str(space.texts), kl=False)
    assert again["perplexity"]["wikitext2"] == report["compressed"]["wikitext2"]["perplexity"]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_loss"] == training["eval"]["eval_loss"] and "train_loss" in results
    shutil.rmtree(tmp_path / "run" / "training")  # a finished run does not need its checkpoints
    assert train(space, text, tmp_path / "run", w_bits=bits, group_size=16) == report  # a second run reuses the first


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, learned positions, and dropout while training."""
    return save_model(tmp_path_factory.mktemp("opt"), "opt", dropout=0.1)


def test_a_model_with_biases_trains(space: Workspace, text: str, opt: Path, tmp_path: Path) -> None:
    train(space, text, tmp_path / "run", model=opt, w_bits=2, group_size=16, learning_rate=1e-2, bf16=True)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (opt, tmp_path / "run" / "model"))
    linears = [name for name, module in after.named_modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 12
    for name in linears:  # the biases of keys shift all scores of a query alike: they have no gradient
        moved = (after.get_submodule(name).bias - before.get_submodule(name).bias).abs().max()
        assert moved > 1e-3 or name.endswith("k_proj")


def test_minicpm_trains_in_bfloat16_with_gradient_checkpointing(space: Workspace, text: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "minicpm", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, scale_emb=12, scale_depth=1.4, dim_model_base=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    train_tokenizer().save_pretrained(tmp_path / "model")
    options = dict(model=tmp_path / "model", w_bits=1.58, bf16=True)  # the packed logits are checked by the run itself
    reports = [
        train(space, text, tmp_path / str(again), gradient_checkpointing=again, **options) for again in (False, True)
    ]
    losses = [report["training"]["eval"]["eval_loss"] for report in reports]
    assert losses[0] < reports[0]["training"]["before"]["eval_loss"]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_a_training_cut_off_ends_as_if_it_had_not_been(
    space: Workspace, text: str, opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(space, text, tmp_path / "whole", model=opt, w_bits=2)

    class Stop(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step == 5:
                raise KeyboardInterrupt

    from mico.qat import trainer as module

    start = module.QATTrainer.__init__

    def stopping(self, *args, **more):  # type: ignore[no-untyped-def]
        start(self, *args, **more)
        self.add_callback(Stop())

    monkeypatch.setattr(module.QATTrainer, "__init__", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(space, text, tmp_path / "cut", model=opt, w_bits=2)
    monkeypatch.undo()
    training = tmp_path / "cut" / "training"
    assert sorted(path.name for path in training.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (training / "checkpoint-5").mkdir()  # a kill while a checkpoint is written leaves one without its last file
    again = train(space, text, tmp_path / "cut", model=opt, w_bits=2)
    assert again["training"]["eval"]["eval_loss"] == whole["training"]["eval"]["eval_loss"]
    assert again["training"]["train"]["train_loss"] == whole["training"]["train"]["train_loss"]
    assert again["training"]["train"]["resumed_from"] == 4
    digests = [sha256_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert digests[0] == digests[1]
    shutil.rmtree(tmp_path / "cut" / "model")  # all steps done, killed while saving: nothing is trained again
    third = train(space, text, tmp_path / "cut", model=opt, w_bits=2)
    assert sha256_file(tmp_path / "cut" / "model" / "model.safetensors") == digests[0]
    assert third["training"]["train"]["train_runtime"] == 0.0
    assert third["training"]["train"]["train_loss"] == whole["training"]["train"]["train_loss"]
    monkeypatch.setenv("RANK", "1")  # another process of a run that is finished has nobody to train with
    assert train(space, text, tmp_path / "cut", model=opt, w_bits=2) == {}


def test_the_mask_of_a_compressed_run_stays(space: Workspace, text: str, tmp_path: Path) -> None:
    report = train(space, text, tmp_path / "run", model=space.run, w_bits=4, kd=True, kd_weight=0.5)
    assert report["size"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    before, after = (AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (space.run, tmp_path / "run"))
    moved = 0
    for name, module in after.named_modules():
        if isinstance(module, PackedLinear):
            keep_RC = before.get_submodule(name).quantized().keep_RC
            assert torch.equal(module.quantized().keep_RC, keep_RC)
            assert torch.all(module.dense()[~keep_RC] == 0)
            moved += not torch.equal(module.dense(), before.get_submodule(name).dense())
    assert moved == 14
    mico.export(str(tmp_path / "run"), to="dense", save=str(tmp_path / "dense"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, module in after.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.all(dense.get_submodule(name).weight[~module.quantized().keep_RC] == 0)


def test_two_processes_train_as_one_with_doubled_accumulation(space: Workspace, text: str, tmp_path: Path) -> None:
    train(space, text, tmp_path / "one", w_bits=2, gradient_accumulation_steps=2, logging_steps=1)
    given = STEPS | dict(
        train_file=text, eval="wikitext2", data_dir=space.texts, save=tmp_path / "two", logging_steps=1
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (given | dict(w_bits=2)).items()]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "mico"]
    done = subprocess.run(
        [sys.executable, *command, "finetune", str(space.model), *flags], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    curves = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "training" / "checkpoint-6" / "trainer_state.json").read_text())
        curves.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], abs=1e-3)


@pytest.mark.parametrize("target", ["dense", "vllm"])
def test_a_trained_model_is_exported(space: Workspace, text: str, tmp_path: Path, target: str) -> None:
    train(space, text, tmp_path / "run", w_bits=4)
    exported = mico.export(str(tmp_path / "run"), to=target, save=str(tmp_path / target))
    assert exported["exact"]


def test_what_cannot_be_trained_is_refused(space: Workspace, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--group-size 48: 64 input channels are no multiple of it"):
        train(space, text, tmp_path / "a", w_bits=2, group_size=48)
    with pytest.raises(UserError, match="--method qat: choose from paretoq"):
        train(space, text, tmp_path / "b", method="qat")
    with pytest.raises(UserError, match=r"step \d: the loss is (nan|inf): lower --learning-rate"):
        train(space, text, tmp_path / "d", w_bits=2, learning_rate=1e30, max_grad_norm=0.0)
    experts = save_model(tmp_path / "mixtral", "mixtral")
    with pytest.raises(UserError, match="--method paretoq: Mixtral has experts"):
        train(space, text, tmp_path / "e", model=experts, w_bits=2)
    with pytest.raises(UserError, match="--teacher tiny-llama: its vocabulary"):
        train(space, text, tmp_path / "f", w_bits=2, kd=True, teacher="tiny-llama")
    train(space, text, tmp_path / "c", w_bits=2)
    with pytest.raises(UserError, match=r"made with other arguments \(w_bits: there 2, here 3"):
        train(space, text, tmp_path / "c", w_bits=3)
