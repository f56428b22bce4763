"""Pictures of grids of handwritten digits and questions about them: what tiny-llava is trained and measured on.

A picture is 6 x 6 cells of 8 x 8 pixels, each a digit of scikit-learn's `load_digits`; the writers' digits that a test
picture shows are in no training picture. A question needs one cell ("read", "check") or two ("compare"), so
that it is known which visual tokens an answer needs. `background="photo"` lays the digits over crops of the two
photographs that come with scikit-learn: the harder set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

CELLS, CELL_PIXELS, PATCH = 6, 8, 4
SIDE = CELLS * CELL_PIXELS  # pixels of a picture
TOKENS_A_SIDE = SIDE // PATCH  # 12: a picture is 144 visual tokens, a cell 2 x 2 of them
TRAIN_DIGITS = 1437  # of 1,797; the rest is for tests
ROWS, COLUMNS = "ABCDEF", "UVWXYZ"  # of cells AU … FZ: no name holds a digit
KINDS = ("read", "compare", "check")
SPLITS = ("train", "test")
BACKGROUNDS = ("plain", "photo")
VARIANTS = 24  # of every training digit: as written, and slightly turned, scaled and moved
PHOTO_SHARE = 0.7  # the left part of each photograph is for training pictures, the rest for tests
PHOTO_LIGHT = 0.7  # how bright a photograph is under the digits
SHORT = "\nAnswer the question using a single word or phrase."  # of the suites, docs/vision.md

Cell = tuple[int, int]


@dataclass(frozen=True)
class GridQuestion:
    """One question; `cells` are the (row, column) pairs, from 0, that its answer depends on."""

    kind: str
    text: str
    answer: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class GridExample:
    """A picture (PIL, RGB, 48 x 48) with its digits and the questions about it."""

    image: Any
    digits: tuple[tuple[int, ...], ...]
    questions: tuple[GridQuestion, ...]


def patches(cells: tuple[Cell, ...]) -> set[int]:
    """Indices, row by row from 0 to 143, of the visual tokens that show `cells`."""
    width = CELL_PIXELS // PATCH
    return {
        (row * width + down) * TOKENS_A_SIDE + column * width + across
        for row, column in cells
        for down in range(width)
        for across in range(width)
    }


def examples(
    split: str, count: int, seed: int = 0, *, cells: int = CELLS, background: str = "plain", per_image: int = 8
) -> Iterator[GridExample]:
    """Yield `count` pictures, each with `per_image` questions about its upper left `cells` x `cells` cells;
    the others are empty.

    The questions of a picture take turns: read, check (yes), compare, check (no), and so on; the same arguments
    give the same pictures. Raises ValueError for an unknown split or background.
    """
    from PIL import Image

    if background not in BACKGROUNDS:
        raise ValueError(f"background {background!r}: choose from {', '.join(BACKGROUNDS)}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    for _ in range(count):
        digits, pictures = draw(rng, split, [background], cells)
        questions = ask(rng, digits[0], per_image, cells)
        yield GridExample(Image.fromarray(pictures[0]), tuple(map(tuple, digits[0].tolist())), tuple(questions))


# --- pictures -------------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, split: str, backgrounds: list[str], cells: int = CELLS) -> tuple[Any, Any]:
    """Digits (N, 6, 6) and pictures (N, 48, 48, 3) as uint8, one a background; cells after `cells` stay empty."""
    count = len(backgrounds)
    bank, labels = _digits(split)
    chosen = rng.integers(len(labels), size=(count, CELLS, CELLS))
    ink = bank[rng.integers(len(bank), size=chosen.shape), chosen]  # N, 6, 6, 8, 8 in 0..1
    ink[:, cells:] = 0
    ink[:, :, cells:] = 0
    ink_NHW = ink.transpose(0, 1, 3, 2, 4).reshape(count, SIDE, SIDE)
    if split == "train":
        ink_NHW = ink_NHW * rng.uniform(0.7, 1.0, (count, 1, 1))
    under = np.zeros((count, SIDE, SIDE, 3))
    for index, background in enumerate(backgrounds):
        if background == "photo":
            under[index] = PHOTO_LIGHT * _crop(rng, split)
    pictures = under + ink_NHW[..., None] * (255 - under)
    return labels[chosen], pictures.round().astype(np.uint8)


@lru_cache(maxsize=2)
def _digits(split: str) -> tuple[Any, Any]:
    """Handwritten digits (variant, digit, 8, 8) in 0..1, and what they are; a test has them only as written."""
    from scipy.ndimage import affine_transform
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    images, labels = data.images[chosen] / 16, data.target[chosen]
    bank = [images]
    rng = np.random.default_rng(1)
    centre = (CELL_PIXELS - 1) / 2
    for _ in range(VARIANTS - 1 if split == "train" else 0):
        turned = np.empty_like(images)
        for index, image in enumerate(images):
            angle, shear = rng.normal(0, 0.12), rng.normal(0, 0.1)
            rows, columns = rng.normal(1, 0.08, 2)
            matrix = np.array(
                [[rows * np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), columns * np.cos(angle)]]
            )
            offset = centre - matrix @ (centre, centre) + rng.normal(0, 0.35, 2)
            turned[index] = affine_transform(image, matrix, offset, order=1)
        bank.append(turned.clip(0, 1))
    return np.stack(bank), labels


@lru_cache(maxsize=1)
def _photos() -> list[Any]:
    """The photographs of scikit-learn, 427 x 640 x 3, at half their size."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [np.asarray(photo.resize((photo.width // 2, photo.height // 2)), dtype=float) for photo in photos]


