"""Perplexity by the protocols of SparseGPT and GPTQ, and which texts a model is measured and calibrated on by default.

Suffixes: N windows, B windows of one batch, T tokens a window, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mico.data import EVALUATION_SPLIT, GPTQ_SPLIT, TEXTS, Windows, evaluation_windows, load_text
from mico.errors import UserError, out_of_memory
from mico.settings import PROTOCOLS, choose

PROTOCOL = PROTOCOLS[0]  # where none is named
NO_TEXTS = "none"
STANDARD_TEXTS = ("wikitext2", "ptb", "c4")
LOGIT_BYTES = 2 << 30  # what the float32 logits of one batch may take: a 128k vocabulary runs one window at a time
ROWS = 512  # rows of logits turned to float32 at a time

Progress = Callable[[str, int, int], None]  # text, windows done, windows in all
# Sees what a model says while it is measured: text, number of the window, logits of its first T - 1 positions (T-1, V).
# Of a batch that did not fit into memory it sees the same windows again.
Observer = Callable[[str, int, torch.Tensor], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Perplexity of one text, and the batch it was measured with: lower than asked when memory ran out."""

    perplexity: float
    batch_size: int
    halvings: int


# --- which texts -----------------------------------------------------------------------------------------------------


def default_texts(reference: bool, data_dir: str | Path | None = None) -> tuple[str, ...]:
    """Texts to evaluate on when none are named.

    The embedded documentation for a reference model of mico without --data-dir and MICO_DATA_DIR (it needs
    neither files nor network), the three texts of the field otherwise.
    """
    return ("docs",) if _embedded(reference, data_dir) else STANDARD_TEXTS


def default_calibration(
    reference: bool, data_dir: str | Path | None = None, data_file: str | Path | None = None
) -> str:
    """Text to calibrate on when none is named: the user's own file, else `docs` or `c4` by the rule above."""
    if data_file is not None:
        return Path(data_file).name
    return "docs" if _embedded(reference, data_dir) else "c4"


def _embedded(reference: bool, data_dir: str | Path | None) -> bool:
    return reference and not (data_dir or os.environ.get("MICO_DATA_DIR"))


def parse_texts(names: str) -> tuple[str, ...]:
    """'wikitext2,ptb' -> ('wikitext2', 'ptb'); 'all' -> the three texts of the field; 'none' -> ().

    Raises UserError otherwise.
    """
    if names.strip() == NO_TEXTS:
        return ()
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    expanded = [text for name in chosen for text in (STANDARD_TEXTS if name == "all" else (name,))]
    unknown = [name for name in expanded if name not in TEXTS]
    if unknown or not expanded:
        wrong = ", ".join(f"'{name}'" for name in unknown) or f"'{names}'"
        raise UserError(
            f"--eval: unknown text {wrong}: choose from {', '.join(TEXTS)} or all, separated by commas, or none"
        )
    return tuple(dict.fromkeys(expanded))


def evaluation_sets(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    seqlen: int,
    data_dir: str | Path | None = None,
    data_file: str | Path | None = None,
    offline: bool = False,
    protocol: str = PROTOCOL,
) -> dict[str, Windows]:
    """Read, tokenize and cut every evaluation text by `protocol`; `data_file` adds one text under its file name.

    Called before any long work, so that a missing text is told at once. Raises UserError naming the text.
    """
    if seqlen < 2:
        raise UserError(f"--seqlen {seqlen}: perplexity needs windows of at least 2 tokens")
    choose("--protocol", protocol, PROTOCOLS)
    splits = GPTQ_SPLIT if protocol == "gptq" else EVALUATION_SPLIT
    sets = {}
    for name in dict.fromkeys(texts):
        # An unknown name goes to load_text, which lists the known ones.
        source = load_text(name, splits.get(name, "test"), data_dir=data_dir, offline=offline)
        sets[name] = evaluation_windows(source, tokenizer, seqlen, protocol)
    if data_file is not None:
        source = load_text("file", "test", data_file=data_file)
        sets[source.name] = evaluation_windows(source, tokenizer, seqlen, protocol)
    return sets


def protocol_line(windows: Windows) -> str:
    """One line to print beside a perplexity: protocol, text, where from, tokens, windows, seqlen, BOS, shortfall."""
    missing = f", {windows.shortfall:,} tokens short of the protocol" if windows.shortfall else ""
    return f"protocol {windows.protocol}: {windows.describe()}{missing}"


# --- perplexity ------------------------------------------------------------------------------------------------------


def perplexity(model: nn.Module, windows: Windows, *, batch_size: int = 8, progress: Progress | None = None) -> float:
    """exp of the mean cross-entropy over the T - 1 targets of every window (natural logarithm, float32 logits).

    Every window weighs the same, as in SparseGPT's `opt_eval`. Raises UserError naming text and window when
    logits hold NaN or Inf, or when not even one window fits into memory.
    """
    return score(model, windows, batch_size=batch_size, progress=progress).perplexity


