"""Image-text data: what is read, what is refused and how, what a model gets of it, where the labels are."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico.errors import UserError
from mico.image_text import UNLABELLED, Sample, chat_text, chosen, collate, encode, load_image_text, pairs
from mico.image_text.sources import CAPTION_PROMPT
from mico.loading import load_processor
from tests.pictures import IMAGE, TEMPLATE, archive, encoded, instruct, llava_folder, picture


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(llava_folder(tmp_path_factory.mktemp("llava") / "tiny"))


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = llava_folder(tmp_path_factory.mktemp("templated") / "tiny", chat_template=TEMPLATE)
    return load_processor(folder)


# --- files ----------------------------------------------------------------------------------------------------------


def test_instruct_rows_are_read_with_their_pictures(tmp_path: Path) -> None:
    file = instruct(tmp_path)
    source = load_image_text(file, tmp_path / "images")
    assert (source.origin, source.sha256) == (str(file), hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(source.samples) == 12 and source.left_out == 0
    assert source.samples[4].turns == (("What is it?", "A document of 4."), ("And then?", "Its end."))
    assert source.samples[3].opened() is None
    seen = source.samples[4].opened()
    assert seen is not None and np.array_equal(np.asarray(seen), np.asarray(picture(4)))
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in json.loads(file.read_text())))
    assert [sample.turns for sample in load_image_text(lines, tmp_path / "images").samples] == [
        sample.turns for sample in source.samples
    ]


def test_turns_without_their_other_half_are_left_out_and_counted(tmp_path: Path, processor: Any) -> None:
    said = [("gpt", "lost"), ("human", "one?"), ("gpt", "two"), ("human", "lost")]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([dict(conversations=[{"from": who, "value": text} for who, text in said])]))
    source = load_image_text(file)
    assert source.samples[0].turns == (("one?", "two"),) and source.left_out == 2
    assert "2 turns without question or answer left out" in pairs(source, processor, 1, 64, 0).describe()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "no list 'conversations'"),
        (dict(conversations=[]), "no list 'conversations'"),
        (dict(conversations=[dict(value="x")]), "turn 1 is from None: 'human' or 'gpt' is expected"),
        (dict(conversations=[{"from": "human", "value": 3}]), "turn 1 has no text 'value'"),
        (dict(conversations=[{"from": "human", "value": "x"}]), "no question with an answer"),
        ("human human gpt", "turn 2: questions and answers do not take turns"),
        ("human:<image> gpt", "<image> is in the text and no 'image' in the row"),
        ("human gpt:<image>", "<image> stands once, in the first question, or nowhere"),
        ("human:<image><image> gpt", "<image> stands once, in the first question, or nowhere"),
        ("human gpt image:nowhere.png", "no picture DIR/nowhere.png"),
        ("human gpt image:", "'image' is '': the path of one picture is expected"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_by_file_and_row(tmp_path: Path, row: Any, message: str) -> None:
    if isinstance(row, str):
        words = [word.partition(":") for word in row.split()]
        turns = [{"from": who, "value": text or "x"} for who, _, text in words if who != "image"]
        row = dict(conversations=turns) | {who: text for who, _, text in words if who == "image"}
    file, good = tmp_path / "rows.json", [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file.write_text(json.dumps([dict(conversations=good), row, row, row, row]))
    wanted = f"{file}: 4 bad rows: row 2: {message}; row 3".replace("DIR", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(wanted) + ".* and 1 more: mend or remove them$"):
        load_image_text(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.json", None, "cannot be read: No such file"),
        ("bad.json", b"[{", r"not JSON"),
        ("object.json", b"{}", "a list of rows is expected, found dict"),
        ("none.json", b"[]", "is empty: no sample in it"),
        ("bad.jsonl", b'{"conversations"', r"bad\.jsonl:1: not JSON"),
        ("bad.tar", b"text" * 300, "is no uncompressed tar file"),
        ("no.tar", None, r"no\.tar cannot be read \(No such file or directory\)"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_image_text(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_archives_are_read_alone_or_by_the_folder(tmp_path: Path) -> None:
    rows = json.dumps(
        dict(conversations=[{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "It."}])
    )
    archive(tmp_path / "a.tar", 2, json=rows.encode())
    archive(tmp_path / "b.tar", 3, json=b'{"caption": "unused: the .txt goes before it"}')
    one, both = load_image_text(tmp_path / "a.tar"), load_image_text(tmp_path)
    assert one.samples[0].turns == (("What?", "It."),)
    assert one.samples[1].turns == ((CAPTION_PROMPT, "Another document, 1."),)
    assert [sample.turns for sample in both.samples[:2]] == [sample.turns for sample in one.samples]
    assert len(both.samples) == 5 and both.sha256 != one.sha256
    assert both.samples[2].turns == ((CAPTION_PROMPT, "Another document, 0."),)
    seen = both.samples[4].opened()
    assert seen is not None and seen.size == picture(2).size
    assert abs(np.asarray(seen, float) - np.asarray(picture(2), float)).mean() < 25  # a JPEG of it
    with pytest.raises(UserError, match="holds its pictures itself"):
        load_image_text(tmp_path / "a.tar", tmp_path)


def test_broken_samples_of_an_archive_are_named(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.tar", 2, txt=b" ")
    with pytest.raises(UserError, match=r"a\.tar: 1 bad rows: sample 00000: no caption"):
        load_image_text(file)
    file = archive(tmp_path / "a.tar", 2, jpg=encoded(picture(0), "jpeg")[:40])
    with pytest.raises(UserError, match=r"a\.tar, 00000\.jpg: the picture cannot be read"):
        load_image_text(file).samples[0].opened()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.tar file in this folder"):
        load_image_text(tmp_path / "empty")


def test_an_archive_that_ends_early_or_is_broken_inside_loses_no_sample_silently(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.tar", 4).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        headers = [member.offset for member in tar]
    broken = [whole[:at] for at in range(64, headers[-1] + 1024, 64)]  # cut, in headers, in contents and between
    for at in headers:
        for place in (at, at + 150):  # a name, a checksum
            flipped = bytearray(whole)
            flipped[place] ^= 255
            broken.append(bytes(flipped))
    broken += [whole[: headers[3]] + bytes(512) + whole[headers[3] + 512 :], whole + whole]
    for content in broken:
        (tmp_path / "broken.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.tar is (cut off or broken at byte|no uncompressed tar file)"):
            load_image_text(tmp_path / "broken.tar")


def test_the_choice_is_that_of_the_seed(tmp_path: Path) -> None:
    source = load_image_text(instruct(tmp_path), tmp_path / "images")
    places = [[source.samples.index(sample) for sample in chosen(source, 5, seed)] for seed in (0, 0, 1)]
    assert places[0] == places[1] == sorted(places[0]) != places[2]
    with pytest.raises(UserError, match=r"asks for 13 samples and .* has 12: lower --nsamples \(at most 12\)"):
        chosen(source, 13, 0)


# --- what a model reads ---------------------------------------------------------------------------------------------

TURNS = (("What is it?", "A document."), ("And then?", "Its end."))


def test_chat_text_is_vicunas_or_the_templates(processor: Any, templated: Any) -> None:
    text, spans = chat_text(processor, TURNS, picture=True)
    assert text == (
        "USER: <image>\nWhat is it? ASSISTANT: A document.</s>USER: And then? ASSISTANT: Its end.</s>"
    )  # fmt: skip
    assert [text[span.start : span.stop] for span in spans] == ["A document.</s>", "Its end.</s>"]
    assert chat_text(processor, [("Why?", None)], picture=False) == ("USER: Why? ASSISTANT:", [])
    text, spans = chat_text(templated, TURNS, picture=True)
    assert text == "[U] <image>\nWhat is it? [A] A document. [U] And then? [A] Its end.</s>"
    assert [text[span.start : span.stop] for span in spans] == ["A document.", "Its end.</s>"]
    assert chat_text(templated, [("Why?", None)], picture=False) == ("[U] Why? [A]", [])


@pytest.mark.parametrize("form", ["processor", "templated"])
@pytest.mark.parametrize("seen", [True, False])
def test_labels_are_on_the_answers_alone(form: str, seen: bool, request: pytest.FixtureRequest) -> None:
    processor = request.getfixturevalue(form)
    made = encode(Sample(TURNS, picture(0) if seen else None, "row"), processor, labels=True)
    ids, labels = made["input_ids"][0], made["labels"][0]
    assert ("pixel_values" in made) is seen and int((ids == IMAGE).sum()) == 4 * seen
    labelled = labels != UNLABELLED
    assert torch.equal(labels[labelled], ids[labelled])
    runs = [run.span() for run in re.finditer("1+", "".join("01"[on] for on in labelled.tolist()))]
    texts = [processor.tokenizer.decode(ids[start:end]).strip() for start, end in runs]
    ends = ["</s>", "</s>"] if form == "processor" else ["", "</s>"]
    assert texts == [f"{answer}{end}" for (_, answer), end in zip(TURNS, ends, strict=True)]


def test_a_sample_is_cut_but_never_inside_its_picture(processor: Any) -> None:
    sample = Sample(TURNS, picture(0), "file, row 3")
    whole = encode(sample, processor, labels=True)
    last = int((whole["input_ids"][0] == IMAGE).nonzero().max())
    cut = encode(sample, processor, labels=True, limit=last + 1)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, : last + 1])
    assert torch.equal(cut["labels"], whole["labels"][:, : last + 1]) and "pixel_values" in cut
    with pytest.raises(UserError, match=f"file, row 3: the picture reaches to token {last + 1}: --seqlen {last}"):
        encode(sample, processor, limit=last)


def test_batches_hold_every_sample_unpadded_and_training_batches_pad_on_the_left(
    tmp_path: Path, processor: Any
) -> None:
    source = load_image_text(instruct(tmp_path), tmp_path / "images")
    found = pairs(source, processor, 12, 128, 0)
    batches = found.batches(3)
    assert all(set(batch) <= {"input_ids", "pixel_values"} and len(batch["input_ids"]) <= 3 for batch in batches)
    rows = [(tuple(ids.tolist()), i, batch) for batch in batches for i, ids in enumerate(batch["input_ids"])]
    assert sorted(ids for ids, *_ in rows) == sorted(tuple(row["input_ids"][0].tolist()) for row in found.rows)
    for ids, place, batch in rows:
        own = next(row for row in found.rows if tuple(row["input_ids"][0].tolist()) == ids)
        assert ("pixel_values" in batch) is ("pixel_values" in own)
        if "pixel_values" in own:
            assert torch.equal(batch["pixel_values"][place], own["pixel_values"][0])
    assert max(len(batch["input_ids"]) for batch in batches) > 1
    assert (found.pictures, found.tokens) == (8, sum(len(ids) for ids, *_ in rows))
    assert f"{found.tokens:,} tokens, 32 of them visual, in 12 samples with 8 pictures" in found.describe()
    again = pairs(source, processor, 12, 128, 1)
    assert again.sha256 == found.sha256 != pairs(source, processor, 11, 128, 0).sha256
    training = [encode(sample, processor, labels=True) for sample in source.samples[:3]]
    batch = collate(training, processor.tokenizer.pad_token_id)
    assert len(batch["pixel_values"]) == 2 and batch["labels"].shape == batch["input_ids"].shape
    for number, row in enumerate(training):
        length = row["input_ids"].shape[1]
        assert batch["attention_mask"][number].sum() == length == batch["attention_mask"][number, -length:].sum()
        assert torch.equal(batch["labels"][number, -length:], row["labels"][0])
        assert (batch["labels"][number, :-length] == UNLABELLED).all()
