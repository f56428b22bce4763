"""Perplexity against a plain transformers loop, memory and failure handling, and which texts are the default."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from mico.data import DataError, Windows, evaluation_windows
from mico.errors import UserError
from mico.metrics import perplexity as module
from mico.metrics.perplexity import (
    default_calibration,
    default_texts,
    evaluate_texts,
    evaluation_sets,
    parse_texts,
    perplexity,
    protocol_line,
    score,
)
from tests.tiny import VOCABULARY, numbered, random_model, source, train_tokenizer

SEQLEN = 24


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch):
    monkeypatch.delenv("MICO_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def windows() -> Windows:
    found = evaluation_windows(numbered(14), train_tokenizer(), SEQLEN)
    assert len(found.ids_NT) >= 10
    return found


@pytest.fixture
def llama():
    return random_model("llama")


def plain_perplexity(model, ids_NT) -> float:
    """What a reader of the transformers documentation would write."""
    losses = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in ids_NT]
    return math.exp(sum(losses) / len(losses))


# --- the figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_a_plain_transformers_loop(windows, arch, batch_size):
    model = random_model(arch)
    with torch.no_grad():
        expected = plain_perplexity(model, windows.ids_NT)
    assert abs(math.log(expected / VOCABULARY)) > 0.1, "the model must say something"
    assert perplexity(model, windows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5, SEQLEN - 1])
def test_cutting_the_rows_changes_nothing(windows, llama, monkeypatch, rows):
    whole = perplexity(llama, windows)
    monkeypatch.setattr(module, "ROWS", rows)
    assert perplexity(llama, windows) == pytest.approx(whole, rel=1e-6)


def test_logits_of_a_low_precision_model_are_judged_in_float32(windows, llama):
    model = llama.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=windows.ids_NT).logits
    assert logits.dtype == torch.bfloat16
    surprise = -logits[:, :-1].double().log_softmax(-1).gather(-1, windows.ids_NT[:, 1:, None])
    assert perplexity(model, windows, batch_size=len(windows.ids_NT)) == pytest.approx(
        math.exp(surprise.mean()), rel=1e-5
    )


def test_random_logits_give_the_size_of_the_vocabulary(windows, llama):
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    assert perplexity(llama, windows) == pytest.approx(VOCABULARY, rel=1e-5)


def test_a_wrecked_model_with_finite_logits_is_infinitely_surprised(windows, llama):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e6)
    assert perplexity(llama, windows) == math.inf


def test_mode_gradients_and_random_state_are_left_alone(windows):
    model = random_model("opt", dropout=0.5).train()
    state = torch.random.get_rng_state()
    assert perplexity(model, windows) == perplexity(random_model("opt", dropout=0.5), windows)
    assert model.training and all(m.training for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_observer_sees_the_logits_of_every_window(windows, llama, batch_size):
    seen = {}
    evaluate_texts(
        llama, {"docs": windows}, batch_size=batch_size, observer=lambda *call: seen.update({call[:2]: call[2].clone()})
    )
    assert list(seen) == [("docs", window) for window in range(len(windows.ids_NT))]
    for (_, window), logits in seen.items():
        with torch.no_grad():
            expected = llama(input_ids=windows.ids_NT[window : window + 1]).logits[0, :-1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# --- memory ----------------------------------------------------------------------------------------------------------


def batches_of(model) -> list[int]:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


def fail_above(model, limit: int, error: Exception) -> None:
    def hook(_, args, kwargs):
        if len(kwargs["input_ids"]) > limit:
            raise error

    model.register_forward_pre_hook(hook, with_kwargs=True)


def test_the_batch_is_cut_to_what_its_logits_may_take(windows, llama, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_BYTES", 3 * SEQLEN * VOCABULARY * 4)
    seen = batches_of(llama)
    score(llama, windows, batch_size=8)
    assert max(seen) == 3 and sum(seen) == len(windows.ids_NT)
    monkeypatch.setattr(module, "LOGIT_BYTES", 1)
    seen.clear()
    score(llama, windows, batch_size=8)
    assert set(seen) == {1}


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_batch_and_goes_on(windows, llama, caplog, error):
    expected = perplexity(llama, windows, batch_size=2)
    fail_above(llama, 2, error)
    with caplog.at_level(logging.WARNING):
        found = score(llama, windows, batch_size=8)
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert (found.batch_size, found.halvings) == (2, 2)
    assert "batch halved to 4" in caplog.text and "batch halved to 2" in caplog.text


def test_the_halved_batch_is_kept_for_the_next_text(windows, llama):
    fail_above(llama, 2, OUT_OF_MEMORY[0])
    results = evaluate_texts(llama, {"first": windows, "second": windows}, batch_size=8)
    assert [(r["batch_size"], r["batch_halvings"]) for r in results.values()] == [(2, 2), (2, 0)]


def test_out_of_memory_with_one_window_is_said_in_one_line(windows, llama):
    fail_above(llama, 0, OUT_OF_MEMORY[0])
    with pytest.raises(UserError, match=f"docs: out of memory on cpu with one window of {SEQLEN} tokens") as caught:
        perplexity(llama, windows)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(windows, llama):
    fail_above(llama, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        perplexity(llama, windows)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_logits_that_are_not_finite_name_text_and_window(windows, llama, batch_size, value):
    rare = VOCABULARY - 1
    ids_NT = windows.ids_NT.clamp(max=rare - 1)
    ids_NT[5, 3] = rare
    with torch.no_grad():
        llama.model.embed_tokens.weight[rare] = value
    broken = Windows(ids_NT, windows.source, None, ids_NT.numel(), False)
    with pytest.raises(UserError, match=f"docs: logits of window 6 of {len(ids_NT)} hold NaN or Inf") as caught:
        perplexity(llama, broken, batch_size=batch_size)
    assert "\n" not in str(caught.value)


def test_batch_size_below_one_is_refused(windows, llama):
    with pytest.raises(UserError, match="--batch-size 0: must be at least 1"):
        perplexity(llama, windows, batch_size=0)


# --- reporting -------------------------------------------------------------------------------------------------------


def test_progress_counts_windows(windows, llama):
    calls = []
    perplexity(llama, windows, batch_size=4, progress=lambda *call: calls.append(call))
    count = len(windows.ids_NT)
    assert calls == [("docs", min(done, count), count) for done in range(4, count + 4, 4)]


def test_results_hold_what_is_needed_to_repeat_them(windows, llama):
    result = evaluate_texts(llama, {"docs": windows})["docs"]
    assert json.loads(json.dumps(result)) == result
    assert result["perplexity"] == perplexity(llama, windows)
    facts = dict(tokens=windows.tokens, windows=len(windows.ids_NT), seqlen=SEQLEN, bos=False, shortfall=0)
    facts |= dict(origin="a test", sha256="0" * 64, protocol="sparsegpt")
    assert {name: result[name] for name in facts} == facts


def test_protocol_line_says_all_of_the_protocol(windows):
    line = protocol_line(windows)
    for part in ("protocol sparsegpt", "docs/test from a test", f"{windows.tokens:,} tokens", f"windows of {SEQLEN}"):
        assert part in line
    assert "BOS none" in line and "short" not in line
    c4 = evaluation_windows(source(numbered(3).documents, "c4", " "), train_tokenizer(bos=True), SEQLEN)
    assert f"of {256 * SEQLEN:,} asked" in protocol_line(c4)
    assert protocol_line(c4).endswith(f"BOS kept, {c4.shortfall:,} tokens short of the protocol")


def test_the_protocol_is_printed_and_recorded(llama):
    cut = evaluation_windows(source(numbered(9).documents, "ptb", " "), train_tokenizer(), SEQLEN, "gptq")
    assert protocol_line(cut).startswith("protocol gptq: ptb/test from a test")
    assert evaluate_texts(llama, {"ptb": cut})["ptb"]["protocol"] == "gptq"


# --- which texts -----------------------------------------------------------------------------------------------------


def test_defaults_of_a_reference_model_need_no_files_and_no_network(monkeypatch, tmp_path):
    assert default_texts(True) == ("docs",) and default_calibration(True) == "docs"
    three = ("wikitext2", "ptb", "c4")
    assert default_texts(False) == three and default_calibration(False) == "c4"
    assert default_texts(True, tmp_path) == three and default_calibration(True, tmp_path) == "c4"
    assert default_calibration(True, None, tmp_path / "mine.txt") == "mine.txt"
    monkeypatch.setenv("MICO_DATA_DIR", str(tmp_path))
    assert default_texts(True) == three and default_calibration(True) == "c4"


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("wikitext2,ptb", ("wikitext2", "ptb")),
        (" c4 , docs,", ("c4", "docs")),
        ("all", ("wikitext2", "ptb", "c4")),
        ("ptb,all,docs,ptb", ("ptb", "wikitext2", "c4", "docs")),
    ],
)
def test_parse_texts(typed, texts):
    assert parse_texts(typed) == texts


@pytest.mark.parametrize(("typed", "named"), [("wikitext2,wiki,pbt", "'wiki', 'pbt'"), ("", "''"), (",", "','")])
def test_unknown_texts_are_named_beside_the_known_ones(typed, named):
    with pytest.raises(UserError, match=f"unknown text {named}: choose from wikitext2, ptb, c4, docs or all"):
        parse_texts(typed)


def test_evaluation_sets_read_every_text_before_any_work(tmp_path):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "test.txt").write_text("a sentence of numbers one and two \n" * 20)
    own = tmp_path / "mine.txt"
    own.write_text("one and two are three. " * 30)
    tokenizer = train_tokenizer()
    sets = evaluation_sets(tokenizer, ["ptb", "ptb"], seqlen=8, data_dir=tmp_path, data_file=own)
    assert list(sets) == ["ptb", "mine.txt"]
    assert sets["mine.txt"].ids_NT.flatten().tolist() == tokenizer(own.read_text()).input_ids[: sets["mine.txt"].tokens]
    with pytest.raises(DataError, match="no file for text 'c4'"):
        evaluation_sets(tokenizer, ["ptb", "c4"], seqlen=8, data_dir=tmp_path)
    with pytest.raises(DataError, match="'wikitext2' needs the hub and --offline is set"):
        evaluation_sets(tokenizer, ["wikitext2"], seqlen=8, offline=True)
    with pytest.raises(UserError, match="--seqlen 1: "):
        evaluation_sets(tokenizer, ["ptb"], seqlen=1, data_dir=tmp_path)


def test_gptq_reads_the_validation_split_of_ptb(tmp_path):
    for name, splits in {"ptb": ("validation", "test"), "wikitext2": ("test",), "c4": ("validation",)}.items():
        (tmp_path / name).mkdir()
        for split in splits:
            (tmp_path / name / f"{split}.txt").write_text(f" {split} of {name} says one and two \n" * 20)
    tokenizer = train_tokenizer()
    texts = ["wikitext2", "ptb", "c4"]
    by = {
        name: evaluation_sets(tokenizer, texts, seqlen=8, data_dir=tmp_path, protocol=name)
        for name in ("sparsegpt", "gptq")
    }
    splits = {name: [windows.source.split for windows in sets.values()] for name, sets in by.items()}
    assert splits == {"sparsegpt": ["test", "test", "validation"], "gptq": ["test", "validation", "validation"]}
    rows = ["validation of ptb says one and two"] * 20
    cut = by["gptq"]["ptb"]
    assert cut.ids_NT.flatten().tolist() == tokenizer("\n\n".join(rows)).input_ids[: cut.tokens]
    assert [windows.protocol for windows in by["gptq"].values()] == ["gptq"] * 3
    assert torch.equal(by["gptq"]["wikitext2"].ids_NT, by["sparsegpt"]["wikitext2"].ids_NT)
    with pytest.raises(UserError, match="--protocol awq: choose from sparsegpt, gptq"):
        evaluation_sets(tokenizer, texts, seqlen=8, data_dir=tmp_path, protocol="awq")
