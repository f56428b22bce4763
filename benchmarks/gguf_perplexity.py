"""Perplexity of a GGUF file in llama.cpp against the same model in transformers, on the same tokens.

`python -m benchmarks.gguf_perplexity MODEL.gguf FOLDER TEXT [--seqlen 512] [--windows N]`, with FOLDER the dense
export of the same run. Needs `pip install llama-cpp-python`. Both sides get the windows that transformers'
tokenizer gives; whether llama.cpp's own tokenizer gives the same ids is printed beside. The weights of both are the
same numbers; what is left is llama.cpp's arithmetic, which rounds activations (to 8 bits in blocks of 32 before a
packed weight, to 16 before a 16-bit one).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from mico.data import TextSource, Windows, evaluation_windows, load_text
from mico.metrics.perplexity import perplexity


@dataclass(frozen=True)
class Comparison:
    """Perplexities of both sides, and where the two tokenizers part first (None: nowhere)."""

    llama_cpp: float
    transformers: float
    tokens: int
    first_difference: int | None

    @property
    def ratio(self) -> float:
        return self.llama_cpp / self.transformers


def compare(gguf: Path, folder: Path, text: Path, seqlen: int, windows: int | None, threads: int) -> Comparison:
    """Measure both on the first `windows` windows of a text file (None: all of them)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = load_text("file", "test", data_file=text)
    cut = evaluation_windows(source, tokenizer, seqlen)
    ids_NT = cut.ids_NT[:windows]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense = perplexity(model, Windows(**{**vars(cut), "ids_NT": ids_NT}))
    llama = load(gguf, seqlen, threads)
    return Comparison(llama_perplexity(llama, ids_NT), dense, ids_NT.numel(), parting(llama, tokenizer, source))


def load(path: Path, seqlen: int, threads: int) -> Any:
    """The file in llama.cpp, with logits of every position."""
    from llama_cpp import Llama

    shared = dict(n_ctx=seqlen, n_batch=seqlen, n_ubatch=seqlen, n_threads=threads, n_threads_batch=threads)
    return Llama(model_path=str(path), logits_all=True, verbose=False, **shared)


def llama_perplexity(llama: Any, ids_NT: torch.Tensor) -> float:
    """As mico.metrics.perplexity: exp of the mean cross-entropy over the T - 1 targets of every window."""
    losses = []
    for ids_T in ids_NT:
        llama.reset()
        llama.eval(ids_T.tolist())
        logits_TV = torch.from_numpy(llama.scores[: len(ids_T)])
        losses.append(float(functional.cross_entropy(logits_TV[:-1].double(), ids_T[1:])))
    return math.exp(math.fsum(losses) / len(losses))


def parting(llama: Any, tokenizer: Any, source: TextSource) -> int | None:
    """Position of the first token that llama.cpp's tokenizer gives otherwise, BOS and EOS included."""
    text = source.joiner.join(source.documents)
    theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
    ours = tokenizer(text, verbose=False).input_ids
    if theirs == ours:
        return None
    same = (a == b for a, b in zip(theirs, ours, strict=False))
    return next((index for index, equal in enumerate(same) if not equal), min(len(theirs), len(ours)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gguf", "folder", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, help="all of the text when left out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = compare(**vars(options))
    table = Table("tokens", "llama.cpp", "transformers", "ratio", "tokenizers")
    parted = "same ids" if found.first_difference is None else f"differ at token {found.first_difference}"
    figures = (f"{found.llama_cpp:.4f}", f"{found.transformers:.4f}", f"{found.ratio:.5f}")
    table.add_row(f"{found.tokens:,}", *figures, parted)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
