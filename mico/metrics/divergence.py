"""How far a model has moved from the dense one it was made from: KL divergence and top-1 agreement.

Never two models in memory: the dense one is measured first, and what it says about the first windows of every text is
kept in a file; the other model is compared with the file in the forward passes that give its perplexity. Kept are its
logits, in float32: they are exact, log-probabilities would be rounded once more.

Suffixes: P positions of a window that predict a token (one less than its tokens), V vocabulary.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from mico.data import Windows
from mico.errors import UserError
from mico.files import TEMPORARY, fingerprint, writing

BUDGET = 2 << 30  # bytes of dense logits that are kept
DISK_SHARE = 0.5  # of the free disk space that they may take
PIECE = 1 << 22  # logits written or read at a time
CHUNK = 1 << 16  # logits turned to float64 at a time: they stay in the cache of a core
BYTES = 4  # of a logit in the file
KEPT = ".dense-logits-"  # a file that stays is hidden: no output of a run


def divergence(dense_PV: torch.Tensor, found_PV: torch.Tensor) -> tuple[float, int]:
    """Sum over the positions of KL(dense || found) in nats, and on how many both hold the same token likeliest.

    KL(p || q) = sum over v of p_v (ln p_v - ln q_v), in float64; 0 ln 0 counts as 0.
    """
    total, agreeing = 0.0, 0
    rows = max(1, CHUNK // dense_PV.shape[-1])
    for p_PV, q_PV in zip(dense_PV.split(rows), found_PV.split(rows), strict=True):
        agreeing += int((p_PV.argmax(-1) == q_PV.argmax(-1)).sum())
        logp_PV, logq_PV = p_PV.double().log_softmax(-1), q_PV.double().log_softmax(-1)
        terms_PV = torch.where(logp_PV > -torch.inf, logp_PV.exp() * (logp_PV - logq_PV), 0.0)
        total += float(terms_PV.sum(-1).clamp_min(0).sum())  # rounding can leave a KL of -1e-17
    return total, agreeing


def shared_rows(windows: Mapping[str, tuple[int, int]], total: int) -> dict[str, int]:
    """How many positions of every text are kept of `total`: the same number for each, as far as a text has them.

    windows: by text, how many and the positions in each. Whole windows, or a part of the first where none fits.
    """
    rows = {}
    smallest_first = sorted(windows, key=lambda name: windows[name][0] * windows[name][1])
    for done, name in enumerate(smallest_first):
        count, each = windows[name]
        share = min(count * each, total // (len(windows) - done))  # what a small text leaves goes to the others
        rows[name] = share if share < each else share // each * each
        total -= rows[name]
    return {name: rows[name] for name in windows}


class DenseReference:
    """What the dense model says about the first windows of every text, and how another model compares with it.

    `record` observes the measuring of the dense model, then comes `finish`, then `compare` observes the measuring of
    the other one (`evaluate_texts(..., observer=reference.record)`), and `results` tells what was found.
    """

    def __init__(
        self,
        sets: Mapping[str, Windows],
        vocabulary: int,
        *,
        folder: Path | None = None,
        name: str | None = None,
        budget: int | None = None,
        spare: int = 0,
    ) -> None:
        """folder: where the file lies (None: the system's temporary folder). name: None for a file that vanishes with
        the process; otherwise it stays for a later process with the same `name` (what identifies the dense model) and
        the same windows, until `delete`; the folder is this process's own and keeps one such file. spare: bytes of the
        disk that are left to others. Raises UserError when the folder cannot be written.
        """
        self.vocabulary, self._piece = vocabulary, max(1, PIECE // vocabulary)
        self._folder = Path(folder or tempfile.gettempdir())
        with writing(self._folder):
            earlier = sum(file.stat().st_size for file in self._folder.glob(f"{KEPT}*"))  # so that it counts the same
            free = shutil.disk_usage(self._folder).free + earlier
        affordable = max(0, min(BUDGET if budget is None else budget, int(DISK_SHARE * free), free - spare))
        shapes = {text: (len(windows.ids_NT), windows.seqlen - 1) for text, windows in sets.items()}
        self._each = {text: each for text, (_, each) in shapes.items()}
        self.rows = shared_rows(shapes, affordable // (BYTES * vocabulary))
        self._first = dict(zip(self.rows, _running_sum(self.rows.values()), strict=True))
        self._recorded: set[tuple[str, int]] = set()
        self._compared: dict[tuple[str, int], tuple[int, float, int]] = {}
        self._kept: Path | None = None
        self._temporary: Path | None = None
        if name is not None:
            identity = dict(model=name, rows=self.rows, windows={text: w.sha256 for text, w in sets.items()})
            self._kept = self._folder / f"{KEPT}{fingerprint(identity)}"
        self._file = self._open()

    def _open(self) -> IO[bytes]:
        with writing(self._folder):
            if self.complete:
                assert self._kept is not None
                return self._kept.open("rb")
            if self._kept is None:
                return tempfile.TemporaryFile(dir=self._folder)  # without a name: gone however the process ends
            for other in self._folder.glob(f"{KEPT}*"):
                other.unlink()
            self._temporary = self._folder / f"{TEMPORARY}{secrets.token_hex(4)}{self._kept.name}"
            return self._temporary.open("w+b")

    @property
    def complete(self) -> bool:
        """Whether an earlier process left the whole file, so that the dense model need not be measured for it."""
        size = sum(self.rows.values()) * BYTES * self.vocabulary
        return self._kept is not None and self._kept.is_file() and self._kept.stat().st_size == size

    # --- the dense model ---

    def record(self, text: str, window: int, logits_PV: torch.Tensor) -> None:
        """Keep the logits of one window, or the part of it that the budget holds."""
        offset, count = self._place(text, window)
        if count == 0:
            return
        assert logits_PV.shape[-1] == self.vocabulary, "logits of another width than the config's vocabulary"
        with writing(self._folder):
            self._file.seek(offset)
            for piece_PV in logits_PV[:count].split(self._piece):
                self._file.write(piece_PV.float().cpu().contiguous().numpy().data)
        self._recorded.add((text, window))

    def finish(self) -> None:
        """Say that the dense model is done; a file that stays gets its name now."""
        asked = sum(-(-rows // self._each[text]) for text, rows in self.rows.items())
        assert len(self._recorded) == asked, "some windows were not recorded"
        with writing(self._folder):
            self._file.flush()
            if self._temporary is not None and self._kept is not None:
                os.fsync(self._file.fileno())
                os.replace(self._temporary, self._kept)
                self._temporary = None

    def _place(self, text: str, window: int) -> tuple[int, int]:
        """Where the logits of a window begin in the file, and how many of its positions are kept."""
        each = self._each[text]
        count = max(0, min(each, self.rows[text] - window * each))
        return (self._first[text] + window * each) * BYTES * self.vocabulary, count

    # --- the other model ---

    def compare(self, text: str, window: int, logits_PV: torch.Tensor) -> None:
        """Compare the logits of one window with those of the dense model."""
        offset, count = self._place(text, window)
        if count == 0:
            return
        if logits_PV.shape[-1] != self.vocabulary:
            raise UserError(
                f"the model's vocabulary has {logits_PV.shape[-1]:,} tokens, the dense model's {self.vocabulary:,}: "
                "give the model it was made from as --dense, or --no-kl"
            )
        total, agreeing, buffer_PV = 0.0, 0, torch.empty(min(count, self._piece), self.vocabulary)
        self._file.seek(offset)
        for piece_PV in logits_PV[:count].split(self._piece):
            dense_PV = buffer_PV[: len(piece_PV)]
            read = self._file.readinto(dense_PV.numpy().data.cast("B"))  # type: ignore[attr-defined]
            assert read == dense_PV.nbytes, "the file is shorter than what was recorded"
            part, same = divergence(dense_PV.to(piece_PV.device), piece_PV.float())
            total, agreeing = total + part, agreeing + same
        self._compared[text, window] = (count, total, agreeing)

    def results(self) -> dict[str, dict[str, Any]]:
        """By text: kl_divergence (nats a token), top1_agreement (a share), kl_tokens (over which both are means)."""
        found = {}
        for text in self.rows:
            members = [one for (name, _), one in self._compared.items() if name == text]
            if members:
                found[text] = _means(members)
        return found

    def overall(self) -> dict[str, Any] | None:
        """The same over the tokens of all texts; None when not one was kept."""
        return _means(self._compared.values()) if self._compared else None

    # --- the end ---

    def close(self) -> None:
        """Give the file up; one that was not finished is removed."""
        self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    def delete(self) -> None:
        """Close, and remove a file that stayed."""
        self.close()
        if self._kept is not None:
            self._kept.unlink(missing_ok=True)

    def __enter__(self) -> DenseReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _running_sum(values: Iterable[int]) -> list[int]:
    """Of the values before each."""
    sums, total = [], 0
    for value in values:
        sums.append(total)
        total += value
    return sums


def _means(members: Iterable[tuple[int, float, int]]) -> dict[str, Any]:
    counts, sums, agreeing = zip(*members, strict=True)
    tokens = sum(counts)
    return dict(kl_divergence=sum(sums) / tokens, top1_agreement=sum(agreeing) / tokens, kl_tokens=tokens)
