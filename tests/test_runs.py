from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mico.errors import UserError
from mico.packed.quantized import QuantizedWeight
from mico.runs import RunFolder, sha256_file
from tests.faults import content, full_disk_message, killing_at

ARGUMENTS = dict(model="tiny", pattern=(2, 4), compression=dict(sparsity=0.5, wbits=4))


Shape = tuple[int, int, int]  # rows, channels, groups


def make_weight(
    seed: int,
    shape: Shape,
    factored: bool,
    zeros: bool,
    mask: bool,
    pattern: tuple[int, int] | None = None,
    floating: bool = False,
) -> QuantizedWeight:
    rows, channels, groups = shape
    generator = torch.Generator().manual_seed(seed)
    label_C = torch.randint(0, groups, (channels,), generator=generator)
    bits_G = tuple(torch.randint(2, 9, (groups,), generator=generator).tolist())
    codes_RC = torch.randint(0, 256, (rows, channels), generator=generator).to(torch.uint8)
    if floating:
        codes_RC, bits_G = torch.randn(rows, channels, generator=generator).bfloat16(), (16,) * groups
    scale = torch.rand(rows, 1 if factored else groups, generator=generator).half()
    return QuantizedWeight(
        codes_RC,
        scale,
        torch.rand(groups, generator=generator).half() if factored else None,
        torch.randint(0, 256, (rows, groups), generator=generator).to(torch.uint8) if zeros else None,
        bits_G,
        label_C,
        torch.rand(rows, channels, generator=generator) > 0.5 if mask else None,
        pattern,
    )


def block(seed: int) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor], list[dict[str, Any]]]:
    layers = {
        "attn.q": make_weight(seed, (5, 12, 3), True, False, True, pattern=(2, 4)),
        "attn.k": make_weight(seed + 1, (3, 12, 2), False, True, False),
    }
    layers["attn.v"] = dataclasses.replace(layers["attn.k"])  # a stream's Linears share their labels' memory
    extra = {"attn.q.bias": torch.arange(5.0) + seed}
    records = [dict(block=seed, layer=name, error=0.1 * seed, note="é") for name in layers]
    return layers, extra, records


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left)]
    return all(a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


def compress(folder: Path, blocks: int = 2) -> None:
    """A run as the block loop does it: resume, write blocks, publish a model, finish."""
    with RunFolder.open(folder, ARGUMENTS) as run:
        if run.completed:
            return
        for index in range(run.finished, blocks):
            layers, extra, records = block(index)
            for record in records:
                run.log_layer(record)
            run.write_block(index, layers, extra, records)
        with run.publish() as staging:
            (staging / "config.json").write_text("{}")
            save_file({"x": torch.arange(50.0)}, staging / "model.safetensors")
        run.finish(dict(blocks=blocks))


@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    pattern=st.sampled_from([None, (2, 4)]),
)
@settings(max_examples=20, deadline=None)
def test_block_round_trip_and_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shape: Shape,
    flags: tuple[bool, ...],
    pattern: tuple[int, int] | None,
) -> None:
    factored, zeros, mask, floating = flags
    weight = make_weight(seed, shape, factored, zeros, mask, pattern, floating)
    layers = {"b": weight, "a": dataclasses.replace(weight)}
    records: list[dict[str, Any]] = [{"layer": "b", "x": [1, None, 0.1]}, {"é": {}}]
    extra = {"z": torch.ones(2, 3).T, "y": torch.zeros(1, dtype=torch.bfloat16)}
    digests = []
    for _ in range(2):
        with RunFolder.open(tmp_path_factory.mktemp("run"), {}) as run:
            run.write_block(0, layers, extra, records)
            digests.append(sha256_file(run.path / "blocks" / "000.safetensors"))
            read, more, again = run.read_block(0)
    assert digests[0] == digests[1]
    assert list(read) == list(layers) and all(same(read[name], layers[name]) for name in layers)
    assert list(more) == list(extra) and all(torch.equal(more[name], extra[name]) for name in extra)
    assert again == records


