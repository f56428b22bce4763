"""Text for calibration and evaluation: local files, hub data sets and the embedded documentation corpus.

A `TextSource` is a list of documents with the joiner its protocol prescribes and the sha256 of what was
read; windows are cut from its tokens. Shapes: N windows, T tokens a window.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import random
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mico.errors import UserError
from mico.settings import PROTOCOLS, choose

Split = Literal["train", "validation", "test"]
TEXTS = ("wikitext2", "ptb", "c4", "docs")
TEXT_FIELDS = ("text", "sentence")  # in JSON rows and parquet columns; PTB's hub form says `sentence`
SUFFIXES = (".txt", ".jsonl", ".json.gz", ".parquet")
C4_DOCUMENTS = 1100  # SparseGPT joins the first 1,100 validation documents of C4 ...
C4_WINDOWS = 256  # ... and keeps the first 256 windows; GPTQ cuts 256 crops at random
DOCS_TEST_PERCENT = 15  # share of the topics of the embedded corpus kept for evaluation
ROWS_ARE_LINES = ("wikitext2", "ptb")
JOINERS = {"wikitext2": "\n\n", "ptb": " ", "c4": " ", "docs": "\n\n"}
EVALUATION_SPLIT: dict[str, Split] = {"wikitext2": "test", "ptb": "test", "c4": "validation", "docs": "test"}
GPTQ_SPLIT: dict[str, Split] = EVALUATION_SPLIT | {"ptb": "validation"}


class DataError(UserError):
    """A text is missing, empty, too short or malformed; the message names the file and the remedy."""


@dataclass(frozen=True)
class TextSource:
    """Documents of one split of one text, how to join them, and where they came from."""

    name: str
    split: str
    documents: tuple[str, ...]
    joiner: str
    origin: str
    sha256: str


@dataclass(frozen=True)
class Windows:
    """Token windows `ids_NT` (int64) and the facts of how they were cut, for the protocol line."""

    ids_NT: torch.Tensor
    source: TextSource
    tokens_asked: int | None
    tokens_available: int
    bos: bool
    protocol: str = PROTOCOLS[0]  # of evaluation windows

    @property
    def seqlen(self) -> int:
        return int(self.ids_NT.shape[1])

    @property
    def tokens(self) -> int:
        return self.ids_NT.numel()

    @property
    def sha256(self) -> str:
        """Of the token ids: text, tokenizer and cutting together."""
        return hashlib.sha256(self.ids_NT.numpy().tobytes()).hexdigest()

    @property
    def shortfall(self) -> int:
        """Tokens asked for that the text does not hold (only evaluation of C4 asks for a number)."""
        return max(0, (self.tokens_asked or 0) - min(self.tokens, self.tokens_available))

    def batches(self, batch_size: int) -> list[dict[str, torch.Tensor]]:
        """As `token_batches`."""
        return token_batches(self.ids_NT, batch_size)

    def describe(self) -> str:
        asked = f" of {self.tokens_asked:,} asked" if self.tokens_asked is not None else ""
        return (
            f"{self.source.name}/{self.source.split} from {self.source.origin}: {self.tokens:,} tokens{asked} "
            f"in {len(self.ids_NT)} windows of {self.seqlen}, BOS {'kept' if self.bos else 'none'}"
        )


def load_text(
    name: str,
    split: Split,
    *,
    data_dir: str | Path | None = None,
    data_file: str | Path | None = None,
    offline: bool = False,
) -> TextSource:
    """Read one text: `data_file` if given, the embedded corpus for `docs`, `data_dir`, else the hub.

    Raises DataError naming the file, row or data set that could not be read and what to do about it.
    """
    if data_file is not None:
        return _from_file(Path(data_file), Path(data_file).name, "all", "\n\n")
    if name not in TEXTS:
        raise DataError(f"unknown text '{name}': choose from {', '.join(TEXTS)}, or pass --data-file")
    if name == "docs":
        return embedded_corpus("test" if split == "test" else "train")
    data_dir = data_dir or os.environ.get("MICO_DATA_DIR")
    if data_dir is not None:
        return _from_dir(Path(data_dir), name, split)
    if offline:
        raise DataError(
            f"text '{name}' needs the hub and --offline is set: "
            f"pass --data-dir DIR with {name}/{split}.txt, or use the embedded text docs"
        )
    return _from_hub(name, split)


def calibration_windows(source: TextSource, tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> Windows:
    """Cut `nsamples` windows without overlap from the joined documents, chosen by `seed`.

    Documents are shuffled first, but not the rows of WikiText-2 and PTB, which are lines of running text. A random
    phase shifts all windows, so another seed sees other cuts even when all the text is used.
    Raises DataError when the text holds fewer than nsamples * seqlen tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(source.documents), generator=generator).tolist()
    order = sorted(shuffled) if source.name in ROWS_ARE_LINES else shuffled
    asked = nsamples * seqlen
    ids = _enough_tokens(source, order, tokenizer, asked)
    available = len(ids)
    if available < asked:
        raise DataError(
            f"calibration asks for {asked:,} tokens ({nsamples} x {seqlen}) and {source.origin} has {available:,}: "
            f"lower --nsamples (at most {available // seqlen}) or --seqlen, or give more text"
        )
    phase = int(torch.randint(0, min(seqlen, available - asked + 1), (1,), generator=generator))
    windows = ids[phase : phase + (available - phase) // seqlen * seqlen].view(-1, seqlen)
    chosen = torch.randperm(len(windows), generator=generator)[:nsamples].sort().values
    return Windows(windows[chosen].contiguous(), source, asked, available, False)


def evaluation_windows(source: TextSource, tokenizer: Any, seqlen: int, protocol: str = PROTOCOLS[0]) -> Windows:
    """Cut windows as SparseGPT's or GPTQ's evaluation does: documents joined, tokenized once, no overlap, tail dropped.

    sparsegpt: C4 joins its first 1,100 validation documents and keeps the first 256 windows (sparsegpt/datautils.py).
    gptq: PTB (validation) is joined by blank lines, C4 cut into random crops (gptq/datautils.py, get_ptb and get_c4).
    """
    choose("--protocol", protocol, PROTOCOLS)
    gptq = protocol == "gptq"
    if gptq and source.name == "c4":
        return _random_crops(source, tokenizer, seqlen)
    documents = source.documents[:C4_DOCUMENTS] if source.name == "c4" else source.documents
    joiner = "\n\n" if gptq and source.name == "ptb" else source.joiner
    encoded = tokenizer(joiner.join(documents), return_tensors="pt", verbose=False).input_ids[0]
    asked = C4_WINDOWS * seqlen if source.name == "c4" else None
    ids = encoded[:asked] if asked is not None else encoded
    count = len(ids) // seqlen
    if count == 0:
        raise DataError(f"{source.origin} has {len(ids):,} tokens, less than one window of --seqlen {seqlen}")
    cut = ids[: count * seqlen].view(count, seqlen).contiguous()
    return Windows(cut, source, asked, len(encoded), _starts_with_bos(ids, tokenizer), protocol)


def _random_crops(source: TextSource, tokenizer: Any, seqlen: int) -> Windows:
    """256 crops, each at random from a random document of more than `seqlen` tokens, drawn with replacement.

    The original seeds Python's global generator with 0; one of our own gives the same draws. It also accepts documents
    of exactly `seqlen` tokens, on which its next draw fails. Available are the tokens of the documents that were cut.
    """
    draw, crops = random.Random(0), list[torch.Tensor]()
    found: dict[int, torch.Tensor] = {}  # tokens of the documents looked at, nothing of those that are too short
    while len(crops) < C4_WINDOWS:
        index = draw.randint(0, len(source.documents) - 1)
        if index not in found:
            ids = tokenizer(source.documents[index], return_tensors="pt", verbose=False).input_ids[0].long()
            found[index] = ids if len(ids) > seqlen else ids[:0]
        if len(found[index]):
            start = draw.randint(0, len(found[index]) - seqlen - 1)
            crops.append(found[index][start : start + seqlen])
        elif not crops and len(found) == len(source.documents):
            raise DataError(f"{source.origin}: no document has more than {seqlen} tokens: lower --seqlen")
    cut = [ids for ids in found.values() if len(ids)]
    asked, available = C4_WINDOWS * seqlen, sum(map(len, cut))
    return Windows(torch.stack(crops), source, asked, available, _starts_with_bos(cut[0], tokenizer), "gptq")


def _starts_with_bos(ids: torch.Tensor, tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id


def token_batches(ids_NT: torch.Tensor, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Windows as the batches that a text model is called with."""
    return [{"input_ids": ids_BT} for ids_BT in ids_NT.split(batch_size)]


def _enough_tokens(source: TextSource, order: list[int], tokenizer: Any, asked: int) -> torch.Tensor:
    """Tokens of the first documents of `order`: all of a small text, about four times `asked` of a large one.

    A C4 shard is 0.8 GB: tokenizing all of it to keep a quarter of a million tokens would take minutes.
    """
    characters = 16 * asked  # English has about four characters a token
    while True:
        taken, length = [], 0
        for index in order:
            if length >= characters:
                break
            taken.append(source.documents[index])
            length += len(taken[-1])
        ids = _tokenize(tokenizer, source.joiner.join(taken))
        if len(taken) == len(order) or len(ids) >= asked:
            return ids
        characters *= 4


def _tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    # verbose=False: no "longer than the maximum" warning, windows are cut afterwards
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0].long()


def _digest(documents: Iterable[str]) -> str:
    """sha256 of the documents joined by NUL, without building the joined text."""
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(b"\x00" * (number > 0) + document.encode(errors="surrogatepass"))
    return digest.hexdigest()


# --- local files ---------------------------------------------------------------------------------------------------


def _from_dir(data_dir: Path, name: str, split: Split) -> TextSource:
    folder = data_dir / name
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder")
    # WikiText-2 and PTB are small: where a train split is absent, calibrate on validation (`origin` says so); never
    # on the split that a text is evaluated on.
    instead = "validation" if split == "train" and EVALUATION_SPLIT[name] != "validation" else split
    splits = tuple(dict.fromkeys((split, instead)))
    for candidate in splits:
        for suffix in SUFFIXES:
            path = folder / f"{candidate}{suffix}"
            if path.exists():
                return _from_file(path, name, candidate, JOINERS[name])
    wanted = " or ".join(f"{folder / s}{{{','.join(SUFFIXES)}}}" for s in splits)
    raise DataError(f"no file for text '{name}': expected {wanted}")


def _from_file(path: Path, name: str, split: str, joiner: str) -> TextSource:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    documents = _documents(path, raw, name)
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} is empty: no text in it")
    return TextSource(name, split, tuple(documents), joiner, str(path), hashlib.sha256(raw).hexdigest())


def _documents(path: Path, raw: bytes, name: str) -> list[str]:
    if path.name.endswith(".parquet"):
        return _parquet_documents(path)
    if path.name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return [_json_text(path, number, line) for number, line in enumerate(raw.splitlines(), 1) if line.strip()]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}): convert the file") from None
    # Only newlines end a row, as in the hub's builders: str.splitlines would also cut at U+2028 and the like.
    if name == "wikitext2":  # rows of the hub's set keep their newline, blank rows are empty strings
        return [row if row.strip() else "" for row in io.StringIO(text, newline=None)]
    return [row.strip() for row in io.StringIO(text, newline=None)] if name == "ptb" else [text]


def _json_text(path: Path, number: int, line: bytes) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nesting without end
        raise DataError(f"{path}:{number}: not JSON ({error}): one object a line is expected") from None
    field = next((f for f in TEXT_FIELDS if isinstance(row, dict) and isinstance(row.get(f), str)), None)
    if field is None:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{path}:{number}: no string field 'text' (found: {found[:80] or 'nothing'})")
    return row[field]


def _parquet_documents(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except Exception as error:  # pyarrow raises several unrelated types on a damaged file
        raise DataError(f"{path} cannot be read as parquet: {error}") from None
    column = next((c for c in TEXT_FIELDS if c in table.column_names), None)
    if column is None:
        raise DataError(f"{path}: no column 'text' or 'sentence' (found: {', '.join(table.column_names)})")
    if str(table[column].type) not in ("string", "large_string", "string_view"):
        raise DataError(f"{path}: column '{column}' holds {table[column].type}, not text")
    return [text or "" for text in table[column].to_pylist()]


# --- the hub -------------------------------------------------------------------------------------------------------

_C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def _from_hub(name: str, split: Split) -> TextSource:
    from datasets import load_dataset

    try:
        with _quiet_hub():
            if name == "wikitext2":
                rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
            elif name == "ptb":  # a script repository: its parquet conversion is the loadable form
                hub = "ptb-text-only/ptb_text_only"
                rows = load_dataset(hub, revision="refs/convert/parquet", split=split)["sentence"]
            else:
                rows = load_dataset("allenai/c4", data_files={split: _C4_SHARDS[split]}, split=split)["text"]
    except Exception as error:  # the hub client raises dozens of types; the remedy is the same for all
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise DataError(
            f"text '{name}' could not be read from the hub ({reason}): check the network, "
            f"or pass --data-dir DIR with {name}/{split}.txt, or --calib docs --eval docs"
        ) from None
    documents = tuple(rows)
    return TextSource(name, split, documents, JOINERS[name], f"hub:{name}", _digest(documents))


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hold back the hub client's warning at each retry: what went wrong is said once, in the error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- the embedded documentation corpus -----------------------------------------------------------------------------

_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip", "pydoc_data"}
_SKIPPED |= {"turtledemo", "tkinter", "distutils", "msilib", "__pycache__", "__phello__"}


def embedded_corpus(share: Literal["train", "test"]) -> TextSource:
    """English that every Python carries: pydoc's topics and the standard library's docstrings.

    Split by topic (a help topic, or a top-level module) through a hash of its name, so the two shares
    never hold parts of one topic and another Python version moves no topic between them.
    """
    documents = [text for _, text in documentation(share)]
    digest = _digest(documents)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return TextSource("docs", share, tuple(documents), JOINERS["docs"], f"Python {version} documentation", digest)


def documentation(share: Literal["train", "test"]) -> list[tuple[str, str]]:
    """Topic and text of every document of one share; a topic's documents follow one another."""
    found = [pair for pair in _topics() if (share == "test") == (_percentile(pair[0]) < DOCS_TEST_PERCENT)]
    if not found:
        raise DataError("this Python carries no documentation sources: pass --data-dir or --data-file")
    return found


def _percentile(topic: str) -> int:
    return int.from_bytes(hashlib.sha256(topic.encode()).digest()[:4], "big") % 100


@functools.cache
def _topics() -> tuple[tuple[str, str], ...]:
    return tuple(_read_topics())


def _read_topics() -> Iterator[tuple[str, str]]:
    with suppress(ImportError):  # some distributions strip the help texts; the docstrings remain
        from pydoc_data import topics

        for topic in sorted(topics.topics):
            yield f"topic:{topic}", topics.topics[topic].strip()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            text = _docstrings(path)
            if len(text) > 200:
                yield f"module:{parts[0].removesuffix('.py')}", text


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)
