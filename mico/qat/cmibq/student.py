"""A LLaVA under CM-IBQ as Trainer trains it: one module whose forward pass gives every term of the loss.

Suffixes: B rows of a batch, T tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mico.image_text import UNLABELLED
from mico.qat.cmibq.losses import Alignment, keys, pooled, text_keys
from mico.qat.cmibq.wrap import CMIBQ
from mico.qat.pruned import answer_logits, distilled, with_question

NLL, TOKENS, ALIGNED = "nll", "tokens", "alignment"


class Student(nn.Module):
    """Batch -> terms of the loss by name: `nll`, summed over the `tokens` of the answers; while training also what
    `CMIBQ.penalty` names and `alignment`, means of a batch each.

    model: a LLaVA that `wrap` quantized, or a PeftModel around one. teacher: the dense model whose states of the
    question are what pictures are aligned with; it belongs to no state dict.
    """

    accepts_loss_kwargs = True  # Trainer then counts the tokens of all batches of a step

    def __init__(self, model: Any, teacher: Any = None, align_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.align_weight = model, align_weight
        self.alignment: Alignment | None = None
        self._teacher = (teacher,)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            width = self.llava.config.get_text_config().hidden_size
            self.alignment = Alignment(width, width).to(self.llava.device)
        self._embedded_BTD: torch.Tensor | None = None
        self.llava.model.language_model.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.told: dict[str, torch.Tensor] = {}  # of the last batch, for the log

    @property
    def llava(self) -> Any:
        """The LLaVA itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def cmibq(self) -> CMIBQ:
        return self.llava.cmibq

    @property
    def config(self) -> Any:
        return self.llava.config

    def gradient_checkpointing_enable(self, *args: Any, **more: Any) -> None:
        self.llava.gradient_checkpointing_enable(*args, **more)

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """What the language model reads: at the visual tokens the output of the projector, its only use."""
        self._embedded_BTD = kwargs["inputs_embeds"] if self.training and self.alignment is not None else None

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.cmibq.open_taps()  # peft calls the LLaVA past the hook that would
        asked = with_question(batch)
        labels_BT = asked.pop("labels")
        asked.pop("question_mask", None)
        found_AV, targets_A = answer_logits(self.model(**asked).logits, labels_BT)
        terms = {NLL: distilled(found_AV, targets_A, None, 0.0)}
        terms[TOKENS] = torch.tensor(len(targets_A), device=labels_BT.device)
        if self.training:
            terms |= self.cmibq.penalty()
            if self.alignment is not None:
                terms[ALIGNED] = self.align_weight * self._aligned(batch)
        return terms

    def _aligned(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """InfoNCE between the mean visual token and the teacher's mean state of the question."""
        assert self.alignment is not None and self._embedded_BTD is not None, "the language model was called"
        embedded_BTD, self._embedded_BTD = self._embedded_BTD, None
        ids_BT = batch["input_ids"]
        visual_BT = ids_BT == self.config.image_token_id
        question_BT = (batch["labels"] == UNLABELLED) & ~visual_BT & batch["attention_mask"].bool()
        pictures = [rows.float().cpu().numpy().tobytes() for rows in batch["pixel_values"]]
        found = self.alignment(
            pooled(embedded_BTD, visual_BT), pooled(self._taught(batch), question_BT),
            text_keys(ids_BT, question_BT), keys(pictures).to(ids_BT.device),
        )  # fmt: skip
        self.told = {
            "alignment_loss": found.loss.detach(), "alignment/acc_v2t": found.acc_v2t,
            "alignment/acc_t2v": found.acc_t2v, "alignment/temperature": found.temperature,
        }  # fmt: skip
        return found.loss

    @torch.no_grad()
    def _taught(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Last states of the dense teacher, (B, T, D)."""
        teacher = self._teacher[0].to(batch["input_ids"].device)
        asked = {name: x for name, x in batch.items() if name != "labels"}
        asked["pixel_values"] = asked["pixel_values"].to(teacher.dtype)
        return teacher.model(**asked, use_cache=False).last_hidden_state
