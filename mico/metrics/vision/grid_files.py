"""Grids of digits as folders of MME and POPE, so that their suites run where the real ones are not.

    python -m mico.metrics.vision.grid_files FOLDER [--pictures 20]
    mico eval tiny-llava --suite mme,pope --vlm-data FOLDER

MME gets two of its categories: `existence` (plain pictures) and `scene` (digits over photographs); a picture is asked
once for a digit that a row has, once for one that it has not. POPE's three files differ, as the real ones do, in the
objects that are absent: any; those that the picture shows most; those that stand beside, in the rows next to it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mico.metrics.vision.mme import INSTRUCTION
from mico.metrics.vision.pope import SPLITS
from mico.reference.grids import CELLS, GridExample, examples

PICTURES = 20
CATEGORIES = {"existence": "plain", "scene": "photo"}  # of MME, and the background of its pictures


def write_suites(folder: Path, pictures: int = PICTURES, seed: int = 0) -> None:
    """Write mme/ and pope/ below `folder`; the same arguments give the same files. Every picture is a test picture."""
    for category, background in CATEGORIES.items():
        _write_mme(folder / "mme" / category, pictures, seed, background)
    _write_pope(folder / "pope", pictures, seed)


def _write_mme(folder: Path, pictures: int, seed: int, background: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # of four questions about a picture the second and the fourth ask for a digit in one row: yes, then no
    for number, example in enumerate(examples("test", pictures, seed, background=background, per_image=4)):
        example.image.save(folder / f"{number:05d}.png")
        finds = [question for question in example.questions if question.kind == "find"]
        lines = [f"{one.text} {INSTRUCTION}\t{one.answer.capitalize()}" for one in finds]
        (folder / f"{number:05d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_pope(folder: Path, pictures: int, seed: int) -> None:
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    # of two questions about a picture the second asks for a digit that a row has
    for number, example in enumerate(examples("test", pictures, seed + 1, per_image=2)):
        image, present = f"COCO_val2014_{number:012d}.png", example.questions[1]
        example.image.save(folder / "val2014" / image)
        for split in SPLITS:
            digit = absent(example, present.cells[0][0], split, rng)
            for text, label in ((present.text, "yes"), (re.sub(r"\d", str(digit), present.text, count=1), "no")):
                made = dict(question_id=len(lines[split]) + 1, image=image, text=text, label=label)
                lines[split].append(made)
    for split, rows in lines.items():
        written = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(written, encoding="utf-8")


def absent(example: GridExample, row: int, split: str, rng: np.random.Generator) -> int:
    """A digit that the row has not: any, the one most frequent in the picture, or one of the rows above and below."""
    missing = [digit for digit in range(10) if digit not in example.digits[row]]
    if split == "popular":
        shown = Counter(digit for line in example.digits for digit in line)
        return max(missing, key=lambda digit: shown[digit])
    if split == "adversarial":
        beside = {digit for near in (row - 1, row + 1) if 0 <= near < CELLS for digit in example.digits[near]}
        missing = [digit for digit in missing if digit in beside] or missing
    return int(rng.choice(missing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="in each of the suites' parts")
    options = parser.parse_args()
    write_suites(options.folder, options.pictures)


if __name__ == "__main__":
    main()
