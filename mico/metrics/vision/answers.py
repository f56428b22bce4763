"""The answers of one suite in a file, one JSON line each, written as they come, so that a killed run goes on.

The first line holds all that the answers depend on; the file is named after a digest of it, so that answers of another
model, other data or other options are never taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.files import writing

FACTS = "asked_with"  # the field of the first line
NEEDED: dict[str, type] = {
    "id": str, "text": str, "tokens": int, "cut": bool, "seconds": float, "prompt_tokens": int, "visual_tokens": int,
    "costs": dict,
}  # fmt: skip


class Answers:
    """Answers by question id. path: None keeps them in memory alone."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path, self.found = path, dict[str, dict[str, Any]]()
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    self._read(path, facts)
                if not path.exists() or not path.stat().st_size:
                    self._append([{FACTS: dict(facts)}])

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Keep what a batch gave: on the disk when this returns."""
        if self.path is not None:
            with writing(self.path):
                self._append(answers)
        self.found |= {answer["id"]: answer for answer in answers}

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Take the whole lines; what a kill left of the last one is cut off."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            row = _row(path, number, line)
            if number == 1:
                if row.get(FACTS) != json.loads(json.dumps(dict(facts))):
                    raise UserError(f"{path}, line 1: not what its name stands for: delete it and run again")
                continue
            for name, kind in NEEDED.items():
                if not isinstance(row.get(name), kind):
                    raise UserError(
                        f"{path}, line {number}: {name} {row.get(name)!r:.40} is no {kind.__name__}: "
                        "delete the file and run again"
                    )
            self.found[row["id"]] = row


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise UserError(f"{path}, line {number}: no JSON ({error}): delete the file and run again") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: no object: delete the file and run again")
    return row
