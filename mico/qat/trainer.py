"""The trainer of transformers with an optimizer that knows step sizes, and distillation from the dense model.

Suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from mico.console import Console
from mico.errors import UserError
from mico.files import atomic_json, make_durable

_CHUNK = 1024  # rows of logits turned to float32 at a time


class QATTrainer(Trainer):
    """Trainer whose step sizes (weight_scale) have a learning rate of their own, and no weight decay.

    It ends at the first loss that is no number.
    """

    def __init__(self, *args: Any, scale_learning_rate: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scale_learning_rate = scale_learning_rate

    def training_step(self, *args: Any, **more: Any) -> torch.Tensor:
        """One batch forward and backward. Raises UserError where its loss is infinite or no number."""
        loss = super().training_step(*args, **more)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1:,}: the loss is {loss.item():g}: lower --learning-rate "
                f"{self.args.learning_rate:g} or --scale-learning-rate {self.scale_learning_rate:g}"
            )
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, with the steps in a group of their own."""
        chosen: Any = self.model if model is None else model
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            self.optimizer = kind(self._groups(chosen), **options)
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        steps: list[nn.Parameter] = []
        weights: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                place = steps if name.endswith("weight_scale") else weights if name in decayed else others
                place.append(parameter)
        return [
            dict(params=weights, weight_decay=self.args.weight_decay),
            dict(params=others, weight_decay=0.0),
            dict(params=steps, weight_decay=0.0, lr=self.scale_learning_rate),
        ]


class Log(TrainerCallback):
    """Says one line at every step that is logged, to which it adds those of the checkpoints and the last.

    The mean loss of a training that goes on from a checkpoint is then that of all its steps.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have a step logged before its checkpoint is written."""
        if state.global_step % state.save_steps == 0 or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loss and learning rate, from the first process alone."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs and state.is_world_process_zero:
            self.console.note(
                f"step {state.global_step:,} of {state.max_steps:,}: loss {logs['loss']:.4f}, "
                f"learning rate {logs['learning_rate']:.3g}, gradient norm {logs['grad_norm']:.3g}"
            )


class Start(TrainerCallback):
    """Keeps what is measured before the first step, in a file.

    Trainer has to do this evaluation itself: one that is asked to evaluate before it trains wraps the model for that,
    and then leaves the gradients of several processes apart.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the metrics of step 0, from the first process alone."""
        if state.global_step == 0 and state.is_world_process_zero:
            atomic_json(self.file, with_perplexity(kwargs["metrics"]))


class Whole(TrainerCallback):
    """Makes a checkpoint durable and writes the sizes of its files beside them, when all processes have written theirs.

    A kill or a power failure then leaves no checkpoint that only looks whole.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last file of a checkpoint."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != self.name]
            make_durable(folder, files)
            atomic_json(folder / self.name, {str(file.relative_to(folder)): file.stat().st_size for file in files})


def with_perplexity(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of Trainer with exp(loss)."""
    return metrics | dict(eval_perplexity=math.exp(min(metrics["eval_loss"], 700.0)))


class Distillation:
    """Loss for Trainer's `compute_loss_func`: (1 - share) cross-entropy + share KL(teacher || student), while training.

    Without gradients, that is in evaluation, it is the cross-entropy alone. Windows hold no padding.
    """

    def __init__(self, teacher: nn.Module, share: float) -> None:
        self.teacher, self.share = teacher.eval().requires_grad_(False), share

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Both terms are summed over the tokens and divided by `num_items_in_batch` (None: their number here)."""
        logits_BTV, targets_BT = outputs.logits[:, :-1], labels[:, 1:]
        count = targets_BT.numel() if num_items_in_batch is None else num_items_in_batch
        loss = torch.zeros((), device=labels.device)
        if self.share < 1 or not logits_BTV.requires_grad:
            for student, targets in _chunks(logits_BTV, targets_BT):
                loss = loss + functional.cross_entropy(student.float(), targets, reduction="sum")
        if not logits_BTV.requires_grad:
            return loss / count
        with torch.no_grad():
            taught_BTV = self.teacher.to(labels.device)(input_ids=labels, use_cache=False).logits[:, :-1]
        apart = torch.zeros((), device=labels.device)
        for student, teacher in _chunks(logits_BTV, taught_BTV):
            of_student, of_teacher = (part.float().log_softmax(-1) for part in (student, teacher))
            apart = apart + functional.kl_div(of_student, of_teacher, reduction="sum", log_target=True)
        return ((1 - self.share) * loss + self.share * apart) / count


def _chunks(logits_BTV: torch.Tensor, other: torch.Tensor) -> Any:
    """Rows of the logits beside rows of targets (B, T) or of other logits (B, T, V), some at a time."""
    return zip(logits_BTV.flatten(0, 1).split(_CHUNK), other.flatten(0, 1).split(_CHUNK), strict=True)
