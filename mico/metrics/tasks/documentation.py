"""Questions and passages of the lm-eval tasks that mico ships, from the documentation that every Python carries.

Only the evaluation share is asked, on which nothing is calibrated; examples in the prompt come from the other. Python
says some things in several places, so passages that share COMMON words in a row with the other share are left out.
Another Python version carries other texts: results compare only within one. lm-eval calls `choice` and `rolling` for
the YAML files beside this one, on its own command line too: `lm_eval --include_path mico/metrics/tasks`.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from mico.data import documentation

ANSWERS = 4
CONTEXT, CONTINUATION = 320, 80  # characters, counted up to the end of a word
QUESTIONS, EXAMPLES = 400, 32
A_TOPIC = 24  # questions of one topic at most: a few topics hold half of the text
DOCUMENTS, DOCUMENT = 60, 2000  # passages of the rolling task, and characters of the longest
SHORTEST = 400  # characters of the shortest passage
COMMON = 12  # words in a row that both shares hold: a passage with such is not asked
SEED = 0


def choice(**_: Any) -> dict[str, Dataset]:
    """Multiple choice: `context`, four `choices` of one length in characters, and the `answer`, an index into them."""
    return {
        "train": Dataset.from_list(questions("train", EXAMPLES)),
        "test": Dataset.from_list(questions("test", QUESTIONS)),
    }


def rolling(**_: Any) -> dict[str, Dataset]:
    """Passages: `text`, each the beginning of a document."""
    return {"test": Dataset.from_list([{"text": text} for text in passages()])}


@functools.cache  # lm-eval asks for the data of a task several times
def questions(share: Any, count: int) -> list[dict[str, Any]]:
    """Up to `count` questions of one share. The wrong answers are the right ones of questions on other topics."""
    generator = random.Random(SEED)
    same_length = defaultdict(list)  # so that an answer's length tells nothing
    for topic, context, continuation in _pieces(share, generator):
        same_length[len(continuation)].append((topic, context, continuation))
    asked = []
    for pieces in same_length.values():
        for topic, context, continuation in pieces:
            others = {text: name for name, _, text in pieces if name != topic and text != continuation}
            wrong = _of_other_topics(others, generator)
            if wrong:
                choices = generator.sample([continuation, *wrong], ANSWERS)
                asked.append(dict(context=context, choices=choices, answer=choices.index(continuation), topic=topic))
    generator.shuffle(asked)
    return asked[:count]


def _pieces(share: Any, generator: random.Random) -> Iterator[tuple[str, str, str]]:
    """Topic, context and continuation of passages that do not overlap, at most A_TOPIC of a topic."""
    found, known = defaultdict(list), _known_elsewhere(share)
    for topic, text in documentation(share):
        words, start = " ".join(text.split()), 0
        while len(words) > (middle := _word_end(words, start + CONTEXT)) + CONTINUATION:
            end = _word_end(words, middle + 1 + CONTINUATION)
            if known.isdisjoint(_runs(words[start:end])):
                found[topic].append((topic, words[start:middle], words[middle + 1 : end]))
            start = end + 1
    for pieces in found.values():
        yield from generator.sample(pieces, min(len(pieces), A_TOPIC))


def _known_elsewhere(share: Any) -> set[str]:
    return {run for _, text in documentation("train" if share == "test" else "test") for run in _runs(text)}


def _runs(text: str) -> Iterator[str]:
    """All COMMON words in a row of a text."""
    words = text.split()
    return (" ".join(words[start : start + COMMON]) for start in range(len(words) - COMMON + 1))


def _word_end(words: str, position: int) -> int:
    """The first end of a word at or after `position`."""
    end = words.find(" ", position)
    return len(words) if end < 0 else end


def _of_other_topics(others: dict[str, str], generator: random.Random) -> list[str]:
    """Three texts of three topics out of {text: topic}; none when there are fewer topics."""
    chosen: dict[str, str] = {}
    for text in generator.sample(list(others), len(others)):
        chosen.setdefault(others[text], text)
        if len(chosen) == ANSWERS - 1:
            return list(chosen.values())
    return []


@functools.cache
def passages() -> list[str]:
    """Up to DOCUMENTS passages, the first of every document before the second of any."""
    known = _known_elsewhere("test")
    cut = [[piece for piece in _cut(text) if known.isdisjoint(_runs(piece))] for _, text in documentation("test")]
    longest = max(map(len, cut))
    return [pieces[place] for place in range(longest) for pieces in cut if place < len(pieces)][:DOCUMENTS]


def _cut(text: str) -> list[str]:
    """A text in pieces of up to DOCUMENT characters that end with a word, those below SHORTEST left out."""
    pieces = []
    while text:
        end = len(text) if len(text) <= DOCUMENT else max(text.rfind(" ", 0, DOCUMENT), DOCUMENT // 2)
        pieces.append(text[:end].strip())
        text = text[end:].strip()
    return [piece for piece in pieces if len(piece) >= SHORTEST]
