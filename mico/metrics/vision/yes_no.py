"""Questions that are answered yes or no, as MME and as POPE judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mico.metrics.vision.question import Record, share

YES_NO = ("yes", "no")


def mme_answer(text: str) -> str:
    """'yes', 'no' or 'other', by the evaluation tool of MME: the first four characters decide."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_figures(records: Sequence[Record]) -> dict[str, Any]:
    """acc: percent of the questions; acc_plus: percent of the pairs with both right; score: their sum, 0 to 200.

    A question whose pair is not there (`unpaired`) counts in acc alone.
    """
    right = [mme_answer(record.text) == record.question.answer for record in records]
    pairs: dict[str | None, list[bool]] = {}
    for record, hit in zip(records, right, strict=True):
        pairs.setdefault(record.question.pair, []).append(hit)
    whole = [hits for pair, hits in pairs.items() if pair is not None and len(hits) == 2]
    acc, plus = 100 * share(right), 100 * share([all(hits) for hits in whole])
    unpaired = len(records) - 2 * len(whole)
    return dict(score=acc + plus, acc=acc, acc_plus=plus, questions=len(records), unpaired=unpaired)


def pope_answer(text: str) -> str:
    """'no' when the text before the first full stop has the word No, no or not, else 'yes', as POPE has it."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_figures(records: Sequence[Record]) -> dict[str, Any]:
    """accuracy, precision, recall and F1 of 'yes', and the share of yes among the answers; 0 where undefined."""
    said = [pope_answer(record.text) == "yes" for record in records]
    true = [record.question.answer == "yes" for record in records]
    both = sum(a and b for a, b in zip(said, true, strict=True))
    precision, recall = both / max(1, sum(said)), both / max(1, sum(true))
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    accuracy = share([a == b for a, b in zip(said, true, strict=True)])
    return dict(
        accuracy=accuracy, precision=precision, recall=recall, f1=f1, yes_ratio=share(said), questions=len(records)
    )
