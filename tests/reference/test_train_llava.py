"""The trainer of tiny-llava: packed questions are answered as if each was asked alone, a killed training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico.reference import train_llava as trainer
from mico.reference.grids import SHORT, examples
from mico.reference.tiny_llava import answer_logits, build_model, build_processor, make_batch
from mico.reference.train_llava import (
    ENOUGH,
    WINDOW,
    Progress,
    Recipe,
    accuracies,
    train,
)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def test_questions_of_one_sequence_do_not_see_each_other(processor: Any) -> None:
    """Logits of packed questions equal those of the chat form through the processor, one question at a time."""
    torch.manual_seed(0)
    model = build_model(processor.tokenizer).eval()
    found = list(examples("test", 2))
    shorts = [[index % 2 == 1 for index in range(8)]] * 2
    batch = make_batch(
        np.stack([np.asarray(x.image) for x in found]), [list(x.questions) for x in found], shorts, processor.tokenizer
    )
    with torch.no_grad():
        packed, labels = answer_logits(model, batch)
        alone = []
        for example in found:
            for index, question in enumerate(example.questions):
                text = question.text + SHORT * (index % 2)
                chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                chat += [{"role": "assistant", "content": [{"type": "text", "text": question.answer}]}]
                inputs = processor(images=example.image, text=processor.apply_chat_template(chat), return_tensors="pt")
                alone.append(model(**inputs).logits[0, -3:-1])  # where the answer and the end are to be predicted
    answers = processor.tokenizer([f" {q.answer}</s>" for x in found for q in x.questions]).input_ids
    assert labels.tolist() == [token for ids in answers for token in ids]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=0)


def test_prompts_are_a_token_a_word(processor: Any) -> None:
    assert processor.tokenizer.tokenize(" What is the digit in cell BY?")[-5:] == [
        "Ġdigit", "Ġin", "Ġcell", "ĠBY", "?",
    ]  # fmt: skip


def test_a_killed_training_ends_with_the_same_weights(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, device, tokenizer = Recipe(steps=3), torch.device("cpu"), processor.tokenizer
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(trainer, "BATCHES", {1: (2, 2)})
    whole = train(recipe, tokenizer, tmp_path / "whole", device, vision_steps=2)
    monkeypatch.setattr(trainer, "KEPT", 2)  # steps between two checkpoints

    def killed(*arguments: Any) -> None:
        if arguments[3].step == 2:
            raise KeyboardInterrupt
        step(*arguments)

    step = trainer._step
    monkeypatch.setattr(trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tokenizer, tmp_path / "parts", device, vision_steps=2)
    monkeypatch.setattr(trainer, "_step", step)
    resumed = train(recipe, tokenizer, tmp_path / "parts", device, vision_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_cells_are_added_when_answers_are_right_often_enough() -> None:
    progress = Progress()
    for _ in range(WINDOW):
        assert progress.cells == 1
        progress.add(1.0, ENOUGH + 0.01)
    assert (progress.cells, progress.shares) == (2, [])
    for _ in range(2 * WINDOW):
        progress.add(1.0, ENOUGH - 0.01)
    assert (progress.cells, progress.step) == (2, 3 * WINDOW)
    for cells in (2, 3, 6):
        assert (progress.cells, progress.told) == (cells, True)
        for _ in range(WINDOW):
            progress.add(1.0, 1.0)
    assert (progress.cells, progress.told) == (6, False)


def test_the_rate_warms_up_stays_and_falls() -> None:
    shares = [Recipe(steps=1000).share(step) for step in (0, 49, 99, 499, 750, 999)]
    assert shares == pytest.approx([0.01, 0.5, 1, 1, 0.505, 0.01198])


def test_an_untrained_model_knows_nothing(processor: Any) -> None:
    torch.manual_seed(0)
    shares = accuracies(build_model(processor.tokenizer), processor.tokenizer, "plain", 20)
    assert set(shares) == {"all", "read", "compare", "check"} and shares["all"] < 0.6
