"""`mico finetune --method cmibq` end to end: widths that move and meet targets, resumed, merged, really quantized."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForImageTextToText, TrainerCallback

import mico
from mico.checkpoint import MANIFEST
from mico.errors import UserError
from mico.files import sha256_file
from mico.finetune import sections
from mico.loading import fingerprint
from mico.packed.linear import PackedLinear
from mico.tables import markdown
from tests.pictures import encoded, instruct, llava_folder, picture
from tests.test_finetune import free_port

STEPS: dict[str, Any] = dict(
    method="cmibq", max_steps=6, save_steps=2, logging_steps=1, learning_rate=1e-3, per_device_train_batch_size=4,
    device="cpu", eval_share=0.25,
)  # fmt: skip
FIRST: dict[str, Any] = dict(stage=1, num_groups=2, group_size=16, target_bits_act=4.5)
SECOND: dict[str, Any] = dict(stage=2, lora_rank=4, learning_rate=3e-3, max_steps=4)
STREAMS = {
    "attn_in": ("q_proj", "k_proj", "v_proj"), "attn_out": ("o_proj", "out_proj"),
    "mlp_in": ("gate_proj", "up_proj", "fc1"), "mlp_out": ("down_proj", "fc2"), "projector": ("linear_1", "linear_2"),
}  # fmt: skip
FILES = ("model/model.safetensors", "bits.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    return dict(train_file=str(instruct(folder)), image_folder=str(folder / "images"))


def train(source: Path, pairs: dict[str, str], folder: Path, stage: dict[str, Any], **options: Any) -> dict[str, Any]:
    return mico.finetune(str(source), **STEPS | pairs | stage | dict(save=str(folder)) | options)


@pytest.fixture(scope="module")
def first(model: Path, pairs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "first"
    train(model, pairs, folder, FIRST, report_to="tensorboard")
    return folder


@pytest.fixture(scope="module")
def second(first: Path, pairs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "second"
    train(first, pairs, folder, SECOND)
    return folder


def history(folder: Path) -> list[dict[str, Any]]:
    last = max((folder / "training").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [entry for entry in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def read(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder / "model")


def batch() -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return dict(input_ids=torch.tensor([[5, 6, 300, 300, 300, 300, 7, 8, 9]]), pixel_values=pixels)


# --- stage 1 --------------------------------------------------------------------------------------------------------


def test_stage_1_moves_widths_cools_down_and_settles(first: Path) -> None:
    log = history(first)
    learning, settled = log[:4], log[4:]
    for short, target in (("act", 4.5), ("weight", 4.0)):
        bits = [entry[f"quantization/{short}_avg_bits"] for entry in learning]
        assert bits[0] == pytest.approx(target, abs=1e-3) and max(bits) - min(bits) > 0.01
        assert all(entry[f"quantization/{short}_theta_grad_norm"] > 0 for entry in learning)
        assert all(0 <= target - entry[f"quantization/{short}_avg_bits"] + 1e-5 <= 0.02 for entry in settled)
        assert not any(f"quantization/{short}_theta_grad_norm" in entry for entry in settled)
    heat = [entry["quantization/temperature"] for entry in learning]
    assert heat[0] == 2.0 and heat == sorted(set(heat), reverse=True)
    assert len({entry["quantization/weight_lambda"] for entry in learning}) > 1
    assert not any("quantization/temperature" in entry or "loss_act_bits" in entry for entry in settled)
    assert [entry["loss_rate"] > 0 for entry in log] == [False, *[True] * 5]  # beta grows from zero
    assert all(entry["grad_norm"] > 0 for entry in log) and settled[-1]["nll"] < settled[0]["nll"]
    written = json.loads((first / "bits.json").read_text())["sites"]
    assert len({width for site in written for width in site["activations"]}) > 1


def test_figures_have_their_names_in_tensorboard(first: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    names: set[str] = set()
    for file in (first / "training").rglob("events.out.*"):
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        names |= set(events.Tags()["scalars"])
    expected = {f"quantization/{part}_avg_bits" for part in ("vision", "projector", "llm", "act", "weight")}
    assert expected | {"train/loss", "train/grad_norm", "quantization/temperature"} <= names


def averages(folder: Path) -> tuple[float, float]:
    """Bits an activation and a weight, counted value by value in the file; 5 visual and 4 + text tokens apart."""
    tokens = json.loads((folder / "bits.json").read_text())["tokens"]
    inputs = weights = inputs_all = weights_all = 0.0
    for name, module in read(folder).named_modules():
        if not isinstance(module, PackedLinear):
            continue
        part = name.rpartition(".")[2]
        stream = next(stream for stream, parts in STREAMS.items() if part in parts)
        block = name.partition(".self_attn")[0].partition(".mlp")[0]
        passed = tokens[name if part.startswith("linear_") else f"{block}.{stream}"]
        raw = module.input_grid.numpy().tobytes()
        bits_G = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(3, -1)[0].tolist()
        quantized = module.quantized()
        for channel in range(module.in_features):
            count = module.out_features * passed
            inputs += count * bits_G[channel * len(bits_G) // module.in_features]
            inputs_all += count
            weights += module.out_features * quantized.bits_G[int(quantized.label_C[channel])]
            weights_all += module.out_features
    return inputs / inputs_all, weights / weights_all


def test_the_file_meets_the_targets(first: Path, second: Path) -> None:
    found = averages(first)
    assert 4.48 <= found[0] <= 4.5 + 1e-6 and 3.98 <= found[1] <= 4 + 1e-6
    report = json.loads((first / "report.json").read_text())
    told = report["quantization"]["averages"]
    assert (told["activations"], told["weights"]) == pytest.approx(found, abs=1e-6)
    assert report["size"]["nominal_bits"] == pytest.approx(found[1])
    assert averages(second) == pytest.approx(found, abs=1e-9)  # widths stay
    maps = [json.loads((folder / "bits.json").read_text())["sites"] for folder in (first, second)]
    assert maps[0] == maps[1]


def test_what_is_written_really_quantizes_activations(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = read(first)
    names = {id(module): name for name, module in written.named_modules() if isinstance(module, PackedLinear)}
    seen: dict[str, int] = {}
    real, current = functional.linear, [""]

    def linear(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if current[0]:
            module, current[0] = written.get_submodule(current[0]), ""
            grid_3G = module.input_grid_3G()
            for run, bits in enumerate(grid_3G[0].int().tolist()):
                here_C = torch.arange(x.shape[-1]) * grid_3G.shape[1] // x.shape[-1] == run
                assert len(x[..., here_C].unique()) <= 2**bits
            seen[names[id(module)]] = 1
        return real(x, *args)

    def note(module: Any, args: Any) -> None:
        current[0] = names[id(module)]

    for module in written.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_pre_hook(note)
    monkeypatch.setattr(functional, "linear", linear)
    with torch.no_grad():
        quantized = written(**batch()).logits
        assert len(seen) == len(names) == 2 * 6 + 2 + 2 * 7  # the last vision block is not read
        for module in written.modules():
            if isinstance(module, PackedLinear):
                module.input_grid = None
                module.register_forward_pre_hook(lambda module, args: current.__setitem__(0, ""))
        assert not torch.allclose(written(**batch()).logits, quantized, atol=1e-2)
        assert torch.equal(mico.load(first)(**batch()).logits, quantized)
    with pytest.raises(UserError, match="activations are quantized"):
        mico.export(str(first), to="dense")


def test_the_report_tells_answers_and_widths(
    model: Path, first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((first / "report.json").read_text())
    text = markdown(sections(report))
    assert (first / "report.md").read_text() == text
    assert "| activations | 4.500 | " in text and "answers of the data are about no picture" in text
    assert 'id="widths-title"' in (first / "report.html").read_text()
    assert "## Answers" in (first / "model" / "README.md").read_text()
    manifest = json.loads((first / "model" / MANIFEST).read_text())  # which `mico eval` reads
    assert manifest["activation_bits"] == report["quantization"]["averages"]["activations"] > 4.4
    assert report["identity"]["model"] == fingerprint(model)  # beside a compression of it: of one model
    mico.report(str(first), figures=str(tmp_path))
    assert "Widths by site" in capsys.readouterr().out and (tmp_path / "widths.png").is_file()
    mico.report([str(first), str(second)])
    assert "stage 2" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [None, 3])
def test_a_run_is_asked_by_a_suite(second: Path, tmp_path: Path, tokens: int | None) -> None:
    options: dict[str, Any] = dict(suite="grids", limit=2, retain_tokens=tokens, output_path=str(tmp_path))
    found = mico.evaluate(str(second), device="cpu", **options)["suites"][0]
    assert found["questions"] == 2 and found.get("equal_tokens", 4) == (tokens or 4)


# --- stage 2 --------------------------------------------------------------------------------------------------------


def test_stage_2_trains_projector_and_language_model_alone(first: Path, second: Path) -> None:
    log = history(second)
    for name in ("acc_v2t", "acc_t2v", "temperature"):
        assert all(0 <= entry[f"alignment/{name}"] <= 1 for entry in log)
    assert any(entry["alignment_loss"] > 0 for entry in log) and log[-1]["nll"] < log[0]["nll"]
    assert log[0]["alignment/temperature"] == pytest.approx(0.07) != log[-1]["alignment/temperature"]
    assert "quantization/temperature" not in log[0]  # widths have been chosen
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all("vision_tower" not in name for name in changed)
    weights = {name for name in changed if name.endswith(".weight")}
    assert len(weights) == 2 + 2 * 7 and all("_proj." in name or "multi_modal" in name for name in weights)
    loss = [
        json.loads((folder / "report.json").read_text())["answers"]["quantized"]["loss"] for folder in (first, second)
    ]
    assert loss[1] < loss[0]


def test_pictures_meet_what_the_dense_model_makes_of_the_question(
    model: Path, first: Path, pairs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mico.qat.cmibq import student as module

    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    batches: list[dict[str, torch.Tensor]] = []
    projected: list[torch.Tensor] = []
    real, forward = module.Alignment.forward, module.Student.forward

    def spy(self: Any, vision_BD: torch.Tensor, text_BD: torch.Tensor, *keys: torch.Tensor) -> Any:
        given.append((vision_BD, text_BD))
        return real(self, vision_BD, text_BD, *keys)

    def watched(self: Any, **asked: torch.Tensor) -> Any:
        if not self.training:
            return forward(self, **asked)
        batches.append(asked)
        projector = self.llava.model.multi_modal_projector
        hook = projector.register_forward_hook(lambda layer, args, output: projected.append(output))
        terms = forward(self, **asked)
        hook.remove()
        return terms

    monkeypatch.setattr(module.Alignment, "forward", spy)
    monkeypatch.setattr(module.Student, "forward", watched)
    train(first, pairs, tmp_path / "run", SECOND, max_steps=1, save_steps=1)
    assert len(given) == len(batches) == len(projected) == 1  # the projector is applied once
    (vision_BD, text_BD), asked = given[0], batches[0]
    assert torch.allclose(vision_BD, projected[0].mean(1), atol=1e-5) and vision_BD.requires_grad
    dense = AutoModelForImageTextToText.from_pretrained(model)
    with torch.no_grad():
        for row in range(len(text_BD)):
            here = asked["attention_mask"][row] == 1
            ids, labels = asked["input_ids"][row][here][None], asked["labels"][row][here]
            states = dense.model(input_ids=ids, pixel_values=asked["pixel_values"][row : row + 1]).last_hidden_state[0]
            question = (labels == -100) & (ids[0] != dense.config.image_token_id)
            assert torch.allclose(text_BD[row], states[question].mean(0), atol=1e-4)


# --- going on, several processes, less memory -----------------------------------------------------------------------


def cut_off(after: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """A training that is stopped in step `after`."""
    from mico.qat.cmibq import trainer

    class Stop(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step == after:
                raise KeyboardInterrupt

    start = trainer.BottleneckTrainer.__init__

    def stopping(self, **more):  # type: ignore[no-untyped-def]
        start(self, **more)
        self.add_callback(Stop())

    monkeypatch.setattr(trainer.BottleneckTrainer, "__init__", stopping)
    with pytest.raises(KeyboardInterrupt):
        act()
    monkeypatch.undo()


def test_stage_1_cut_off_ends_as_if_it_had_not_been(
    model: Path, first: Path, pairs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut"
    cut_off(5, monkeypatch, lambda: train(model, pairs, cut, FIRST))
    with pytest.raises(UserError, match=r"--stage 2: stage 1 is not finished in .*cut: give its command again"):
        train(cut, pairs, tmp_path / "two", SECOND)
    again = train(model, pairs, cut, FIRST)
    assert again["training"]["train"]["resumed_from"] == 4
    for name in (*FILES, "masters/state.safetensors"):
        assert sha256_file(cut / name) == sha256_file(first / name), name
    drop = ("epoch",)
    assert [{n: v for n, v in e.items() if n not in drop} for e in history(cut)] == [
        {n: v for n, v in e.items() if n not in drop} for e in history(first)
    ]
    shutil.rmtree(cut / "model")  # all steps done, killed while saving: nothing is trained again
    train(model, pairs, cut, FIRST)
    assert sha256_file(cut / FILES[0]) == sha256_file(first / FILES[0])
    with pytest.raises(UserError, match=r"target_bits_weight: there 4\.0, here 3"):
        train(model, pairs, cut, FIRST, target_bits_weight=3)


def test_stage_2_cut_off_ends_as_if_it_had_not_been(
    first: Path, second: Path, pairs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(3, monkeypatch, lambda: train(first, pairs, tmp_path, SECOND))
    assert train(first, pairs, tmp_path, SECOND)["training"]["train"]["resumed_from"] == 2
    assert sha256_file(tmp_path / FILES[0]) == sha256_file(second / FILES[0])
    frozen = {name for name in load_file(tmp_path / "training" / "checkpoint-4" / "model.safetensors")}
    assert not any("vision_tower" in name and name.endswith("_proj.weight") for name in frozen)  # read from stage 1


def alike(folder: Path) -> dict[str, str]:
    """Two steps of four answers of one length: what is padded rounds otherwise, and Q of that may be another level."""
    said = [(f"What is in {number}?", f"A document of {number}.") for number in range(8)]
    names = [{"from": "human", "value": f"<image>\n{ask}"} for ask, _ in said]
    rows = [
        dict(image=f"{number}.png", conversations=[asked, {"from": "gpt", "value": said[number][1]}])
        for number, asked in enumerate(names)
    ]
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))
    (folder / "pairs.json").write_text(json.dumps(rows))
    return dict(train_file=str(folder / "pairs.json"), eval_file=str(folder / "pairs.json"), image_folder=str(folder))


@pytest.mark.parametrize("stage", [FIRST, SECOND], ids=["stage 1", "stage 2"])
def test_two_processes_train_as_one_with_a_doubled_batch(
    model: Path, first: Path, tmp_path: Path, stage: dict[str, Any]
) -> None:
    source, pairs = model if stage is FIRST else first, alike(tmp_path / "pairs")
    options = STEPS | pairs | stage | dict(max_steps=2, save_steps=1, learning_rate=1e-4)
    train(source, pairs, tmp_path / "one", options)
    given = options | dict(save=tmp_path / "two", per_device_train_batch_size=2)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "mico"]
    done = subprocess.run(
        [sys.executable, *command, "finetune", str(source), *flags], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-3)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-3)
    if stage is SECOND:  # over the negatives of both
        assert two[0]["alignment_loss"] == pytest.approx(one[0]["alignment_loss"], abs=1e-4)
    if stage is FIRST:  # all that is learned, after a step
        place = "training/checkpoint-1/model.safetensors"
        alone, both = (load_file(tmp_path / name / place) for name in ("one", "two"))
        learned = [name for name, x in alone.items() if x.is_floating_point() and ".meter." not in name]
        apart = {name: float((alone[name] - both[name]).abs().max()) for name in learned if "features" not in name}
        assert len(apart) > 100 and max(apart.values()) < 1e-5, max(apart, key=lambda name: apart[name])
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], abs=1e-3)
    assert two[1]["quantization/act_avg_bits"] == pytest.approx(one[1]["quantization/act_avg_bits"], abs=1e-2)


def test_gradient_checkpointing_and_accumulation_change_nothing(
    model: Path, pairs: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(max_steps=1, save_steps=1, ib_weight=0.1)
    train(model, pairs, tmp_path / "plain", FIRST, **options)
    train(model, pairs, tmp_path / "again", FIRST, gradient_checkpointing=True, **options)
    split: dict[str, Any] = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    train(model, pairs, tmp_path / "parts", FIRST, **options | split)
    plain, again, parts = (history(tmp_path / name) for name in ("plain", "again", "parts"))
    for one, other in zip(plain, again, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert parts[0]["nll"] == pytest.approx(plain[0]["nll"], abs=1e-4)
    assert parts[0]["loss_act_bits"] == pytest.approx(plain[0]["loss_act_bits"], abs=1e-6)


# --- arms and refusals ----------------------------------------------------------------------------------------------


def test_arms_with_widths_fixed_before_the_training(model: Path, pairs: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = dict(max_steps=1, save_steps=1, target_bits_act=4, target_bits_weight=3)
    found = {}
    for arm in ("uniform", "knapsack"):
        report = train(model, pairs, tmp_path / arm, FIRST, bits_allocation=arm, **options)
        told = report["quantization"]["averages"]
        assert told["activations"] == pytest.approx(4, abs=0.02) and told["weights"] == pytest.approx(3, abs=0.02)
        sites = report["bit_map"]["sites"]
        found[arm] = {width for site in sites for row in site["weights"].values() for width in row}
        assert "loss_rate" not in history(tmp_path / arm)[0]
    assert found["uniform"] == {3} and len(found["knapsack"]) > 1


def test_ablations_leave_their_parts_out(model: Path, first: Path, pairs: dict[str, str], tmp_path: Path) -> None:
    short: dict[str, Any] = dict(max_steps=1, save_steps=1)
    train(model, pairs, tmp_path / "a", FIRST, use_ib=False, use_importance=False, **short)
    assert "loss_rate" not in history(tmp_path / "a")[0]
    train(first, pairs, tmp_path / "b", SECOND, use_align=False, use_lora=False, **short)
    assert "alignment_loss" not in history(tmp_path / "b")[0] and history(tmp_path / "b")[0]["loss_rate"] > 0
    train(first, pairs, tmp_path / "c", SECOND, ib_weight=0.0, **short)
    assert history(tmp_path / "c")[0]["loss_rate"] == 0
    state = load_file(tmp_path / "b" / "training" / "checkpoint-1" / "model.safetensors")
    assert not any("lora" in name for name in state)
    assert any("language_model" in name and name.endswith("q_proj.weight") for name in state)


def test_a_pruned_model_keeps_its_zeros_through_both_stages(model: Path, pairs: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = dict(calib="docs", eval="none", nsamples=2, seqlen=16, device="cpu")
    mico.compress(str(model), method="wanda", sparsity=0.5, wbits=16, save=str(tmp_path / "sparse"), **options)
    pruned = {name: one.keep_RC for name, one in packed(read(tmp_path / "sparse")).items()}
    assert len(pruned) == 2 * 7  # of the language model alone
    for name, source, stage in (("one", "sparse", FIRST), ("two", "one", SECOND)):
        report = train(tmp_path / source, pairs, tmp_path / name, stage, max_steps=3, save_steps=3)
        found = packed(read(tmp_path / name))
        assert all(torch.equal(found[path].keep_RC, keep_RC) for path, keep_RC in pruned.items())
        assert all(found[path].keep_RC is None for path in found if path not in pruned)
        assert all(0 < int((found[path].dequantize() != 0).sum()) == int(pruned[path].sum()) for path in pruned)
        bits = torch.cat(
            [torch.tensor(one.bits_G)[one.label_C].expand_as(one.codes_RC).flatten() for one in found.values()]
        )
        kept = torch.cat([
            torch.ones_like(one.codes_RC).flatten() if one.keep_RC is None else one.keep_RC.flatten()
            for one in found.values()
        ]).bool()  # fmt: skip
        average = float(bits[kept].float().mean())
        assert average == pytest.approx(report["quantization"]["averages"]["weights"], abs=1e-5)
        assert 3.98 <= average <= 4 + 1e-5 and report["size"]["sparsity"] > 0.2
        assert report["arm"].startswith("cm-ibq w4a4.5 ") and "% sparse" in report["arm"]


def packed(written: Any) -> dict[str, Any]:
    """What the packed Linears of a model hold, by name."""
    return {name: one.quantized() for name, one in written.named_modules() if isinstance(one, PackedLinear)}


def test_what_cannot_be_trained_is_refused(
    model: Path, first: Path, second: Path, pairs: dict[str, str], tmp_path: Path
) -> None:
    cases: list[tuple[Path | str, dict[str, Any], str]] = [
        ("tiny-llama", FIRST, "--method cmibq: tiny-llama .* sees no images"),
        (model, dict(stage=3), "--stage 3: choose 1, or 2"),
        (model, FIRST | dict(lora_rank=4), "--lora-rank 4: --method cmibq --stage 1 has no such option"),
        (first, SECOND | dict(target_bits_act=3.0), "--target-bits-act 3.0: --method cmibq --stage 2 has no such"),
        (model, FIRST | dict(target_bits_act=9.0), "--target-bits-act 9.0: must be from 2 to 8"),
        (model, FIRST | dict(bits_allocation="uniform"), "--target-bits-act 4.5: .* uniform choose from 2, 3, 4"),
        (model, FIRST | dict(fsdp="full_shard"), "--fsdp full_shard: FSDP flattens weights"),
        (first, SECOND | dict(per_device_train_batch_size=1), "one pair is alone"),
        (second, SECOND, r"is a run of another kind \(cmibq --stage 2\): give the folder"),
        (model, SECOND, "does not exist: give the folder of a run of mico finetune --method cmibq --stage 1"),
        (model, FIRST | dict(learning_rate=1e30, max_grad_norm=0.0), r"step \d: the loss is (nan|inf): lower"),
        (first, FIRST, "was made by it: give the model that its stage 1 started from"),
    ]
    for place, (source, options, said) in enumerate(cases):
        with pytest.raises(UserError, match=said):
            train(Path(source), pairs, tmp_path / str(place), options)
    damaged = shutil.copytree(first, tmp_path / "damaged")
    state = (damaged / "masters" / "state.safetensors").read_bytes()
    (damaged / "masters" / "state.safetensors").write_bytes(state[: len(state) // 2])
    with pytest.raises(UserError, match=r"masters/state.safetensors .*: restore it, or give the command of stage 1"):
        train(damaged, pairs, tmp_path / "d", SECOND)
