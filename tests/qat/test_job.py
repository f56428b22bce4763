"""What every method of training shares: room, whole checkpoints, the loss of a training that was cut."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from mico.errors import UserError
from mico.qat.job import STATE, WHOLE, check_room, last_checkpoint, mean_loss, own_randomness
from mico.qat.recipe import Training

CPU = torch.device("cpu")


def checkpoint(folder: Path, step: int, whole: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "model.safetensors").write_bytes(bytes(100))
    (made / STATE).write_text(json.dumps(dict(global_step=step)))
    if whole:
        (made / WHOLE).write_text(json.dumps({file.name: file.stat().st_size for file in made.iterdir()}))
    return made


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    assert last_checkpoint(tmp_path, said.append) is None and not said
    for step in (8, 10):
        checkpoint(tmp_path, step)
    truncated, unfinished = checkpoint(tmp_path, 12), checkpoint(tmp_path, 100, whole=False)
    (truncated / "model.safetensors").write_bytes(bytes(99))
    assert last_checkpoint(tmp_path, said.append) == (str(tmp_path / "checkpoint-10"), dict(global_step=10))
    assert [str(folder) in line for folder, line in zip((unfinished, truncated), said, strict=True)] == [True, True]


def test_the_mean_loss_weighs_entries_by_their_steps() -> None:
    history = [
        dict(step=0, eval_loss=9.0),
        dict(step=10, loss=4.0),
        dict(step=12, loss=1.0),
        dict(step=12, eval_loss=1),
    ]
    assert mean_loss(history) == pytest.approx((10 * 4 + 2 * 1) / 12)
    assert mean_loss([]) is None


def test_disk_and_memory_that_are_too_small_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(max_steps=300, save_steps=100)  # three checkpoints on the disk at the worst
    needed = 10**6 * (3 * 12 + 4)
    assert check_room(tmp_path, 10**6, CPU, training, windows=10) == needed
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"40 MB free, 40 MB needed \(3 checkpoints and the model\): free some"):
        check_room(tmp_path, 10**6, CPU, training, windows=10)
    assert check_room(tmp_path, 10**6, CPU, Training(max_steps=300), windows=10) < needed  # saved less often
    monkeypatch.setattr("mico.qat.job.free_memory", lambda _: 10**6)
    with pytest.raises(UserError, match="1 MB are free on cpu: use more devices"):
        check_room(tmp_path, 10**6, CPU, Training(max_steps=300), windows=10)
    assert check_room(tmp_path, 10**6, CPU, Training(max_steps=300, fsdp="full_shard"), windows=10)


def test_steps_are_counted_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(num_train_epochs=2.0, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert training.steps(80) == 20
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert training.steps(80) == 4


def test_the_generators_of_the_program_are_as_before() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    first = draw()
    random.setstate(states[0]), numpy.random.set_state(states[1]), torch.set_rng_state(states[2])
    with own_randomness():
        random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
        draw()
    assert draw() == first
