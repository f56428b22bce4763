"""Training with pruned visual tokens against the same model unpruned, and how well answers are known under pruning.

The student runs inside `mico.visual_tokens.enable`, with its adapters; the teacher is the same module without them,
outside of it. Suffixes: B batch, T tokens, K columns at the end with logits, V vocabulary, A tokens of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import Trainer

from mico.errors import UserError
from mico.image_text import UNLABELLED
from mico.metrics.vision.run import Tokens
from mico.qat.answers import Answers
from mico.visual_tokens import enable

_CHUNK = 1024  # rows of logits turned to float32 at a time


def with_question(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch as the model is called with it: what judges visual tokens, and logits from the first answer on.

    Rows are padded on the left, and their answers stand at their ends.
    """
    labels_BT = inputs["labels"]
    labelled_T = (labels_BT != UNLABELLED).any(0)
    columns = int(labelled_T.flip(0).nonzero().max()) + 2 if bool(labelled_T.any()) else 1
    asked_BT = labels_BT == UNLABELLED
    return inputs | dict(question_mask=asked_BT, use_cache=False, logits_to_keep=min(columns, labels_BT.shape[1]))


def answer_logits(logits_BKV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (A, V) at the tokens before those with a label, and these labels (A,); the logits are of the last K."""
    targets_BK = labels_BT[:, labels_BT.shape[1] - logits_BKV.shape[1] + 1 :]
    there_BK = targets_BK != UNLABELLED
    return logits_BKV[:, :-1][there_BK], targets_BK[there_BK]


def distilled(
    student_AV: torch.Tensor, targets_A: torch.Tensor, teacher_AV: torch.Tensor | None, share: float
) -> torch.Tensor:
    """(1 - share) cross-entropy + share KL(teacher || student), summed over answer tokens, in float32.

    Without a teacher it is the cross-entropy alone.
    """
    loss = student_AV.new_zeros((), dtype=torch.float32)
    for start in range(0, max(1, len(targets_A)), _CHUNK):
        part = slice(start, start + _CHUNK)
        of_student = student_AV[part].float().log_softmax(-1)
        entropy = functional.nll_loss(of_student, targets_A[part], reduction="sum")
        if teacher_AV is None:
            loss = loss + entropy
            continue
        of_teacher = teacher_AV[part].float().log_softmax(-1)
        apart = functional.kl_div(of_student, of_teacher, reduction="sum", log_target=True)
        loss = loss + (1 - share) * entropy + share * apart
    return loss


@contextmanager
def as_teacher(adapted: Any) -> Iterator[Any]:
    """Inside, a PeftModel is what it was made of: no adapter, no dropout, no gradient."""
    training = adapted.training
    adapted.eval()
    try:
        with torch.no_grad(), adapted.disable_adapter():
            yield adapted
    finally:
        adapted.train(training)


class PrunedTrainer(Trainer):
    """Trainer of a PeftModel around a LLaVA whose visual tokens are pruned, in training and in evaluation.

    share: of the divergence from the teacher in the loss; 0 runs no teacher. Ends at the first loss that is no number.
    """

    def __init__(self, *, tokens: Tokens, share: float, **more: Any) -> None:
        self.tokens, self.share = tokens, share
        self._taught_BKV: torch.Tensor | None = None
        super().__init__(compute_loss_func=self._loss, **more)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        """The student's loss; without gradients, that is in evaluation, its cross-entropy alone."""
        inputs, plain = with_question(inputs), self.accelerator.unwrap_model(model)
        self._taught_BKV = None
        if self.share > 0 and torch.is_grad_enabled():
            asked = {name: x for name, x in inputs.items() if name not in ("labels", "question_mask")}
            with as_teacher(plain) as teacher:
                self._taught_BKV = teacher(**asked).logits
        with enable(plain.get_base_model(), **asdict(self.tokens)):
            return super().compute_loss(model, inputs, *args, **more)

    def _loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        student_AV, targets_A = answer_logits(outputs.logits, labels)
        taught_AV = None if self._taught_BKV is None else answer_logits(self._taught_BKV, labels)[0]
        self._taught_BKV = None  # no need of it while gradients are made
        count = len(targets_A) if num_items_in_batch is None else num_items_in_batch
        total = distilled(student_AV, targets_A, taught_AV, self.share)
        return total / (count.clamp_min(1) if isinstance(count, torch.Tensor) else max(1, count))

    def training_step(self, *args: Any, **more: Any) -> torch.Tensor:
        """One batch forward and backward. Raises UserError where its loss is infinite or no number."""
        loss = super().training_step(*args, **more)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1:,}: the loss is {loss.item():g}: lower --learning-rate "
                f"{self.args.learning_rate:g}"
            )
        return loss


@torch.no_grad()
def known_answers(
    model: Any, answers: Answers, batch_size: int, tokens: Tokens | None, advance: Callable[[str], None]
) -> dict[str, float]:
    """How well a model knows answers, with its visual tokens pruned or (tokens None) all of them.

    loss: cross-entropy a token of the answers; right: share of the answers of which every token is the likeliest one,
    given those before it: these would be generated; answers and their tokens. Of pruned visual tokens also
    equal_tokens and processed_tokens (means, as the field counts and as it is), and without_rater (a count of answers).
    """
    pruned: Any = nullcontext() if tokens is None else enable(model, **asdict(tokens))
    loss, right, asked, counted = 0.0, 0, 0, 0
    with pruned as pruning:
        for batch in DataLoader(answers, batch_size, collate_fn=answers.batch):
            inputs = with_question({name: x.to(model.device) for name, x in batch.items()})
            labels_BT = inputs.pop("labels")
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            if tokens is None:
                del inputs["question_mask"]
            logits_BKV = model(**inputs).logits
            found_AV, targets_A = answer_logits(logits_BKV, labels_BT)
            loss += float(distilled(found_AV, targets_A, None, 0.0))
            wrong_A = found_AV.argmax(-1) != targets_A
            row_A = (labels_BT != UNLABELLED).nonzero()[:, 0]
            has_B = (labels_BT != UNLABELLED).any(1)
            missed_B = torch.zeros_like(has_B).index_put((row_A[wrong_A],), torch.ones_like(wrong_A[wrong_A]))
            right, asked = right + int((has_B & ~missed_B).sum()), asked + int(has_B.sum())
            counted += len(targets_A)
            advance("")
    found = dict(loss=loss / max(1, counted), right=right / max(1, asked), answers=asked, tokens=counted)
    if pruning is None:
        return found
    means = pruning.totals.means()
    costs = dict(equal_tokens=means["equal_tokens"], processed_tokens=means["processed_tokens"])
    return found | costs | dict(without_rater=means["samples_without_rater"])
