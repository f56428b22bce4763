"""The testbed's pictures and questions: true answers, splits apart, the visual tokens that an answer needs."""

from __future__ import annotations

import numpy as np
import pytest

from mico.reference.grids import CELL_PIXELS, COLUMNS, KINDS, PATCH, ROWS, SIDE, _digits, examples, patches


def test_the_same_arguments_give_the_same_pictures_and_another_seed_others() -> None:
    one, again, other = (list(examples("test", 3, seed)) for seed in (0, 0, 1))
    assert [x.questions for x in one] == [x.questions for x in again] != [x.questions for x in other]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, again, strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_digits(split: str) -> None:
    for example in examples(split, 20, background="photo"):
        digits = np.array(example.digits)
        assert example.image.size == (SIDE, SIDE)
        assert [q.kind for q in example.questions] == ["read", "check", "compare", "check"] * 2
        for question in example.questions:
            shown = [digits[cell] for cell in question.cells]
            words = [word.strip(",?") for word in question.text.split()]
            named = [(ROWS.index(w[0]), COLUMNS.index(w[1])) for w in words if len(w) == 2 and w.isupper()]
            assert tuple(named) == question.cells
            if question.kind == "check":
                assert question.answer == ("no" if shown[0] % 2 else "yes")
            else:
                assert question.answer == str(max(shown))


def test_a_pair_of_checks_is_yes_and_no() -> None:
    for example in examples("test", 10):
        assert (example.questions[1].answer, example.questions[3].answer) == ("yes", "no")


def test_pictures_show_the_digits_as_written() -> None:
    bank, labels = _digits("test")
    (example,) = examples("test", 1)
    picture = np.asarray(example.image)[..., 0].astype(float)
    for row in range(6):
        for column in range(6):
            cell = picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            nearest = np.abs(bank[0] * 255 - cell).max((1, 2)).argmin()
            assert np.abs(bank[0][nearest] * 255 - cell).max() <= 0.5
            assert labels[nearest] == example.digits[row][column]


def test_no_digit_of_a_test_is_trained_on() -> None:
    train, test = (_digits(split)[0][0].reshape(-1, 64) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_fewer_cells_keep_questions_in_the_corner() -> None:
    for example in examples("train", 10, cells=3):
        assert all(max(cell) < 3 for q in example.questions for cell in q.cells)
        empty = np.asarray(example.image).astype(bool)
        assert not empty[24:].any() and not empty[:, 24:].any() and empty.any()


def test_patches_are_those_that_the_vision_tower_cuts_from_the_cells() -> None:
    for cell in ((0, 0), (2, 5), (5, 3)):
        picture = np.zeros((SIDE, SIDE), bool)
        picture[cell[0] * CELL_PIXELS :, cell[1] * CELL_PIXELS :][:CELL_PIXELS, :CELL_PIXELS] = True
        tokens = picture.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).any((1, 3)).ravel()
        assert patches((cell,)) == set(np.flatnonzero(tokens))


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="background 'beach'"):
        next(examples("test", 1, background="beach"))
    with pytest.raises(ValueError):
        next(examples("validation", 1))
    assert KINDS == ("read", "compare", "check")
