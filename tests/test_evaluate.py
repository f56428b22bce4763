"""The verb eval: perplexity, KL, tasks, samples; everything wrong is told before weights are read."""

from __future__ import annotations

import json
import math
import random
import shutil
import weakref

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from mico import evaluate as verb
from mico.console import Console
from mico.errors import UserError
from mico.evaluate import evaluate
from mico.loading import REFERENCE_DIR, fingerprint
from mico.metrics import divergence
from mico.metrics.asked import LM_EVAL
from mico.metrics.sections import evaluation_sections
from tests.tiny import CONTEXT, VOCABULARY, random_model, save_model, train_tokenizer
from tests.workspace import workspace

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
    for name in ("wikitext2", "ptb"):
        (root / name).mkdir()
        (root / name / "test.txt").write_text("".join(f" {sentence} \n" for sentence in SENTENCES))
    (root / "ptb" / "validation.txt").write_text("".join(f" {sentence} \n" for sentence in SENTENCES[::-1]))
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


# --- against a plain loop of transformers ----------------------------------------------------------------------------


def raw_windows(tokenizer, data_dir, name: str, protocol: str, seqlen: int) -> list[list[int]]:
    """Windows cut from the files themselves, by the description of the two protocols."""
    folder = data_dir / name
    if name == "wikitext2":
        rows = (folder / "test.txt").read_text().splitlines(keepends=True)
        text = "\n\n".join(row if row.strip() else "" for row in rows)
    elif name == "ptb":
        rows = (folder / ("test.txt" if protocol == "sparsegpt" else "validation.txt")).read_text().splitlines()
        text = (" " if protocol == "sparsegpt" else "\n\n").join(row.strip() for row in rows)
    else:
        documents = [json.loads(row)["text"] for row in (folder / "validation.jsonl").read_text().splitlines()]
        text = " ".join(documents[:1100])
    if name == "c4" and protocol == "gptq":
        draw, crops = random.Random(0), []
        while len(crops) < 256:
            ids = tokenizer(documents[draw.randint(0, len(documents) - 1)]).input_ids
            if len(ids) > seqlen:
                start = draw.randint(0, len(ids) - seqlen - 1)
                crops.append(ids[start : start + seqlen])
        return crops
    ids = tokenizer(text).input_ids[: 256 * seqlen if name == "c4" else None]
    return [ids[i : i + seqlen] for i in range(0, len(ids) - seqlen + 1, seqlen)]


