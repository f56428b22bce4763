"""What the tests of the commands share: a small model in a folder, texts, and one finished compression."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mico
from tests.tiny import numbered, save_model

WIDTH, MAXIMUM = 64, 128


def make_model(folder: Path, layers: int = 2) -> Path:
    """A random Llama of `layers` layers with a tokenizer."""
    shape = dict(hidden_size=WIDTH, intermediate_size=96, max_position_embeddings=MAXIMUM, num_hidden_layers=layers)
    return save_model(folder, "llama", **shape)


def make_texts(folder: Path) -> Path:
    """wikitext2/{train,test}.txt below `folder`."""
    (folder / "wikitext2").mkdir(parents=True)
    for split, documents in (("train", 600), ("test", 100)):
        lines = "\n".join(numbered(documents).documents)
        (folder / "wikitext2" / f"{split}.txt").write_text(lines, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Workspace:
    """A folder with model and texts, and the options that fit them."""

    root: Path
    model: Path
    texts: Path

    @property
    def options(self) -> dict[str, Any]:
        """Of the verbs; `flags` are the same on the command line."""
        return dict(calib="wikitext2", data_dir=str(self.texts), nsamples=8, batch_size=2)

    @property
    def flags(self) -> list[str]:
        return [f"--{name.replace('_', '-')}={value}" for name, value in self.options.items()]

    @functools.cached_property
    def run(self) -> Path:
        """A finished compression with channel groups by MI; its statistics and groups lie beside it."""
        folder = self.root / "mico-run"
        mico.compress(
            str(self.model), eval="wikitext2", arm="mi", save=str(folder), statistics=str(self.root / "statistics"),
            groups=str(self.root / "groups"), **self.options,
        )  # fmt: skip
        return folder


@functools.cache
def workspace(root: Path) -> Workspace:
    """Made once for a `root`: `tmp_path_factory.getbasetemp()` is the same for all tests of a session."""
    return Workspace(root, make_model(root / "mico-model"), make_texts(root / "mico-texts"))
