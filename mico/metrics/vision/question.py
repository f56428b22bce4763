"""What every suite is made of: questions with their images, and the reading of the files they lie in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mico.errors import UserError

SHORT = "\nAnswer the question using a single word or phrase."
REMEDY = "mend it, or fetch the suite again (layout: calib_data/README.md)"


@dataclass(frozen=True)
class Question:
    """One question of a suite.

    id: its own in the suite. prompt: what is said after the image. answer: what the score compares with, a JSON value.
    row: where it stands, for messages. image: a file, a PIL picture, or None for text alone. pair: shared by questions
    that are judged together. about: what the score tells apart (category, kind, split).
    """

    id: str
    prompt: str
    answer: Any
    row: str
    image: Any = None
    pair: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> list[Any]:
        """All that an answer and its judgement depend on, as plain JSON values; image files by name and size."""
        image = self.image
        if isinstance(image, Path):
            image = [image.name, image.stat().st_size]
        elif image is not None:
            image = hashlib.sha256(image.tobytes()).hexdigest()
        return [self.id, self.prompt, self.answer, image, self.pair, dict(self.about)]


@dataclass(frozen=True)
class Record:
    """A question and what the model said, without spaces around it."""

    question: Question
    text: str


def share(hits: Sequence[bool] | Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(hits) / len(hits) if hits else 0.0


def percent(value: float) -> str:
    return f"{value:.1%}"


def by(records: Sequence[Record], what: str) -> dict[str, list[Record]]:
    """The records by a field of `about`, in the order of their first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.question.about[what], []).append(record)
    return found


# --- files ----------------------------------------------------------------------------------------------------------


def find(folder: Path, suite: str, *names: str) -> Path:
    """The first of `names` that is in the folder. Raises UserError that names the first when none is."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"--suite {suite}: {folder / names[0]} does not exist: see calib_data/README.md for the layout")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object: {REMEDY}")
    return value


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file with one a line, or with a list of them, each with where it stands (from 1)."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{path}, entry {number}", row) for number, row in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise UserError(f"{path} is no list of JSON objects ({error}): {REMEDY}") from None
    else:
        rows = list(_lines(path, text))
    for where, row in rows:
        yield where, fields(row, where)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error}): {REMEDY}") from None


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises UserError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from error


def fields(row: Any, where: str) -> dict[str, Any]:
    """A row that is an object. Raises UserError naming it when it is something else."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object: {REMEDY}")
    return row


def entry(row: Any, name: str, where: str, kind: type = str) -> Any:
    """A field of a row. Raises UserError naming row and field when it is missing or of another type."""
    value = fields(row, where).get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "missing" if value is None else f"{value!r:.40}"
        raise UserError(f"{where}: field '{name}' is {found}, not {kind.__name__}: {REMEDY}")
    return value


def one_of(row: Any, name: str, where: str, allowed: Sequence[str]) -> str:
    """A field whose value, in lower case, is one of `allowed`."""
    value = str(entry(row, name, where)).strip().lower()
    if value not in allowed:
        raise UserError(f"{where}: {name} {value!r:.40} is none of {', '.join(allowed)}: {REMEDY}")
    return value
