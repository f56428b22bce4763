"""Grids as folders of MME and POPE: the suites read them, and every answer is what the digits say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mico.metrics.vision.ask import check_images
from mico.metrics.vision.grid_files import CATEGORIES, absent, write_suites
from mico.metrics.vision.suites import load_suite
from mico.reference.grids import GridExample, examples

PICTURES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("suites")
    write_suites(made, PICTURES)
    return made


@pytest.fixture(scope="module")
def rows() -> dict[str, int]:
    """What questions call a row, and which it is."""
    finds = [one for example in examples("test", 40) for one in example.questions if one.kind == "find"]
    return {one.text.rpartition("row ")[2]: one.cells[0][0] for one in finds}


def said(prompt: str, example: GridExample, rows: dict[str, int]) -> str:
    """The answer that the digits of the picture give."""
    question, _, _ = prompt.partition("\n")
    found = re.fullmatch(r"Is there a (\d) in row (.+)", question)
    assert found is not None, question
    return "yes" if int(found[1]) in example.digits[rows[found[2]]] else "no"


def test_mme_asks_two_questions_a_picture_and_answers_them_right(folder: Path, rows: dict[str, int]) -> None:
    questions = load_suite("mme", folder)
    check_images(questions)
    assert (
        len(rows) == 6
        and len(questions) == 2 * 2 * PICTURES
        and {one.about["category"] for one in questions} == set(CATEGORIES)
    )
    assert all("yes or no" not in one.prompt for one in questions)
    for category, background in CATEGORIES.items():
        pictures = list(examples("test", PICTURES, 0, background=background, per_image=4))
        mine = [one for one in questions if one.about["category"] == category]
        for place, question in enumerate(mine):
            assert question.answer == said(question.prompt, pictures[place // 2], rows)
        assert [one.answer for one in mine] == ["yes", "no"] * PICTURES
        assert len({one.pair for one in mine}) == PICTURES


def test_pope_has_three_files_with_as_many_yes_as_no(folder: Path, rows: dict[str, int]) -> None:
    questions = load_suite("pope", folder)
    check_images(questions)
    pictures = list(examples("test", PICTURES, 1, per_image=2))
    for split in ("random", "popular", "adversarial"):
        mine = [one for one in questions if one.about["split"] == split]
        assert [one.answer for one in mine] == ["yes", "no"] * PICTURES
        for place, question in enumerate(mine):
            assert question.answer == said(question.prompt, pictures[place // 2], rows)


def test_the_same_arguments_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_suites(tmp_path, PICTURES)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 2 * 2 * PICTURES + PICTURES + 3
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_absent_digits_are_chosen_as_popes_objects_are() -> None:
    digits = ((1, 1, 2, 2, 3, 3), (4, 4, 5, 5, 4, 5), (6, 6, 6, 6, 6, 6), *(((7, 7, 7, 7, 7, 7),) * 3))
    example, rng = GridExample(None, digits, ()), np.random.default_rng(0)
    assert absent(example, 0, "popular", rng) == 7
    assert {absent(example, 0, "adversarial", rng) for _ in range(40)} == {4, 5}
    assert {absent(example, 1, "adversarial", rng) for _ in range(80)} == {1, 2, 3, 6}
    assert {absent(example, 0, "random", rng) for _ in range(200)} == {0, 4, 5, 6, 7, 8, 9}
    assert absent(example, 5, "adversarial", rng) != 7  # the row beside has nothing else: any other
