"""Training text: packing with the end of every document, held-out documents, what is refused and where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mico.data import TextSource, load_text
from mico.errors import UserError
from mico.qat.corpus import TokenWindows, read_corpus
from tests.tiny import numbered, train_tokenizer


def write(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in documents), encoding="utf-8")
    return str(path)


def test_documents_are_shuffled_and_joined_by_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    documents = list(numbered(50).documents)
    file = write(tmp_path / "train.jsonl", documents)
    corpus = read_corpus(tokenizer, 16, train_file=file, eval_share=0.2)
    texts = [tokenizer.decode(ids.reshape(-1).tolist()) for ids in (corpus.train_NT, corpus.eval_NT)]
    pieces = [text.split("</s>")[:-1] for text in texts]  # the last may be cut
    assert all(piece in documents for piece in pieces[0] + pieces[1])
    assert not set(pieces[0]) & set(pieces[1]) and len(pieces[1]) in (9, 10)
    assert pieces[0] != sorted(pieces[0], key=documents.index)
    tokens = sum(len(ids) + 1 for ids in tokenizer(documents).input_ids)
    assert corpus.train_NT.numel() + corpus.eval_NT.numel() + corpus.dropped == tokens
    again, other = (read_corpus(tokenizer, 16, train_file=file, eval_share=0.2, seed=seed) for seed in (0, 1))
    assert corpus.train_NT.equal(again.train_NT) and not corpus.train_NT.equal(other.train_NT)
    rows = TokenWindows(corpus.train_NT)
    assert len(rows) == len(corpus.train_NT) and rows[3]["labels"].equal(rows[3]["input_ids"])


def test_an_evaluation_file_leaves_all_documents_to_train_on(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", list(numbered(30).documents))
    held = write(tmp_path / "eval.jsonl", ["Quite another text, long enough for a window of some tokens."])
    corpus = read_corpus(train_tokenizer(), 8, train_file=train, eval_file=held)
    assert "Quite" in train_tokenizer().decode(corpus.eval_NT[0].tolist())
    assert held in corpus.describe() and train in corpus.describe()


def test_without_files_the_embedded_documentation_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(name: str, split: Any) -> TextSource:
        found = load_text(name, split)
        return replace(found, documents=found.documents[:10])

    monkeypatch.setattr("mico.qat.corpus.load_text", some)
    corpus = read_corpus(train_tokenizer(), 64)
    assert len(corpus.train_NT) > 0 < len(corpus.eval_NT) and "Python" in corpus.describe()
    assert [source.split for source in corpus.sources] == ["train", "test"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"text": 3}\n', ":2: no string field 'text'"),
        ('{"text": "fine"}\n{"text": \n', ":2: not JSON"),
        ('{"text": "one document alone"}\n', "1 document, none is left to train on: give --eval-file"),
        ('{"text": "a"}\n{"text": "b"}\n', "fills no window of --seqlen 16"),
    ],
)
def test_bad_rows_and_short_texts_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as told:
        read_corpus(train_tokenizer(), 16, train_file=str(file))
    assert str(file) in str(told.value) and message in str(told.value)


def test_a_share_and_a_form_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--eval-share 1.5"):
        read_corpus(train_tokenizer(), 16, eval_share=1.5)
    with pytest.raises(UserError, match=r"train\.json: one JSON object a line"):
        read_corpus(train_tokenizer(), 16, train_file=str(tmp_path / "train.json"))
