"""The fourteen mistakes that users make: one line that says what to do, the right exit code, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mico import cli
from tests.workspace import WIDTH, Workspace, make_model, workspace


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MICO_RESULTS", str(tmp_path / "results"))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, space: Workspace):
    """Run `mico compress MODEL` with the options that fit the small model and some more; return what was said."""

    def run(*more: str, model: Path | str = space.model) -> str:
        own_text = any(word.startswith("--data-file") for word in more)
        flags = [flag for flag in space.flags if not (own_text and flag.startswith("--calib"))]
        assert cli.main(["compress", str(model), *flags, "--eval=wikitext2", *more]) == 2
        shown = capsys.readouterr()
        said = [line for line in shown.err.splitlines() if not line.startswith(("calibration ", "evaluation "))]
        assert len(said) == 1 and said[0].startswith("mico: error: "), shown.err
        assert "Traceback" not in shown.err and shown.out == ""
        assert not list((tmp_path / "results").glob("*/model"))
        return said[0]

    return run


def test_unknown_model(refused) -> None:
    said = refused(model="opt-125")
    assert "unknown model 'opt-125'" in said and "did you mean opt-125m" in said and "mico models" in said


def test_bloom(refused, tmp_path: Path) -> None:
    folder = tmp_path / "bloom"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom", "n_layer": 2, "hidden_size": 64}))
    said = refused(model=folder)
    assert "'bloom' is not supported" in said and all(name in said for name in ("OPT", "Llama", "Mistral", "Qwen3"))


def test_missing_data(refused, tmp_path: Path) -> None:
    assert f"no file for text 'ptb': expected {tmp_path}" in refused("--calib=ptb", f"--data-dir={tmp_path}")
    assert "nowhere is not a folder" in refused("--data-dir=nowhere")
    assert "nothing.txt does not exist" in refused("--data-file=nothing.txt")


def test_empty_file(refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert "empty.txt is empty" in refused(f"--data-file={tmp_path / 'empty.txt'}")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--sparsity=1.5", "--sparsity 1.5: must be at least 0 and below 1"),
        ("--wbits=0", "--wbits 0: choose 2 to 8"),
        ("--target-avg-bits=1.2", "--target-avg-bits 1.2: must be from 2 to 8"),
        (f"--n-groups={WIDTH + 1}", f"--n-groups {WIDTH + 1}: more groups than channels"),
        ("--n-groups=few", "--n-groups few: give a whole number of at least 1, or auto"),
        ("--seqlen=100000", "--seqlen 100000: must be from 2 to the model's maximum, 128"),
        ("--seqlen=0", "--seqlen 0: must be at least 1"),
        ("--nsamples=5000", "lower --nsamples (at most "),
        ("--method=magic", "--method magic: choose from mico, sparsegpt"),
        ("--eval=wiki", "--eval: unknown text 'wiki': choose from wikitext2"),
    ],
)
def test_numbers_and_names_out_of_range(option: str, told: str, refused) -> None:
    """Among them four of the fourteen: sparsity 1.5, bits 0, a target below the minimum, more groups than channels."""
    assert told in refused(option)


def test_more_groups_than_channels_in_mi_group(space: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mi-group", str(space.model), *space.flags, f"--n_groups={WIDTH + 1}"]) == 2
    assert "more groups than channels" in capsys.readouterr().err


def test_unwritable_output(refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(f"--save={tmp_path / 'file' / 'run'}")
    assert "cannot be written" in said and str(tmp_path / "file") in said
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    assert "cat.jpg) and not a run folder" in refused(f"--save={tmp_path / 'photos'}")


def test_no_network(refused) -> None:
    said = refused(model="facebook/opt-125m")
    assert "model facebook/opt-125m: " in said and "HF_HUB_OFFLINE" in said


def test_no_network_for_texts(space: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compress", str(space.model), "--calib=c4", "--offline"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "text 'c4' needs the hub" in said and "--data-dir DIR" in said


def test_corrupt_safetensors(refused, space: Workspace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(space.model, tmp_path / "model"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = refused(model=folder)
    assert "model.safetensors is truncated or corrupt" in said and "fetch it again" in said


def test_a_row_without_text(refused, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n\n{"body": "no text here"}\n')
    assert "rows.jsonl:3: no string field 'text' (found: body)" in refused(f"--data-file={file}")


def test_ctrl_c_keeps_finished_blocks(space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real program, interrupted in the middle; then the same command goes on after the finished blocks."""
    model, run = make_model(tmp_path / "deep", layers=24), tmp_path / "run"
    words = ["compress", str(model), *space.flags, "--eval=wikitext2", "--arm=original", f"--save={run}"]
    process = subprocess.Popen([sys.executable, "-m", "mico", *words], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (run / "blocks" / "001.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < until, "no block was written"
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130, said
        assert time.monotonic() - started < 5
    finally:
        process.kill()
    last = said.splitlines()[-1]
    assert last.startswith("mico: interrupted: finished blocks are kept, the same command again")
    assert "Traceback" not in said and not (run / "model").exists()

    assert cli.main(words) == 0
    assert "blocks were finished, going on after them" in capsys.readouterr().err
    assert (run / "model" / "model.safetensors").exists()
