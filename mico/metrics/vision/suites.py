"""The suites by name, and the part of one that `--limit` asks for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.metrics.vision import gqa, grids, mme, pope, scienceqa, textvqa
from mico.metrics.vision.ask import NEW_TOKENS
from mico.metrics.vision.question import Question, Record

DIGITS = 8  # new tokens of an answer to a grid


@dataclass(frozen=True)
class Suite:
    """load: of a folder, or of nothing where `files` is False; score: figures of the records; rows: what is shown."""

    load: Callable[..., list[Question]]
    score: Callable[[Sequence[Record]], dict[str, Any]]
    rows: Callable[[dict[str, Any]], list[tuple[str, str]]]
    files: bool = True
    new_tokens: int = NEW_TOKENS


SUITES = {
    "mme": Suite(mme.load, mme.score, mme.rows),
    "pope": Suite(pope.load, pope.score, pope.rows),
    "scienceqa": Suite(scienceqa.load, scienceqa.score, scienceqa.rows),
    "gqa": Suite(gqa.load, gqa.score, gqa.rows),
    "textvqa": Suite(textvqa.load, textvqa.score, textvqa.rows),
    "grids": Suite(grids.load, grids.score, grids.rows, files=False, new_tokens=DIGITS),
    "grids-photo": Suite(partial(grids.load, background="photo"), grids.score, grids.rows, False, DIGITS),
}


def suite_names(suite: str | Sequence[str] | None) -> tuple[str, ...]:
    """'mme, pope' -> ('mme', 'pope'). Raises UserError for a name that is none."""
    if suite is None:
        return ()
    names = [name.strip().lower() for name in (suite.split(",") if isinstance(suite, str) else suite)]
    wrong = next((name for name in names if name not in SUITES), None)
    if wrong is not None or not names:
        raise UserError(f"--suite {wrong or suite}: unknown suite: choose from {', '.join(SUITES)}")
    return tuple(dict.fromkeys(names))


def load_suite(name: str, folder: Path | None) -> list[Question]:
    """The questions of a suite, read from `folder`/name. Raises UserError naming what is missing or wrong."""
    suite = SUITES[name]
    if not suite.files:
        return suite.load()
    if folder is None:
        raise UserError(f"--suite {name} needs --vlm-data: the folder that holds {name}/ (see calib_data/README.md)")
    if not (folder / name).is_dir():
        raise UserError(f"--vlm-data {folder}: holds no folder {name}/: see calib_data/README.md for the layout")
    questions = suite.load(folder / name)
    if not questions:
        raise UserError(f"--suite {name}: {folder / name} holds no question: fetch the suite again")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{question.row}: question id {question.id!r} is there twice: fetch the suite again")
        seen.add(question.id)
    return questions


def part_of(questions: Sequence[Question], limit: float | None) -> list[Question]:
    """`limit` questions, or that share of them below 1, always the same ones; pairs stay together.

    They are drawn, as suites have periods that every n-th question would follow. A smaller limit gives a part of what a
    larger one does.
    """
    if limit is None:
        return list(questions)
    wanted = min(len(questions), max(1, int(limit) if limit >= 1 else math.ceil(limit * len(questions))))
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question.pair or f"alone {place}", []).append(place)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    drawn = list(chain.from_iterable(order))[:wanted]
    return [questions[place] for place in sorted(drawn)]
