"""The trainer of tiny-llava: packed questions are answered as if each was asked alone, a killed training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mico.reference.grids import SHORT, examples
from mico.reference.train_llava import (
    CHECK,
    Recipe,
    accuracies,
    answer_logits,
    build_model,
    build_processor,
    make_batch,
    train,
    training_batch,
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
    assert processor.tokenizer.tokenize(" What is the digit in row 2, column 5?")[-6:] == [
        "Ġrow", "Ġ2", ",", "Ġcolumn", "Ġ5", "?",
    ]  # fmt: skip


def test_a_resumed_training_ends_with_the_same_weights(processor: Any, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=2)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    device, tokenizer = torch.device("cpu"), processor.tokenizer
    whole = train(recipe, tokenizer, tmp_path / "whole", device)
    torch.manual_seed(0)
    model = build_model(tokenizer)
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.05),
        dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate(0), betas=(0.9, 0.98), fused=True)
    logits, labels = answer_logits(model, training_batch(recipe, 0, tokenizer))
    functional.cross_entropy(logits, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=1)
    torch.save(state, tmp_path / "parts" / "checkpoint.pt")
    resumed = train(recipe, tokenizer, tmp_path / "parts", device)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_curriculum_and_the_rate() -> None:
    recipe = Recipe(steps=1000)
    assert [recipe.cells(step) for step in (0, 100, 200, 300)] == [3, 4, 5, 6]
    assert recipe.rate(0) < recipe.rate(199) == recipe.peak > recipe.rate(600) > recipe.rate(999) > 0


def test_an_untrained_model_knows_nothing(processor: Any) -> None:
    torch.manual_seed(0)
    shares = accuracies(build_model(processor.tokenizer), processor.tokenizer, "plain", 20)
    assert set(shares) == {"all", "read", "compare", "find"} and shares["all"] < 0.6 and CHECK == 400