def float64_perplexity(model, windows: list[list[int]]) -> float:
    losses = []
    with torch.no_grad():
        for ids in torch.tensor(windows).split(64):
            logits = model(input_ids=ids).logits[:, :-1].double()
            losses.append(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt", "compressed"])
def test_equals_a_plain_transformers_loop_in_float64(name, data_dir, tmp_path_factory):
    folder = REFERENCE_DIR / name
    if name == "compressed":
        folder = workspace(tmp_path_factory.getbasetemp()).run / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, seqlen = AutoTokenizer.from_pretrained(folder), 16
    for protocol in ("sparsegpt", "gptq"):
        texts = "all" if protocol == "sparsegpt" else "ptb,c4"  # its wikitext2 is the same
        found = evaluate(str(folder), eval=texts, protocol=protocol, data_dir=str(data_dir), seqlen=seqlen, kl=False)
        assert found["protocol"] == protocol
        for text, perplexity in found["perplexity"].items():
            windows = raw_windows(tokenizer, data_dir, text, protocol, seqlen)
            assert found["texts"][text]["windows"] == len(windows) > 10
            assert found["texts"][text]["protocol"] == protocol
            assert perplexity == pytest.approx(float64_perplexity(model, windows), rel=1e-5)


# --- distance to the dense model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(folder, tmp_path_factory):
    """`folder` with slightly other weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), random_model("llama", seed=1).parameters(), strict=True):
            parameter.lerp_(other, 0.2)
    path = tmp_path_factory.mktemp("models") / "moved"
    model.save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return path


def plain_kl(dense, folder, windows) -> tuple[float, float]:
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (dense, folder)]
    with torch.no_grad():
        p, q = (model(input_ids=torch.tensor(windows)).logits[:, :-1].double().softmax(-1) for model in models)
    return float((p * (p / q).log()).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_kl_to_a_dense_model_named(folder, moved, data_dir):
    options = dict(eval="ptb,wikitext2", data_dir=str(data_dir), seqlen=16)
    found = evaluate(str(moved), dense=str(folder), **options)
    assert found["dense"]["model"] == str(folder)
    assert found["dense"]["perplexity"] == evaluate(str(folder), **options)["perplexity"]
    assert found["perplexity"] == evaluate(str(moved), **options)["perplexity"]
    for text in ("ptb", "wikitext2"):
        kl, agreement = plain_kl(folder, moved, raw_windows(train_tokenizer(), data_dir, text, "sparsegpt", 16))
        assert kl > 0.01
        assert found["texts"][text]["kl_divergence"] == pytest.approx(kl, rel=1e-5)
        assert found["texts"][text]["top1_agreement"] == pytest.approx(agreement, abs=1e-3)
    assert found["kl"]["kl_tokens"] == sum(text["kl_tokens"] for text in found["texts"].values())
    assert found["notes"] == []


def test_a_model_against_itself(folder, data_dir):
    found = evaluate(str(folder), dense=str(folder), eval="ptb", data_dir=str(data_dir))
    assert (found["kl"]["kl_divergence"], found["kl"]["top1_agreement"]) == (0.0, 1.0)


def test_without_a_dense_model_nothing_is_compared(folder, data_dir):
    found = evaluate(str(folder), eval="ptb", data_dir=str(data_dir))
    assert found["dense"] is None and found["kl"] is None and "kl_divergence" not in found["texts"]["ptb"]


def test_never_two_models_in_memory(folder, moved, data_dir, monkeypatch):
    alive, load = [], verb.load_model

    def counted(*args, **options):
        assert not [reference for reference in alive if reference() is not None], "the dense model is still there"
        loaded = load(*args, **options)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(verb, "load_model", counted)
    evaluate(str(moved), dense=str(folder), eval="ptb", data_dir=str(data_dir), samples=1)
    assert len(alive) == 2


def test_the_budget_limits_the_tokens_of_kl(folder, moved, data_dir, monkeypatch):
    monkeypatch.setattr(divergence, "BUDGET", 40 * 4 * VOCABULARY)
    found = evaluate(str(moved), dense=str(folder), eval="ptb,wikitext2", data_dir=str(data_dir), seqlen=16)
    assert [text["kl_tokens"] for text in found["texts"].values()] == [15, 15] and found["kl"]["kl_tokens"] == 30
    shown = "\n".join(line for section in evaluation_sections(found) for line in section.lines)
    assert f"ptb 15 of {found['texts']['ptb']['windows'] * 15:,}" in shown


def test_a_run_folder_knows_its_dense_model(folder, moved, data_dir, tmp_path):
    options = dict(eval="ptb", data_dir=str(data_dir))
    run = make_run(tmp_path / "run", moved, name=str(folder), model=fingerprint(folder))
    found = evaluate(str(run), **options)
    assert found["dense"]["model"] == str(folder) and found["kl"]["kl_divergence"] > 0
    silent = evaluate(str(run), kl=False, **options)
    assert silent["dense"] is None and silent["notes"] == [] and silent["perplexity"] == found["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(name="gone/away/far"), "no such folder"),
        (dict(model="0" * 64), "its weights are not those that were compressed"),
        (dict(name="tiny-opt"), "its vocabulary or tokenizer is another"),
    ],
)
def test_a_dense_model_that_cannot_be_had_is_a_note(folder, moved, data_dir, tmp_path, arguments, reason):
    run = make_run(tmp_path / "run", moved, **(dict(name=str(folder)) | arguments))
    console = Console()
    found = evaluate(str(run), eval="ptb", data_dir=str(data_dir), console=console)
    assert found["dense"] is None and found["kl"] is None and found["perplexity"]["ptb"] > 1
    (note,) = found["notes"]
    assert note.startswith("KL to the dense model is left out (") and reason in note and "--dense" in note
    assert note in console.notes and "\n" not in note
    with pytest.raises(UserError, match=reason):
        evaluate(str(run), kl=True, eval="ptb", data_dir=str(data_dir))


def test_nothing_is_downloaded_for_a_dense_model_that_nobody_named(moved, data_dir, tmp_path, monkeypatch):
    asked = []

    def snapshot(*args, **options):
        asked.append(options["local_files_only"])
        raise OSError("out of reach")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run = make_run(tmp_path / "run", moved, name="org/dense")
    assert evaluate(str(run), eval="ptb", data_dir=str(data_dir))["notes"] and asked == [True]
    with pytest.raises(UserError, match="org/dense could not be read from the hub"):
        evaluate(str(run), kl=True, eval="ptb", data_dir=str(data_dir))
    assert asked == [True, False]


def test_a_packed_folder_knows_its_dense_model(folder, moved, data_dir, tmp_path):
    shutil.copytree(moved, tmp_path / "model")
    (tmp_path / "model" / "mico_manifest.json").write_text(json.dumps({"base_model": str(folder), "files": {}}))
    found = evaluate(str(tmp_path / "model"), eval="ptb", data_dir=str(data_dir))
    assert found["dense"]["model"] == str(folder)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dense="tiny-llama", kl=False), "--dense tiny-llama contradicts --no-kl"),
        (dict(kl=True), "--kl: it is not known what .* was made from: name the dense model with --dense"),
        (dict(dense="tiny-lama"), "unknown model 'tiny-lama'"),
        (dict(dense="tiny-llama"), "its vocabulary or tokenizer is another than that of"),
        (dict(protocol="awq"), "--protocol awq: choose from sparsegpt, gptq"),
        (dict(samples=-1), "--samples -1: must be at least 0"),
        (dict(eval="none", tasks="mico_choice", samples=1), "--samples 1: prompts are cut from texts: name some"),
        (dict(eval=None, tasks="mico_choice", dense="tiny-llama"), "--dense and --kl compare on texts"),
        (dict(tasks=" , "), "--tasks ' , ': name at least one task"),
        (dict(tasks="mico_choice", limit=0), "--limit 0: must be above 0"),
        (dict(tasks="mico_choice", num_fewshot=-1), "--num-fewshot -1: must be at least 0"),
        (dict(limit=3), "--limit has no effect without --tasks"),
        (dict(num_fewshot=0), "--num-fewshot has no effect without --tasks"),
        (dict(include_path="here"), "--include-path has no effect without --tasks"),
        (dict(tasks="mico_choice", log_samples=True), "--log-samples needs --output-path"),
        (dict(eval="none"), "--eval none: name a text to measure on, or give --data-file, --tasks or --suite"),
    ],
)
def test_mistakes_about_measures_are_told_before_weights_are_read(folder, data_dir, options, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(str(folder), **(dict(eval="ptb", data_dir=str(data_dir)) | options))
    assert "\n" not in str(caught.value)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_stand_side_by_side(folder, moved, data_dir):
    options = dict(eval="ptb,wikitext2", data_dir=str(data_dir), samples=3)
    own = evaluate(str(moved), **options)["samples"]
    assert [(one["text"], one["window"]) for one in own] == [("ptb", 0), ("wikitext2", 0), ("ptb", 1)]
    assert own[0]["prompt"] == " ".join(SENTENCES)[: len(own[0]["prompt"])]
    both = evaluate(str(moved), dense=str(folder), **options)
    dense = evaluate(str(folder), **options)["samples"]
    assert [one["dense"] for one in both["samples"]] == [one["continuation"] for one in dense]
    assert [{k: v for k, v in one.items() if k != "dense"} for one in both["samples"]] == own
    section = next(one for one in evaluation_sections(both) if one.title.startswith("Samples"))
    assert section.columns[1:] == ("dense", "this model") and len(section.rows) == 3


# --- tasks and results.json ------------------------------------------------------------------------------------------


@pytest.fixture
def task_folder(tmp_path):
    """A multiple-choice task of two questions, told by a YAML file."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(dict(question=f"{i} and", choices=["one", "two"], answer=i % 2)) + "\n" for i in range(6))
    )
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "counting.yaml").write_text(
        "task: counting\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
    )
    return folder


