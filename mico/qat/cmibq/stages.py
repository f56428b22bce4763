"""The two stages: what each starts from, and how widths are chosen for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from mico.adapters.family import Family
from mico.errors import UserError
from mico.qat.answers import Answers
from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.recipe import Aligning, Shaping
from mico.qat.cmibq.settings import Settings
from mico.qat.cmibq.sites import TOWER, VISION, find_sites, read_tower_blocks
from mico.qat.cmibq.start import observe
from mico.qat.cmibq.student import NLL, Student
from mico.qat.cmibq.wrap import CMIBQ, Masks, wrap
from mico.qat.job import gathered_state

CALIBRATION = 128  # answers that steps start from
MEASURED = 512  # answers by which widths are chosen for good
TOGETHER = 4  # of them in a batch, whatever the batch of the training is: its size shall not decide
SURE = 100.0  # a logit that leaves the other widths no share
CHECKPOINTING = dict(use_reentrant=False)  # of gradients; the other kind hides inputs from the rate

Batch = dict[str, torch.Tensor]


def spaced_batches(answers: Answers, count: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, bool]]:
    """At most `count` rows, evenly spaced over the data, in batches of TOGETHER, and whether each counts; those of one
    of several processes.

    All processes get as many, as under ZeRO-3 they gather weights together: the last of some is one that another has,
    and does not count. `average_over_ranks` counts those that do.
    """
    count = min(count, len(answers))
    places = [index * len(answers) // count for index in range(count)]
    for first in range(0, count, world * TOGETHER):
        own = places[first + rank * TOGETHER :][:TOGETHER]
        yield answers.batch([answers[place] for place in own or places[:TOGETHER]]), bool(own)


def _placed(batch: Batch, device: Any) -> Batch:
    return {name: x.to(device) for name, x in batch.items()}


# --- stage 1 --------------------------------------------------------------------------------------------------------


def shaped(model: Any, recipe: Shaping, answers: Answers, masks: Masks | None = None) -> Student:
    """The student of stage 1 around a dense float32 LLaVA. Widths that are not learned are chosen; those that are
    begin where the dense model's backward passes would have them. masks: weights that stay pruned."""
    batches = [_placed(batch, model.device) for batch, _ in spaced_batches(answers, CALIBRATION)]
    model.requires_grad_(True)
    try:
        cmibq = wrap(model, recipe.settings(), observe(model, find_sites(model), batches), masks)
    except ValueError as error:
        raise UserError(str(error)) from None
    freeze_unread(model)
    student = Student(model)
    if recipe.gradient_checkpointing:  # as Trainer will, which comes after the dense model is measured
        student.gradient_checkpointing_enable(CHECKPOINTING)
    if recipe.bits_allocation == "uniform":
        for kind in cmibq.kinds:
            kind.fix(torch.full_like(kind.chosen_I, BITS.index(int(kind.price.target))))
    else:
        if recipe.use_importance:
            _measure_dense(student, batches)
        if recipe.bits_allocation == "knapsack":
            cmibq.harden()
    if recipe.bits_allocation == "learned":
        for kind in cmibq.kinds:
            kind.begin(recipe.use_importance)
    else:
        for kind in cmibq.kinds:
            kind.allocator.requires_grad_(False)
    return student


def freeze_unread(model: Any) -> None:
    """Parameters of the vision tower behind the states that the projector reads get no gradient: none waits for one."""
    read = tuple(f"{name}." for name, _ in read_tower_blocks(model))
    blocks = read[0].rpartition(".0.")[0] + "."
    for name, parameter in model.named_parameters():
        behind = name.startswith(blocks) and not name.startswith(read)
        if name.startswith(f"{TOWER}.") and (behind or ".post_layernorm." in name):
            parameter.requires_grad_(False)


