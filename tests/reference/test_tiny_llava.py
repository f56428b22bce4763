"""The shipped tiny-llava answers questions about pictures that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mico.loading import REFERENCE_DIR, load_model, load_processor
from mico.reference.grids import examples
from mico.reference.train_llava import accuracies

FOLDER = REFERENCE_DIR / "tiny-llava"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny-llava", device="cpu", dtype="float32").model


def test_it_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "pipelines/train_llava.sh" in card and "| plain |" in card and "| photo |" in card


@pytest.mark.parametrize(("background", "least"), [("plain", 0.93), ("photo", 0.9)])
def test_most_answers_are_right(model: Any, background: str, least: float) -> None:
    """On 40 pictures; the card tells the accuracy on many."""
    shares = accuracies(model, load_processor("tiny-llava").tokenizer, background, 40)
    assert min(shares.values()) > least, shares


def test_it_answers_in_words_through_its_processor(model: Any) -> None:
    processor = load_processor("tiny-llava")
    right = 0
    for example in examples("test", 3, seed=5):
        for question in example.questions[:4]:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            inputs = processor(images=example.image, text=processor.apply_chat_template(chat), return_tensors="pt")
            new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            right += processor.tokenizer.decode(new, skip_special_tokens=True).strip() == question.answer
    assert right >= 10
    assert Path(FOLDER / "chat_template.jinja").is_file()
