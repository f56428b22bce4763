"""mico's own suite: pictures of grids of handwritten digits, made here, so that no file is needed.

It is what the shipped tiny-llava was trained for, on other digits; see mico/reference/grids.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mico.errors import UserError
from mico.metrics.vision.question import Question, Record, by, percent, share
from mico.metrics.vision.yes_no import mme_figures, pope_figures
from mico.reference import grids
from mico.tables import number

PICTURES = 250  # with eight questions each
CHECK = "check"  # the kind that is answered yes or no, twice for a picture


def load(count: int = PICTURES, background: str = "plain", split: str = "test", seed: int = 0) -> list[Question]:
    """The questions of `count` pictures, eight each; background: plain, or photo for the harder set."""
    if split not in grids.SPLITS:
        raise UserError(f"grids: split {split!r}: choose from {', '.join(grids.SPLITS)}")
    questions = []
    for picture, example in enumerate(grids.examples(split, count, seed, background=background)):
        checks = 0
        for place, question in enumerate(example.questions):
            name = f"{background}/{picture}"
            checks += question.kind == CHECK
            pair = f"{name}/{(checks - 1) // 2}" if question.kind == CHECK else None
            row, about = f"grids, {background}, picture {picture}, question {place}", dict(kind=question.kind)
            one = Question(f"{name}/{place}", question.text, question.answer, row, example.image, pair, about)
            questions.append(one)
    return questions


def right(record: Record) -> bool:
    """Whether the answer, without a full stop at its end and in lower case, is the one expected."""
    return record.text.rstrip(".").strip().lower() == record.question.answer


def score(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy over all and by kind; the yes/no questions also as MME (0 to 200) and POPE judge them."""
    kinds = by(records, "kind")
    found: dict[str, Any] = dict(accuracy=share([right(record) for record in records]))
    found["kinds"] = {kind: share([right(record) for record in kinds[kind]]) for kind in sorted(kinds)}
    if CHECK in kinds:
        found |= dict(mme=mme_figures(kinds[CHECK]), pope=pope_figures(kinds[CHECK]))
    return found


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of `score`: measure and value."""
    found = [("accuracy", percent(figures["accuracy"]))]
    found += [(kind, percent(value)) for kind, value in figures["kinds"].items()]
    if CHECK in figures["kinds"]:
        found += [("check as MME, of 200", number(figures["mme"]["score"], 1))]
        found += [("check as POPE, F1", percent(figures["pope"]["f1"]))]
    return found
