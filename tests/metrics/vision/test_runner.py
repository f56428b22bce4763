"""Suites answered by a tiny LLaVA: batches, resume after a kill, memory that runs out, what is refused and written."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mico import cli, vision_options
from mico.console import Console
from mico.errors import UserError
from mico.evaluate import evaluate
from mico.files import fingerprint
from mico.loading import load_model, load_processor
from mico.metrics.vision import grids
from mico.metrics.vision.answers import Answers
from mico.metrics.vision.ask import Asker, image_of, prompt_of
from mico.metrics.vision.question import Question
from mico.metrics.vision.run import asked_suites
from mico.metrics.vision.sections import suites_sections
from mico.metrics.vision.suites import SUITES, Suite, load_suite, part_of
from tests.pictures import TEMPLATE, llava_folder, picture
from tests.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llava_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder))


@pytest.fixture
def processor(folder):
    return load_processor(str(folder))


def few(count=7):
    """Questions of several lengths, every third without an image."""
    asked = ["Is it?", "What are one and two and three, and then?", "Another document, and then its end, or what?"]
    return [Question(str(i), asked[i % 3], "yes", f"row {i}", None if i % 3 == 2 else picture(i)) for i in range(count)]


def free(visual, prompt):
    return [dict(processed_tokens=float(one)) for one in visual]


def asker(loaded, processor, batch_size=3, **more):
    return Asker(loaded.model, processor, batch_size, Console(), free, **dict(new_tokens=6, name="few") | more)


def said(one, questions):
    return {answer["id"]: answer for batch in one.answers(questions) for answer in batch}


@torch.no_grad()
def by_hand(loaded, processor, question):
    """Greedy decoding without a cache, without padding, one token at a time."""
    inputs = processor(
        text=prompt_of(processor, question), return_tensors="pt",
        images=None if question.image is None else image_of(question),
    )  # fmt: skip
    ids, found = inputs["input_ids"], []
    while len(found) < 6:
        seen = dict(pixel_values=inputs["pixel_values"]) if question.image is not None else {}
        token = int(loaded.model(input_ids=ids, **seen).logits[0, -1].argmax())
        if token == 1:
            break
        found.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return processor.tokenizer.decode(found, skip_special_tokens=True).strip(), len(inputs["input_ids"][0])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_greedy_decoding_by_hand(loaded, processor, batch_size):
    questions = few(5)
    found = said(asker(loaded, processor, batch_size), questions)
    for question in questions:
        text, length = by_hand(loaded, processor, question)
        answer = found[question.id]
        assert (answer["text"], answer["prompt_tokens"]) == (text, length)
        assert answer["visual_tokens"] == (0 if question.image is None else 4)
    assert len({answer["text"] for answer in found.values()}) > 1


def test_sampling_settings_of_the_model_are_ignored_and_kept(loaded, processor):
    own = loaded.model.generation_config
    before = said(asker(loaded, processor), few(2))
    own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 3.0
    try:
        after = said(asker(loaded, processor), few(2))
        assert loaded.model.generation_config is own
    finally:
        own.do_sample, own.temperature, own.repetition_penalty = False, 1.0, 1.0
    assert {i: one["text"] for i, one in after.items()} == {i: one["text"] for i, one in before.items()}


def test_prompts_with_and_without_a_template(processor):
    seen, blind = few(3)[0], few(3)[2]
    assert prompt_of(processor, seen) == "USER: <image>\nIs it? ASSISTANT:"
    assert prompt_of(processor, blind) == f"USER: {blind.prompt} ASSISTANT:"
    processor.chat_template = TEMPLATE
    assert prompt_of(processor, seen) == "[U] <image>\nIs it? [A]"
    assert prompt_of(processor, blind) == f"[U] {blind.prompt} [A]"
    marked = Question("0", "What is an <image>?", "", "row 3")
    with pytest.raises(UserError, match="row 3: its prompt has 1 marks <image> for 0 images"):
        prompt_of(processor, marked)
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(UserError, match="row 0: its prompt has 0 marks <image> for 1 images"):
        prompt_of(processor, seen)


def test_an_answer_ends_at_the_end_token_or_is_cut(loaded, processor, monkeypatch):
    question, pad = few(1), processor.tokenizer.pad_token_id
    rows = {"ends": [40, 41, 1, pad, pad], "cut": [40, 41, 42, 43, 44]}
    for name, row in rows.items():
        monkeypatch.setattr(
            loaded.model, "generate", lambda row=row, **inputs: torch.cat([inputs["input_ids"], torch.tensor([row])], 1)
        )
        answer = said(asker(loaded, processor, new_tokens=5), question)["0"]
        assert (answer["cut"], answer["tokens"]) == ((False, 2) if name == "ends" else (True, 5))
        assert answer["text"] == processor.tokenizer.decode(row[: answer["tokens"]]).strip()


def test_a_prompt_longer_than_the_model_takes_is_named(loaded, processor):
    long = Question("0", "and then " * 200, "yes", "some.json, line 4", picture(0))
    with pytest.raises(UserError, match=r"some.json, line 4: its prompt has \d+ tokens"):
        said(asker(loaded, processor), [long])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_halves_the_batch(loaded, processor, monkeypatch):
    questions, generate, sizes = few(7), loaded.model.generate, []

    def hungry(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    plain = said(asker(loaded, processor, 4), questions)
    monkeypatch.setattr(loaded.model, "generate", hungry)
    one = asker(loaded, processor, 4)
    found = said(one, questions)
    assert sizes[:3] == [4, 2, 1] and one.halvings == 2 and one.batch_size == 1
    assert [note for note in one.console.notes if "halved to 2" in note and "few" in note]
    assert {i: answer["text"] for i, answer in found.items()} == {i: answer["text"] for i, answer in plain.items()}


def test_memory_for_not_even_one_question(loaded, processor, monkeypatch):
    def hungry(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loaded.model, "generate", hungry)
    with pytest.raises(UserError, match=r"suite few: out of memory on cpu with a batch of 1 \(row 0\)"):
        said(asker(loaded, processor, 2), few(2))


# --- the file of answers --------------------------------------------------------------------------------------------


def answer(name, text="yes"):
    return dict(
        id=name, text=text, tokens=1, cut=False, seconds=0.5, prompt_tokens=9, visual_tokens=4,
        costs=dict(processed_tokens=4.0),
    )  # fmt: skip


def test_answers_survive_a_torn_line(tmp_path):
    file = tmp_path / "suites" / "few.jsonl"
    Answers(file, dict(model="m")).add([answer("0"), answer("1", "Ünïcödé")])
    with file.open("ab") as stream:
        stream.write('{"id": "2", "text": "Ü'.encode()[:-1])
    again = Answers(file, dict(model="m"))
    assert list(again.found) == ["0", "1"] and again.found["1"]["text"] == "Ünïcödé"
    again.add([answer("2")])
    assert list(Answers(file, dict(model="m")).found) == ["0", "1", "2"]


def test_a_file_that_a_kill_left_empty_is_begun_anew(tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text('{"asked_w')
    Answers(file, dict(model="m")).add([answer("0")])
    assert len(file.read_text().splitlines()) == 2 and "0" in Answers(file, dict(model="m")).found


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nonsense", "line 2: no JSON"),
        ("[1]", "line 2: no object"),
        ('{"id": "0", "text": 3}', "line 2: text 3 is no str"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, told):
    file = tmp_path / "few.jsonl"
    Answers(file, dict(model="m"))
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(UserError, match=told):
        Answers(file, dict(model="m"))
    with pytest.raises(UserError, match="line 1: not what its name stands for"):
        Answers(file, dict(model="other"))


# --- mico eval ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """`grids` of three pictures."""
    own = Suite(lambda: grids.load(3), grids.score, grids.rows, files=False, new_tokens=4)
    monkeypatch.setitem(SUITES, "grids", own)
    return own.load()


def ask_grids(folder, output, **more):
    return evaluate(str(folder), suite="grids", output_path=str(output), batch_size=4, **more)


def test_suites_alone_measure_no_text(folder, small, tmp_path):
    report = ask_grids(folder, tmp_path / "out")
    (record,) = report["suites"]
    assert report["texts"] == {} and report["tasks"] == {}
    assert record["questions"] == record["of"] == 24 and record["limit"] is None and record["tokens"] is None
    assert set(record["figures"]["kinds"]) == {"read", "compare", "check"} and record["visual_tokens"] == 4
    assert 0 < record["latency"] <= record["seconds"] and record["cut"] <= 24
    written = json.loads((tmp_path / "out" / "results.json").read_text())["mico"]["suites"]
    assert written == [json.loads(json.dumps(record))]
    rows = (tmp_path / "out" / "suites" / record["answers"]).read_text().splitlines()
    assert len(rows) == 25 and json.loads(rows[0])["asked_with"]["data"] == record["data"]
    # a prompt costs what its tokens cost in both layers: keys and values of 2 heads of 16 channels in float32
    assert record["kv_bytes"] == pytest.approx(2 * 2 * 2 * 16 * 4 * record["prompt_tokens"])
    per_token = 2 * 64 * 16 * (2 * 4 + 2 * 2) + 6 * 64 * 96
    assert record["prefill_flops"] > 2 * per_token * record["prompt_tokens"]
    # the same again: nothing is generated, the figures are the same
    again = ask_grids(folder, tmp_path / "out")["suites"][0]
    assert again["reused"] == 24 and again["figures"] == record["figures"] and again["latency"] == record["latency"]


def test_a_killed_run_goes_on_where_it_was(folder, small, tmp_path, monkeypatch):
    whole = ask_grids(folder, tmp_path / "whole")["suites"][0]
    batch, before, asked = Asker._batch, [], []

    def killed(self, questions):
        if len(before) == 12:
            raise KeyboardInterrupt
        before.extend(question.id for question in questions)
        return batch(self, questions)

    with monkeypatch.context() as patch:
        patch.setattr(Asker, "_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            ask_grids(folder, tmp_path / "out")
    (file,) = (tmp_path / "out" / "suites").iterdir()
    assert len(file.read_text().splitlines()) == 1 + 12
    monkeypatch.setattr(Asker, "_batch", lambda self, qs: asked.extend(q.id for q in qs) or batch(self, qs))
    record = ask_grids(folder, tmp_path / "out")["suites"][0]
    assert record["reused"] == 12 and len(asked) == 12 and not set(asked) & set(before)
    assert record["figures"] == whole["figures"]


def test_answers_of_other_models_data_and_options_are_not_taken(folder, small, tmp_path, monkeypatch):
    ask_grids(folder, tmp_path / "out", limit=8)
    assert ask_grids(folder, tmp_path / "out", limit=12)["suites"][0]["reused"] == 8
    assert ask_grids(folder, tmp_path / "out", dtype="bfloat16", limit=8)["suites"][0]["reused"] == 0
    other = SUITES["grids"]
    monkeypatch.setitem(SUITES, "grids", Suite(other.load, other.score, other.rows, False, 5))
    assert ask_grids(folder, tmp_path / "out", limit=8)["suites"][0]["reused"] == 0
    monkeypatch.setitem(SUITES, "grids", Suite(lambda: grids.load(3, seed=1), other.score, other.rows, False, 4))
    assert ask_grids(folder, tmp_path / "out", limit=8)["suites"][0]["reused"] == 0


def test_answers_hang_on_what_cuts_and_ends_texts(folder, small, loaded, processor, monkeypatch):
    suites = asked_suites("grids", None, None, 4, str(folder), {})

    def facts():
        return suites._facts("grids", loaded, processor)

    found = [facts()]
    processor.tokenizer(["one", "one and two"], padding=True, truncation=True, max_length=3)  # leaves traces in it
    assert facts() == found[0] and json.loads(json.dumps(found[0])) == found[0]
    processor.tokenizer.add_tokens("documentary")
    found.append(facts())
    processor.num_additional_image_tokens += 1
    found.append(facts())
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [1, 9])
    found.append(facts())
    processor.chat_template = TEMPLATE
    found.append(facts())
    processor.image_processor.do_normalize = False
    found.append(facts())
    assert len({fingerprint(one) for one in found}) == len(found)


def test_what_is_missing_is_told_below_the_table():
    record = dict(
        suite="mme", questions=3, of=9, limit=3, tokens=None, cut=1, batch_halvings=2, batch_size=1, latency=0.5,
        without_rater=0.25, visual_tokens=4.0,
        figures=dict(perception=50.0, cognition=0.0, unpaired=1, absent=["count", "OCR"], categories={}),
    )  # fmt: skip
    assert suites_sections("m", [record])[0].lines == (
        "mme: 3 of 9 questions (--limit)",
        "mme: 1 answers were cut at the most tokens allowed",
        "mme: memory ran out, the batch was halved 2 times, to 1",
        "mme: no word stood out in 25.0% of the questions, all judged",
        "mme: 1 questions without their pair count in acc alone",
        "mme: no question of count, OCR: they add nothing to the sums",
    )


def test_results_hold_every_suite_of_the_model(folder, small, tmp_path):
    ask_grids(folder, tmp_path / "out")
    evaluate(str(folder), suite="grids", limit=0.5, output_path=str(tmp_path / "out"), batch_size=8)
    own = json.loads((tmp_path / "out" / "results.json").read_text())["mico"]
    assert [(one["limit"], one["questions"]) for one in own["suites"]] == [(None, 24), (0.5, 12)]
    (tmp_path / "text.txt").write_text("Document says that one and two. " * 90)
    text = dict(data_file=str(tmp_path / "text.txt"), seqlen=32, output_path=str(tmp_path / "out"))
    evaluate(str(folder), **text)
    own = json.loads((tmp_path / "out" / "results.json").read_text())["mico"]
    assert own["texts"] and len(own["suites"]) == 2
    ask_grids(folder, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["mico"]
    assert kept["texts"] == own["texts"] and len(kept["suites"]) == 2


def test_the_command_line_shows_a_table(folder, small, tmp_path, capsys):
    assert cli.main(["eval", str(folder), "--suite=grids", "--limit=8", "--quiet"]) == 0
    shown = capsys.readouterr().out
    for words in ("Suites of", "accuracy", "compare", "Cost of a question", "8 of 24 questions", "KV cache"):
        assert words in shown


@pytest.mark.parametrize("tokens", [dict(retain_tokens=2), dict(retain_tokens=2, token_method="fastv")])
def test_pruned_visual_tokens_stand_beside_all_of_them(folder, small, tmp_path, tokens):
    dense = ask_grids(folder, tmp_path / "out", limit=8)["suites"][0]
    pruned = ask_grids(folder, tmp_path / "out", limit=8, **tokens)["suites"][0]
    assert pruned["reused"] == 0 and pruned["tokens"]["retain"] == 2 and pruned["visual_tokens"] == 4
    assert pruned["equal_tokens"] == pytest.approx(2, abs=1) and pruned["processed_tokens"] < 4
    assert pruned["kv_bytes"] < dense["kv_bytes"]
    # a visual token less in a layer is 2 x 2 heads x 16 channels x 4 bytes less in the cache
    spared = 2 * (dense["processed_tokens"] - pruned["processed_tokens"]) * 2 * 2 * 16 * 4
    assert dense["kv_bytes"] - pruned["kv_bytes"] == pytest.approx(spared)
    again = ask_grids(folder, tmp_path / "out", limit=8, **tokens)["suites"][0]
    assert again["reused"] == 8 and again["prefill_flops"] == pruned["prefill_flops"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())["mico"]["suites"]
    assert [one["tokens"] and one["tokens"]["retain"] for one in written] == [None, 2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(suite="mmme"), "--suite mmme: unknown suite: choose from mme, pope"),
        (dict(suite=""), "--suite : unknown suite"),
        (dict(suite="mme"), "--suite mme needs --vlm-data"),
        (dict(suite="mme", vlm_data="DIR"), "holds no folder mme/"),
        (dict(vlm_data="DIR", eval="docs"), "--vlm-data has no effect without --suite"),
        (dict(retain_tokens=2, eval="docs"), "--retain-tokens has no effect without --suite"),
        (dict(suite="grids", adaptive=True), "--adaptive has no effect without --retain-tokens"),
        (dict(suite="grids", token_method="cls"), "--token-method has no effect without --retain-tokens"),
        (dict(suite="grids", retain_tokens=0), "--retain-tokens 0: must be at least 1"),
        (dict(suite="grids", retain_tokens=5), "--retain-tokens 5: a picture has 4 visual tokens"),
        (dict(suite="grids", retain_tokens=2, token_method="best"), "'best': choose from"),
        (dict(suite="grids", retain_tokens=2, sparsevlm_version="3"), "version '3': choose from 1.0, 2.0"),
        (dict(suite="grids", retain_tokens=2, token_method="fastv", adaptive=True), "--adaptive: fastv has no raters"),
        (dict(suite="grids", limit=0), "--limit 0: must be above 0"),
        (dict(suite="grids", num_fewshot=2), "--num-fewshot has no effect without --tasks"),
        (dict(suite="grids", samples=2), "--samples 2: prompts are cut from texts"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(folder, small, tmp_path, monkeypatch, options, told):
    monkeypatch.setattr("mico.evaluate.load_model", None)
    options = {name: str(tmp_path) if value == "DIR" else value for name, value in options.items()}
    with pytest.raises(UserError) as error:
        evaluate(str(folder), **options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_missing_image_is_named_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mico.evaluate.load_model", None)
    (tmp_path / "gqa" / "images").mkdir(parents=True)
    rows = {str(i): dict(imageId=f"n{i}", question="Is it?", answer="yes") for i in range(3)}
    (tmp_path / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    picture(0).save(tmp_path / "gqa" / "images" / "n0.jpg")
    with pytest.raises(UserError, match=r"question 1: image .*n1\.jpg does not exist"):
        evaluate(str(folder), suite="gqa", vlm_data=str(tmp_path))
    for image in load_suite("gqa", tmp_path)[1:]:
        picture(0).save(image.image)
    asked = part_of(load_suite("gqa", tmp_path), 1)[0].image  # the others must be there too: the digest has them
    next(image for image in sorted(asked.parent.iterdir()) if image != asked).unlink()
    with pytest.raises(UserError, match=r"question \d: image .*jpg does not exist"):
        evaluate(str(folder), suite="gqa", vlm_data=str(tmp_path), limit=1)


def test_an_image_that_is_none_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"some row: image .*a\.jpg cannot be read"):
        image_of(Question("0", "Is it?", "yes", "some row", tmp_path / "a.jpg"))


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
        assert image_of(Question("0", "", "", "", tmp_path / f"{mode}.png")).mode == "RGB"


def test_a_model_that_sees_no_images_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr("mico.evaluate.load_model", None)
    with pytest.raises(UserError, match=r"--suite grids: .*llama\) sees no images"):
        evaluate(str(save_model(tmp_path / "blind")), suite="grids")


# --- a part of a suite ----------------------------------------------------------------------------------------------


def test_a_limit_takes_questions_from_all_over_and_keeps_pairs():
    pairs = [Question(str(i), "", "", "", pair=str(i // 2)) for i in range(100)]
    for limit, size in ((10, 10), (0.25, 25), (7, 7), (1000, 100), (None, 100), (0.001, 1)):
        part = part_of(pairs, limit)
        assert len(part) == size and len({one.id for one in part}) == size
        alone = [one for one in part if sum(other.pair == one.pair for other in part) == 1]
        assert len(alone) <= 1
    places = [int(one.id) for one in part_of(pairs, 20)]
    assert places == sorted(places) and places[-1] >= 60 and places[0] < 40
    assert {one.id for one in part_of(pairs, 10)} < {one.id for one in part_of(pairs, 20)}


def test_a_limit_does_not_follow_the_period_of_a_suite():
    questions = grids.load(20)
    kinds = [one.about["kind"] for one in part_of(questions, 20)]
    assert set(kinds) == {"read", "compare", "check"}


def test_names_of_the_command_line_are_those_of_the_table():
    assert tuple(SUITES) == vision_options.SUITES
