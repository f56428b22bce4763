"""POPE: is an object in the image? Three files of COCO, whose absent objects are random, popular or adversarial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mico.metrics.vision.question import SHORT, Question, Record, by, entry, find, one_of, percent, read_rows, share
from mico.metrics.vision.yes_no import YES_NO, pope_figures

SPLITS = ("random", "popular", "adversarial")


def load(folder: Path) -> list[Question]:
    """All three files: one object a line, also where they end in .json; images in val2014/ or images/."""
    names = [(split, f"coco_pope_{split}.json") for split in SPLITS]
    files = {split: find(folder, "pope", name, f"coco/{name}", f"{name}l", f"coco/{name}l") for split, name in names}
    images = find(folder, "pope", "val2014", "images")
    return [_question(where, row, split, images) for split, file in files.items() for where, row in read_rows(file)]


def _question(where: str, row: dict[str, Any], split: str, images: Path) -> Question:
    text, image = entry(row, "text", where), images / entry(row, "image", where)
    number = row.get("question_id", where)
    return Question(
        f"{split}/{number}", text + SHORT, one_of(row, "label", where, YES_NO), where, image, about=dict(split=split)
    )


def score(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of every split, and the means of F1 and accuracy over the splits."""
    splits = {split: pope_figures(found) for split, found in by(records, "split").items()}
    means = {name: share([found[name] for found in splits.values()]) for name in ("f1", "accuracy", "yes_ratio")}
    return dict(means, splits=splits)


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of `score`: measure and value."""
    means = [(f"mean {name}", percent(figures[key])) for name, key in (("F1", "f1"), ("accuracy", "accuracy"))]
    return means + [
        (split, f"F1 {percent(found['f1'])}, accuracy {percent(found['accuracy'])}, yes {percent(found['yes_ratio'])}")
        for split, found in figures["splits"].items()
    ]