def measure(student: Student, batches: Iterable[tuple[Batch, bool]]) -> None:
    """What every width loses by those of these batches that count, forward and backward without a step; widths are not
    chosen yet.

    Losses are summed, so that an answer counts alike in whatever batch it comes.
    """
    student.train()
    with torch.enable_grad(), student.cmibq.measuring() as meters:
        for batch, counts in batches:
            for meter in meters:
                meter.counts = counts
            loss = student(**_placed(batch, student.llava.device))[NLL]
            # Every quantizer's backward pass leads to these; gradients of all weights would be as large as the weights.
            # Not backward(), nor to a parameter, which DistributedDataParallel and DeepSpeed would take for a step.
            torch.autograd.grad(loss, [kind.learned_IK for kind in student.cmibq.kinds])  # type: ignore[arg-type]


def harden(student: Student, answers: Answers) -> None:
    """Choose the widths that were learned, in all processes. Raises UserError where a target cannot be met."""
    rank, world = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
    if student.cmibq.settings.use_importance:
        measure(student, spaced_batches(answers, MEASURED, rank, world))
    student.cmibq.harden()


def _measure_dense(student: Student, batches: list[Batch]) -> None:
    """What widths lose in the dense model, as near as the widest come to it: no training has moved a thing."""
    cmibq = student.cmibq
    with torch.no_grad():
        for kind in cmibq.kinds:
            kind.allocator.residual[:, -1] = SURE
    cmibq.progress = 1.0
    measure(student, ((batch, True) for batch in batches))
    with torch.no_grad():
        for kind in cmibq.kinds:
            kind.allocator.residual.zero_()
    cmibq.progress = 0.0


# --- stage 2 --------------------------------------------------------------------------------------------------------


def aligned(
    model: Any, family: Family, recipe: Aligning, settings: Settings, state: Mapping[str, torch.Tensor], teacher: Any,
    masks: Masks | None = None,
) -> Student:  # fmt: skip
    """The student of stage 2 around the dense LLaVA that stage 1 started from; state: what stage 1 left.

    teacher: the same dense model once more; None where nothing is aligned. masks: weights that stay pruned.
    """
    if recipe.ib_weight is not None:
        settings = replace(settings, ib_weight=recipe.ib_weight)
    wrap(model, settings, None, masks)
    load_state(model, state)
    model.requires_grad_(False)
    chosen: Any = model
    if recipe.use_lora:
        from mico.qat.cmibq.adapters import adapted  # imports peft

        chosen = adapted(model, family, rank=recipe.lora_rank, alpha=recipe.lora_alpha, seed=recipe.seed)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith((f"{TOWER}.", "cmibq.")) and ".weight_quantizer." not in name)
    _learn_steps(model, model.cmibq)
    return Student(chosen, teacher, recipe.align_weight)


def gathered(student: Student, trainer: Any, blank: Callable[[], Student]) -> Student:
    """The student with the weights that ZeRO-3 left in parts, in the first of all processes, on the CPU.

    blank: makes one of the same shapes without a teacher; the others get the student as it is.
    """
    state = gathered_state(trainer)
    if state is None:
        return student
    whole = blank()
    load_state(whole, {name: tensor for name, tensor in state.items() if not name.startswith("alignment.")})
    return whole


def load_state(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """What `whole_state` gave, into a wrapped model of the same shapes."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing, unknown = model.load_state_dict(state, strict=False)
    lost = [*unknown, *(name for name in missing if name not in tied)]
    if lost:
        raise UserError(f"the state of stage 1 does not fit the model, as '{lost[0]}': run stage 1 again")


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """All that a wrapped model is, tied tensors once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _learn_steps(model: Any, cmibq: CMIBQ) -> None:
    """Steps and priors of projector and language model go on learning; nothing needs gradients of the vision tower."""
    for number, site in enumerate(cmibq.sites):
        if site.modality == VISION:
            continue
        parts: list[Any] = [cmibq.inputs[number], *(_linear(model, name).weight_quantizer for name in site.linears)]
        parts += [cmibq.priors[number]] if cmibq.settings.use_ib else []
        for part in parts:
            part.requires_grad_(True)


def _linear(model: Any, name: str) -> Any:
    module = model.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def merged(student: Student) -> Any:
    """The LLaVA with its adapters in its weights. No bit of what it computes changes."""
    if hasattr(student.model, "merge_and_unload"):
        student.model = student.model.merge_and_unload()
    return student.model
