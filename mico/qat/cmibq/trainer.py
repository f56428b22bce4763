"""Trainer of both stages: the loss put together, parameter groups, what is logged, and what a checkpoint holds."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from mico.errors import UserError
from mico.qat.cmibq.importance import share_first
from mico.qat.cmibq.quantizer import Quantizer, QuantLinear
from mico.qat.cmibq.student import NLL, TOKENS, Student
from mico.qat.cmibq.wrap import CMIBQ, parameter_groups

WEIGHTS = "model.safetensors"  # of a checkpoint, as Trainer reads it
LEARNING = ("/temperature", "_lambda")  # figures that mean nothing once widths are chosen


class BottleneckTrainer(Trainer):
    """Trainer of a Student. Ends at the first loss that is no number.

    theta_learning_rate, scale_learning_rate: of what decides widths, and of steps, priors and heads. choose: chooses
    widths for good, in every process; called once all steps are done in which they are learned.
    """

    model: Any

    def __init__(
        self, *, theta_learning_rate: float, scale_learning_rate: float, choose: Callable[[], None], **more: Any
    ) -> None:
        self.theta_learning_rate, self.scale_learning_rate = theta_learning_rate, scale_learning_rate
        self.choose = choose
        self.figures: dict[str, float] = {}  # of the last step
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)  # of the batches since the last log
        _gathered_whole(more["model"])
        super().__init__(**more)
        self.add_callback(_Steps(self))

    # --- the loss ---

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """NLL a token over all batches of a step, and the mean of the penalties over them.

        Without gradients, that is in evaluation, the NLL a token of the batch.
        """
        terms = model(**inputs)
        count = terms.pop(TOKENS) if num_items_in_batch is None else num_items_in_batch
        terms.pop(TOKENS, None)
        loss = nll = terms.pop(NLL) / (count.clamp_min(1) if isinstance(count, torch.Tensor) else max(1, count))
        if terms:
            steps = self.current_gradient_accumulation_steps
            if num_items_in_batch is not None:
                nll = nll * self.accelerator.num_processes  # of which the mean of gradients is taken
            scaled = {name: term / steps for name, term in terms.items()}
            loss = nll + torch.stack(list(scaled.values())).sum()
            student = self.accelerator.unwrap_model(model)
            if self.is_deepspeed_enabled:  # ZeRO-3 takes the last gradient once more where there is none
                loss = loss + student.cmibq.unmoved()
            self._note(dict(nll=nll.detach() * steps) | {f"loss_{name}": term.detach() for name, term in terms.items()})
            self._note(student.told)
        return (loss, {}) if return_outputs else loss

    def _note(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._sums[name].append(value.float())

    def training_step(self, *args: Any, **more: Any) -> torch.Tensor:
        """One batch forward and backward. Raises UserError where its loss is infinite or no number."""
        loss = super().training_step(*args, **more)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1:,}: the loss is {loss.item():g}: lower --learning-rate "
                f"{self.args.learning_rate:g}, --scale-learning-rate {self.scale_learning_rate:g} or "
                f"--theta-learning-rate {self.theta_learning_rate:g}"
            )
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, over groups with learning rates of their own."""
        if self.optimizer is None:
            student: Any = self.accelerator.unwrap_model(self.model if model is None else model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, student)
            groups = parameter_groups(
                student.llava, self.args.learning_rate, self.theta_learning_rate, self.scale_learning_rate,
                self.args.weight_decay,
            )  # fmt: skip
            if student.alignment is not None:
                heads = list(student.alignment.parameters())
                groups.append(dict(name="heads", params=heads, lr=self.scale_learning_rate, weight_decay=0.0))
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # --- the log ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own figures, under train/; beside them those of widths and alignment, under their names.

        The parts of the loss and the alignment are means over the batches since the last log, of this process.
        """
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        means = {name: float(torch.stack(values).mean()) for name, values in self._sums.items()}
        self._sums.clear()
        found = self.figures | means
        apart = {name: value for name, value in found.items() if "/" in name}
        super().log(logs | {name: value for name, value in found.items() if "/" not in name}, start_time)
        self.state.log_history[-1] |= apart
        if self.is_world_process_zero():
            self._send(apart)

    def _send(self, figures: dict[str, float]) -> None:
        """To TensorBoard and W&B without the prefix that transformers would put before them."""
        from transformers.integrations import TensorBoardCallback, WandbCallback

        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in figures.items():
                    callback.tb_writer.add_scalar(name, value, self.state.global_step)
            elif isinstance(callback, WandbCallback) and callback._wandb is not None:
                callback._wandb.log(figures | {"train/global_step": self.state.global_step})

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What is learned, and all that is measured; frozen weights are read from the model again."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        student = self.accelerator.unwrap_model(self.model)
        state = learned_state(student, state_dict)
        safetensors.torch.save_file(state, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Names that a checkpoint lacks are frozen weights; any that the model lacks are a mistake."""
        assert not load_result.unexpected_keys, load_result.unexpected_keys[:3]


class _Steps(TrainerCallback):
    """Time in CM-IBQ goes on with every step of the optimizer."""

    def __init__(self, trainer: BottleneckTrainer) -> None:
        self.trainer = trainer

    @property
    def _student(self) -> Student:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All processes go on from the same widths and measurements; parameters are shared by what wraps the model."""
        share_first(
            buffer
            for module in self._student.modules()
            if isinstance(module, CMIBQ | Quantizer)
            for buffer in module.buffers()
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """While the gradients are there."""
        found, fixed = self._student.cmibq.metrics(), self._student.cmibq.fixed
        self.trainer.figures = {name: value for name, value in found.items() if not (fixed and name.endswith(LEARNING))}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In every process, before a checkpoint is written."""
        cmibq = self._student.cmibq
        cmibq.advance(state.global_step / state.max_steps)
        if not cmibq.fixed and cmibq.learned == 1:
            self.trainer.choose()


def _gathered_whole(student: Student) -> None:
    """Have ZeRO-3 gather all of a QuantLinear at once: what it computes with belongs to its parts as well."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        kinds = {type(one) for one in student.modules() if isinstance(getattr(one, "base_layer", one), QuantLinear)}
        for module in set_z3_leaf_modules(student, list(kinds)):
            if any(parameter.requires_grad for parameter in module.parameters()):
                module.register_forward_pre_hook(_with_gradient)


def _with_gradient(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """DeepSpeed takes the gradients of such a module when that of its input is there, and else before they are."""
    x, *more = args
    return (x.detach().requires_grad_(), *more) if torch.is_grad_enabled() and not x.requires_grad else None


def learned_state(student: nn.Module, state: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Parameters that are trained and all buffers, each tensor once; state: in place of the module's own."""
    frozen = {name for name, one in student.named_parameters(remove_duplicate=False) if not one.requires_grad}
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in (student.state_dict() if state is None else state).items():
        place = (tensor.data_ptr(), tensor.shape)
        if name not in frozen and (place not in seen or not tensor.numel()):
            seen.add(place)
            found[name] = tensor.detach().contiguous()
    return found
