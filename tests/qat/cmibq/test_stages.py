"""What comes before the training: memory of what is measured, where a model lies, what several processes share."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mico.errors import UserError
from mico.qat import job
from mico.qat.answers import read_answers
from mico.qat.cmibq import stages, trainer
from mico.qat.cmibq.quantizer import QuantLinear
from mico.qat.cmibq.recipe import Aligning, Shaping
from mico.qat.cmibq.student import NLL, Student
from mico.qat.cmibq.wrap import quant_linears, wrap
from mico.qat.cmibq_job import Bottleneck
from tests.pictures import encoded, picture
from tests.qat.cmibq.making import batch, dense, made


class Rows:
    """Four answers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return batch(0, len(rows))


def measured(student: Student) -> torch.Tensor:
    return torch.cat([kind.distortion(True).flatten() for kind in student.cmibq.kinds])


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_measuring_holds_no_gradients_of_weights(progress: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cmibq = made()
    cmibq.progress, student, sizes, real = progress, Student(model), [], torch.autograd.grad

    def spy(*args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        sizes.append(sum(gradient.numel() for gradient in found))
        return found

    monkeypatch.setattr(torch.autograd, "grad", spy)
    stages.measure(student, [(batch(0), True), (batch(2), False), (batch(1), True)])
    found = measured(student)
    assert sizes == [sum(kind.allocator.residual.numel() for kind in cmibq.kinds)] * 3
    assert all(parameter.grad is None for parameter in student.parameters())
    with cmibq.measuring():
        for seed in range(2):
            student(**batch(seed))[NLL].backward()
    assert found.min() > 0 and torch.equal(measured(student), found)


@pytest.mark.parametrize(("rows", "world"), [(10, 2), (3, 4), (16, 2), (600, 6)])
def test_processes_measure_as_many_batches_and_no_row_twice(rows: int, world: int) -> None:
    given: Any = type("Listed", (Rows,), dict(__len__=lambda self: rows, batch=lambda self, chosen: chosen))()
    found = [list(stages.spaced_batches(given, stages.MEASURED, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in found}) == 1 and all(batch for batches in found for batch, _ in batches)
    counted = sorted(row for batches in found for batch, counts in batches if counts for row in batch)  # type: ignore
    assert len(counted) == len({*counted}) == min(rows, stages.MEASURED)
    assert counted == sorted(row for batch, _ in stages.spaced_batches(given, stages.MEASURED) for row in batch)  # type: ignore


def test_the_dense_model_is_measured_with_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def measure(student: Student, batches: Any) -> None:
        raise Reached(str(student.llava.is_gradient_checkpointing))

    monkeypatch.setattr(stages, "measure", measure)
    monkeypatch.setattr(stages, "wrap", lambda model, settings, *rest: wrap(model, settings, None))
    for asked in (True, False):
        with pytest.raises(Reached, match=str(asked)):
            stages.shaped(dense(), Shaping(gradient_checkpointing=asked, group_size=16), Rows())  # type: ignore[arg-type]


def test_zero_has_the_model_on_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # of DeepSpeed
    config = tmp_path / "zero.json"
    request: Any = SimpleNamespace(device=None)
    for stage in (2, 3):
        zero = dict(stage=stage, stage3_gather_16bit_weights_on_model_save=True)
        config.write_text(json.dumps(dict(zero_optimization=zero)))
        assert job.place_of(request, Shaping(deepspeed=str(config))) == torch.device("cuda", 0)
        assert Shaping(deepspeed=str(config)).weights_apart == (stage == 3)
    launch = dict(USE_DEEPSPEED="true", DEEPSPEED_ZERO_STAGE="3", DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true")
    for name, value in launch.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert Shaping().weights_apart and Shaping().parted


def test_fsdp_and_weights_that_are_never_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "zero.json"
    config.write_text(json.dumps(dict(zero_optimization=dict(stage=3))))
    launches = {
        "--fsdp of accelerate: FSDP flattens weights": dict(USE_FSDP="true"),
        'of accelerate: set "stage3_gather.* --zero3_save_16bit_model true': dict(
            USE_DEEPSPEED="true", DEEPSPEED_ZERO_STAGE="3"
        ),
        'model_save": true in zero_opt': dict(USE_DEEPSPEED="true", DEEPSPEED_CONFIG_FILE=str(config)),
    }
    for said, launch in launches.items():
        with monkeypatch.context() as patch:
            for name, value in launch.items():
                patch.setenv(f"ACCELERATE_{name}", value)
            with pytest.raises(UserError, match=said):
                Shaping()


@pytest.mark.parametrize(
    ("file", "half"),
    [
        ({}, None), (dict(bf16=dict(enabled=False)), None), (dict(bf16=dict(enabled=True)), "bf16"),
        (dict(fp16=dict(enabled=True), bf16=dict(enabled=False)), "fp16"), (dict(bf16=dict(enabled="auto")), "--bf16"),
        (dict(zero_optimization=dict(stage=2)), "--bf16"),
    ],
)  # fmt: skip
def test_steps_in_16_bits_are_refused(
    file: dict[str, Any], half: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """half: which format is told of; --bf16: with that option alone, which fills what the file leaves open."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # of DeepSpeed
    config = tmp_path / "zero.json"
    config.write_text(json.dumps(file))
    for bf16 in (False, True):
        if half is None or (half == "--bf16" and not bf16):
            Shaping(deepspeed=str(config), bf16=bf16)
        else:
            with pytest.raises(UserError, match=f"{config}: {half.strip('-')} would hold .* choose torch_autocast"):
                Shaping(deepspeed=str(config), bf16=bf16)


@pytest.mark.parametrize(
    ("options", "held"), [(dict(bf16=True), "bfloat16"), ({}, "float32"), (dict(bf16=True, use_align=False), None)]
)
def test_the_teacher_is_held_in_what_is_multiplied_in(options: dict[str, Any], held: str | None) -> None:
    given: Any = object.__new__(Bottleneck)
    given.recipe, given.place = Aligning(**options), torch.device("cpu")
    given.console = SimpleNamespace(stage=lambda name: nullcontext())
    given._load = lambda place, dtype: (SimpleNamespace(model=dtype), {})
    given._second = lambda loaded, masks, teacher: teacher
    assert given._student(None, {}) == held


def test_zero_3_gathers_a_linear_whole_and_gets_a_gradient_of_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[type] = []

    def leaves(student: Student, kinds: list[type]) -> list[Any]:
        asked.extend(kinds)
        return [module for module in student.modules() if type(module) in kinds]

    fake: Any = ModuleType("deepspeed.utils")
    fake.set_z3_leaf_modules = leaves
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", fake)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    model, cmibq = made()
    linears = quant_linears(model)
    frozen, trained = (linears[f"model.multi_modal_projector.linear_{number}"] for number in (1, 2))
    frozen.requires_grad_(False)
    cmibq.requires_grad_(False)
    trainer._gathered_whole(Student(model))
    assert asked == [QuantLinear]
    seen = []
    for linear in (frozen, trained):
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
        linear.inputs.quantizer = lambda x: x
        linear(torch.zeros(1, linear.in_features))
        with torch.no_grad():
            linear(torch.zeros(1, linear.in_features))
    assert seen == [False, False, True, False]


def test_no_buffer_of_the_state_has_two_names() -> None:
    """ZeRO-3 gathers it under the first alone."""
    _, cmibq = made()
    state = cmibq.state_dict(keep_vars=True)
    found = [id(buffer) for name, buffer in cmibq.named_buffers(remove_duplicate=False) if name in state]
    assert len(found) == len({*found}) > 20


def test_what_zero_3_parts_is_gathered_into_a_new_student() -> None:
    trained, _ = made()
    student, state = Student(trained), {"alignment.logit_scale": torch.ones(1)}
    for number, parameter in enumerate(student.parameters()):
        parameter.data += 0.01 * number
    state |= student.state_dict()

    def blank() -> Student:
        model = dense()
        wrap(model, trained.cmibq.settings, None)
        return Student(model)

    for leads in (False, True):
        fake: Any = SimpleNamespace(
            model_wrapped=None, is_world_process_zero=lambda: leads,  # noqa: B023
            accelerator=SimpleNamespace(get_state_dict=lambda model: state if leads else None),  # noqa: B023
        )  # fmt: skip
        whole = stages.gathered(student, fake, blank)
        assert (whole is not student) == leads
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    del state["model.cmibq.state"]
    with pytest.raises(UserError, match=r"does not fit the model, as 'model\.cmibq\.state'"):
        stages.gathered(student, fake, blank)


def test_processes_begin_with_what_the_first_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[torch.Tensor] = []
    monkeypatch.setattr(trainer, "share_first", shared.extend)
    model = dense()
    cmibq = wrap(model, Shaping(group_size=16).settings(), None)
    fake: Any = SimpleNamespace(model=Student(model), accelerator=SimpleNamespace(unwrap_model=lambda one: one))
    trainer._Steps(fake).on_train_begin(None, None, None)
    given = {id(tensor) for tensor in shared}
    for kind in cmibq.kinds:
        parts = [kind.chosen_I, *(quantizer.error_GK for quantizer in kind.quantizers)]
        assert {id(tensor) for tensor in parts} <= given


def test_under_deepspeed_what_learned_the_widths_gets_a_gradient_of_zero_in_the_end() -> None:
    """ZeRO-3 would go on with the last one, and clip all others by its norm too."""
    for learned, deepspeed in ((True, True), (False, True), (False, False)):
        model, cmibq = made()
        if not learned:
            for kind in cmibq.kinds:
                kind.fix(torch.full_like(kind.chosen_I, 2))
        fake: Any = SimpleNamespace(
            is_deepspeed_enabled=deepspeed, current_gradient_accumulation_steps=1, _note=lambda values: None,
            accelerator=SimpleNamespace(unwrap_model=lambda one: one),
        )  # fmt: skip
        trainer.BottleneckTrainer.compute_loss(fake, Student(model), batch(0)).backward()
        for parameter in (one for kind in cmibq.kinds for one in kind.allocator.parameters()):
            assert (parameter.grad is not None) == (learned or deepspeed)
            assert learned or parameter.grad is None or parameter.grad.count_nonzero() == 0


def test_gradients_that_are_no_numbers_choose_no_widths() -> None:
    _, cmibq = made()
    for kind in cmibq.kinds:
        for quantizer in kind.quantizers:
            quantizer.meter.batches.fill_(1)
            quantizer.meter.distortion_GK.fill_(1.0)
    cmibq.weights.quantizers[0].meter.distortion_GK.fill_(torch.nan)
    with pytest.raises(UserError, match="--target-bits-weight 4: widths cannot be chosen, gradients are infinite"):
        cmibq.harden()


@pytest.mark.parametrize("seed", range(4))
def test_a_part_of_the_data_without_pictures_is_named(tmp_path: Path, seed: int) -> None:
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    seen = [{"from": "human", "value": "<image>\nWhat?"}, said[1]]
    (tmp_path / "pairs.json").write_text(
        json.dumps([dict(conversations=said), dict(image="a.png", conversations=seen)])
    )
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    options: dict[str, Any] = dict(train_file=str(tmp_path / "pairs.json"), image_folder=str(tmp_path), seed=seed)
    with pytest.raises(UserError, match=r"none of the 1 conversations (held out|left to train on) is about a picture"):
        read_answers(None, 100, eval_share=0.5, **options)
