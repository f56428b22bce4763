"""Questions put to a model: prompts, pictures, greedy decoding in batches that shrink where memory runs out.

Shapes: B questions of a batch, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mico.checkpoint import set_execution
from mico.console import Console
from mico.errors import UserError, out_of_memory
from mico.image_text.inputs import chat_text
from mico.loading import longest_text
from mico.metrics.generation import end_tokens
from mico.metrics.vision.question import Question
from mico.packed.linear import PackedLinear

Costs = Callable[[list[int], list[int]], list[dict[str, float]]]
NEW_TOKENS = 128  # at most, of an answer: what LLaVA's evaluation allows for short ones


def image_of(question: Question) -> Any:
    """The picture of a question as PIL RGB. Raises UserError naming the file when it cannot be read."""
    from PIL import Image

    if not isinstance(question.image, Path):
        return question.image.convert("RGB")
    try:
        with Image.open(question.image) as picture:
            return picture.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders fail in many ways
        raise UserError(f"{question.row}: image {question.image} cannot be read ({error}): fetch it again") from error


def check_images(questions: Sequence[Question]) -> None:
    """Raise UserError naming the first image file that is missing, and the row that asks for it."""
    for question in questions:
        if isinstance(question.image, Path) and not question.image.is_file():
            raise UserError(f"{question.row}: image {question.image} does not exist: fetch the images of the suite")


def prompt_of(processor: Any, question: Question) -> str:
    """The text given to the processor, see `chat_text`. Raises UserError unless it marks the image, and only it."""
    text, _ = chat_text(processor, [(question.prompt, None)], question.image is not None)
    marks, wanted = text.count(processor.image_token), int(question.image is not None)
    if marks != wanted:
        raise UserError(
            f"{question.row}: its prompt has {marks} marks {processor.image_token} for {wanted} images: mend the chat "
            "template of the model, or the question"
        )
    return text


@dataclass
class Asker:
    """A model with its processor, which pads on the left.

    costs: of every prompt of the last batch, given its visual tokens and its tokens in all; halvings: of the batch, so
    far; name: what messages say.
    """

    model: Any
    processor: Any
    batch_size: int
    console: Console
    costs: Costs
    new_tokens: int = NEW_TOKENS
    name: str = ""
    halvings: int = 0

    def answers(self, questions: Sequence[Question]) -> Iterator[list[dict[str, Any]]]:
        """What `Answers` keeps of every question, batch by batch, those with images and those without apart.

        Raises UserError when memory does not do for one question, or a prompt is longer than the model's context.
        """
        for seen in (True, False):
            waiting = [question for question in questions if (question.image is not None) is seen]
            while waiting:
                batch = waiting[: self.batch_size]
                if (found := self._try(batch)) is not None:
                    yield found
                    waiting = waiting[len(batch) :]

    def _try(self, batch: Sequence[Question]) -> list[dict[str, Any]] | None:
        """The answers; None when memory ran out and less is needed now."""
        try:
            return self._batch(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if self.batch_size == 1 and not self._holds_dense():
                raise UserError(
                    f"suite {self.name}: out of memory on {self._device()} with a batch of 1 ({batch[0].row}): "
                    "use --device cpu, or a machine with more memory"
                ) from error
        self._need_less(len(batch))  # outside the except clause: its traceback would keep the tensors alive
        return None

    def _holds_dense(self) -> bool:
        return any(isinstance(module, PackedLinear) and module.execution == "dense" for module in self.model.modules())

    def _need_less(self, tried: int) -> None:
        device = self._device()
        if self._holds_dense():
            set_execution(self.model, "lean")
            self.console.note(f"suite {self.name}: out of memory on {device}, weights are unpacked at every call")
        else:
            self.batch_size = max(1, tried // 2)
            self.halvings += 1
            self.console.note(f"suite {self.name}: out of memory on {device}, batch halved to {self.batch_size}")
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # of a streamed model other parts are nowhere yet

    @torch.inference_mode()
    def _batch(self, batch: Sequence[Question]) -> list[dict[str, Any]]:
        inputs = self._inputs(batch)
        ids_BT = inputs["input_ids"]
        room = (longest_text(self.model.config) or ids_BT.shape[1] + self.new_tokens) - ids_BT.shape[1]
        if room < 1:
            longest = max(batch, key=lambda question: len(question.prompt))
            raise UserError(
                f"{longest.row}: its prompt has {ids_BT.shape[1]} tokens with those of the image, more than the "
                "model takes: leave the suite out, or use a model with a longer context"
            )
        started = self._now()
        with _greedy(self.model, self.processor.tokenizer, min(self.new_tokens, room)):
            written_BT = self.model.generate(**inputs)[:, ids_BT.shape[1] :]
        seconds = (self._now() - started) / len(batch)
        ends = end_tokens(self.model, self.processor.tokenizer)
        length, visual = inputs["attention_mask"].sum(1).tolist(), self._visual_tokens(ids_BT)
        costs = self.costs(visual, length)
        return [
            dict(
                id=question.id, **self._text(row_T.tolist(), ends), seconds=seconds, prompt_tokens=tokens,
                visual_tokens=seen, costs=cost,
            )
            for question, row_T, tokens, seen, cost in zip(batch, written_BT, length, visual, costs, strict=True)
        ]  # fmt: skip

    def _inputs(self, batch: Sequence[Question]) -> Any:
        prompts = [prompt_of(self.processor, question) for question in batch]
        pictures = [image_of(question) for question in batch if question.image is not None]
        start = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=prompts, images=pictures or None, padding=True, return_tensors="pt",
            add_special_tokens=not (start and prompts[0].startswith(start)),
        )  # fmt: skip
        inputs = inputs.to(self._device())
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _visual_tokens(self, ids_BT: torch.Tensor) -> list[int]:
        config = self.model.config
        mark = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        return (ids_BT == mark).sum(1).tolist()

    def _text(self, ids: list[int], ends: set[int]) -> dict[str, Any]:
        """The words up to the end-of-text token; `cut` where none came."""
        stop = next((place for place, token in enumerate(ids) if token in ends), None)
        text = self.processor.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
        return dict(text=text, tokens=len(ids) if stop is None else stop, cut=stop is None)

    def _now(self) -> float:
        if self._device().type == "cuda":
            torch.cuda.synchronize(self._device())
        return time.monotonic()


@contextmanager
def _greedy(model: Any, tokenizer: Any, new_tokens: int) -> Iterator[None]:
    """Inside, `generate` decodes greedily and ignores the sampling and penalties that came with the model."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, use_cache=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = kept


def ask_all(
    asker: Asker, questions: Sequence[Question], known: Callable[[str], bool], keep: Callable[[Any], None]
) -> None:
    """Put the questions that are not answered yet, with a bar; `keep` gets every batch as soon as it is there."""
    waiting = [question for question in questions if not known(question.id)]
    done = len(questions) - len(waiting)
    with asker.console.bar(asker.name, len(questions), done) as advance:
        for batch in asker.answers(waiting):
            keep(batch)
            for _ in batch:
                advance("")
