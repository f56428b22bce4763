"""Tasks of lm-eval in process: the same figures as lm-eval itself, kept, reused, and safe against want of memory."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

lm_eval = pytest.importorskip("lm_eval")

from lm_eval._cli.harness import HarnessCLI  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import mico  # noqa: E402
from mico.console import Console  # noqa: E402
from mico.errors import UserError  # noqa: E402
from mico.loading import load_model  # noqa: E402
from mico.metrics import harness  # noqa: E402
from mico.metrics.harness_model import EvaluatedModel  # noqa: E402
from mico.metrics.harness_tasks import OWN_TASKS  # noqa: E402
from mico.packed.linear import PackedLinear  # noqa: E402
from tests.tiny import random_model, train_tokenizer  # noqa: E402
from tests.workspace import workspace  # noqa: E402

WORDS = ("one", "two", "three", "numbers", "a document", "the end")
METRIC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(autouse=True)
def _small_index(monkeypatch):
    """lm-eval's index of its own tasks takes seconds to read and is not needed here."""
    monkeypatch.setattr(TaskManager, "__init__", functools.partialmethod(TaskManager.__init__, include_defaults=False))
    monkeypatch.setattr(harness, "_ASK_ENVIRONMENT", lambda: "a test")


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def write_task(folder: Path, name: str, rows: list[dict], **changes: object) -> None:
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    described = dict(
        task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(folder / f"{name}.jsonl"))),
        test_split="test", output_type="multiple_choice", doc_to_text="question", doc_to_choice="choices",
        doc_to_target="answer", metric_list=[METRIC], metadata=dict(version=2),
    )  # fmt: skip
    described = {key: value for key, value in (described | changes).items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")


def choice_rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        choices = draw.sample(WORDS, 3)
        rows.append(dict(question=f"Number {number} says", choices=choices, answer=draw.randrange(3)))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks `first`, `second` (of tag `pair` and group `both`), `rolling` and `written`."""
    folder = tmp_path_factory.mktemp("include")
    write_task(folder, "first", choice_rows(13, 0), tag="pair")
    write_task(folder, "second", choice_rows(7, 1), tag="pair")
    group = dict(group="both", task=["first", "second"])
    group |= dict(aggregate_metric_list=[dict(metric="acc", weight_by_size=True)], metadata=dict(version=3))
    (folder / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    texts = [dict(text=" ".join(random.Random(number).choices(WORDS, k=30))) for number in range(5)]
    metrics = [
        dict(metric="byte_perplexity", aggregation="weighted_perplexity", higher_is_better=False),
        dict(metric="bits_per_byte", aggregation="bits_per_byte", higher_is_better=False),
    ]
    plain = dict(doc_to_choice=None, doc_to_text="", doc_to_target="text")
    write_task(folder, "rolling", texts, output_type="loglikelihood_rolling", metric_list=metrics, **plain)
    exact = dict(metric="exact_match", aggregation="mean", higher_is_better=True)
    generation = dict(generation_kwargs=dict(until=["."], max_gen_toks=4), output_type="generate_until")
    asked = dict(doc_to_choice=None, doc_to_target="{{choices[answer]}}", metric_list=[exact])
    write_task(folder, "written", choice_rows(5, 2), **generation, **asked)
    return folder


def run(model, tokenizer, names, kept, folder, console=None, **options):
    console = console or Console()
    return harness.run_tasks(
        model, tokenizer, names.split(","), kept, include_path=str(folder), console=console, **options
    )


def figures(results, name):
    return {key: value for key, value in results["results"][name].items() if "," in key}


def forbid_work(monkeypatch, but: int = 0):
    """Stop at the model's call number `but`, as Ctrl-C does."""
    calls, kept = [0], EvaluatedModel._model_call

    def call(self, *args, **options):
        calls[0] += 1
        if calls[0] > but:
            raise KeyboardInterrupt
        return kept(self, *args, **options)

    monkeypatch.setattr(EvaluatedModel, "_model_call", call)


# --- the figures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """One request alone, without padding."""
    ids = torch.tensor([context + continuation])
    logs = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(context) + place - 1, token]) for place, token in enumerate(continuation))


