"""A dense model measured before it is changed, and what became of it measured afterwards: never both in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mico.console import Console
from mico.data import Windows
from mico.files import atomic_json, read_json
from mico.metrics.divergence import DenseReference
from mico.metrics.perplexity import bar_steps, evaluate_texts

DENSE = "dense.json"  # perplexities of the dense model

Scores = dict[str, dict[str, Any]]


class Pair:
    """Perplexities of both models by text, and how far the second has moved from the first.

    What is found of the dense model stays in `folder` until `compressed` is done, so that a run that goes on does not
    measure it again. mark: what identifies the dense model. spare: bytes of the disk that the run still needs.
    """

    def __init__(
        self, sets: Mapping[str, Windows], folder: Path, mark: str, vocabulary: int, batch_size: int, console: Console,
        spare: int = 0,
    ) -> None:  # fmt: skip
        self._sets, self._kept, self._batch_size, self._console = sets, folder / DENSE, batch_size, console
        self._reference = DenseReference(sets, vocabulary, folder=folder, name=mark, spare=spare) if sets else None
        if self._reference is not None and not any(self._reference.rows.values()):
            console.note(
                f"KL to the dense model is left out: {folder} has no disk space for what it says about a token"
            )

    def dense(self, model: nn.Module) -> Scores:
        """Measure the dense model, unless an earlier process did."""
        if self._reference is None:
            return {}
        if self._kept.exists() and self._reference.complete:
            return read_json(self._kept)
        scores = self._measure(model, "dense", self._reference.record)
        self._reference.finish()
        atomic_json(self._kept, scores)
        return scores

    def compressed(self, model: nn.Module) -> Scores:
        """Measure what became of it; every text has kl_divergence, top1_agreement and kl_tokens too."""
        if self._reference is None:
            return {}
        scores = self._measure(model, "compressed", self._reference.compare)
        return {name: score | self._reference.results().get(name, {}) for name, score in scores.items()}

    def done(self) -> None:
        """Remove the logits of the dense model: the figures are safe."""
        if self._reference is not None:
            self._reference.delete()

    def _measure(self, model: nn.Module, label: str, observer: Any) -> Scores:
        total = sum(len(windows.ids_NT) for windows in self._sets.values())
        with self._console.stage("evaluate"), self._console.bar(f"perplexity, {label}", total) as advance:
            return evaluate_texts(
                model, self._sets, batch_size=self._batch_size, progress=bar_steps(advance), observer=observer
            )