def score(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Score:
    """`perplexity` with the batch size it ended on and how often it was halved for want of memory."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    training = model.training
    model.eval()
    try:
        return _score(model, windows, _fitting_batch(model, windows.seqlen, batch_size), progress, observer)
    finally:
        model.train(training)


def _score(
    model: nn.Module, windows: Windows, batch: int, progress: Progress | None, observer: Observer | None
) -> Score:
    name, count = windows.source.name, len(windows.ids_NT)
    device = _input_device(model)
    losses: list[float] = []
    halvings = 0
    while len(losses) < count:
        try:
            ids_BT = windows.ids_NT[len(losses) : len(losses) + batch].to(device)
            batch_losses = _window_losses(model, ids_BT, _from_window(observer, name, len(losses)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
            if batch == 1:
                raise UserError(
                    f"{name}: out of memory on {device} with one window of {windows.seqlen} tokens: "
                    f"lower --seqlen, or use --device cpu"
                ) from error
            batch_losses = []
        if not batch_losses:  # outside the except clause: its traceback would keep the tensors alive
            batch, halvings = batch // 2, halvings + 1
            log.warning("%s: out of memory on %s, batch halved to %d", name, device, batch)
            _free(device)
            continue
        _check(name, batch_losses, len(losses), count)
        losses += batch_losses
        if progress is not None:
            progress(name, len(losses), count)
    return Score(_exp(math.fsum(losses) / count), batch, halvings)


def _from_window(observer: Observer | None, name: str, first: int) -> Callable[[int, torch.Tensor], None]:
    """What to call with the place of a window in a batch that begins with window `first`, and its logits."""
    if observer is None:
        return lambda place, logits: None
    return lambda place, logits: observer(name, first + place, logits)


@torch.inference_mode()
def _window_losses(model: nn.Module, ids_BT: torch.Tensor, observe: Callable[[int, torch.Tensor], None]) -> list[float]:
    """Mean cross-entropy of every window of a batch; never more than ROWS x V logits in float32 at once."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    losses = []
    for place, (logits_TV, ids_T) in enumerate(zip(logits_BTV, ids_BT.to(logits_BTV.device), strict=True)):
        observe(place, logits_TV[:-1])
        total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
        for rows_V, targets in _row_chunks(logits_TV[:-1], ids_T[1:]):
            total += functional.cross_entropy(rows_V.float(), targets, reduction="sum")
        losses.append(total / (len(ids_T) - 1))
    return torch.stack(losses).tolist()


def _row_chunks(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(logits_TV.split(ROWS), targets_T.split(ROWS), strict=True)


def _check(name: str, losses: list[float], first: int, count: int) -> None:
    for offset, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise UserError(
                f"{name}: logits of window {first + offset + 1} of {count} hold NaN or Inf: "
                f"the model's weights are damaged, or overflow its dtype (try --dtype float32)"
            )


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:  # a wrecked model: finite logits, a perplexity above 1e308
        return math.inf


def _input_device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device  # type: ignore[operator]


def _fitting_batch(model: nn.Module, seqlen: int, batch_size: int) -> int:
    config: Any = getattr(model, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 1
    return max(1, min(batch_size, LOGIT_BYTES // (4 * seqlen * vocabulary)))


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def evaluate_texts(
    model: nn.Module,
    sets: Mapping[str, Windows],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> dict[str, dict[str, Any]]:
    """Perplexity of every text of `evaluation_sets` with all that is needed to repeat it, as plain JSON values."""
    results = {}
    for name, windows in sets.items():
        found = score(model, windows, batch_size=batch_size, progress=progress, observer=observer)
        if found.halvings:
            batch_size = found.batch_size  # what did not fit once will not fit for the next text
        results[name] = {
            "perplexity": found.perplexity,
            "tokens": windows.tokens,
            "windows": len(windows.ids_NT),
            "seqlen": windows.seqlen,
            "bos": windows.bos,
            "origin": windows.source.origin,
            "sha256": windows.source.sha256,
            "protocol": windows.protocol,
            "shortfall": windows.shortfall,
            "batch_size": found.batch_size,
            "batch_halvings": found.halvings,
        }
    return results


def bar_steps(advance: Callable[[str], None]) -> Progress:
    """Turn 'n windows of this text are done' into steps of one bar over all texts."""
    seen: dict[str, int] = {}

    def progress(name: str, done: int, _count: int) -> None:
        for _ in range(done - seen.get(name, 0)):
            advance(name)
        seen[name] = done

    return progress