def test_tasks_alone_measure_no_text(folder, task_folder, tmp_path):
    options = dict(tasks="counting", include_path=str(task_folder))
    found = evaluate(str(folder), **options)
    assert found["texts"] == {} and set(found["tasks"]) == {"counting"} and found["n-shot"] == {"counting": 0}
    assert found["tasks"]["counting"]["acc,none"] in {i / 6 for i in range(7)}
    limited = evaluate(str(folder), limit=2, num_fewshot=1, output_path=str(tmp_path / "out"), **options)
    assert limited["tasks"]["counting"]["sample_len"] == 2 and limited["n-shot"] == {"counting": 1}
    titles = [section.title for section in evaluation_sections(found)]
    assert titles == [f"Tasks of {folder}", "Measured"]


def test_results_json_has_the_shape_of_lm_eval_and_ours(folder, moved, task_folder, data_dir, tmp_path):
    out, file = tmp_path / "out", tmp_path / "flat.json"
    options = dict(tasks=["counting"], include_path=str(task_folder), eval="ptb", data_dir=str(data_dir), samples=1)
    found = evaluate(str(moved), dense=str(folder), output_path=str(out), json=str(file), **options)
    assert json.loads(file.read_text()) == found
    results = json.loads((out / "results.json").read_text())
    assert set(LM_EVAL) <= set(results)
    assert results["results"] == found["tasks"] and results["n-shot"] == found["n-shot"]
    assert results["versions"] == {"counting": 1.0} and results["higher_is_better"]["counting"] == {"acc": True}
    own = results["mico"]
    assert {name: own[name] for name in found if name not in ("tasks", "n-shot")} == {
        name: value for name, value in found.items() if name not in ("tasks", "n-shot")
    }
    assert {"torch", "transformers", "mico"} <= set(own["environment"]) and own["command"]
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "tasks"]