def _crop(rng: np.random.Generator, split: str) -> Any:
    """48 x 48 x 3 of one of the photographs, from the part that belongs to the split."""
    photo = _photos()[rng.integers(2)]
    border = int(photo.shape[1] * PHOTO_SHARE)
    low, high = (0, border - SIDE) if split == "train" else (border, photo.shape[1] - SIDE)
    top, left = rng.integers(photo.shape[0] - SIDE + 1), rng.integers(low, high + 1)
    return photo[top : top + SIDE, left : left + SIDE]


# --- questions ------------------------------------------------------------------------------------------------------


def ask(rng: np.random.Generator, digits: Any, count: int, cells: int = CELLS) -> list[GridQuestion]:
    """`count` questions about the upper left `cells` x `cells` of digits (6, 6): read, yes, compare, no, read, …"""
    questions: list[GridQuestion] = []
    while len(questions) < count:
        questions += [_read(rng, digits, cells), _check(rng, digits, cells, True)]
        questions += [_compare(rng, digits, cells), _check(rng, digits, cells, False)]
    return questions[:count]


def _cell(rng: np.random.Generator, cells: int) -> Cell:
    row, column = rng.integers(cells, size=2)
    return int(row), int(column)


def name(row: int, column: int) -> str:
    """What questions call a cell: 'BY' is in row B, column Y."""
    return ROWS[row] + COLUMNS[column]


def _read(rng: np.random.Generator, digits: Any, cells: int) -> GridQuestion:
    row, column = _cell(rng, cells)
    text = f"What is the digit in cell {name(row, column)}?"
    return GridQuestion("read", text, str(digits[row, column]), ((row, column),))


def _compare(rng: np.random.Generator, digits: Any, cells: int) -> GridQuestion:
    first, second = _cell(rng, cells), _cell(rng, cells)
    while first == second and cells > 1:
        second = _cell(rng, cells)
    named = [name(*cell) for cell in (first, second)]
    larger = max(digits[first], digits[second])
    return GridQuestion(
        "compare", f"What is the larger digit of cells {named[0]} and {named[1]}?", str(larger), (first, second)
    )


def _check(rng: np.random.Generator, digits: Any, cells: int, even: bool) -> GridQuestion:
    """Of a cell with an even or an odd digit, where there is one."""
    found = np.argwhere(digits[:cells, :cells] % 2 == (0 if even else 1))
    row, column = map(int, found[rng.integers(len(found))]) if len(found) else _cell(rng, cells)
    answer = "no" if digits[row, column] % 2 else "yes"
    return GridQuestion("check", f"Is the digit in cell {name(row, column)} even?", answer, ((row, column),))
