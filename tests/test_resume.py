"""A compression killed at any moment goes on with the same command and ends with the same bytes.

MICO_KILLS and MICO_KILL_MODEL (for instance 10 and tiny-llama) make it the full exercise.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mico.files import sha256_file
from tests.tiny import save_model
from tests.workspace import make_texts

KILLS = int(os.environ.get("MICO_KILLS", "2"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("MICO_KILL_MODEL")
    return named or str(save_model(tmp_path_factory.mktemp("resume") / "model"))


def command(model: str, folder: Path) -> list[str]:
    texts = folder.parent / "texts"
    small = [
        "--nsamples",
        "16",
        "--seqlen",
        "64",
        "--calib",
        "wikitext2",
        "--eval",
        "wikitext2",
        "--data-dir",
        str(texts),
    ]
    chosen = ["--eval", "docs"] if "MICO_KILL_MODEL" in os.environ else small
    return [sys.executable, "-m", "mico", "compress", model, "--save", str(folder / "run"), *chosen]


def start(model: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"MICO_RESULTS": str(folder / "results"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command(model, folder), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def weights(folder: Path) -> dict[str, str]:
    """sha256 of everything that must be the same: blocks, the saved model, the layer records."""
    files = [*folder.glob("run/blocks/*"), *folder.glob("run/model/*"), folder / "run" / "layers.jsonl"]
    return {file.name: sha256_file(file) for file in files if file.name != "README.md"}  # it names the command's folder


def written(folder: Path) -> int:
    """How many files of the run are there, whole or half written."""
    return sum(len(files) for _, _, files in os.walk(folder))  # passes over folders that vanish meanwhile


def test_sigkill_at_random_moments_ends_with_the_same_bytes(model: str, tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    whole = tmp_path / "whole"
    process = start(model, whole)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    expected = weights(whole)
    assert any(name.endswith(".safetensors") for name in expected)

    # The moment is a number of files written, not a time: a run on a busy machine is no slower than its own files.
    moments, files, killed = random.Random(0), written(whole), 0
    for attempt in range(KILLS):
        folder = tmp_path / f"killed-{attempt}"
        process = start(model, folder)
        last = files - 1 if attempt else files // 2  # one kill at least comes long before the end
        enough, pause = moments.randint(1, last), moments.uniform(0, 0.05)
        while process.poll() is None and written(folder) < enough:
            time.sleep(0.005)
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        again = start(model, folder)
        output, _ = again.communicate(timeout=600)
        assert again.returncode == 0, output
        assert weights(folder) == expected, f"attempt {attempt}"
        assert not list(folder.rglob(".tmp-*"))
    assert killed >= KILLS / 2, f"only {killed} of {KILLS} runs were still alive when killed"