def test_finished_tasks_are_not_run_again(folder, task_folder, tmp_path):
    options = dict(tasks="counting", include_path=str(task_folder), output_path=str(tmp_path / "out"))
    first = evaluate(str(folder), **options)
    console = Console()
    again = evaluate(str(folder), console=console, **options)
    assert again["tasks"] == first["tasks"]
    assert any("counting" in note and "finished before" in note for note in console.notes)
    assert len(list((tmp_path / "out" / "tasks").iterdir())) == 1


def test_without_tasks_the_shape_is_the_same_and_empty(folder, data_dir, tmp_path):
    run = make_run(tmp_path / "run", folder, eval={"ptb": "a digest"})
    found = evaluate(str(run), data_dir=str(data_dir))
    results = json.loads((run / "eval" / "results.json").read_text())
    assert {name: results[name] for name in LM_EVAL} == {name: {} for name in LM_EVAL}
    assert results["mico"]["perplexity"] == found["perplexity"]


def test_a_later_call_keeps_what_it_does_not_measure(folder, moved, task_folder, data_dir, tmp_path):
    out, tasks = tmp_path / "out", dict(tasks="counting", include_path=str(task_folder))
    texts, kept = dict(eval="ptb", data_dir=str(data_dir)), dict(output_path=str(out))

    def results():
        return json.loads((out / "results.json").read_text())

    first = evaluate(str(folder), **texts, **kept)
    console = Console()
    second = evaluate(str(folder), console=console, **tasks, **kept)
    assert second["texts"] == {} and results()["results"] == second["tasks"]
    assert results()["mico"]["texts"] == first["texts"] and "keeps the texts of an earlier call" in str(console.notes)
    evaluate(str(folder), **texts | dict(eval="wikitext2"), **kept)
    assert results()["results"] == second["tasks"] and list(results()["mico"]["texts"]) == ["wikitext2"]
    evaluate(str(moved), **texts, **kept)  # another model keeps nothing
    assert results()["results"] == {} and list(results()["mico"]["texts"]) == ["ptb"]
    (out / "results.json").write_text("{")
    evaluate(str(folder), **tasks, **kept)
    assert set(results()["results"]) == {"counting"} and results()["mico"]["texts"] == {}


@pytest.mark.usefixtures("no_weights")
def test_an_output_folder_that_cannot_be_written_is_refused_first(folder, data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/results\.json cannot be written"):
        evaluate(str(folder), eval="ptb", data_dir=str(data_dir), output_path=str(tmp_path / "file"))
