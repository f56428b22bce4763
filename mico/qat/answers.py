"""Image-text data to train on: every answer is a sample of its own, with the conversation before it as the prompt.

Visual tokens are chosen once a prompt, by all text behind the picture: this way an answer is trained as it will be
generated.
Suffixes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Dataset

from mico.errors import UserError
from mico.files import fingerprint
from mico.image_text import (
    UNLABELLED,
    ImageTextSource,
    Sample,
    chosen,
    collate,
    encode,
    is_image_text,
    load_image_text,
)
from mico.reference import grids

GRIDS = "grids"  # in place of a file: pictures that are made here
PICTURES, HELD_PICTURES = 512, 32  # of grids, with eight questions each
PHOTOS = 0.3  # share of grids with a photograph behind the digits
MOST_HELD = 1000  # conversations that --eval-share holds out, at most: each evaluation reads all of them


class Answers(Dataset):
    """Samples as rows: input_ids and labels (1, T), pixel_values, image_sizes. Pictures are read when asked for.

    limit: tokens of a row. cut: rows read so far whose answer lies behind it, which teach nothing.
    """

    def __init__(self, samples: Sequence[Sample], processor: Any, limit: int) -> None:
        self.processor, self.limit = processor, limit
        self.cut: set[int] = set()
        self.samples = [part for sample in samples for part in _by_answer(sample)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = encode(self.samples[index], self.processor, labels=True)
        row["labels"] = _last_answer(row["labels"])
        if row["input_ids"].shape[1] > self.limit:
            visual = row["input_ids"][0] == self.processor.image_token_id
            if bool(visual[self.limit :].any()):
                raise UserError(
                    f"{self.samples[index].place}: --seqlen {self.limit} is shorter than its picture: raise it"
                )
            row |= {name: row[name][:, : self.limit] for name in ("input_ids", "labels")}
        if not bool((row["labels"] != UNLABELLED).any()):
            self.cut.add(index)
        return row

    def batch(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows padded on the left, the tiles of pictures (LLaVA-NeXT) to the most of any."""
        most = max((row["pixel_values"].shape[1] for row in rows if "pixel_values" in row), default=0)
        return collate([_tiled(row, most) for row in rows], self.processor.tokenizer.pad_token_id)


def _by_answer(sample: Sample) -> Iterator[Sample]:
    for count in range(1, len(sample.turns) + 1):
        yield replace(sample, turns=sample.turns[:count])


def _last_answer(labels_1T: torch.Tensor) -> torch.Tensor:
    """Labels of the last run of labelled tokens alone."""
    silent = (labels_1T[0] == UNLABELLED).nonzero().flatten()
    there = (labels_1T[0] != UNLABELLED).nonzero().flatten()
    before = silent[silent < there[-1]]
    start = int(before[-1]) + 1 if len(before) else 0
    return torch.where(torch.arange(labels_1T.shape[1]) >= start, labels_1T, UNLABELLED)


def _tiled(row: dict[str, torch.Tensor], most: int) -> dict[str, torch.Tensor]:
    pixels = row.get("pixel_values")
    if pixels is None or pixels.dim() != 5:
        return row
    return row | dict(pixel_values=functional.pad(pixels, (0, 0) * 3 + (0, most - pixels.shape[1])))


@dataclass(frozen=True)
class ImageText:
    """What is trained on and what is evaluated on, and where it comes from."""

    train: Answers
    held: Answers
    sources: tuple[ImageTextSource, ...]

    @property
    def digests(self) -> list[str]:
        """sha256 of the texts, as the sources tell them."""
        return [source.sha256 for source in self.sources]

    def describe(self) -> str:
        origins = " and ".join(dict.fromkeys(source.origin for source in self.sources))
        pictures = sum(sample.picture is not None for sample in self.train.samples)
        left = sum(source.left_out for source in self.sources)
        notes = f", {left} turns without question or answer left out" if left else ""
        return (
            f"image-text pairs from {origins}: {len(self.train):,} answers to train on, {pictures:,} of them about a "
            f"picture, {len(self.held):,} to evaluate on{notes}"
        )


def read_answers(
    processor: Any, limit: int, *, train_file: str, image_folder: str | None = None, eval_file: str | None = None,
    eval_share: float = 0.05, seed: int = 0,
) -> ImageText:  # fmt: skip
    """Read image-text data; 'grids' is made here, its evaluation part of digits that are in no training picture.

    Without `eval_file` a share of the conversations, at most 1,000, is drawn by `seed` and held out. Raises UserError
    naming file and row where one is wrong, and where no picture is left to train on.
    """
    if not 0 < eval_share < 1:
        raise UserError(f"--eval-share {eval_share}: must be between 0 and 1")
    train = _source(train_file, image_folder, "train", seed)
    samples = train.samples
    sources: tuple[ImageTextSource, ...] = (train,)
    if eval_file is not None or train_file == GRIDS:
        test = _source(eval_file or GRIDS, image_folder, "test", seed)
        held, sources = test.samples, (train, test)
    else:
        count = min(MOST_HELD, max(1, round(eval_share * len(samples))))
        if count >= len(samples):
            raise UserError(f"{train.origin}: {len(samples)} sample, none is left to train on: give --eval-file")
        held = tuple(chosen(train, count, seed))
        out = {id(sample) for sample in held}
        samples = tuple(sample for sample in samples if id(sample) not in out)
    for part, source in ((samples, train), (held, sources[-1])):
        if all(sample.picture is None for sample in part):
            if all(sample.picture is None for sample in source.samples):
                raise UserError(f"{source.origin}: no picture in it: give image-text data")
            use = "held out" if part is held else "left to train on"
            raise UserError(
                f"{source.origin}: none of the {len(part):,} conversations {use} is about a picture: change "
                f"--eval-share {eval_share:g} or --seed {seed}, or give --eval-file"
            )
    return ImageText(Answers(samples, processor, limit), Answers(held, processor, limit), sources)


def _source(file: str, image_folder: str | None, split: str, seed: int) -> ImageTextSource:
    if file == GRIDS:
        if image_folder is not None:
            raise UserError(f"--image-folder {image_folder}: grids are made here, leave the option out")
        return grid_pairs(split, PICTURES if split == "train" else HELD_PICTURES, seed)
    if not is_image_text(file):
        raise UserError(f"{file}: LLaVA-Instruct .json or .jsonl, a webdataset .tar, or a folder of them is expected")
    return load_image_text(file, image_folder)


def grid_pairs(split: str, count: int, seed: int) -> ImageTextSource:
    """This many pictures of digits, with eight questions each; those of "test" hold digits that "train" has not."""
    photos = round(PHOTOS * count)
    samples = []
    for background, share in (("plain", count - photos), ("photo", photos)):
        for picture, example in enumerate(grids.examples(split, share, seed + 1, background=background)):
            for question in example.questions:
                place = f"grids, {split}, {background}, picture {picture}"
                samples.append(Sample(((question.text, question.answer),), example.image, place))
    digest = fingerprint([[sample.place, *map(list, sample.turns)] for sample in samples])
    return ImageTextSource(GRIDS, tuple(samples), f"grids of digits ({split})", digest)
