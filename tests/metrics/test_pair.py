"""A dense model and what became of it: KL as long as the disk has room for it, and a word where it has none."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from mico.console import Console
from mico.data import evaluation_windows
from mico.metrics.pair import Pair
from tests.tiny import VOCABULARY, numbered, random_model, train_tokenizer

ROW = 4 * VOCABULARY  # bytes that the logits of one position take


@pytest.mark.parametrize(
    ("spare", "tokens"), [(0, 30), (80 * ROW, 15), (95 * ROW, 5), (100 * ROW, None), (1 << 40, None)]
)
def test_what_the_run_needs_of_the_disk_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, tokens: int | None
) -> None:
    usage, sets = (
        namedtuple("usage", "total used free"),
        {"docs": evaluation_windows(numbered(3), train_tokenizer(), 16)},
    )
    assert len(sets["docs"].ids_NT) >= 2
    sets["docs"] = replace(sets["docs"], ids_NT=sets["docs"].ids_NT[:2])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100 * ROW))
    console = Console()
    pair = Pair(sets, tmp_path, "mark", VOCABULARY, 2, console, spare=spare)
    dense, found = pair.dense(random_model("llama")), pair.compressed(random_model("llama", seed=1))
    pair.done()
    assert found["docs"].get("kl_tokens") == tokens and dense["docs"]["perplexity"] != found["docs"]["perplexity"]
    told = [note for note in console.notes if note.startswith("KL to the dense model is left out")]
    assert len(told) == (tokens is None)
    assert [path.name for path in tmp_path.iterdir()] == ["dense.json"]
