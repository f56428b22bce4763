"""Answers made comparable as the EvalAI server of VQA and TextVQA does it: case, punctuation, articles, numbers."""

from __future__ import annotations

import re

_COUNT = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(_COUNT.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # commas and question marks have gone before
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST = 32  # full stops taken away: the original gives a flag of `re` where the count belongs
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""


def _without_one(word: str) -> list[str]:
    """A word as often as it has apostrophes, each time without one of them."""
    return [word[:at] + word[at + 1 :] for at, sign in enumerate(word) if sign == "'"]


# The table of EvalAI has every contraction without one of its apostrophes, and one entry the wrong way round. Of the
# three for 'ow's'at the other two have an 's, which is a word of its own by then.
_ODD = {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}
CONTRACTIONS = {key: word for word in _CONTRACTIONS.split() for key in _without_one(word)} | _ODD


def normalized(answer: str) -> str:
    """'The Two, dogs.' -> '2 dogs'."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for sign in PUNCTUATION:  # beside a space it goes, between letters it becomes one
        plain = plain.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    plain = _FULL_STOP.sub("", plain, count=_MOST)
    words = (NUMBERS.get(word, word) for word in plain.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
