"""MME: two yes/no questions an image, 10 categories of perception and 4 of cognition, each worth 200 points.

The folder is MME_Benchmark_release_version, or holds it: a folder a category with an image and a .txt beside it, or
with `images/` and `questions_answers_YN/`. Where the `llava_mme.jsonl` of LLaVA lies there too, its prompts are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.metrics.vision.question import REMEDY, SHORT, Question, Record, by, entry, read_rows, read_text
from mico.metrics.vision.yes_no import YES_NO, mme_figures
from mico.tables import number

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SIDES = {"perception": PERCEPTION, "cognition": COGNITION}
INSTRUCTION = "Please answer yes or no."  # of MME itself: LLaVA's evaluation has its own in place of it
LLAVA = "llava_mme.jsonl"
IMAGES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")


def load(folder: Path) -> list[Question]:
    """All questions, category by category, the two of an image side by side."""
    top = _release(folder)
    questions = [one for name in (*PERCEPTION, *COGNITION) if (top / name).is_dir() for one in _category(top / name)]
    own = next((place / LLAVA for place in (folder, top) if (place / LLAVA).is_file()), None)
    return _prompts_of_llava(own, questions) if own else questions


def _release(folder: Path) -> Path:
    names = ("", "MME_Benchmark_release_version", "MME_Benchmark", "MME_Benchmark_release_version/MME_Benchmark")
    for name in names:
        if any((folder / name / category).is_dir() for category in (*PERCEPTION, *COGNITION)):
            return folder / name
    raise UserError(f"--suite mme: {folder} holds no category ({PERCEPTION[0]}/, ...): see calib_data/README.md")


def _category(folder: Path) -> list[Question]:
    texts, images = folder / "questions_answers_YN", folder / "images"
    texts, images = texts if texts.is_dir() else folder, images if images.is_dir() else folder
    files = sorted(texts.glob("*.txt"))
    if not files:
        raise UserError(f"--suite mme: {texts} holds no .txt with questions: {REMEDY}")
    return [question for file in files for question in _file(file, folder.name, images)]


def _file(file: Path, category: str, images: Path) -> list[Question]:
    found = [images / f"{file.stem}{ending}" for ending in IMAGES]
    image = next((path for path in found if path.is_file()), found[0])
    questions = []
    for place, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        text, tab, answer = line.strip().partition("\t")
        where = f"{file}, line {place}"
        if not tab or answer.strip().lower() not in YES_NO:
            raise UserError(f"{where}: {line!r:.60} is no question, a tab, and Yes or No: {REMEDY}")
        prompt = text.replace(INSTRUCTION, "").strip() + SHORT
        name = f"{category}/{file.stem}"
        about = dict(category=category)
        questions.append(
            Question(f"{name}/{place}", prompt, answer.strip().lower(), where, image, pair=name, about=about)
        )
    return questions


def _prompts_of_llava(file: Path, questions: list[Question]) -> list[Question]:
    """The questions as LLaVA's file asks them, found by category, image and wording."""
    known = {(one.pair, _wording(one.prompt)): one for one in questions}
    found = []
    for where, row in read_rows(file):
        text, name = entry(row, "text", where), Path(entry(row, "question_id", where))
        pair = f"{entry(row, 'category', where)}/{name.stem}"
        question = known.get((pair, _wording(text)))
        if question is None:
            raise UserError(f"{where}: no .txt of {pair} asks {text!r:.60}: {REMEDY}")
        found.append(Question(question.id, text, question.answer, where, question.image, pair, question.about))
    return found


def _wording(text: str) -> str:
    """A question without instructions, its spaces made single."""
    return " ".join(text.replace(SHORT.strip(), "").replace(INSTRUCTION, "").split())


def score(records: Sequence[Record]) -> dict[str, Any]:
    """Points: acc + acc_plus of every category, their sums over perception (10) and cognition (4).

    absent: categories without a question, which add nothing to the sums.
    """
    categories = {name: mme_figures(found) for name, found in by(records, "category").items()}
    sums = {
        side: sum(found["score"] for name, found in categories.items() if name in names)
        for side, names in SIDES.items()
    }
    unpaired = sum(found["unpaired"] for found in categories.values())
    absent = [name for name in (*PERCEPTION, *COGNITION) if name not in categories]
    return dict(sums, unpaired=unpaired, absent=absent, categories=categories)


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of `score`: measure and value."""
    sums = [(f"{side}, of {200 * len(names):,}", number(figures[side], 1)) for side, names in SIDES.items()]
    return sums + [
        (name, f"{found['score']:.1f} (acc {found['acc']:.1f}, acc+ {found['acc_plus']:.1f})")
        for name, found in figures["categories"].items()
    ]
