"""TextVQA, validation: text in photographs, ten answers by people, and what an OCR system read as a hint.

TextVQA_0.5.1_val.json and train_images/ID.jpg; the OCR tokens are in TextVQA_Rosetta_OCR_v0.2_val.json, in a field
`ocr_tokens` of every row, or in the prompts of LLaVA's llava_textvqa_val_v051_ocr.jsonl, which are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.metrics.vision.question import (
    REMEDY,
    SHORT,
    Question,
    Record,
    entry,
    find,
    percent,
    read_object,
    read_rows,
    share,
)
from mico.metrics.vision.vqa_words import normalized

FILE, OCR, LLAVA = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json", "llava_textvqa_val_v051_ocr.jsonl"
PEOPLE = 10  # who answered every question
AGREE = 3  # of the others make an answer fully right

Key = tuple[str, str]  # image id and question in lower case


def load(folder: Path) -> list[Question]:
    """The questions in the order of the file. `about["hint"]` is none where there are no OCR tokens."""
    file, images = find(folder, "textvqa", FILE), find(folder, "textvqa", "train_images", "train_val_images")
    tokens, prompts = _ocr(folder / OCR), _prompts(folder / LLAVA)
    rows = entry(read_object(file), "data", str(file), list)
    return [_question(f"{file}, entry {n}", row, images, tokens, prompts) for n, row in enumerate(rows, 1)]


def _question(
    where: str, row: Any, images: Path, tokens: Mapping[str, list[Any]], prompts: Mapping[Key, str]
) -> Question:
    text, image = entry(row, "question", where), entry(row, "image_id", where)
    answers = [str(answer) for answer in entry(row, "answers", where, list)]
    if len(answers) != PEOPLE:
        raise UserError(f"{where}: {len(answers)} answers, not {PEOPLE}: {REMEDY}")
    own = entry(row, "ocr_tokens", where, list) if row.get("ocr_tokens") else tokens.get(image, [])
    read = [str(token) for token in own]
    prompt = prompts.get((image, text.lower())) or _prompt(text, read)
    hint = "ocr" if "Reference OCR token:" in prompt else "none"
    return Question(
        str(row.get("question_id", where)), prompt, answers, where, images / f"{image}.jpg", about=dict(hint=hint)
    )


def _prompt(text: str, tokens: list[str]) -> str:
    hint = f"\nReference OCR token: {', '.join(tokens)}" if tokens else ""
    return text.strip().capitalize() + hint + SHORT


def _ocr(file: Path) -> dict[str, list[Any]]:
    """OCR tokens by image id; none where the file is not there."""
    if not file.is_file():
        return {}
    rows = entry(read_object(file), "data", str(file), list)
    places = ((f"{file}, entry {number}", row) for number, row in enumerate(rows, 1))
    return {entry(row, "image_id", where): entry(row, "ocr_tokens", where, list) for where, row in places}


def _prompts(file: Path) -> dict[Key, str]:
    """LLaVA's prompts by image and question; none where the file is not there."""
    found = {}
    for where, row in read_rows(file) if file.is_file() else ():
        text = entry(row, "text", where)
        question = next((line for line in text.split("\n") if not line.startswith("Reference OCR token:")), "")
        found[str(row.get("question_id")), question.lower()] = text
    return found


def agreement(text: str, answers: Sequence[str]) -> float:
    """Mean over the ten people of min(1, matches among the other nine / 3), words normalized as EvalAI does."""
    same = sum(normalized(answer) == normalized(text) for answer in answers)
    chosen, others = min(1.0, (same - 1) / AGREE), min(1.0, same / AGREE)
    return (same * chosen + (len(answers) - same) * others) / len(answers)


def score(records: Sequence[Record]) -> dict[str, Any]:
    """accuracy: the mean agreement; without_ocr: questions that were asked without OCR tokens."""
    without = sum(record.question.about["hint"] == "none" for record in records)
    found = [agreement(record.text, record.question.answer) for record in records]
    return dict(accuracy=share(found), without_ocr=without)


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of `score`: measure and value."""
    return [
        ("accuracy", percent(figures["accuracy"])),
        ("questions without OCR tokens", str(figures["without_ocr"])),
    ]
