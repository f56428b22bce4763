"""What every method of `mico finetune` shares: the request, checks, and a training by Trainer that goes on when killed.

finetune.py   METHODS[name](request, options) -> Job     reads and checks all but the weights
              Job.lead(run) -> report                    in the first process
              Job.follow(folder)                         in the others
a Job         fit(trainer, ...) -> Results               the training itself, below
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

from mico.console import Console
from mico.errors import UserError
from mico.files import atomic_json, read_json
from mico.loading import pick_device, quiet
from mico.loading.free import free_memory
from mico.qat.recipe import Training
from mico.runs import TRAINING, RunFolder
from mico.tables import Section, size_text

BEFORE = "before_results.json"
STATE, WHOLE = "trainer_state.json", "mico_whole.json"  # of a checkpoint; WHOLE is written when all else is on disk
MASTERS = 16  # bytes a parameter: float32 weight, gradient and two moments of AdamW
KEPT = 12  # the same in a checkpoint, without the gradient
CHECKPOINTS = 3  # two are kept while a third is written

Results = dict[str, dict[str, Any]]  # of Trainer: 'before', 'train', 'eval', 'all'


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for beside the options of the method itself; None: the default of `mico finetune --help`."""

    model: str
    method: str
    train_file: str | None
    image_folder: str | None
    eval_file: str | None
    eval_share: float
    seqlen: int | None
    teacher: str | None
    eval: tuple[str, ...] | None
    data_dir: str | None
    device: str
    offline: bool
    trust_remote_code: bool
    console: Console

    @property
    def hub(self) -> dict[str, bool]:
        """How models are looked up; packed ones are welcome."""
        return dict(offline=self.offline, trust_remote_code=self.trust_remote_code, packed=True)


class Job(Protocol):
    """One training. Whatever can be refused without weights was refused when it was made."""

    label: str  # of the run folder, where the user names none
    identity: dict[str, Any]  # what the run folder's content depends on, with the names that the user knows

    def __init__(self, request: Request, options: dict[str, Any]) -> None: ...

    def lead(self, run: RunFolder) -> dict[str, Any]:
        """The whole of it, from the weights to the report."""

    def follow(self, folder: Path) -> None:
        """The part of a process that is not the first."""

    @staticmethod
    def told(report: dict[str, Any]) -> list[Section]:
        """The report for the terminal."""

    @staticmethod
    def figures(report: dict[str, Any]) -> dict[str, Any]:
        """The figures of the report by plain names, for `--json`."""


# --- before training ------------------------------------------------------------------------------------------------


def place_of(request: Request, training: Training) -> torch.device:
    """Where this process loads the model: its own GPU, or the CPU where the model is to be parted among processes.

    Raises UserError where a device was asked for that is not there.
    """
    chosen = pick_device(request.device)
    if chosen.type != "cuda":
        return chosen
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu") if training.loaded_apart else own


