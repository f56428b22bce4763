"""ScienceQA, test split: problems.json, pid_splits.json and images/test/ID/image.png. Some questions have no image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.metrics.vision.question import (
    REMEDY,
    Question,
    Record,
    entry,
    fields,
    find,
    percent,
    read_object,
    read_rows,
    share,
)

LETTERS = "ABCDE"
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
LLAVA = "llava_test_CQM-A.json"  # LLaVA's own wording of the questions, used where it is there
IMAGE = "image"


def load(folder: Path) -> list[Question]:
    """The questions of the test split, in its order."""
    problems, splits = (find(folder, "scienceqa", name) for name in ("problems.json", "pid_splits.json"))
    rows, ids = read_object(problems), entry(read_object(splits), "test", str(splits), list)
    images = next((path for path in (folder / "images" / "test", folder / "test") if path.is_dir()), folder / "images")
    wordings = _wordings(folder / LLAVA)
    questions = []
    for pid in map(str, ids):
        where = f"{problems}, problem {pid}"
        if pid not in rows:
            raise UserError(f"{where}: missing, named by {splits}: {REMEDY}")
        questions.append(_question(pid, fields(rows[pid], where), where, images, wordings))
    return questions


def _question(pid: str, row: dict[str, Any], where: str, images: Path, wordings: Mapping[str, str]) -> Question:
    choices, answer = entry(row, "choices", where, list), entry(row, "answer", where, int)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise UserError(f"{where}: answer {answer} among {len(choices)} choices: {REMEDY}")
    prompt = (wordings[pid] if pid in wordings else _prompt(row, choices, where)) + SUFFIX
    image = images / pid / entry(row, "image", where) if row.get("image") else None
    about = dict(kind="text" if image is None else IMAGE)
    return Question(pid, prompt, LETTERS[answer], where, image, about=about)


def _prompt(row: dict[str, Any], choices: list[Any], where: str) -> str:
    """The hint as context, the question, one line a choice; neither lecture nor solution is shown."""
    hint = str(row.get("hint") or "").strip()
    lines = [f"Context: {hint}"] if hint else []
    options = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return "\n".join([*lines, entry(row, "question", where), *options])


def _wordings(file: Path) -> dict[str, str]:
    """Prompts by id from LLaVA's file, without its mark of the image; none where the file is not there."""
    found = {}
    for where, row in read_rows(file) if file.is_file() else ():
        turns = entry(row, "conversations", where, list)
        said = entry(turns[0] if turns else {}, "value", where)
        found[str(row.get("id"))] = said.replace("<image>", "").strip()
    return found


def letter(text: str) -> str | None:
    """The option that an answer names: 'B', 'B. ...' or '... The answer is B'; None where it names none."""
    text = text.replace("\n", ". ")
    if len(text.strip()) == 1 and text.strip() in LETTERS:
        return text.strip()
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    named = re.search(r"The answer is ([A-E])\.", text) or re.search(r"The answer is ([A-E])", text)
    return named.group(1) if named else None


def score(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy over all, over those with an image (IMG) and without; unparsed: answers that name no option."""
    said = [letter(record.text) for record in records]
    right = [name == record.question.answer for name, record in zip(said, records, strict=True)]
    seen = [record.question.about["kind"] == IMAGE for record in records]
    return dict(
        accuracy=share(right),
        image_accuracy=share([hit for hit, image in zip(right, seen, strict=True) if image]),
        text_accuracy=share([hit for hit, image in zip(right, seen, strict=True) if not image]),
        image_questions=sum(seen),
        unparsed=sum(name is None for name in said),
    )


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of `score`: measure and value."""
    shown = {"accuracy": "accuracy", "accuracy, with image": "image_accuracy", "accuracy, text alone": "text_accuracy"}
    cells = [(name, percent(figures[key])) for name, key in shown.items()]
    return [*cells, ("answers without an option", str(figures["unparsed"]))]
