"""Samples as what a model is called with: chat text, visual tokens, labels on the answers alone.

Suffixes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from mico.errors import UserError
from mico.image_text.sources import ImageTextSource, Sample, chosen

INPUTS = ("input_ids", "pixel_values", "image_sizes")  # what a model is called with, where nothing is padded
UNLABELLED = -100


def chat_text(processor: Any, turns: Sequence[tuple[str, str | None]], picture: bool) -> tuple[str, list[range]]:
    """A conversation as the model was trained on it, and the characters of every answer in it.

    By the processor's chat template, or as Vicuna's `USER: … ASSISTANT: …` where there is none. The end-of-text token
    closes the last answer (Vicuna's form: every answer) and belongs to it. An answer None, of the last turn alone, is
    left for the model to write. Raises UserError where a template does not leave earlier turns as they were.
    """
    end = processor.tokenizer.eos_token or ""
    if getattr(processor, "chat_template", None):
        return _by_template(processor, turns, picture, end)
    text, spans = "", list[range]()
    for number, (question, answer) in enumerate(turns):
        mark = f"{processor.image_token}\n" if picture and number == 0 else ""
        text += f"USER: {mark}{question} ASSISTANT:"
        if answer is not None:
            start = len(text) + 1
            text += f" {answer}{end}"
            spans.append(range(start, len(text)))
    return text, spans


def _by_template(
    processor: Any, turns: Sequence[tuple[str, str | None]], picture: bool, end: str
) -> tuple[str, list[range]]:
    messages: list[dict[str, Any]] = []
    text, spans = "", list[range]()

    def rendered(prompt: bool) -> str:
        found: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        if not found.startswith(text):
            raise UserError("the chat template of the model changes earlier turns: give a processor without one")
        return found

    for number, (question, answer) in enumerate(turns):
        mark = [dict(type="image")] if picture and number == 0 else []
        messages.append(dict(role="user", content=[*mark, dict(type="text", text=question)]))
        prompt = rendered(True)
        if answer is None:
            return prompt, spans
        messages.append(dict(role="assistant", content=[dict(type="text", text=answer)]))
        text = prompt.rstrip()
        start = len(text)
        text = rendered(False)
        if number + 1 == len(turns):
            text = text.rstrip()
            text += "" if text.endswith(end) else end
        inside = text[start:]
        spans.append(range(start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())))
    return text, spans


def encode(
    sample: Sample, processor: Any, *, labels: bool = False, limit: int | None = None
) -> dict[str, torch.Tensor]:
    """What the model is called with for one sample: input_ids (1, T), and pixel_values and image_sizes of a picture.

    labels: (1, T) too, the ids of the tokens of the answers and -100 elsewhere. limit: tokens after which a sample is
    cut. Raises UserError naming the sample when its picture cannot be read or does not fit into `limit` tokens.
    """
    picture = sample.opened()
    text, spans = chat_text(processor, sample.turns, picture is not None)
    if picture is None:
        made = dict(input_ids=_tokenized(processor, text, "pt")["input_ids"])
    else:
        produced = processor(images=[picture], text=[text], return_tensors="pt")
        made = {name: produced[name] for name in INPUTS if name in produced}
    ids_1T, visual = made["input_ids"], made["input_ids"][0] == processor.image_token_id
    if labels:
        made["labels"] = _labels(processor, text, spans, ids_1T, int(visual.sum()))
    if limit is None or ids_1T.shape[1] <= limit:
        return made
    if bool(visual[limit:].any()):
        needed = int(visual.nonzero().max()) + 1
        raise UserError(f"{sample.place}: the picture reaches to token {needed}: --seqlen {limit} is too short")
    return made | {name: made[name][:, :limit] for name in ("input_ids", "labels") if name in made}


def _tokenized(processor: Any, text: str, kind: str | None = None, **more: Any) -> Any:
    return processor.tokenizer(text if kind is None else [text], return_tensors=kind, verbose=False, **more)


def _labels(processor: Any, text: str, spans: Iterable[range], ids_1T: torch.Tensor, visual: int) -> torch.Tensor:
    """The ids of the tokens that hold a character of a span, -100 elsewhere.

    The processor puts as many marks as a picture has tokens in place of one; the text with them, cut again with the
    places of its tokens, must give the same ids.
    """
    if not processor.tokenizer.is_fast:
        raise UserError(
            "labels need a tokenizer of the tokenizers library (tokenizer.json), which tells where tokens are"
        )
    mark, shift, where = processor.image_token, 0, len(text)
    if visual:
        where, shift = text.index(mark), (visual - 1) * len(mark)
        text = text.replace(mark, mark * visual, 1)
    again = _tokenized(processor, text, return_offsets_mapping=True)
    assert again["input_ids"] == ids_1T[0].tolist(), "the processor cuts the text as its tokenizer does"
    moved = [
        range(span.start + shift * (span.start > where), span.stop + shift * (span.start > where)) for span in spans
    ]
    inside = [
        any(start < span.stop and end > span.start for span in moved) for start, end in again["offset_mapping"]
    ]  # fmt: skip
    return torch.where(torch.tensor([inside]), ids_1T, UNLABELLED)


def collate(rows: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Samples as one batch for training, padded on the left: input_ids, attention_mask, labels (B, T), and pictures.

    Pictures of one size alone can be in a batch.
    """
    longest = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.cat([_left(row[name], longest, value) for row in rows])

    batch = dict(input_ids=padded("input_ids", pad_token_id))
    batch["attention_mask"] = torch.cat([_left(torch.ones_like(row["input_ids"]), longest, 0) for row in rows])
    if "labels" in rows[0]:
        batch["labels"] = padded("labels", UNLABELLED)
    for name in ("pixel_values", "image_sizes"):
        if found := [row[name] for row in rows if name in row]:
            batch[name] = torch.cat(found)
    return batch


def _left(x_1T: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(x_1T, (length - x_1T.shape[1], 0), value=value)


@dataclass(frozen=True)
class Pairs:
    """Encoded samples, and the facts of where they came from: what `mico.data.Windows` is for text."""

    rows: tuple[dict[str, torch.Tensor], ...]
    source: ImageTextSource
    image_token_id: int
    limit: int  # tokens of a sample, at most

    @property
    def tokens(self) -> int:
        return sum(row["input_ids"].numel() for row in self.rows)

    @property
    def pictures(self) -> int:
        return sum("pixel_values" in row for row in self.rows)

    @property
    def sha256(self) -> str:
        """Of ids and pixels: data, processor and choice together."""
        digest = hashlib.sha256()
        for row in self.rows:
            for name in INPUTS:
                if name in row:
                    digest.update(f"\0{name}{tuple(row[name].shape)}\0".encode())
                    digest.update(row[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        visual = sum(int((row["input_ids"] == self.image_token_id).sum()) for row in self.rows)
        full = sum(row["input_ids"].shape[1] == self.limit for row in self.rows)
        notes = f", {full} of them as long as --seqlen {self.limit} allows" if full else ""
        notes += f", {self.source.left_out} turns without question or answer left out" if self.source.left_out else ""
        return (
            f"image-text pairs of {self.source.name} from {self.source.origin}: {self.tokens:,} tokens, {visual:,} of "
            f"them visual, in {len(self.rows)} samples with {self.pictures} pictures{notes}"
        )

    def batches(self, batch_size: int) -> list[dict[str, torch.Tensor]]:
        """Inputs of up to `batch_size` samples of one length: nothing is padded, so no token needs to be left out."""

        def kind(row: dict[str, torch.Tensor]) -> tuple[Any, ...]:
            pixels = row.get("pixel_values")
            return row["input_ids"].shape[1], () if pixels is None else tuple(pixels.shape)

        found = []
        for (_, shape), group in groupby(sorted(self.rows, key=kind), key=kind):
            rows, size = list(group), 1 if len(shape) == 5 else batch_size  # tiles of a picture: their number varies
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                found.append({name: torch.cat([row[name] for row in part]) for name in INPUTS if name in part[0]})
        return found


def pairs(source: ImageTextSource, processor: Any, nsamples: int, limit: int, seed: int) -> Pairs:
    """`nsamples` samples drawn by `seed` and encoded. Raises UserError as `chosen` and `encode` do."""
    picked = chosen(source, nsamples, seed)
    rows = tuple(encode(sample, processor, limit=limit) for sample in picked)
    return Pairs(rows, source, processor.image_token_id, limit)
