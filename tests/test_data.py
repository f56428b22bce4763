"""Texts, file formats and windows: what is read, how it is joined, what a broken file says."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mico import data
from mico.data import DataError, calibration_windows, embedded_corpus, evaluation_windows, load_text
from mico.errors import UserError
from tests.tiny import numbered, source, train_tokenizer

DOCUMENTS = ["First document, it ends here.\nSecond line of it.", "", "Ünïcödé — and a \u2028 separator.", "Last one."]
SENTENCES = ["no it was n't black monday", "but while the new york stock exchange did n't fall apart"]


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch):
    monkeypatch.delenv("MICO_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def write_rows(path, rows, field="text"):
    lines = "".join(json.dumps({field: row}, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"url": ["u"] * len(rows), field: rows}), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    else:
        path.write_bytes(lines)


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".parquet"])
def test_every_format_of_rows_gives_the_same_documents(tmp_path, suffix):
    folder = tmp_path / "c4"
    folder.mkdir()
    path = folder / f"validation{suffix}"
    write_rows(path, DOCUMENTS)
    text = load_text("c4", "validation", data_dir=tmp_path)
    assert list(text.documents) == DOCUMENTS
    assert (text.name, text.split, text.joiner, text.origin) == ("c4", "validation", " ", str(path))
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet"])
def test_data_file_of_rows(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    write_rows(path, DOCUMENTS)
    assert list(load_text("c4", "train", data_file=path).documents) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz"])
def test_data_file_of_plain_text_is_one_document(tmp_path, suffix):
    path, raw = tmp_path / f"mine{suffix}", "One.\n\nTwo — three.\n".encode()
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    text = load_text("docs", "train", data_file=path)
    assert (text.documents, text.name) == (("One.\n\nTwo — three.\n",), path.name)


def test_blank_lines_between_json_rows_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n{"text": "two"}\n')
    assert load_text("c4", "train", data_file=path).documents == ("one", "two")


WIKI_RAW = " \n = Robert <unk> = \n \n Robert is an actor .\u2028He had a role . \n \n = = Career = = \n"
WIKI_ROWS = ["", " = Robert <unk> = \n", "", " Robert is an actor .\u2028He had a role . \n", "", " = = Career = = \n"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json.gz", ".parquet"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_wikitext2_joins_the_rows_of_the_hub_by_blank_lines(tmp_path, suffix, newline):
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    if suffix == ".txt":
        (folder / "test.txt").write_bytes(WIKI_RAW.replace("\n", newline).encode())
    else:
        write_rows(folder / f"test{suffix}", WIKI_ROWS)
    text = load_text("wikitext2", "test", data_dir=tmp_path)
    assert text.joiner.join(text.documents) == "\n\n".join(WIKI_ROWS)


@pytest.mark.parametrize(("suffix", "field"), [(".txt", ""), (".jsonl", "sentence"), (".parquet", "sentence")])
def test_ptb_joins_stripped_sentences_by_a_space(tmp_path, suffix, field):
    folder = tmp_path / "ptb"
    folder.mkdir()
    if suffix == ".txt":
        (folder / "test.txt").write_text("".join(f" {s} \n" for s in SENTENCES))
    else:
        write_rows(folder / f"test{suffix}", SENTENCES, field)
    text = load_text("ptb", "test", data_dir=tmp_path)
    assert text.joiner.join(text.documents) == " ".join(SENTENCES)


def test_a_missing_train_split_is_replaced_by_validation_and_said(tmp_path):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "validation.txt").write_text("a sentence \n")
    text = load_text("ptb", "train", data_dir=tmp_path)
    assert (text.split, text.origin) == ("validation", str(tmp_path / "ptb" / "validation.txt"))
    with pytest.raises(DataError, match="ptb/test"):
        load_text("ptb", "test", data_dir=tmp_path)


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "row without text": ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', "a.jsonl:3: no string field 'text' .*body"),
    "text not a string": ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: no string field 'text'"),
    "row not an object": ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl:2: no string field 'text' .*list"),
    "bad JSON": ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "a.jsonl:2: not JSON"),
    "JSON without end": ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
    "bad UTF-8 in JSON": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not JSON"),
    "bad UTF-8": ("a.txt", b"one\ntwo\nthr\xe9e\n", "a.txt:3: not UTF-8 .byte 0xe9."),
    "empty file": ("a.txt", b"", "a.txt is empty"),
    "only blanks": ("a.txt", b" \n\n", "a.txt is empty"),
    "empty rows": ("a.jsonl", b'{"text": ""}\n', "a.jsonl is empty"),
    "truncated gzip": ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-20], "a.json.gz is not a whole gzip file"),
    "not gzip": ("a.json.gz", b'{"text": "x"}\n', "a.json.gz is not a whole gzip file"),
    "damaged gzip": ("a.txt.gz", gzip.compress(b"x")[:10] + b"\xff" * 30, "a.txt.gz is not a whole gzip file"),
    "bad row in gzip": ("a.json.gz", gzip.compress(b'{"text": "x"}\n{}\n'), "a.json.gz:2: no string field 'text'"),
    "not parquet": ("a.parquet", b"PAR1 nothing else", "a.parquet cannot be read as parquet"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_file_is_named_in_one_line(tmp_path, mistake):
    name, raw, message = MISTAKES[mistake]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        load_text("c4", "train", data_file=tmp_path / name)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"body": ["x"]}, "no column 'text' or 'sentence' .found: body"), ({"text": [1]}, "'text' holds int64")],
)
def test_parquet_without_text(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load_text("c4", "train", data_file=tmp_path / "a.parquet")


def test_missing_file_folder_and_name(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.txt does not exist"):
        load_text("c4", "train", data_file=tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"--data-dir .*absent is not a folder"):
        load_text("c4", "validation", data_dir=tmp_path / "absent")
    with pytest.raises(DataError, match=r"no file for text 'c4'.*c4/validation\{\.txt,\.jsonl,"):
        load_text("c4", "validation", data_dir=tmp_path)
    with pytest.raises(DataError, match="unknown text 'wikitext3': choose from wikitext2, ptb, c4, docs"):
        load_text("wikitext3", "test")


def test_data_dir_of_the_environment_is_used_and_the_option_wins(tmp_path, monkeypatch):
    for folder, content in (("env", "from the environment\n"), ("option", "from the option\n")):
        (tmp_path / folder / "ptb").mkdir(parents=True)
        (tmp_path / folder / "ptb" / "test.txt").write_text(content)
    monkeypatch.setenv("MICO_DATA_DIR", str(tmp_path / "env"))
    assert load_text("ptb", "test").documents == ("from the environment",)
    assert load_text("ptb", "test", offline=True).documents == ("from the environment",)
    assert load_text("ptb", "test", data_dir=tmp_path / "option").documents == ("from the option",)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_offline_without_data_is_refused_in_one_line(name):
    with pytest.raises(DataError, match=f"text '{name}' needs the hub and --offline is set: pass --data-dir") as caught:
        load_text(name, "validation", offline=True)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line_and_no_retry_noise(monkeypatch, caplog):
    def unreachable(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach the Hub\nwith a second line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"'c4' could not be read from the hub \(Couldn't reach the Hub\).*--data-dir"
    ) as e:
        load_text("c4", "validation")
    assert "\n" not in str(e.value)
    assert "Retrying" not in caplog.text


@pytest.mark.parametrize(
    ("name", "split", "arguments", "options", "field"),
    [
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {}, "text"),
        ("ptb", "test", ("ptb-text-only/ptb_text_only",), {"revision": "refs/convert/parquet"}, "sentence"),
        (
            "c4",
            "validation",
            ("allenai/c4",),
            {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
            "text",
        ),
        ("c4", "train", ("allenai/c4",), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}, "text"),
    ],
)
def test_hub_data_sets_are_those_of_the_protocol(monkeypatch, name, split, arguments, options, field):
    calls = []

    def recorded(*args, **kwargs):
        calls.append((args, kwargs))
        return {field: SENTENCES}

    monkeypatch.setattr("datasets.load_dataset", recorded)
    text = load_text(name, split)
    assert calls == [(arguments, {"split": split, **options})]
    assert (text.documents, text.origin) == (tuple(SENTENCES), f"hub:{name}")
    assert text.sha256 == hashlib.sha256("\x00".join(SENTENCES).encode()).hexdigest()


# --- evaluation windows ----------------------------------------------------------------------------------------------


def test_evaluation_windows_follow_each_other_and_drop_the_tail(tokenizer):
    text = numbered(12)
    ids = tokenizer(" ".join(text.documents)).input_ids
    seqlen = 16
    assert len(ids) % seqlen, "the tail must not be empty for this test to say anything"
    windows = evaluation_windows(text, tokenizer, seqlen)
    assert windows.ids_NT.dtype == torch.int64
    assert windows.ids_NT.flatten().tolist() == ids[: len(ids) // seqlen * seqlen]
    assert (windows.tokens_available, windows.tokens_asked, windows.shortfall) == (len(ids), None, 0)


def test_only_c4_is_cut_to_1100_documents_and_256_windows(tokenizer):
    documents = [f"Document {i}." for i in range(1300)]
    seqlen = 8
    c4 = evaluation_windows(source(documents, "c4", " "), tokenizer, seqlen)
    first = tokenizer(" ".join(documents[:1100])).input_ids
    assert len(first) > 256 * seqlen
    assert c4.ids_NT.shape == (256, seqlen)
    assert c4.ids_NT.flatten().tolist() == first[: 256 * seqlen]
    assert (c4.tokens_asked, c4.tokens_available, c4.shortfall) == (256 * seqlen, len(first), 0)
    other = evaluation_windows(source(documents, "ptb", " "), tokenizer, seqlen)
    assert other.tokens > c4.tokens and other.tokens_available > len(first)


def test_c4_shortfall_is_counted_and_described(tokenizer):
    windows = evaluation_windows(source(["Only a few words here, far from enough."], "c4", " "), tokenizer, 8)
    assert windows.shortfall == 256 * 8 - windows.tokens > 0
    assert f"{windows.tokens:,} tokens of 2,048 asked" in windows.describe()


def test_bos_is_kept_where_the_tokenizer_puts_it():
    with_bos = evaluation_windows(numbered(9), train_tokenizer(bos=True), 8)
    without = evaluation_windows(numbered(9), train_tokenizer(bos=False), 8)
    assert with_bos.bos and not without.bos
    assert with_bos.ids_NT.flatten()[1:9].tolist() == without.ids_NT.flatten()[:8].tolist()
    assert int((with_bos.ids_NT == 0).sum()) == 1, "one BOS in front of the whole text, none in the other windows"
    assert "BOS kept" in with_bos.describe() and "BOS none" in without.describe()


def gptq_crops(documents: list[str], tokenizer, seqlen: int) -> list[list[int]]:
    """What get_c4 of GPTQ does, written down from its description: the global generator, seed 0, documents again."""
    before = random.getstate()
    random.seed(0)
    crops = []
    while len(crops) < 256:
        ids = tokenizer(documents[random.randint(0, len(documents) - 1)]).input_ids
        if len(ids) > seqlen:
            start = random.randint(0, len(ids) - seqlen - 1)
            crops.append(ids[start : start + seqlen])
    random.setstate(before)
    return crops


def test_gptq_cuts_c4_at_random_as_the_original_draws(tokenizer):
    documents = [" ".join(f"{i} and {j}" for j in range(i % 7 * 3)) for i in range(40)]
    state = random.getstate()
    windows = evaluation_windows(source(documents, "c4", " "), tokenizer, 16, "gptq")
    assert random.getstate() == state, "the global generator is left alone"
    assert windows.ids_NT.tolist() == gptq_crops(documents, tokenizer, 16)
    assert windows.protocol == "gptq" and windows.ids_NT.shape == (256, 16)
    available = sum(len(ids) for text in documents if len(ids := tokenizer(text).input_ids) > 16)
    assert windows.tokens_available == available < 256 * 16, "every long document was drawn"
    assert windows.shortfall == 256 * 16 - available


def test_a_document_of_just_a_window_is_too_short_for_a_crop(tokenizer):
    seqlen = len(tokenizer(SENTENCES[0]).input_ids)
    text = source([SENTENCES[0], SENTENCES[0] + " and one"], "c4", " ")
    assert evaluation_windows(text, tokenizer, seqlen, "gptq").tokens_available > seqlen
    with pytest.raises(DataError, match=f"a test: no document has more than {seqlen} tokens: lower --seqlen"):
        evaluation_windows(source([SENTENCES[0]], "c4", " "), tokenizer, seqlen, "gptq")


@pytest.mark.parametrize(("name", "joiner"), [("ptb", "\n\n"), ("wikitext2", " ++ "), ("docs", " ++ ")])
def test_gptq_joins_ptb_by_blank_lines_and_the_rest_as_sparsegpt_does(tokenizer, name, joiner):
    text = source(SENTENCES, name, " ++ ")
    windows = evaluation_windows(text, tokenizer, 8, "gptq")
    assert windows.ids_NT.flatten().tolist() == tokenizer(joiner.join(SENTENCES)).input_ids[: windows.tokens]
    assert evaluation_windows(text, tokenizer, 8).protocol == "sparsegpt"


def test_a_text_shorter_than_one_window_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"a test has \d+ tokens, less than one window of --seqlen 512"):
        evaluation_windows(numbered(2), tokenizer, 512)


# --- calibration windows ---------------------------------------------------------------------------------------------


def offsets_of(windows, text, tokenizer, seed) -> list[int]:
    """Where every window starts in the shuffled text."""
    order = torch.randperm(len(text.documents), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = tokenizer(text.joiner.join(text.documents[i] for i in order), add_special_tokens=False).input_ids
    starts = {tuple(ids[i : i + windows.seqlen]): i for i in range(len(ids))}
    return [starts[tuple(window)] for window in windows.ids_NT.tolist()]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_calibration_windows_do_not_overlap(tokenizer, seed):
    text = numbered(40)
    windows = calibration_windows(text, tokenizer, nsamples=10, seqlen=16, seed=seed)
    assert windows.ids_NT.shape == (10, 16) and windows.ids_NT.is_contiguous()
    starts = sorted(offsets_of(windows, text, tokenizer, seed))
    assert all(after - before >= 16 for before, after in itertools.pairwise(starts))


def test_calibration_windows_are_decided_by_the_seed_alone(tokenizer):
    first = calibration_windows(numbered(40), tokenizer, 10, 16, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = calibration_windows(numbered(40), tokenizer, 10, 16, seed=3)
    other = calibration_windows(numbered(40), tokenizer, 10, 16, seed=4)
    assert torch.equal(first.ids_NT, again.ids_NT)
    assert not torch.equal(first.ids_NT, other.ids_NT)


def test_calibration_leaves_the_global_random_state_alone(tokenizer):
    state = torch.random.get_rng_state()
    calibration_windows(numbered(40), tokenizer, 10, 16, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_calibration_shortfall_says_what_would_fit(tokenizer):
    text = numbered(5)
    available = len(tokenizer(" ".join(text.documents)).input_ids)
    with pytest.raises(DataError) as caught:
        calibration_windows(text, tokenizer, nsamples=128, seqlen=16, seed=0)
    message = str(caught.value)
    assert "asks for 2,048 tokens (128 x 16) and a test has" in message and "\n" not in message
    fits = int(message.split("at most ")[1].split(")")[0])
    assert fits == pytest.approx(available / 16, abs=1), "joined in another order, so a token more or less"
    assert len(calibration_windows(text, tokenizer, nsamples=fits, seqlen=16, seed=0).ids_NT) == fits


def test_calibration_reads_a_share_of_a_huge_text(tokenizer):
    seen = []

    class Counting:
        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    text = source(["A sentence of the same length as all."] * 20_000, joiner=" ")
    windows = calibration_windows(text, Counting(), nsamples=4, seqlen=16, seed=0)
    assert len(windows.ids_NT) == 4
    assert sum(seen) < 0.05 * 20_000 * 38


def test_calibration_reads_on_when_tokens_are_long(tokenizer):
    class Words:  # one token a word of 100 letters: the first share falls short
        def __call__(self, text, **options):
            ids = torch.arange(len(text.split()))[None]
            return type("Encoding", (), {"input_ids": ids})()

    text = source(["x" * 100 + f"{i}" for i in range(200)], joiner=" ")
    assert calibration_windows(text, Words(), nsamples=10, seqlen=16, seed=0).ids_NT.shape == (10, 16)


# --- the embedded corpus ---------------------------------------------------------------------------------------------


def test_embedded_corpus_has_two_shares_without_a_common_topic():
    train, test = embedded_corpus("train"), embedded_corpus("test")
    topics = dict(data._topics())
    assert sum(map(len, train.documents)) > 500_000 and sum(map(len, test.documents)) > 100_000
    by_text: dict[str, set[str]] = {}
    for topic, text in data._topics():
        by_text.setdefault(text, set()).add(topic)
    topics_of = [{t for text in share.documents for t in by_text[text]} for share in (train, test)]
    assert topics_of[0] | topics_of[1] == set(topics)
    assert not set(train.documents) & set(test.documents)
    held_out = {t for t in topics if data._percentile(t) < data.DOCS_TEST_PERCENT}
    assert topics_of[1] == held_out and not topics_of[0] & held_out


def test_embedded_corpus_is_reached_by_name_whatever_the_folder(tmp_path):
    text = load_text("docs", "train", data_dir=tmp_path, offline=True)
    assert text == embedded_corpus("train")
    assert text.joiner == "\n\n" and "Python" in text.origin
    assert load_text("docs", "test").sha256 != text.sha256


def test_embedded_corpus_is_the_same_in_another_process():
    root = Path(data.__file__).parents[1]
    code = "from mico.data import embedded_corpus as e; print(e('train').sha256, e('test').sha256)"
    options = dict(capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)})
    found = subprocess.run([sys.executable, "-c", code], **options).stdout.split()
    assert found == [embedded_corpus("train").sha256, embedded_corpus("test").sha256]