def test_the_bytes_of_extra_tensors_are_told_by_name(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", {}) as run:
        assert run.extra_bytes() == {}
        for index in range(2):
            extra = {f"{stream}/rows": torch.zeros(7, 3 + index, dtype=torch.float16) for stream in ("attn", "mlp")}
            extra |= {
                "attn/sum": torch.zeros(3, dtype=torch.float64),
                "attn/mark": torch.zeros(2, dtype=torch.bfloat16),
            }
            run.write_block(index, block(index)[0], extra, [])
        assert run.extra_bytes() == {"rows": 2 * 2 * 7 * (3 + 4), "sum": 2 * 8 * 3, "mark": 2 * 2 * 2}


def test_resume_counts_blocks_and_rebuilds_layers(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with RunFolder.open(folder, ARGUMENTS) as run:
        assert run.finished == 0 and not run.completed and run.environment_changes == []
        for index in range(2):
            layers, extra, records = block(index)
            run.log_layer(records[0])
            run.write_block(index, layers, extra, records)
        run.log_layer(dict(block=2, layer="unfinished"))
        assert run.finished == 2
    (folder / ".tmp-1234-left").write_text("x")
    (folder / "blocks" / ".tmp-1234-left").write_text("x")
    with RunFolder.open(folder, ARGUMENTS) as run:
        assert run.finished == 2
        assert same(run.read_block(1)[0]["attn.q"], block(1)[0]["attn.q"])
    lines = (folder / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == block(0)[2] + block(1)[2]
    assert not list(folder.rglob(".tmp-*"))
    (folder / "blocks" / "000.safetensors").unlink()  # what an error message may have asked for
    with RunFolder.open(folder, ARGUMENTS) as run:
        assert run.finished == 0
    with RunFolder.open(folder, ARGUMENTS) as run:
        assert run.finished == 0


def test_without_resume_the_same_folder_starts_over(tmp_path: Path) -> None:
    compress(tmp_path)
    with RunFolder.open(tmp_path, ARGUMENTS, resume=False) as run:
        assert run.finished == 0 and not run.completed
        assert (tmp_path / "layers.jsonl").read_bytes() == b""


def test_completed_run_is_recognised_and_a_flipped_bit_named(tmp_path: Path) -> None:
    compress(tmp_path)
    first = content(tmp_path)
    assert {"manifest.json", "report.json", "layers.jsonl", "config.json", "model.safetensors", ".lock"} < set(first)
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        assert run.completed and run.damaged == []
    data = bytearray(first["model.safetensors"])
    data[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").unlink()
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        assert not run.completed and run.damaged == ["config.json", "model.safetensors"]
    compress(tmp_path)  # writes the outputs again
    assert (tmp_path / "model.safetensors").read_bytes() == first["model.safetensors"]
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        assert run.completed


def test_published_files_honour_umask(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        compress(tmp_path)
    finally:
        os.umask(previous)
    for name in ("model.safetensors", "config.json", "manifest.json", "layers.jsonl", "blocks/000.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644, name


def test_failed_publish_leaves_nothing(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        with pytest.raises(KeyError), run.publish() as staging:
            (staging / "config.json").write_text("{}")
            raise KeyError
        assert not (tmp_path / "config.json").exists() and not list(tmp_path.glob(".tmp-*"))


def test_damaged_block_is_named(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        for index in range(2):
            run.write_block(index, *block(index))
    file = tmp_path / "blocks" / "001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        assert run.read_block(0)[2] == block(0)[2]
        with pytest.raises(UserError, match=r"001\.safetensors is truncated or damaged .*delete it and run again"):
            run.read_block(1)
    for size in (0, 5, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"001\.safetensors is truncated or damaged"):
            RunFolder.open(tmp_path, ARGUMENTS)
    file.unlink()
    with RunFolder.open(tmp_path, ARGUMENTS) as run:  # the failed opens gave the lock back
        assert run.finished == 1


def test_blocks_of_a_finished_run_may_be_deleted(tmp_path: Path) -> None:
    compress(tmp_path)
    shutil.rmtree(tmp_path / "blocks")
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        assert run.completed and run.finished == 0
    assert RunFolder.view(tmp_path, ARGUMENTS) is None  # there is nothing to read


def test_view_reads_a_finished_run_without_owning_it(tmp_path: Path) -> None:
    assert RunFolder.view(tmp_path / "absent", ARGUMENTS) is None
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        run.write_block(0, *block(0))
        assert RunFolder.view(tmp_path, ARGUMENTS) is None
    compress(tmp_path)
    before = content(tmp_path)
    with RunFolder.open(tmp_path, ARGUMENTS):
        view = RunFolder.view(tmp_path, ARGUMENTS)
        assert view is not None and view.finished == 2 and view.read_block(1)[2] == block(1)[2]
    with pytest.raises(AssertionError):
        view.write_block(2, *block(2))
    with pytest.raises(UserError, match='model: there "tiny", here "big"'):
        RunFolder.view(tmp_path, ARGUMENTS | dict(model="big"))
    assert content(tmp_path).keys() == before.keys()
    (tmp_path / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
    assert RunFolder.view(tmp_path, ARGUMENTS) is None


def test_other_arguments_are_refused_by_name(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, ARGUMENTS).close()
    other = ARGUMENTS | dict(model="big", compression=dict(sparsity=0.6, wbits=4))
    message = r'\(model: there "tiny", here "big"; compression\.sparsity: there 0\.5, here 0\.6\).*--save'
    for resume in (True, False):
        with pytest.raises(UserError, match=message):
            RunFolder.open(tmp_path, other, resume=resume)
    RunFolder.open(tmp_path, ARGUMENTS).close()


def test_environment_changes_are_told(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, ARGUMENTS).close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["environment"]) == {"python", "torch", "transformers", "mico", "platform", "threads"}
    manifest["environment"]["torch"] = "1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with RunFolder.open(tmp_path, ARGUMENTS) as run:
        assert [change.split(",")[0] for change in run.environment_changes] == ['torch: there "1.0"']


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "mico-run", "version": 1}', '{"format":', "\udcff"])
def test_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        RunFolder.open(tmp_path, ARGUMENTS)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty \(thesis\.txt\) and not a run folder"):
        RunFolder.open(tmp_path, ARGUMENTS)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    (tmp_path / "thesis.txt").rename(tmp_path / ".hidden")
    RunFolder.open(tmp_path, ARGUMENTS).close()


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/mico-run"])
def test_unwritable_folder_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose a folder"):
        RunFolder.open(tmp_path / where, ARGUMENTS)


def test_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mico.runs import RunFolder; run = RunFolder.open(sys.argv[1], {}); "
        "print('held', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | dict(PYTHONPATH=root, OMP_NUM_THREADS="1")
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"{tmp_path} is in use by another run \(pid {owner.pid} on "):
            RunFolder.open(tmp_path, {})
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with RunFolder.open(tmp_path, {}), pytest.raises(UserError, match=f"pid {os.getpid()} on"):
        RunFolder.open(tmp_path, {})
    RunFolder.open(tmp_path, {}).close()


def test_killed_anywhere_no_partial_file_and_the_same_bytes_after_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # here only its place in the order counts
    compress(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    fixed = [name for name in whole if name not in ("manifest.json", ".lock")]
    point = 0
    while True:
        folder = tmp_path / f"run{point}"
        killed = killing_at(point, partial(compress, folder), folder)
        for name, data in content(folder).items() if folder.exists() else ():
            if name == "manifest.json":
                json.loads(data)
            elif name == "layers.jsonl":
                assert whole[name].startswith(data)
            elif not name.startswith((".", "blocks/.")):
                assert data == whole[name], (point, name)
        compress(folder)
        after = content(folder)
        assert {name: after.get(name) for name in fixed} == {name: whole[name] for name in fixed}, point
        assert after.keys() == whole.keys()
        if not killed:
            break
        point += 1
    assert point > 30


def test_full_disk_keeps_the_blocks_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def overflow() -> None:
        with RunFolder.open(folder, ARGUMENTS) as run:
            run.write_block(0, *block(0))
            layers, extra, records = block(1)
            run.write_block(1, layers, extra | dict(big=torch.ones(9000)), records)

    message = full_disk_message(overflow, tmp_path / "answer", 16384)
    assert "001.safetensors cannot be written (File too large): free disk space" in message and "\n" not in message
    assert not list(folder.rglob(".tmp-*"))
    with RunFolder.open(folder, ARGUMENTS) as run:
        assert run.finished == 1 and run.read_block(0)[2] == block(0)[2]


def test_full_disk_while_publishing(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def overflow() -> None:
        with RunFolder.open(folder, ARGUMENTS) as run, run.publish() as staging:
            save_file({"big": torch.ones(9000)}, staging / "model.safetensors")

    message = full_disk_message(overflow, tmp_path / "answer", 16384)
    assert f"{folder} cannot be written" in message and "free disk space" in message
    assert not (folder / "model.safetensors").exists() and not list(folder.glob(".tmp-*"))
