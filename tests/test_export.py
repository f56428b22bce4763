"""The verb around the exporters: where it writes, what it refuses first, and what a full disk leaves."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import mico
from mico import cli
from mico.errors import UserError
from mico.exports.source import read_packed
from tests.exports.sources import SHAPE
from tests.packed.making import Pair, pair

TARGETS = ("dense", "vllm", "gguf", "gptq")


@pytest.fixture(scope="module")
def made() -> Pair:
    return pair(kind="pattern", **SHAPE)


@pytest.fixture(scope="module")
def saved(made: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("export") / "run" / "model")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved.parent, tmp_path / "run"))


@pytest.mark.parametrize("inside", [".", "model"])
def test_a_name_is_found_from_inside_the_folder(run: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / inside)
    report = mico.export(".", to="dense")
    assert report["folder"] == str(run.parent / "run-dense") and (run.parent / "run-dense" / "config.json").is_file()
    monkeypatch.chdir(run.parent)
    (run.parent / "made").mkdir()
    assert mico.export("run/../run/model", to="dense", save="made")["folder"] == str(run.parent / "made")


FULL = """
import resource, sys
from mico import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # no file may grow beyond
sys.exit(cli.main(["export", sys.argv[1], "--to", sys.argv[2]]))
"""


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_is_told_and_leaves_nothing(run: Path, tmp_path: Path, to: str) -> None:
    done = subprocess.run([sys.executable, "-B", "-c", FULL, str(run), to], capture_output=True, text=True)
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, message
    assert f"{tmp_path / f'run-{to}'} cannot be written (" in message
    assert "free disk space" in message and "kept" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_failures_are_not_blamed_on_the_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr("mico.exports.dense.export_dense", fail)
    with pytest.raises(OSError, match="input/output error"):
        mico.export(str(run), to="dense")
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_free_space_is_asked_for_first(
    made: Pair, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 4 * sum(parameter.numel() for parameter in made.dense.parameters())
    assert read_packed(run).numbers() * 4 == needed
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    monkeypatch.setattr("mico.exports.dense.export_dense", lambda *_: pytest.fail("started"))
    assert cli.main(["export", str(run), "--to", "dense", "--dtype", "float32"]) == 2
    assert "free some or choose --save" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_damaged_folder_is_one_line(run: Path) -> None:
    """As `mico eval` sees it: before transformers opens what an index names."""
    folder = run / "model"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, run.parent / "outside.safetensors", {"format": "pt"})
    index = dict(metadata={}, weight_map=dict.fromkeys(tensors, "../../outside.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for act in (lambda: mico.load(run), lambda: read_packed(run)):
        with pytest.raises(UserError, match="only a file of the same folder is opened"):
            act()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").symlink_to(run.parent / "outside.safetensors")
    for act in (lambda: mico.load(run), lambda: read_packed(run)):
        with pytest.raises(UserError, match="leads out of the model's folder"):
            act()
    (folder / "model.safetensors").unlink()
    for act in (lambda: mico.load(run), lambda: read_packed(run)):
        with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
            act()
    content = (run.parent / "outside.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    for act in (lambda: mico.load(run), lambda: read_packed(run)):
        with pytest.raises(UserError, match="is truncated or corrupt") as caught:
            act()
        assert "\n" not in str(caught.value)