def test_accuracy_is_that_of_a_plain_loop(model, tokenizer, folder):
    right = 0
    for row in choice_rows(13, 0):
        context = tokenizer(row["question"]).input_ids
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}").input_ids
            assert whole[: len(context)] == context
            scores.append(log_likelihood(model, context, whole[len(context) :]))
        right += scores.index(max(scores)) == row["answer"]
    assert run(model, tokenizer, "first", None, folder)["results"]["first"]["acc,none"] == right / 13


def test_byte_perplexity_is_that_of_a_plain_loop(model, tokenizer, folder):
    total = size = 0
    longest = model.config.max_position_embeddings
    for line in (folder / "rolling.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer(text).input_ids
        assert len(ids) > longest  # several windows
        size += len(text.encode())
        for start in range(0, len(ids), longest):  # a window scores `longest` tokens, what is left over fills its front
            end = min(start + longest, len(ids))
            before = [tokenizer.eos_token_id] if start == 0 else ids[max(0, end - longest - 1) : start]
            total += log_likelihood(model, before, ids[start:end])
    found = figures(run(model, tokenizer, "rolling", None, folder), "rolling")
    assert found["byte_perplexity,none"] == pytest.approx(np.exp(-total / size), rel=1e-5)
    assert found["bits_per_byte,none"] == pytest.approx(-total / size / np.log(2), rel=1e-5)


def lm_eval_alone(model, tokenizer, names, folder, **options):
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 5)
    manager = TaskManager(include_path=str(folder))
    return lm_eval.simple_evaluate(wrapped, tasks=names.split(","), task_manager=manager, **seeds, **options)


def test_groups_and_tags_are_aggregated_as_by_lm_eval(model, tokenizer, folder, tmp_path):
    theirs = lm_eval_alone(model, tokenizer, "both", folder, num_fewshot=1)
    ours = run(model, tokenizer, "both", tmp_path, folder, batch_size=4, seed=5, num_fewshot=1)
    for key in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[key] == json.loads(json.dumps(theirs[key])), key
    assert ours["results"]["both"]["acc,none"] == ours["groups"]["both"]["acc,none"]
    assert set(ours["tasks"]) == {"first", "second"}
    pair = run(model, tokenizer, "pair", tmp_path, folder, batch_size=4, seed=5, num_fewshot=1)
    assert {name: figures(pair, name) for name in ("first", "second")} == {
        name: figures(ours, name) for name in ("first", "second")
    }
    assert all(told["reused"] for told in pair["tasks"].values())


def test_what_a_model_writes_is_judged_as_by_lm_eval(model, tokenizer, folder):
    theirs = lm_eval_alone(model, tokenizer, "written", folder, log_samples=True)
    ours = run(model, tokenizer, "written", None, folder, batch_size=4, seed=5)
    assert figures(ours, "written") == figures(theirs, "written")
    assert "samples" not in ours


def test_a_packed_model_equals_the_command_line_on_its_dense_export(tmp_path, tmp_path_factory):
    space = workspace(tmp_path_factory.getbasetemp())
    dense, out = tmp_path / "dense", tmp_path / "out"
    mico.export(str(space.run), to="dense", dtype="bfloat16", save=str(dense))
    command = ["run", "--model", "hf", "--model_args", f"pretrained={dense},dtype=bfloat16", "--device", "cpu"]
    command += ["--tasks", "mico_choice,mico_rolling", "--include_path", str(OWN_TASKS), "--seed", "0"]
    command += ["--batch_size", "8", "--limit", "8", "--output_path", str(out)]
    cli = HarnessCLI()
    cli.execute(cli._parser.parse_args(command))
    theirs = json.loads(next(out.rglob("results*.json")).read_text(encoding="utf-8"))
    loaded = load_model(str(space.run / "model"), device="cpu", dtype="bfloat16", packed=True)
    packed = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    tasks = ["mico_choice", "mico_rolling"]
    ours = harness.run_tasks(loaded.model, loaded.tokenizer, tasks, None, limit=8, console=Console())
    assert ours["results"] == theirs["results"] and set(ours["results"]) == set(tasks)
    assert packed and {module.execution for module in packed} == {"auto"}
    assert not sum(module.calls["kernel"] for module in packed)


