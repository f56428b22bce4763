"""The comparison of perplexities, with a stand-in for llama.cpp that computes with transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import gguf_perplexity
from mico.data import evaluation_windows
from mico.metrics.perplexity import perplexity
from tests.tiny import numbered, random_model, train_tokenizer

MODEL, TOKENIZER = random_model("llama"), train_tokenizer(bos=True)


class Llama(SimpleNamespace):
    """What the benchmark uses of llama_cpp.Llama; `shift` is added to the id of the token at `at`."""

    def reset(self) -> None:
        self.scores = None

    @torch.no_grad()
    def eval(self, tokens: list[int]) -> None:
        assert self.scores is None  # reset before every window
        self.scores = MODEL(torch.tensor([tokens])).logits[0].numpy()

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        ids = TOKENIZER(text.decode(), add_special_tokens=add_bos).input_ids
        return ids if self.at is None else [*ids[: self.at], ids[self.at] + 1, *ids[self.at + 1 :]]


def test_perplexity_by_the_same_protocol():
    windows = evaluation_windows(numbered(40), TOKENIZER, 32)
    assert len(windows.ids_NT) > 3
    found = gguf_perplexity.llama_perplexity(Llama(at=None, scores=None), windows.ids_NT)
    assert found == pytest.approx(perplexity(MODEL, windows), rel=1e-5)


@pytest.mark.parametrize("at", [None, 0, 17])
def test_where_tokenizers_part(at):
    assert gguf_perplexity.parting(Llama(at=at), TOKENIZER, numbered(9)) == at
