"""Prompts are the heads of windows, the texts in turn; continuations are those of greedy decoding without a cache."""

from __future__ import annotations

import pytest
import torch

from mico.data import evaluation_windows
from mico.metrics import generation as module
from mico.metrics.generation import Prompt, continuations, cut_prompts
from tests.tiny import CONTEXT, numbered, random_model, source, train_tokenizer


@pytest.fixture(scope="module")
def sets():
    short = source(["one and two and three are numbers of a document " * 3], "short")
    return {text.name: evaluation_windows(text, train_tokenizer(), 16) for text in (numbered(8), short)}


def test_texts_take_turns_and_windows_that_run_out_are_passed_over(sets):
    left = len(sets["short"].ids_NT)
    assert 1 < left < len(sets["docs"].ids_NT)
    assert [(p.text, p.window) for p in cut_prompts(sets, 3)] == [("docs", 0), ("short", 0), ("docs", 1)]
    everything = cut_prompts(sets, 1000)
    assert [p.window for p in everything if p.text == "short"] == list(range(left))
    assert len(everything) == left + len(sets["docs"].ids_NT)
    assert cut_prompts(sets, 0) == [] == cut_prompts({}, 3)


def test_a_prompt_is_the_head_of_its_window(sets, monkeypatch):
    assert cut_prompts(sets, 1)[0].ids_T.tolist() == sets["docs"].ids_NT[0].tolist(), "16 tokens are all there are"
    monkeypatch.setattr(module, "PROMPT_TOKENS", 5)
    assert cut_prompts(sets, 3)[2].ids_T.tolist() == sets["docs"].ids_NT[1, :5].tolist()


def plain(model, ids: list[int], count: int, ends: tuple[int, ...] = ()) -> list[int]:
    """The likeliest token `count` times over, the whole text read again each time."""
    found: list[int] = []
    while len(found) < count:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("arch", ["llama", "opt", "mixtral"])
def test_equals_greedy_decoding_without_a_cache(sets, arch):
    model, tokenizer = random_model(arch), train_tokenizer()
    model.generation_config.update(do_sample=True, repetition_penalty=9.0)  # what `generate` would follow
    prompts = cut_prompts(sets, 2)
    expected = [plain(model, prompt.ids_T.tolist(), module.NEW_TOKENS) for prompt in prompts]
    assert continuations(model, tokenizer, prompts) == [tokenizer.decode(ids) for ids in expected]


def test_the_end_of_text_ends_it_and_is_not_shown(sets):
    model, tokenizer = random_model("llama"), train_tokenizer()
    prompt = cut_prompts(sets, 1)[0]
    ids = plain(model, prompt.ids_T.tolist(), 5)
    end = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 0)
    model.generation_config.eos_token_id = [ids[end], 1]
    assert continuations(model, tokenizer, [prompt]) == [tokenizer.decode(ids[:end])]


def test_a_model_is_not_asked_for_more_than_it_takes():
    model, tokenizer = random_model("opt"), train_tokenizer()
    prompt = Prompt("docs", 0, torch.arange(40, 40 + CONTEXT - 3))
    ids = plain(model, prompt.ids_T.tolist(), 3)
    assert continuations(model, tokenizer, [prompt]) == [tokenizer.decode(ids)]
