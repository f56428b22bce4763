"""Grids as folders of MME and POPE: the suites read them, and every answer is what the digits say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mico.image_text import load_image_text
from mico.metrics.vision.ask import check_images
from mico.metrics.vision.grid_files import CATEGORIES, odd_cell, write_suites
from mico.metrics.vision.pope import SPLITS
from mico.metrics.vision.suites import load_suite
from mico.reference.grids import COLUMNS, ROWS, GridExample, examples

PICTURES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("suites")
    write_suites(made, PICTURES)
    return made


def said(prompt: str, example: GridExample) -> str:
    """The answer that the digits of the picture give."""
    question, _, _ = prompt.partition("\n")
    found = re.fullmatch(r"Is the digit in cell (.)(.) even\?", question)
    assert found is not None, question
    return "no" if example.digits[ROWS.index(found[1])][COLUMNS.index(found[2])] % 2 else "yes"


def test_mme_asks_two_questions_a_picture_and_answers_them_right(folder: Path) -> None:
    questions = load_suite("mme", folder)
    check_images(questions)
    assert len(questions) == 2 * 2 * PICTURES and {one.about["category"] for one in questions} == set(CATEGORIES)
    assert all("yes or no" not in one.prompt for one in questions)
    for category, background in CATEGORIES.items():
        pictures = list(examples("test", PICTURES, 0, background=background, per_image=4))
        mine = [one for one in questions if one.about["category"] == category]
        for place, question in enumerate(mine):
            assert question.answer == said(question.prompt, pictures[place // 2])
        assert [one.answer for one in mine] == ["yes", "no"] * PICTURES
        assert len({one.pair for one in mine}) == PICTURES


def test_pope_has_three_files_with_as_many_yes_as_no(folder: Path) -> None:
    questions = load_suite("pope", folder)
    check_images(questions)
    pictures = list(examples("test", PICTURES, 1, per_image=2))
    for split in ("random", "popular", "adversarial"):
        mine = [one for one in questions if one.about["split"] == split]
        assert [one.answer for one in mine] == ["yes", "no"] * PICTURES
        for place, question in enumerate(mine):
            assert question.answer == said(question.prompt, pictures[place // 2])


def test_the_same_arguments_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_suites(tmp_path, PICTURES)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 2 * 2 * PICTURES + PICTURES + 3 + PICTURES + 1
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_odd_cells_are_chosen_as_popes_objects_are() -> None:
    digits = ((2, 2, 2, 2, 2, 7), (2, 2, 2, 2, 2, 2), (2, 2, 5, 2, 2, 2), *(((2, 7, 2, 2, 7, 2),) * 3))
    example, rng = GridExample(None, digits, ()), np.random.default_rng(0)
    cells = {split: {odd_cell(example, (1, 1), split, rng) for _ in range(100)} for split in SPLITS}
    assert cells["random"] == cells["popular"] | cells["adversarial"]
    assert cells["adversarial"] == {(2, 2)}
    assert all(digits[row][column] == 7 for row, column in cells["popular"])
    far = {odd_cell(example, (1, 0), "adversarial", rng) for _ in range(100)}
    assert far == cells["random"]  # nothing odd is beside


def test_training_pairs_are_read_as_llava_instruct(folder: Path) -> None:
    read = load_image_text(str(folder / "instruct" / "pairs.json"))
    expected = [one for example in examples("train", PICTURES, 0) for one in example.questions]
    assert [sample.turns for sample in read.samples] == [((one.text, one.answer),) for one in expected]
    assert all(sample.picture is not None for sample in read.samples)
