"""Grids of digits as folders of MME and POPE and as LLaVA-Instruct, so that these run where the real ones are not.

    python -m mico.metrics.vision.grid_files FOLDER [--pictures 20]
    mico eval tiny-llava --suite mme,pope --vlm-data FOLDER
    mico finetune tiny-llava --method cmibq --train-file FOLDER/instruct/pairs.json

MME gets two of its categories: `existence` (plain pictures) and `scene` (digits over photographs); a picture is asked
about a cell with an even digit and about one with an odd digit. POPE's three files differ, as the real ones do, in what
the "no" questions are about: any odd digit; that which the picture shows most; one beside the even digit asked about.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mico.metrics.vision.mme import INSTRUCTION
from mico.metrics.vision.pope import SPLITS
from mico.reference.grids import Cell, GridExample, examples, name

PICTURES = 20
CATEGORIES = {"existence": "plain", "scene": "photo"}  # of MME, and the background of its pictures


def write_suites(folder: Path, pictures: int = PICTURES, seed: int = 0) -> None:
    """Write mme/, pope/ and instruct/ below `folder`; the same arguments give the same files.

    The pictures of the last are for training, the others for tests.
    """
    for category, background in CATEGORIES.items():
        _write_mme(folder / "mme" / category, pictures, seed, background)
    _write_pope(folder / "pope", pictures, seed)
    write_instruct(folder / "instruct", pictures, seed)


def _write_mme(folder: Path, pictures: int, seed: int, background: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # of four questions about a picture the second and the fourth check for an even digit: yes, then no
    for number, example in enumerate(examples("test", pictures, seed, background=background, per_image=4)):
        example.image.save(folder / f"{number:05d}.png")
        checks = [question for question in example.questions if question.kind == "check"]
        lines = [f"{one.text} {INSTRUCTION}\t{one.answer.capitalize()}" for one in checks]
        (folder / f"{number:05d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_pope(folder: Path, pictures: int, seed: int) -> None:
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    # of two questions about a picture the second is about an even digit
    for number, example in enumerate(examples("test", pictures, seed + 1, per_image=2)):
        image, present = f"COCO_val2014_{number:012d}.png", example.questions[1]
        example.image.save(folder / "val2014" / image)
        for split in SPLITS:
            other = odd_cell(example, present.cells[0], split, rng)
            renamed = present.text.replace(name(*present.cells[0]), name(*other))
            for text, label in ((present.text, "yes"), (renamed, "no")):
                made = dict(question_id=len(lines[split]) + 1, image=image, text=text, label=label)
                lines[split].append(made)
    for split, rows in lines.items():
        written = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(written, encoding="utf-8")


def write_instruct(folder: Path, pictures: int, seed: int) -> None:
    """`pairs.json` in LLaVA-Instruct's layout with the pictures beside it, eight questions about each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(examples("train", pictures, seed)):
        example.image.save(folder / f"{number:05d}.png")
        for asked in example.questions:
            said = [{"from": "human", "value": f"<image>\n{asked.text}"}, {"from": "gpt", "value": asked.answer}]
            rows.append(dict(id=f"{len(rows)}", image=f"{number:05d}.png", conversations=said))
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")


def odd_cell(example: GridExample, even: Cell, split: str, rng: np.random.Generator) -> Cell:
    """A cell with an odd digit: any, one with the most frequent odd digit, or one beside `even`; any if none is."""
    digits = np.array(example.digits)
    found = [(int(row), int(column)) for row, column in np.argwhere(digits % 2)]
    if split == "popular":
        shown = Counter(int(digits[cell]) for cell in found)
        found = [cell for cell in found if digits[cell] == shown.most_common(1)[0][0]]
    if split == "adversarial":
        beside = [cell for cell in found if max(abs(cell[0] - even[0]), abs(cell[1] - even[1])) == 1]
        found = beside or found
    return found[rng.integers(len(found))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="in each of the suites' parts")
    options = parser.parse_args()
    write_suites(options.folder, options.pictures)


if __name__ == "__main__":
    main()