def check_room(
    folder: Path, parameters: int, place: torch.device, training: Training, windows: int, model: int | None = None
) -> int:
    """Bytes that the run will write; raises UserError where disk or memory cannot hold the training.

    parameters: those that are trained; model: bytes of the model that is written, None: 4 a parameter.
    """
    written = min(CHECKPOINTS, math.ceil(training.steps(windows) / training.save_steps))
    needed = parameters * written * KEPT + (4 * parameters if model is None else model)
    there = sum(file.stat().st_size for file in (folder / TRAINING).rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + there
    if needed > free:
        raise UserError(
            f"{folder}: {size_text(free)} free, {size_text(needed)} needed ({written} checkpoints and the model): "
            "free some or move --save"
        )
    taken = parameters * (MASTERS - 4)  # the weights are there already
    if not training.parted and taken > free_memory(place):
        raise UserError(
            f"training takes {size_text(taken)} more for gradients and moments of {parameters:,} parameters, "
            f"{size_text(free_memory(place))} are free on {place}: use more devices with --fsdp or --deepspeed"
        )
    return needed


@contextmanager
def own_randomness() -> Iterator[None]:
    """Trainer seeds the generators of the whole program: they are given back as they were."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    kept = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def one_tracked_run(folder: Path, trackers: list[str]) -> Iterator[None]:
    """Trainer logs to W&B under one id a run folder, so that a training that goes on goes on there too."""
    if "wandb" not in trackers:
        yield
        return
    import wandb

    name = f"{folder.name}-{os.stat(folder).st_ino:x}"
    wanted = dict(WANDB_PROJECT="mico", WANDB_RUN_ID=name, WANDB_RESUME="allow", WANDB_SILENT="true")
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        wandb.finish()
        for key in added:
            os.environ.pop(key, None)


# --- training -------------------------------------------------------------------------------------------------------


def fit(trainer: Any, folder: Path, console: Console) -> Results:
    """Train from the last whole checkpoint in `folder`/training on, and evaluate.

    trainer: without callbacks of mico. Its model ends without the wrapper that computes in 16 bits. Raises UserError
    where the loss is no number.
    """
    from transformers import PrinterCallback

    from mico.qat.trainer import Log, Start, Whole, with_perplexity

    trainer.remove_callback(PrinterCallback)  # it writes to stdout, where results go
    for callback in (Log(console), Start(folder / BEFORE), Whole(WHOLE)):
        trainer.add_callback(callback)
    with quiet(), console.stage("train"), one_tracked_run(folder, trainer.args.report_to):
        train = _train(trainer, folder / TRAINING, console)
        after = with_perplexity(trainer.evaluate())
    if not math.isfinite(after["eval_loss"]):
        raise UserError(f"the loss is {after['eval_loss']:g} after training: lower --learning-rate")
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # changes it in place
        trainer.model.zero_grad(set_to_none=True)
    before = read_json(folder / BEFORE) if trainer.is_world_process_zero() else {}
    return dict(before=before, train=train, eval=after, all=train | after)


def gathered_state(trainer: Any) -> dict[str, torch.Tensor] | None:
    """The state of a model that processes hold in parts (ZeRO-3, FSDP), on the CPU, in the first; None in the others.

    All of them must ask. Models that are loaded afterwards are whole.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()  # or a model that is loaded next would be spread over the processes too
    return state if trainer.is_world_process_zero() else None


def _train(trainer: Any, folder: Path, console: Console) -> dict[str, Any]:
    """Train, or go on from the last checkpoint; one that holds the last step is only read."""
    found = last_checkpoint(folder, console.note)
    trainer.args.eval_on_start = found is None
    start = 0 if found is None else int(found[1]["global_step"])
    if found is None:
        metrics = trainer.train().metrics
    elif start < found[1]["max_steps"]:
        console.note(f"finetune: goes on from {found[0]}, step {start:,} of {found[1]['max_steps']:,}")
        metrics = trainer.train(resume_from_checkpoint=found[0]).metrics
    else:
        console.note(f"finetune: all {start:,} steps were done, {found[0]}")
        trainer._load_from_checkpoint(found[0])  # Trainer itself would add a step
        metrics = dict(epoch=found[1]["epoch"], train_runtime=0.0)
        trainer.state.log_history = found[1]["log_history"]
    return metrics | dict(train_loss=mean_loss(trainer.state.log_history), resumed_from=start)


def mean_loss(history: list[dict[str, Any]]) -> float | None:
    """Mean training loss over the steps of a log, those before a kill too; each entry is the mean since the last."""
    entries = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    total, before = 0.0, 0
    for step, loss in entries:
        total, before = total + loss * (step - before), step
    return total / before if before else None


def last_checkpoint(folder: Path, tell: Callable[[str], None]) -> tuple[str, dict[str, Any]] | None:
    """The newest whole checkpoint of Trainer in `folder` with its state; one cut short is passed over, and told."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    for path in found:
        try:
            sizes = json.loads((path / WHOLE).read_text())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return str(path), json.loads((path / STATE).read_text())
        except (OSError, ValueError, AttributeError):
            pass
        tell(f"finetune: {path} is not whole, passing it over")
    return None


def write_results(folder: Path, results: Results) -> None:
    """train_results.json, eval_results.json and all_results.json, as the examples of transformers name them."""
    for name in ("train", "eval", "all"):
        atomic_json(folder / f"{name}_results.json", results[name])
