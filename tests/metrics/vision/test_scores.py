"""Scores of the suites on cases made by hand, and against other ways to compute the same."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from mico.metrics.vision import gqa, grids, mme, pope, scienceqa, textvqa
from mico.metrics.vision.question import Question, Record
from mico.metrics.vision.vqa_words import CONTRACTIONS, normalized
from mico.metrics.vision.yes_no import mme_answer, mme_figures, pope_answer, pope_figures


def record(text: str, answer: Any, pair: str | None = None, **about: str) -> Record:
    return Record(Question("0", "", answer, "", pair=pair, about=about), text)


# --- MME ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("NO", "no"), ("No, it is not.", "no"), ("Yes, there is no dog.", "yes"),
        ("It is. Yes", "other"), ("not at all", "no"), ("I know", "other"), ("know", "no"), ("", "other"),
        ("The answer is no", "other"), ('"yes"', "yes"), ("(no)", "no"),
    ],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(text, said):
    assert mme_answer(text) == said


def test_mme_by_hand():
    found = [
        record("Yes", "yes", "color/1", category="color"), record("No.", "no", "color/1", category="color"),
        record("yes", "yes", "color/2", category="color"), record("Yes", "no", "color/2", category="color"),
        record("perhaps", "no", "color/3", category="color"),  # its pair is not there
        record("no", "no", "text_translation/1", category="text_translation"),
        record("nothing", "yes", "text_translation/1", category="text_translation"),
    ]  # fmt: skip
    figures = mme.score(found)
    color = figures["categories"]["color"]
    assert (color["acc"], color["acc_plus"], color["unpaired"]) == (pytest.approx(60), pytest.approx(50), 1)
    assert figures["perception"] == pytest.approx(110) and figures["cognition"] == pytest.approx(50)
    assert figures["unpaired"] == 1 and len(figures["absent"]) == 12 and "color" not in figures["absent"]
    assert ("perception, of 2,000", "110.0") in mme.rows(figures)


def test_mme_knows_fourteen_categories():
    assert len(mme.PERCEPTION) == 10 and len(mme.COGNITION) == 4
    full = [
        record(answer, answer, f"{name}/1", category=name)
        for name in (*mme.PERCEPTION, *mme.COGNITION)
        for answer in ("yes", "no")
    ]
    figures = mme.score(full)
    assert (figures["perception"], figures["cognition"], figures["absent"]) == (2000, 800, [])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "maybe"]), st.booleans()), max_size=40))
def test_mme_points_equal_a_count(said):
    """Images in order, two questions each, the last maybe alone; counted image by image."""
    found = [record(text, "yes" if yes else "no", str(i // 2)) for i, (text, yes) in enumerate(said)]
    hits = [text == ("yes" if yes else "no") for text, yes in said]
    both, images = 0, 0
    for first in range(0, len(hits) - 1, 2):
        images += 1
        both += hits[first] and hits[first + 1]
    figures = mme_figures(found)
    assert figures["acc"] == pytest.approx(100 * sum(hits) / len(hits) if hits else 0)
    assert figures["acc_plus"] == pytest.approx(100 * both / images if images else 0)
    assert figures["unpaired"] == len(hits) % 2


# --- POPE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No", "no"), ("no", "no"), ("Yes, there is.", "yes"), ("There is not a dog. Yes", "no"),
        ("Yes. No, wait", "yes"), ("No, there is none", "no"), ("NO", "yes"), ("Not here", "yes"), ("nothing", "yes"),
        ("", "yes"), (". no", "yes"), ("well,no", "yes"), ("a dog is ,not, there", "no"), ("no\nyes", "yes"),
    ],
)  # fmt: skip
def test_pope_looks_for_words_before_the_first_full_stop(text, said):
    assert pope_answer(text) == said


@settings(max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_pope_equals_scikit_learn(pairs):
    found = [record("Yes" if said else "No", "yes" if true else "no") for said, true in pairs]
    figures = pope_figures(found)
    said, true = zip(*pairs, strict=True)
    scores = precision_recall_fscore_support(true, said, average="binary", pos_label=True, zero_division=0)
    assert (figures["precision"], figures["recall"], figures["f1"]) == pytest.approx(scores[:3])
    assert figures["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert figures["yes_ratio"] == pytest.approx(sum(said) / len(said))


def test_pope_means_are_over_the_splits():
    found = [record("yes", "yes", split="random")] * 9 + [record("yes", "no", split="popular")]
    figures = pope.score(found)
    assert figures["f1"] == 0.5 and figures["accuracy"] == 0.5 and figures["yes_ratio"] == 1
    assert figures["splits"]["random"]["f1"] == 1 and figures["splits"]["popular"]["precision"] == 0
    assert ("mean F1", "50.0%") in pope.rows(figures)


# --- ScienceQA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"), (" B ", "B"), ("B. Louisiana", "B"), ("B.", None), ("B) Louisiana", None), ("b", None),
        ("I think. The answer is C.", "C"), ("The answer is D", "D"), ("The answer is A because B.", "A"),
        ("The answer is B, no: The answer is C.", "C"), ("The answer is x", None), ("Because A. ", None), ("", None),
        ("A\nThe answer is B.", "A"), ("E", "E"), ("F", None), ("AB", None), ("the answer is A.", None),
    ],
)  # fmt: skip
def test_scienceqa_reads_an_option(text, said):
    assert scienceqa.letter(text) == said


def test_scienceqa_tells_questions_with_an_image_apart():
    found = [
        record("A", "A", kind="image"), record("B. x", "A", kind="image"), record("The answer is C.", "C", kind="text"),
        record("C", "C", kind="text"), record("none", "C", kind="text"),
    ]  # fmt: skip
    figures = scienceqa.score(found)
    assert (figures["accuracy"], figures["image_accuracy"]) == (0.6, 0.5)
    assert figures["text_accuracy"] == pytest.approx(2 / 3)
    assert (figures["image_questions"], figures["unparsed"]) == (2, 1)
    assert ("answers without an option", "1") in scienceqa.rows(figures)


# --- GQA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Yes", True),
        ("yes.", True),
        ("YES...", True),
        ("yes!", False),
        ("yes. no", False),
        (".yes", False),
        ("", False),
    ],
)
def test_gqa_is_exact_but_for_case_and_full_stops(text, right):
    assert gqa.right(record(text, "yes", kind="verify")) is right


def test_gqa_by_kind():
    found = [
        record("Yes.", "yes", kind="verify"),
        record("left", "right", kind="query"),
        record("Cat", "cat", kind="query"),
    ]
    assert gqa.score(found) == dict(accuracy=pytest.approx(2 / 3), kinds=dict(verify=1.0, query=0.5))


# --- TextVQA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("The Dog", "dog"), ("a an the", ""), ("Two, dogs.", "2 dogs"), ("none", "0"), ("ten ten", "10 10"),
        ("1,000", "1000"), ("3.5", "3.5"), ("3. 5", "3 5"), ("no. 5", "no 5"), ("u.s.a.", "usa"), ("9.", "9"),
        ("dont", "don't"), ("Couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"), ("twas", "'twas"),
        ("yalld've", "yalld've"), ("y'alld've", "y'all'd've"), ("somebody'd", "somebodyd"), ("oclock", "o'clock"),
        ("'ows'at", "'ow's'at"), ("ow's'at", "ow 's'at"),
        ("joe's", "joe 's"), ("what?", "what"), ("coca-cola", "coca cola"), ("coca -cola", "coca cola"),
        ("new- york", "new york"), ("(a)", ""), ("w(i)th", "w i th"), ("7/11", "7 11"), ("7 /11", "7 11"),
        ('"stop"', "stop"), ("a\nb\tc", "b c"), ("rock & roll", "rock & roll"), ("$5", "$5"), ("10:30", "10:30"),
        ("hi!", "hi"), ("hi!there", "hi there"), ("@home", "home"), ("one_two", "1 2"), ("  far   out ", "far out"),
        ("'S", "'s"), ("eleven", "eleven"), ("Im", "im"), ("", ""),
    ],
)  # fmt: skip
def test_answers_are_normalized_as_evalai_does(said, words):
    assert normalized(said) == words


def slowly(answer: str) -> str:
    """The rules of the EvalAI server one after another, as its documentation of VQA lists them."""
    answer = answer.lower()
    for sign in ",?":
        answer = "".join(letter for letter in answer if letter != sign)
    answer = " 's".join(answer.split("'s")).strip()
    answer = re.sub("[\n\t]", " ", answer).strip()
    result = answer
    for sign in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", "!"]:
        beside_space = bool(re.search(re.escape(sign) + " ", answer) or re.search(" " + re.escape(sign), answer))
        result = ("" if beside_space else " ").join(result.split(sign))
    kept = [letter for place, letter in enumerate(result) if letter != "." or result[place + 1 : place + 2].isdecimal()]
    digits = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8")
    digits |= dict(nine="9", ten="10")
    words = []
    for word in "".join(kept).split():
        word = digits.get(word, word)
        if word in ("a", "an", "the"):
            continue
        words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


@given(st.text(alphabet="aetn1 5.,-'\"!s\n/?xo(", max_size=30))
def test_normalized_equals_the_rules_one_by_one(answer):
    assert normalized(answer) == slowly(answer)


def test_contractions():
    assert len(CONTRACTIONS) == 112 and CONTRACTIONS["wont"] == "won't" and CONTRACTIONS["y'allll"] == "y'all'll"
    for key, word in CONTRACTIONS.items():
        assert key.replace("'", "") == word.replace("'", ""), key


def leave_one_out(text: str, answers: list[str]) -> float:
    """Each person in turn is left out; three of the other nine who say the same make it fully right."""
    total = 0.0
    for left_out in range(len(answers)):
        others = [normalized(answer) for place, answer in enumerate(answers) if place != left_out]
        total += min(others.count(normalized(text)) / 3, 1)
    return total / len(answers)


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_by_hand(matches, score):
    answers = ["Dakota."] * matches + [f"other {i}" for i in range(10 - matches)]
    assert textvqa.agreement("the dakota", answers) == pytest.approx(score)


def test_agreement_equals_leaving_one_out():
    draw = random.Random(0)
    for _ in range(200):
        answers = [draw.choice(["one", "1", "two", "the 2", "cats"]) for _ in range(10)]
        text = draw.choice(["One", "2", "dogs", "cats."])
        assert textvqa.agreement(text, answers) == pytest.approx(leave_one_out(text, answers))


def test_textvqa_counts_questions_without_a_hint():
    found = [record("a", ["b"] * 10, hint="none"), record("stop", ["STOP!"] * 10, hint="ocr")]
    assert textvqa.score(found) == dict(accuracy=0.5, without_ocr=1)


# --- grids ----------------------------------------------------------------------------------------------------------


def test_grids_by_kind_and_as_yes_no_suites():
    found = [
        record("7.", "7", kind="read"), record("3", "7", kind="read"), record("9", "9", kind="compare"),
        record("Yes", "yes", "0", kind="check"), record("no", "no", "0", kind="check"),
        record("yes", "yes", "1", kind="check"), record("Yes.", "no", "1", kind="check"),
    ]  # fmt: skip
    figures = grids.score(found)
    assert figures["accuracy"] == pytest.approx(5 / 7)
    assert figures["kinds"] == dict(check=0.75, compare=1.0, read=0.5)
    assert (figures["mme"]["acc"], figures["mme"]["acc_plus"]) == (75, 50)
    assert figures["pope"]["recall"] == 1 and figures["pope"]["precision"] == pytest.approx(2 / 3)
    assert ("check as MME, of 200", "125.0") in grids.rows(figures)


def test_grids_ask_yes_and_no_in_pairs():
    questions = grids.load(2)
    pairs: dict[str, list[Question]] = {}
    for question in questions:
        if question.about["kind"] == "check":
            assert question.pair is not None
            pairs.setdefault(question.pair, []).append(question)
        else:
            assert question.pair is None
    assert len(questions) == 16 and len(pairs) == 4 and len({question.id for question in questions}) == 16
    for pair in pairs.values():
        assert [question.answer for question in pair] == ["yes", "no"]


def test_the_photo_set_shows_the_same_kind_of_questions_on_other_pictures():
    plain, photo = grids.load(1), grids.load(1, background="photo")
    assert [one.about for one in plain] == [one.about for one in photo]
    assert plain[0].image.tobytes() != photo[0].image.tobytes()
    assert [one.facts() for one in grids.load(1)] == [one.facts() for one in plain]
