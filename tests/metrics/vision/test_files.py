"""The suites read from folders laid out as their authors and LLaVA lay them out, and what is wrong in them named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mico.errors import UserError
from mico.metrics.vision import gqa, mme, pope, scienceqa, textvqa
from mico.metrics.vision.ask import check_images
from mico.metrics.vision.question import SHORT
from mico.metrics.vision.suites import load_suite
from tests.pictures import picture

NOT_HERE = "does not exist: see calib_data/README.md"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".png", ".jpg"):
        picture(0).save(file)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


# --- MME ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mme_folder(tmp_path):
    """One category with its files in two folders, one with all in its own, and folders that are no category."""
    top = tmp_path / "mme" / "MME_Benchmark_release_version"
    asks = "Does this artwork exist in the form of {}? Please answer yes or no.\t{}\n"
    write(
        top / "artwork" / "questions_answers_YN" / "10002.txt",
        asks.format("painting", "Yes") + asks.format("glass", "No"),
    )
    write(top / "artwork" / "images" / "10002.jpg", None)
    word, red = 'Is the word in the logo "angie\'s"?  Please answer yes or no.', "Is it red? Please answer yes or no."
    write(top / "OCR" / "0001.txt", f"{word}\tYes\n\n{red}\tNo\n")
    write(top / "OCR" / "0001.png", None)
    write(top / "eval_tool" / "readme.txt", "nothing")
    return tmp_path / "mme"


def test_mme_in_both_layouts(mme_folder):
    questions = mme.load(mme_folder)
    check_images(questions)
    assert [(one.about["category"], one.answer) for one in questions] == [
        ("artwork", "yes"), ("artwork", "no"), ("OCR", "yes"), ("OCR", "no"),
    ]  # fmt: skip
    assert questions[0].prompt == "Does this artwork exist in the form of painting?" + SHORT
    assert questions[2].prompt == 'Is the word in the logo "angie\'s"?' + SHORT
    assert [one.pair for one in questions] == ["artwork/10002"] * 2 + ["OCR/0001"] * 2
    assert questions[0].image.name == "10002.jpg" and questions[3].image.name == "0001.png"
    assert questions[3].row.endswith("0001.txt, line 3")
    release = mme_folder / "MME_Benchmark_release_version"
    assert [one.id for one in mme.load(release)] == [one.id for one in questions]


def test_mme_asks_as_the_file_of_llava_does(mme_folder):
    rows = [
        dict(question_id="OCR/0001.png", image="OCR/0001.png", text="Is it red?" + SHORT, category="OCR"),
        dict(
            question_id="artwork/10002.jpg", image="artwork/images/10002.jpg", category="artwork",
            text="Does this artwork exist in the form of glass? Please answer yes or no." + SHORT,
        ),
    ]  # fmt: skip
    file = write(mme_folder / "llava_mme.jsonl", lines(*rows))
    questions = mme.load(mme_folder)
    assert [(one.prompt, one.answer) for one in questions] == [(rows[0]["text"], "no"), (rows[1]["text"], "no")]
    assert questions[1].image.name == "10002.jpg" and questions[0].pair == "OCR/0001"
    write(file, lines(rows[0], rows[1] | dict(text="Is it blue?")))
    with pytest.raises(UserError, match=r"llava_mme.jsonl, line 2: no .txt of artwork/10002 asks 'Is it blue\?'"):
        mme.load(mme_folder)


def test_mme_names_what_is_wrong(mme_folder, tmp_path):
    top = mme_folder / "MME_Benchmark_release_version"
    write(top / "OCR" / "0002.txt", "Is it red? Please answer yes or no. Yes\n")
    with pytest.raises(UserError, match=r"0002.txt, line 1: .* is no question, a tab, and Yes or No"):
        mme.load(mme_folder)
    write(top / "OCR" / "0002.txt", "Is it red? Please answer yes or no.\tYes\n")
    with pytest.raises(UserError, match=r"0002.txt, line 1: image .*0002.jpg does not exist"):
        check_images(mme.load(mme_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no category"):
        mme.load(tmp_path / "empty")
    (top / "color").mkdir()
    with pytest.raises(UserError, match=r"color holds no \.txt"):
        mme.load(mme_folder)


def test_a_text_that_is_not_utf_8_is_named(mme_folder):
    file = mme_folder / "MME_Benchmark_release_version" / "OCR" / "0001.txt"
    file.write_bytes(b"Is it \xff red?\tYes\n")
    with pytest.raises(UserError, match=r"0001.txt cannot be read \('utf-8' codec"):
        mme.load(mme_folder)


# --- POPE -----------------------------------------------------------------------------------------------------------


def pope_rows(count=2):
    text = "Is there a snowboard in the image?"
    return [
        dict(question_id=i + 1, image="COCO_val2014_1.jpg", text=text, label=("yes", "no")[i % 2]) for i in range(count)
    ]


@pytest.mark.parametrize(("where", "ending"), [("coco", "json"), (".", "json"), (".", "jsonl")])
def test_pope_reads_json_lines_whatever_their_name(tmp_path, where, ending):
    for split in pope.SPLITS:
        write(tmp_path / where / f"coco_pope_{split}.{ending}", lines(*pope_rows()))
    write(tmp_path / "val2014" / "COCO_val2014_1.jpg", None)
    questions = pope.load(tmp_path)
    check_images(questions)
    assert [one.id for one in questions] == [f"{split}/{n}" for split in pope.SPLITS for n in (1, 2)]
    assert questions[0].prompt == "Is there a snowboard in the image?" + SHORT
    assert [one.answer for one in questions] == ["yes", "no"] * 3


def test_pope_needs_all_three_files_and_whole_rows(tmp_path):
    write(tmp_path / "val2014" / "COCO_val2014_1.jpg", None)
    for split in pope.SPLITS[:2]:
        write(tmp_path / f"coco_pope_{split}.json", lines(*pope_rows()))
    with pytest.raises(UserError, match=f"coco_pope_adversarial.json {NOT_HERE}"):
        pope.load(tmp_path)
    last = tmp_path / "coco_pope_adversarial.json"
    for row, told in (
        (dict(label="maybe"), "line 2: label 'maybe' is none of yes, no"),
        (dict(text=3), "line 2: field 'text' is 3, not str"),
        (dict(image=None), "line 2: field 'image' is missing, not str"),
    ):
        write(last, lines(pope_rows()[0], pope_rows()[1] | row))
        with pytest.raises(UserError, match=told):
            pope.load(tmp_path)
    write(last, lines(pope_rows()[0]) + "{broken\n")
    with pytest.raises(UserError, match="line 2: no JSON"):
        pope.load(tmp_path)
    write(last, lines(*pope_rows(), pope_rows()[0]))
    (tmp_path / "pope").symlink_to(tmp_path)
    with pytest.raises(UserError, match="question id 'adversarial/1' is there twice"):
        load_suite("pope", tmp_path)


# --- ScienceQA ------------------------------------------------------------------------------------------------------


def problem(**more):
    plain = dict(question="Which is north?", choices=["Ohio", "Utah"], answer=1, hint="", image=None, split="test")
    return plain | dict(lecture="Maps have four directions.", solution="Look up.") | more


@pytest.fixture
def science(tmp_path):
    rows = {
        "4": problem(image="image.png"), "5": problem(hint=" Figure: Chicago.\nIt is windy. ", answer=0),
        "6": problem(choices=list("vwxyz"), answer=4),
    }  # fmt: skip
    write(tmp_path / "problems.json", rows)
    write(tmp_path / "pid_splits.json", dict(train=["6"], test=["5", "4", "6"]))
    write(tmp_path / "images" / "test" / "4" / "image.png", None)
    return tmp_path


def test_scienceqa_shows_hint_and_choices_but_no_lecture(science):
    hinted, seen, many = scienceqa.load(science)
    check_images([hinted, seen, many])
    assert hinted.prompt == (
        "Context: Figure: Chicago.\nIt is windy.\nWhich is north?\nA. Ohio\nB. Utah\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert seen.prompt.startswith("Which is north?\nA. Ohio\nB. Utah\nAnswer")
    assert (hinted.image, seen.image.name, many.image) == (None, "image.png", None)
    assert [one.answer for one in (hinted, seen, many)] == ["A", "B", "E"]
    assert [one.about["kind"] for one in (hinted, seen, many)] == ["text", "image", "text"]


def test_scienceqa_asks_as_the_file_of_llava_does(science):
    said = [{"from": "human", "value": "Where is north?\nA. Ohio\nB. Utah\n<image>"}, {"from": "gpt", "value": "B"}]
    write(science / "llava_test_CQM-A.json", [dict(id="4", image="4/image.png", conversations=said)])
    hinted, seen, _ = scienceqa.load(science)
    assert seen.prompt == "Where is north?\nA. Ohio\nB. Utah" + scienceqa.SUFFIX
    assert hinted.prompt.startswith("Context: ")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (problem(answer=2), "problem 5: answer 2 among 2 choices"),
        (problem(answer=-1), "problem 5: answer -1 among 2 choices"),
        (problem(answer="B"), "problem 5: field 'answer' is 'B', not int"),
        (problem(choices=list("abcdef")), "problem 5: answer 1 among 6 choices"),
        (problem(question=None), "problem 5: field 'question' is missing"),
        (problem(image=5), "problem 5: field 'image' is 5, not str"),
        (3, "problem 5: a int, not an object"),
        (None, "problem 5: missing, named by .*pid_splits.json"),
    ],
)
def test_scienceqa_names_the_problem_that_is_wrong(science, row, told):
    write(science / "problems.json", {} if row is None else {"5": row})
    with pytest.raises(UserError, match=told):
        scienceqa.load(science)


@pytest.mark.parametrize("turns", [[], ["Where is north?"], [{"from": "human"}]])
def test_scienceqa_names_the_row_of_llava_that_is_wrong(science, turns):
    write(science / "llava_test_CQM-A.json", [dict(id="4", conversations=turns)])
    with pytest.raises(UserError, match=r"llava_test_CQM-A.json, entry 1: "):
        scienceqa.load(science)


# --- GQA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "data/questions", "questions"])
def test_gqa(tmp_path, inside):
    rows = {
        "201307251": dict(imageId="n161313", question="Is it overcast?", answer="no", types=dict(structural="verify")),
        "201640614": dict(imageId="n161313", question="Who is wearing the dress?", answer="woman"),
    }
    write(tmp_path / inside / "testdev_balanced_questions.json", rows)
    write(tmp_path / ("data/images" if "data" in inside else "images") / "n161313.jpg", None)
    first, second = gqa.load(tmp_path)
    check_images([first, second])
    assert first.prompt == "Is it overcast?" + SHORT and (first.id, first.answer) == ("201307251", "no")
    assert (first.about["kind"], second.about["kind"]) == ("verify", "other")


def test_gqa_names_what_is_wrong(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=f"testdev_balanced_questions.json {NOT_HERE}"):
        gqa.load(tmp_path)
    file = write(tmp_path / "testdev_balanced_questions.json", {"1": dict(imageId="n1", question="Is it?")})
    with pytest.raises(UserError, match="question 1: field 'answer' is missing"):
        gqa.load(tmp_path)
    write(file, [1])
    with pytest.raises(UserError, match="holds a list, not an object"):
        gqa.load(tmp_path)
    write(file, {})
    (tmp_path / "gqa").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"--suite gqa: .* holds no question"):
        load_suite("gqa", tmp_path)


# --- TextVQA --------------------------------------------------------------------------------------------------------


def text_row(**more):
    known = dict(question_id=34602, image_id="003a8ae2ef43b901", question="what is the brand of this camera?")
    return known | dict(answers=["dakota"] * 10) | more


@pytest.fixture
def text_folder(tmp_path):
    write(tmp_path / "TextVQA_0.5.1_val.json", dict(data=[text_row()]))
    write(tmp_path / "train_images" / "003a8ae2ef43b901.jpg", None)
    return tmp_path


def test_textvqa_without_ocr_tokens_says_so(text_folder):
    (question,) = textvqa.load(text_folder)
    check_images([question])
    assert question.prompt == "What is the brand of this camera?" + SHORT
    assert question.about == dict(hint="none") and question.answer == ["dakota"] * 10 and question.id == "34602"


def test_textvqa_with_ocr_tokens_of_the_row_or_of_rosetta(text_folder):
    hinted = "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + SHORT
    rosetta = dict(data=[dict(image_id="003a8ae2ef43b901", ocr_tokens=["DAKOTA", "DIGITAL"], ocr_info=[])])
    file = write(text_folder / "TextVQA_Rosetta_OCR_v0.2_val.json", rosetta)
    assert textvqa.load(text_folder)[0].prompt == hinted
    file.unlink()
    write(text_folder / "TextVQA_0.5.1_val.json", dict(data=[text_row(ocr_tokens=["DAKOTA", "DIGITAL"])]))
    (question,) = textvqa.load(text_folder)
    assert question.prompt == hinted and question.about == dict(hint="ocr")


@pytest.mark.parametrize("first", [True, False])
def test_textvqa_asks_as_the_file_of_llava_does(text_folder, first):
    parts = ["What is the brand of this camera?", "Reference OCR token: DAKOTA, Pire"]
    text = "\n".join(parts if first else parts[::-1]) + SHORT
    write(text_folder / textvqa.LLAVA, lines(dict(question_id="003a8ae2ef43b901", image="x.jpg", text=text)))
    (question,) = textvqa.load(text_folder)
    assert question.prompt == text and question.about == dict(hint="ocr")


def test_textvqa_names_what_is_wrong(text_folder):
    file = text_folder / "TextVQA_0.5.1_val.json"
    for row, told in (
        (text_row(answers=["one"] * 9), "entry 2: 9 answers, not 10"),
        (text_row(question=None), "entry 2: field 'question' is missing"),
        (3, "entry 2: a int, not an object"),
        (text_row(ocr_tokens="DAKOTA"), "entry 2: field 'ocr_tokens' is 'DAKOTA', not list"),
    ):
        write(file, dict(data=[text_row(), row]))
        with pytest.raises(UserError, match=told):
            textvqa.load(text_folder)
    write(file, dict(rows=[]))
    with pytest.raises(UserError, match="field 'data' is missing, not list"):
        textvqa.load(text_folder)
    write(file, dict(data=[text_row()]))
    write(text_folder / "TextVQA_Rosetta_OCR_v0.2_val.json", dict(data=[3]))
    with pytest.raises(UserError, match=r"Rosetta_OCR_v0.2_val.json, entry 1: a int, not an object"):
        textvqa.load(text_folder)
