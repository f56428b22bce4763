"""Training text: documents of a file or of the embedded corpus, packed into windows. N windows, T tokens a window."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mico.data import DataError, TextSource, load_text
from mico.errors import UserError

_DOCUMENTS = 1000  # tokenized at a time


@dataclass(frozen=True)
class Corpus:
    """Windows (int32) to train on and to evaluate on, and where they come from.

    dropped: tokens at the end that fill no window, of both.
    """

    train_NT: torch.Tensor
    eval_NT: torch.Tensor
    sources: tuple[TextSource, ...]
    dropped: int

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of the tokens of both parts."""
        parts = dict(train=self.train_NT, eval=self.eval_NT)
        return {name: hashlib.sha256(ids_NT.contiguous().numpy().data).hexdigest() for name, ids_NT in parts.items()}

    def describe(self) -> str:
        origins = " and ".join(dict.fromkeys(source.origin for source in self.sources))
        return (
            f"training text from {origins}: {self.train_NT.numel():,} tokens in {len(self.train_NT):,} windows of "
            f"{self.train_NT.shape[1]}, {self.eval_NT.numel():,} tokens to evaluate on, {self.dropped:,} dropped"
        )


class TokenWindows(Dataset):
    """The windows as the rows that a causal model is trained on."""

    def __init__(self, ids_NT: torch.Tensor) -> None:
        self.ids_NT = ids_NT

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_T = self.ids_NT[index].long()
        return dict(input_ids=ids_T, labels=ids_T)


def read_corpus(
    tokenizer: Any, seqlen: int, *, train_file: str | None = None, eval_file: str | None = None,
    eval_share: float = 0.05, seed: int = 0,
) -> Corpus:  # fmt: skip
    """Read, shuffle and pack the text; without `train_file` the embedded documentation.

    Without `eval_file` a share of the documents is held out (of the embedded text: its evaluation split). Documents
    are shuffled by `seed`, joined with the end-of-text token between them and cut into windows of `seqlen`.
    Raises UserError naming file and line where a row is wrong, and where the text fills no window.
    """
    if not 0 < eval_share < 1:
        raise UserError(f"--eval-share {eval_share}: must be between 0 and 1")
    train = _source(train_file, "train")
    if eval_file is None and train_file is not None:
        documents = _shuffled(train.documents, seed)
        held = max(1, round(eval_share * len(documents)))
        if held >= len(documents):
            raise DataError(f"{train.origin}: {len(documents)} document, none is left to train on: give --eval-file")
        parts, sources = [documents[held:], documents[:held]], [train]
    else:
        test = _source(eval_file, "test")
        parts, sources = [_shuffled(train.documents, seed), list(test.documents)], [train, test]
    (train_NT, dropped), (eval_NT, more) = (_pack(part, tokenizer, seqlen) for part in parts)
    for ids_NT, source, use in ((train_NT, train, "train"), (eval_NT, sources[-1], "evaluate")):
        if not len(ids_NT):
            raise DataError(f"{source.origin}: the text to {use} on fills no window of --seqlen {seqlen}: lower it")
    return Corpus(train_NT, eval_NT, tuple(sources), dropped + more)


def _source(file: str | None, split: Any) -> TextSource:
    if file is None:
        return load_text("docs", split)
    if Path(file).suffix == ".json":
        raise DataError(f"{file}: one JSON object a line is expected, in a file named .jsonl")
    return load_text("file", split, data_file=file)


def _shuffled(documents: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[index] for index in order.tolist()]


def _pack(documents: Sequence[str], tokenizer: Any, seqlen: int) -> tuple[torch.Tensor, int]:
    """(windows (N, T), tokens dropped): every document is followed by the end-of-text token where there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = array("i")  # 4 bytes a token, and some documents at a time: a corpus has more tokens than memory has lists
    for first in range(0, len(documents), _DOCUMENTS):
        some = list(documents[first : first + _DOCUMENTS])
        for encoded in tokenizer(some, add_special_tokens=False, verbose=False).input_ids:
            ids.extend(encoded)
            ids.extend(end)
    count = len(ids) // seqlen
    if not count:
        return torch.empty(0, seqlen, dtype=torch.int32), len(ids)
    return torch.frombuffer(ids, dtype=torch.int32)[: count * seqlen].view(count, seqlen), len(ids) - count * seqlen
