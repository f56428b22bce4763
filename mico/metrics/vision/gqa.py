"""GQA, balanced test-dev: questions about the objects of a scene with answers of a word or two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mico.metrics.vision.question import SHORT, Question, Record, by, entry, fields, find, percent, read_object, share

FILE = "testdev_balanced_questions.json"


def load(folder: Path) -> list[Question]:
    """The questions in the order of the file; images in images/ID.jpg."""
    file = find(folder, "gqa", FILE, f"questions/{FILE}", f"data/{FILE}", f"data/questions/{FILE}")
    images = find(folder, "gqa", "images", "data/images")
    questions = []
    for number, row in read_object(file).items():
        where = f"{file}, question {number}"
        types = fields(row, where).get("types")
        kind = str(types.get("structural", "other")) if isinstance(types, dict) else "other"
        image = images / f"{entry(row, 'imageId', where)}.jpg"
        prompt = entry(row, "question", where) + SHORT
        questions.append(Question(number, prompt, entry(row, "answer", where), where, image, about=dict(kind=kind)))
    return questions


def right(record: Record) -> bool:
    """Whether the answer, without full stops at its end and in lower case, is exactly the one expected."""
    return record.text.rstrip(".").lower() == record.question.answer


def score(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy, over all and by structural type."""
    kinds = {kind: share([right(record) for record in found]) for kind, found in by(records, "kind").items()}
    return dict(accuracy=share([right(record) for record in records]), kinds=kinds)


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of `score`: measure and value."""
    return [("accuracy", percent(figures["accuracy"])), *((k, percent(value)) for k, value in figures["kinds"].items())]
