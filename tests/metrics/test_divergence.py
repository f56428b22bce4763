"""KL divergence and top-1 agreement against a plain float64 computation, and what the file of dense logits holds."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mico.data import Windows, evaluation_windows
from mico.errors import UserError
from mico.metrics import divergence as module
from mico.metrics.divergence import DenseReference, divergence, shared_rows
from mico.metrics.perplexity import evaluate_texts
from tests.tiny import VOCABULARY, numbered, random_model, source, train_tokenizer

SEQLEN = 16
ROW = 4 * VOCABULARY  # bytes that the logits of one position take


@pytest.fixture(scope="module")
def sets() -> dict[str, Windows]:
    long, short = numbered(14), source(["a short text of numbers, one and two and three " * 4], "short")
    found = {text.name: evaluation_windows(text, train_tokenizer(), SEQLEN) for text in (long, short)}
    assert len(found["docs"].ids_NT) > 2 * len(found["short"].ids_NT) >= 4
    return found


def near_model():
    """A model that agrees with `random_model("llama")` on some tokens and not on others."""
    model, other = random_model("llama"), random_model("llama", seed=1)
    with torch.no_grad():
        for mine, noise in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(noise, 0.2)
    return model


@pytest.fixture(scope="module")
def models():
    return random_model("llama"), near_model()


def plain(dense, found, ids_NT: torch.Tensor) -> tuple[float, float]:
    """Mean KL in nats and share of equal arg max over every predicted token, from the definition."""
    with torch.no_grad():
        p, q = (model(input_ids=ids_NT).logits[:, :-1].double().softmax(-1) for model in (dense, found))
    kl = (p * (p / q).log()).sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean())


def measured(dense, found, sets, **options) -> DenseReference:
    reference = DenseReference(sets, VOCABULARY, **options)
    evaluate_texts(dense, sets, batch_size=3, observer=reference.record)
    reference.finish()
    evaluate_texts(found, sets, batch_size=3, observer=reference.compare)
    return reference


# --- the figures ----------------------------------------------------------------------------------------------------


def test_equals_the_definition_in_float64(models, sets):
    with measured(*models, sets) as reference:
        results, overall = reference.results(), reference.overall()
    assert json.loads(json.dumps([results, overall])) == [results, overall]
    tokens = {name: windows.tokens - len(windows.ids_NT) for name, windows in sets.items()}
    for name, windows in sets.items():
        kl, agreement = plain(*models, windows.ids_NT)
        assert kl > 0.1 and 0 < agreement < 1, "the models must differ"
        assert results[name]["kl_divergence"] == pytest.approx(kl, rel=1e-6)
        assert results[name]["top1_agreement"] == pytest.approx(agreement, abs=1e-12)
        assert results[name]["kl_tokens"] == tokens[name]
    mean = sum(results[name]["kl_divergence"] * tokens[name] for name in sets) / sum(tokens.values())
    assert overall["kl_divergence"] == pytest.approx(mean, rel=1e-12)
    assert overall["kl_tokens"] == sum(tokens.values())


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_gives_exactly_0_and_1(sets, arch, dtype):
    model = random_model(arch).to(dtype)
    with measured(model, model, sets) as reference:
        found = [*reference.results().values(), reference.overall()]
    assert [(one["kl_divergence"], one["top1_agreement"]) for one in found] == [(0.0, 1.0)] * 3


@pytest.mark.parametrize("size", [1, 2 * VOCABULARY, 1 << 30])
def test_cutting_the_work_into_pieces_changes_nothing(models, sets, monkeypatch, size):
    with measured(*models, sets) as reference:
        whole = reference.overall()
    monkeypatch.setattr(module, "PIECE", size)
    monkeypatch.setattr(module, "CHUNK", size)
    with measured(*models, sets) as reference:
        assert reference.overall() == pytest.approx(whole, rel=1e-12)


def test_tokens_that_cannot_come_add_nothing_and_those_ruled_out_everything():
    inf = torch.inf
    p, q = torch.tensor([[0.0, 0.0, -inf]]), torch.tensor([[1.0, 0.0, -inf]])
    expected = 0.5 * sum(torch.log_softmax(p[0, :2], 0) - torch.log_softmax(q[0, :2], 0))
    assert divergence(p, q) == (pytest.approx(float(expected)), 1)
    assert divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -inf]]))[0] == inf


def test_the_perplexities_are_as_without(models, sets):
    reference = DenseReference(sets, VOCABULARY)
    assert evaluate_texts(models[0], sets, observer=reference.record) == evaluate_texts(models[0], sets)
    reference.finish()
    assert evaluate_texts(models[1], sets, observer=reference.compare) == evaluate_texts(models[1], sets)


def test_a_batch_that_did_not_fit_is_not_counted_twice(models, sets):
    model, seen = near_model(), []

    def hook(_, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if len(seen) == 2:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(hook, with_kwargs=True)
    with measured(*models, sets) as whole, measured(models[0], model, sets) as halved:
        assert max(seen[2:]) < seen[0]
        assert halved.overall() == pytest.approx(whole.overall(), rel=1e-6)


# --- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "rows"),
    [
        (10_000, {"a": 100, "b": 1000, "c": 40}),
        (340, {"a": 100, "b": 200, "c": 40}),  # what the small text leaves goes to the others
        (100, {"a": 30, "b": 40, "c": 30}),  # whole windows
        (20, {"a": 7, "b": 7, "c": 6}),  # parts of the first window
        (1, {"a": 0, "b": 1, "c": 0}),
    ],
)
def test_texts_share_the_rows(total, rows):
    assert shared_rows({"a": (10, 10), "b": (100, 10), "c": (4, 10)}, total) == rows


def test_the_budget_cuts_the_windows_and_the_tokens_are_told(models, sets):
    kept = 2  # windows of each text
    with measured(*models, sets, budget=2 * kept * (SEQLEN - 1) * ROW) as reference:
        found = reference.results()
    for name, windows in sets.items():
        kl, agreement = plain(*models, windows.ids_NT[:kept])
        assert found[name]["kl_divergence"] == pytest.approx(kl, rel=1e-6)
        assert found[name]["top1_agreement"] == pytest.approx(agreement)
        assert found[name]["kl_tokens"] == kept * (SEQLEN - 1)


def test_a_budget_below_one_window_keeps_its_first_positions(models, sets):
    with measured(*models, {"docs": sets["docs"]}, budget=5 * ROW + 3) as reference:
        found = reference.results()["docs"]
    kl, _ = plain(*models, sets["docs"].ids_NT[:1, :6])  # six tokens, of which five are predicted
    assert found["kl_tokens"] == 5 and found["kl_divergence"] == pytest.approx(kl, rel=1e-5)


def test_half_of_the_free_disk_is_left_alone(models, sets, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * 15 * ROW))
    with measured(*models, {"docs": sets["docs"]}, folder=tmp_path) as reference:
        assert reference.results()["docs"]["kl_tokens"] == 15
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    with measured(*models, sets, folder=tmp_path) as reference:
        assert reference.results() == {} and reference.overall() is None


# --- the file -------------------------------------------------------------------------------------------------------


def test_nothing_is_left_in_the_folder(models, sets, tmp_path):
    with measured(*models, sets, folder=tmp_path):
        assert not list(tmp_path.iterdir()), "the file has no name"
    with pytest.raises(AssertionError, match="some windows were not recorded"):
        DenseReference(sets, VOCABULARY, folder=tmp_path).finish()


def test_a_file_that_stays_serves_a_later_process(models, sets, tmp_path):
    with measured(*models, sets, folder=tmp_path, name="dense") as first:
        expected = first.results()
    assert len(list(tmp_path.iterdir())) == 1
    with DenseReference(sets, VOCABULARY, folder=tmp_path, name="dense") as again:
        assert again.complete
        evaluate_texts(models[1], sets, batch_size=3, observer=again.compare)
        assert again.results() == expected
    again.delete()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [dict(name="another"), dict(texts=["docs"]), dict(budget=100 * ROW)])
def test_a_file_of_something_else_is_not_taken_and_makes_room(models, sets, tmp_path, change):
    measured(*models, sets, folder=tmp_path, name="dense").close()
    (earlier,) = tmp_path.iterdir()
    chosen = {text: sets[text] for text in change.get("texts", sets)}
    options = dict(name=change.get("name", "dense"), budget=change.get("budget"))
    with DenseReference(chosen, VOCABULARY, folder=tmp_path, **options) as reference:
        assert not reference.complete and not earlier.exists()


def test_the_file_that_stays_does_not_count_against_its_own_room(models, sets, tmp_path, monkeypatch):
    usage, size = namedtuple("usage", "total used free"), 100 * ROW

    def free(folder):
        return usage(0, 0, size - sum(file.stat().st_size for file in Path(folder).glob(".dense*")))

    monkeypatch.setattr(shutil, "disk_usage", free)
    with measured(*models, sets, folder=tmp_path, name="dense") as first:
        assert 0 < sum(first.rows.values()) <= 50
    with DenseReference(sets, VOCABULARY, folder=tmp_path, name="dense") as again:
        assert again.rows == first.rows and again.complete


def test_an_unfinished_file_has_no_final_name_and_is_removed(models, sets, tmp_path):
    with DenseReference(sets, VOCABULARY, folder=tmp_path, name="dense") as reference:
        evaluate_texts(models[0], {"docs": sets["docs"]}, observer=reference.record)
        assert [path.name[:5] for path in tmp_path.iterdir()] == [".tmp-"]
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_is_refused_in_one_line(models, sets):
    reference = DenseReference(sets, VOCABULARY)
    evaluate_texts(models[0], sets, observer=reference.record)
    reference.finish()
    with pytest.raises(UserError, match="vocabulary has 310 tokens, the dense model's 300") as caught:
        reference.compare("docs", 0, torch.zeros(SEQLEN - 1, 310))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(sets, tmp_path):
    with pytest.raises(UserError, match="absent"):
        DenseReference(sets, VOCABULARY, folder=Path(tmp_path / "absent"))