# --- kept and reused ------------------------------------------------------------------------------------------------


def test_a_finished_task_is_not_run_again(model, tokenizer, folder, tmp_path, monkeypatch):
    before = run(model, tokenizer, "first,rolling", tmp_path, folder)
    assert not any(told["reused"] for told in before["tasks"].values())
    assert len(list((tmp_path / "tasks").iterdir())) == 2
    forbid_work(monkeypatch)
    console = Console()
    again = run(model, tokenizer, "first,rolling", tmp_path, folder, console)
    assert again["results"] == before["results"] and again["config"] == before["config"]
    assert [note.split(":")[0] for note in console.notes] == ["task first", "task rolling"]
    assert all(told["reused"] for told in again["tasks"].values())


def test_a_call_that_was_stopped_goes_on_after_the_finished_tasks(model, tokenizer, folder, tmp_path, monkeypatch):
    whole = run(model, tokenizer, "first,second", None, folder)
    with monkeypatch.context() as patch:
        forbid_work(patch, but=-(-13 * 3 // 8))  # the batches of the first task
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, "first,second", tmp_path, folder)
    assert [file.name.split("-")[0] for file in (tmp_path / "tasks").iterdir()] == ["first"]
    resumed = run(model, tokenizer, "first,second", tmp_path, folder)
    assert [told["reused"] for told in resumed["tasks"].values()] == [True, False]
    assert resumed["results"] == whole["results"]


@pytest.mark.parametrize(
    "change",
    [dict(limit=3), dict(num_fewshot=1), dict(seed=1), dict(model_fingerprint="other")],
    ids=lambda change: next(iter(change)),
)
def test_another_question_is_another_result(model, tokenizer, folder, tmp_path, change):
    run(model, tokenizer, "second", tmp_path, folder)
    again = run(model, tokenizer, "second", tmp_path, folder, **change)
    assert not again["tasks"]["second"]["reused"]
    assert len(list((tmp_path / "tasks").iterdir())) == 2


def test_other_data_or_another_prompt_is_another_result(model, tokenizer, tmp_path):
    for rows, changes in (
        (choice_rows(4, 0), {}),
        (choice_rows(4, 1), {}),
        (choice_rows(4, 1), dict(description="Think. ")),
    ):
        write_task(tmp_path, "changing", rows, **changes)
        told = run(model, tokenizer, "changing", tmp_path, tmp_path)["tasks"]["changing"]
        assert not told["reused"]
        assert run(model, tokenizer, "changing", tmp_path, tmp_path)["tasks"]["changing"] == told | {"reused": True}


def test_samples_are_kept_beside_the_result(model, tokenizer, folder, tmp_path):
    plain = run(model, tokenizer, "second", tmp_path, folder)
    with_samples = run(model, tokenizer, "second", tmp_path, folder, log_samples=True)
    assert not with_samples["tasks"]["second"]["reused"]  # there were none
    assert with_samples["results"] == plain["results"]
    (file,) = (tmp_path / "tasks").glob("second-*.samples.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert np.mean([sample["acc"] for sample in samples]) == plain["results"]["second"]["acc,none"]
    assert [sample["doc"]["question"] for sample in samples] == [row["question"] for row in choice_rows(7, 1)]
    assert run(model, tokenizer, "second", tmp_path, folder, log_samples=True)["tasks"]["second"]["reused"]


def test_a_damaged_result_is_named(model, tokenizer, folder, tmp_path):
    run(model, tokenizer, "second", tmp_path, folder)
    (file,) = (tmp_path / "tasks").iterdir()
    file.write_text('{"result": 3}')
    with pytest.raises(UserError, match=f"{file.name} holds no result: delete it"):
        run(model, tokenizer, "second", tmp_path, folder)


# --- what goes wrong, and what must stay as it was ------------------------------------------------------------------


def limit_batch(monkeypatch, most: int, error: type[Exception], message: str):
    kept = EvaluatedModel._model_call

    def call(self, inps, *args, **options):
        if len(inps) > most:
            raise error(message)
        return kept(self, inps, *args, **options)

    monkeypatch.setattr(EvaluatedModel, "_model_call", call)


@pytest.mark.parametrize(
    ("error", "message"),
    [(torch.OutOfMemoryError, "CUDA out of memory"), (RuntimeError, "DefaultCPUAllocator: can't allocate memory")],
)
def test_the_batch_is_halved_when_memory_runs_out(model, tokenizer, folder, monkeypatch, error, message):
    small = run(model, tokenizer, "first,rolling", None, folder, batch_size=2)
    limit_batch(monkeypatch, 3, error, message)
    console = Console()
    halved = run(model, tokenizer, "first,rolling", None, folder, console, batch_size=8)
    assert figures(halved, "first") == figures(small, "first")
    told = [(part["batch_size"], part["batch_halvings"]) for part in halved["tasks"].values()]
    assert told == [(2, 2), (2, 0)]
    assert [note for note in console.notes if "halved" in note] == [
        f"task first: out of memory on cpu, batch halved to {size}" for size in (4, 2)
    ]
    limit_batch(monkeypatch, 0, error, message)
    with pytest.raises(UserError, match="task first: out of memory on cpu with a batch of 1"):
        run(model, tokenizer, "first", None, folder)


def test_other_errors_are_not_taken_for_want_of_memory(model, tokenizer, folder, monkeypatch):
    limit_batch(monkeypatch, 0, RuntimeError, "shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(model, tokenizer, "first", None, folder)


def test_packed_weights_are_not_held_dense_when_memory_runs_out(tmp_path_factory, folder, monkeypatch):
    run_folder = workspace(tmp_path_factory.getbasetemp()).run
    loaded = load_model(str(run_folder / "model"), device="cpu", packed=True)
    plain = run(loaded.model, loaded.tokenizer, "first", None, folder)
    kept = EvaluatedModel._model_call

    def call(self, *args, **options):
        if self._holds_dense():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kept(self, *args, **options)

    monkeypatch.setattr(EvaluatedModel, "_model_call", call)
    console = Console()
    lean = run(loaded.model, loaded.tokenizer, "first", None, folder, console)
    assert lean["results"] == plain["results"] and lean["tasks"]["first"]["batch_size"] == 8
    assert console.notes == ["task first: out of memory on cpu, weights are unpacked at every call"]


def test_nan_is_no_answer(tokenizer, folder):
    broken = random_model("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="task first: log-likelihoods are NaN"):
        run(broken, tokenizer, "first", None, folder)


def test_requests_that_are_cut_are_counted(model, tokenizer, tmp_path):
    rows = [row | {"question": "one two three " * 40} for row in choice_rows(2, 0)]
    write_task(tmp_path, "long", rows)
    texts = [f"{row['question'].rstrip()} {choice}" for row in rows for choice in row["choices"]]
    asked = {tuple(tokenizer(text, verbose=False).input_ids[:-1]) for text in texts}  # answers of one token share one
    console = Console()
    assert run(model, tokenizer, "long", None, tmp_path, console)["tasks"]["long"]["truncated"] == len(asked)
    assert console.notes == [f"task long: requests longer than 64 tokens lost their start, {len(asked)} times"]


def test_nothing_global_is_left_changed(model, tokenizer, folder, capsys):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, pad = state(), tokenizer.pad_token_id
    model.train()
    run(model, tokenizer, "written,rolling", None, folder, num_fewshot=None)
    assert model.training and state() == before and tokenizer.pad_token_id == pad
    model.eval()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(limit=0), "--limit 0: must be above 0"),
        (dict(limit=float("nan")), "--limit nan"),
        (dict(num_fewshot=-1), "--num-fewshot -1: must be at least 0"),
        (dict(batch_size=0), "--batch-size 0: must be at least 1"),
    ],
)
def test_wrong_numbers_are_named(options, message):
    with pytest.raises(UserError, match=message):
        run(None, None, "first", None, Path(), **options)
