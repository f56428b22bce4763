"""The verb eval on model folders and run folders; everything wrong is told before weights are read."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from mico import evaluate as verb
from mico.errors import UserError
from mico.evaluate import evaluate
from tests.tiny import CONTEXT, save_model, train_tokenizer

SENTENCES = [f"document number {i} says {i * i} and then one and two" for i in range(60)]


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch):
    monkeypatch.delenv("MICO_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, file in (("wikitext2", "test.txt"), ("ptb", "test.txt")):
        (root / name).mkdir()
        (root / name / file).write_text("".join(f" {sentence} \n" for sentence in SENTENCES))
    (root / "c4").mkdir()
    rows = (json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES)
    (root / "c4" / "validation.jsonl").write_text("".join(rows))
    return root


@pytest.fixture
def no_weights(monkeypatch):
    """Fail the test when weights are read."""

    def read(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(verb, "load_model", read)


def make_run(path, folder, **arguments):
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"format": "mico-run", "version": 1, "arguments": arguments}))
    if folder is not None:
        shutil.copytree(folder, path / "model")
    return path


def plain_perplexity(folder, text, seqlen) -> float:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor(train_tokenizer()(text).input_ids)
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, 1, seqlen)
    with torch.no_grad():
        losses = [model(input_ids=window, labels=window).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def test_a_model_folder_is_measured_on_the_three_texts(folder, data_dir):
    report = evaluate(str(folder), data_dir=str(data_dir), device="cpu")
    assert list(report["perplexity"]) == ["wikitext2", "ptb", "c4"]
    joined = " ".join(SENTENCES)
    assert report["perplexity"]["ptb"] == pytest.approx(plain_perplexity(folder, joined, CONTEXT), rel=1e-5)
    assert report["perplexity"]["c4"] == pytest.approx(report["perplexity"]["ptb"], rel=1e-5)
    wiki = "\n\n".join(f" {sentence} \n" for sentence in SENTENCES)
    assert report["perplexity"]["wikitext2"] == pytest.approx(plain_perplexity(folder, wiki, CONTEXT), rel=1e-5)
    assert report["texts"]["c4"]["shortfall"] > 0 and report["texts"]["ptb"]["shortfall"] == 0
    facts = dict(model=str(folder), family="Llama", seqlen=CONTEXT, dtype="float32", device="cpu", protocol="sparsegpt")
    assert {name: report[name] for name in facts} == facts


def test_seqlen_and_texts_are_taken_and_the_json_is_the_report(folder, data_dir, tmp_path):
    file = tmp_path / "new" / "result.json"
    report = evaluate(str(folder), eval="ptb", data_dir=str(data_dir), seqlen=16, batch_size=3, json=str(file))
    assert json.loads(file.read_text()) == report
    assert list(report["texts"]) == ["ptb"] and report["texts"]["ptb"]["seqlen"] == 16
    assert report["perplexity"]["ptb"] == pytest.approx(plain_perplexity(folder, " ".join(SENTENCES), 16), rel=1e-5)
    assert list(tmp_path.rglob("*.json")) == [file], "nothing unfinished is left"


def test_an_own_file_is_measured_alone_or_beside_texts(folder, data_dir, tmp_path):
    own = tmp_path / "mine.txt"
    own.write_text(" ".join(SENTENCES))
    alone = evaluate(str(folder), data_file=str(own))
    assert list(alone["perplexity"]) == ["mine.txt"]
    beside = evaluate(str(folder), eval=["ptb"], data_dir=str(data_dir), data_file=str(own))
    assert beside["perplexity"]["mine.txt"] == beside["perplexity"]["ptb"] == alone["perplexity"]["mine.txt"]


def test_a_run_folder_means_the_model_in_it_and_the_texts_it_was_measured_on(folder, data_dir, tmp_path):
    run = make_run(tmp_path / "run", folder, eval={"ptb": "a digest"})
    report = evaluate(str(run), data_dir=str(data_dir))
    assert report["perplexity"] == evaluate(str(folder), eval="ptb", data_dir=str(data_dir))["perplexity"]
    assert report["model"] == str(run) and report["source"] == str(run / "model")
    assert list(evaluate(str(run), eval="c4", data_dir=str(data_dir))["texts"]) == ["c4"]


@pytest.mark.parametrize("arguments", [{}, {"eval": {}}, {"eval": {"mine.txt": "a digest"}}, {"eval": "ptb"}])
def test_a_run_folder_without_known_texts_takes_the_default(folder, data_dir, tmp_path, arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(verb, "evaluation_sets", lambda _, texts, **options: asked.append(texts) or {})
    run = make_run(tmp_path / "run", folder, **arguments)
    evaluate(str(run), data_dir=str(data_dir))
    assert asked == [("wikitext2", "ptb", "c4")]


@pytest.mark.usefixtures("no_weights")
def test_an_unfinished_run_folder_is_refused(tmp_path):
    run = make_run(tmp_path / "run", None)
    with pytest.raises(UserError, match="run: this run folder holds no finished model/"):
        evaluate(str(run))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eval="ptb,wiki3"), "unknown text 'wiki3': choose from wikitext2, ptb, c4, docs or all"),
        (dict(eval="wikitext2", offline=True), "text 'wikitext2' needs the hub and --offline is set"),
        (dict(eval="ptb", data_dir="absent"), "--data-dir absent is not a folder"),
        (dict(data_file="absent.txt"), "absent.txt does not exist"),
        (dict(eval="docs", seqlen=CONTEXT + 1), f"--seqlen {CONTEXT + 1}: must be from 2 to"),
        (dict(eval="docs", seqlen=1), "--seqlen 1: "),
        (dict(eval="docs", batch_size=0), "--batch-size 0: must be at least 1"),
        (dict(eval="docs", device="quantum"), "--device quantum: "),
    ],
)
def test_mistakes_are_told_in_one_line_before_weights_are_read(folder, options, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(str(folder), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_weights")
def test_a_result_file_that_cannot_be_written_is_refused_first(folder, tmp_path):
    with pytest.raises(UserError, match=r"--json .*: this is a folder"):
        evaluate(str(folder), eval="docs", json=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/result\.json cannot be written"):
        evaluate(str(folder), eval="docs", json=str(tmp_path / "file" / "result.json"))


def test_an_earlier_result_survives_a_run_that_fails(folder, tmp_path):
    file = tmp_path / "result.json"
    file.write_text("earlier")
    with pytest.raises(UserError):
        evaluate(str(folder), eval="wikitext2", offline=True, json=str(file))
    assert file.read_text() == "earlier"


def test_unknown_models_and_families_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown model 'tiny-lama'"):
        evaluate("tiny-lama")
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UserError, match="bloom"):
        evaluate(str(tmp_path))
