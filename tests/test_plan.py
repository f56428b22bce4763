"""The forecast of compress: from headers alone, near what a run leaves; a refusal says what would fit."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mico
import mico.activations as activations
import mico.plan as verb
from mico import cli
from mico.errors import UserError
from mico.forecast import fit, machine, memory
from mico.forecast.fit import Room, streams
from mico.forecast.machine import Machine
from mico.forecast.memory import START_BYTES
from mico.forecast.outline import Outline, outline
from mico.loading import load_config
from mico.loading.headers import stored_tensors
from tests.workspace import WIDTH, Workspace, workspace

GB = 10**9
STILL = Machine(*[1e9] * 4, *[1e-6] * 5, *[1e9] * 4)  # a machine that nobody has to wait for
ROOM = Room(host=100 * GB, device=None, disk=100 * GB, base=GB)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it to plan on another machine than this one, and without trying it."""
    monkeypatch.setattr(verb, "measure", lambda *_: STILL)
    monkeypatch.setattr(memory, "HEAP_BYTES", 0)  # which would outweigh so small a model
    monkeypatch.setattr(fit, "spills", lambda *_: False)  # as activations do, where memory is as scarce as here

    def set_room(**free: Any) -> None:
        monkeypatch.setattr(verb, "_room", lambda *_: replace(ROOM, **free))

    set_room()
    return set_room


def stages(report: dict[str, Any], key: str) -> dict[str, float]:
    return {stage["stage"]: stage[key] for stage in report["stages"]}


@pytest.mark.parametrize(
    "options",
    [
        dict(method="sparsegpt", sparsity=0.5, wbits=4),
        dict(method="sparsegpt", pattern="2:4", wbits=3, group_size=32),
        dict(method="rtn", wbits=8, embed_bits=8),
        dict(arm="mi"),
        dict(profile="gguf", wbits=4),
    ],
)
def test_size_is_that_of_a_real_run(space: Workspace, options: dict[str, Any], tmp_path: Path, room: Any) -> None:
    planned = mico.plan(str(space.model), nsamples=8, batch_size=2, eval="none", **options)
    if options == dict(arm="mi"):
        real = json.loads((space.run / "report.json").read_text())["size"]
    else:
        real = mico.compress(
            str(space.model), eval="none", save=str(tmp_path / "run"), **options, **space.options
        )["size"]  # fmt: skip
    assert planned["packed_bytes"] == pytest.approx(real["packed_bytes"], rel=0.01)
    assert planned["bytes"] == pytest.approx(real["bytes"], rel=0.04)  # a header weighs in so small a file
    assert planned["bits_per_weight"] == pytest.approx(real["true_bits"], rel=0.01)
    assert planned["linear_weights"] == real["weights"]


def a_shape(space: Workspace) -> Outline:
    return outline(load_config(str(space.model)), stored_tensors(str(space.model)), "the model")


def truncated(model: Path, folder: Path, keep: int = 0) -> Path:
    """A copy whose weight file ends `keep` bytes after its header."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: 8 + struct.unpack("<Q", data[:8])[0] + keep])
    return folder


def test_headers_are_enough(space: Workspace, tmp_path: Path, room: Any) -> None:
    whole = mico.plan(str(space.model), eval="none")
    cut = mico.plan(str(truncated(space.model, tmp_path / "cut")), eval="none")
    assert cut | {"model": ""} == whole | {"model": ""}
    with pytest.raises(UserError, match=r"model\.safetensors: its header is truncated"):
        mico.plan(str(truncated(space.model, tmp_path / "short", -9)), eval="none")


def test_missing_tensors_are_named(space: Workspace, tmp_path: Path, room: Any) -> None:
    folder = tmp_path / "deep"
    shutil.copytree(space.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"config.json describes .*missing: model.layers.2"):
        mico.plan(str(folder), eval="none")


def test_the_hub_is_not_asked_when_it_is_off(room: Any) -> None:
    with pytest.raises(UserError, match="hub"):
        mico.plan("opt-125m", offline=True)


def test_stages_follow_the_options(space: Workspace, room: Any) -> None:
    model = str(space.model)
    plain = mico.plan(model, method="sparsegpt", eval="none")
    assert list(stages(plain, "seconds")) == ["load", "compress", "save", "reload"]
    full = mico.plan(model, embed_bits=8, eval="wikitext2")
    assert list(stages(full, "seconds")) == [
        "load", "evaluate dense", "statistics", "groups", "embeddings", "compress", "save", "reload and evaluate"
    ]  # fmt: skip
    assert full["disk_bytes"] > plain["disk_bytes"] and full["seconds"] > plain["seconds"]
    assert full["peak_host_bytes"] == max(stages(full, "host_bytes").values())
    assert full["disk_bytes"] == sum(stages(full, "disk_bytes").values())
    assert full["seconds"] == pytest.approx(sum(stages(full, "seconds").values()), abs=0.5)


def test_more_work_is_forecast_as_more(space: Workspace, room: Any) -> None:
    model, base = str(space.model), dict(eval="none", nsamples=64, seqlen=128)
    least = mico.plan(model, method="sparsegpt", **base)
    for more in (dict(method="mico"), dict(nsamples=640), dict(batch_size=64, dtype="float32")):
        report = mico.plan(model, **dict(method="sparsegpt") | base | more)
        assert report["peak_host_bytes"] > least["peak_host_bytes"]
    assert mico.plan(model, method="sparsegpt", **base | {"nsamples": 640})["seconds"] > least["seconds"]
    streamed = mico.plan(model, method="sparsegpt", **base, stream=True)
    assert streamed["peak_otherwise_bytes"] == least["peak_host_bytes"] and streamed["streams"]
    assert stages(streamed, "host_bytes")["load"] < stages(least, "host_bytes")["load"]


def test_streams_by_the_rule_of_loading(space: Workspace, room: Any) -> None:
    report = mico.plan(str(space.model), eval="none")
    assert not report["streams"] and mico.plan(str(space.model), eval="none", stream=True)["streams"]
    shape, whole = a_shape(space), report["whole_model_bytes"]
    for host, device, expected in ((1.01, None, False), (0.99, None, True), (100, 0.99, True), (0.5, 1.01, False)):
        free = replace(ROOM, host=int(host * whole / 0.8), device=device and int(device * whole / 0.8))
        assert streams(shape, 4, free, None) is expected
        assert streams(shape, 4, free, True) and not streams(shape, 4, free, False)


@pytest.mark.parametrize("free", [0.95, 0.8, 0.5])
def test_the_remedy_is_true(space: Workspace, room: Any, free: float, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(space.model), "--eval=none", "--nsamples=4096", "--seqlen=128", "--batch-size=256", "--no-stream"]
    asked = mico.plan(str(space.model), eval="none", nsamples=4096, seqlen=128, batch_size=256, stream=False)
    base, fixed = 10**6, GB + START_BYTES
    room(host=int((asked["peak_host_bytes"] - fixed) * free) + START_BYTES, base=base)
    assert cli.main(["plan", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    found = re.search(r"does not fit: it takes [\d.]+ \wB of memory, [\d.]+ \wB are free: (--.*) takes", shown.err)
    assert found, shown.err
    remedy = found[1].split()
    kept = [word for word in words if not (word == "--no-stream" and "--stream" in remedy)]
    assert cli.main(["plan", *kept, *remedy]) == 0, shown.err


def test_hidden_states_that_would_fill_the_memory_go_to_the_disk(
    space: Workspace, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = dict(eval="none", nsamples=40_000, seqlen=128, stream=True)
    within = mico.plan(str(space.model), **big)
    monkeypatch.setattr(fit, "spills", activations.spills)
    assert mico.plan(str(space.model), **big) == within
    hidden = 2 * 40_000 * 128 * WIDTH * 4
    room(host=2 * hidden + 1)
    assert not mico.plan(str(space.model), **big)["hidden_in_file"]
    room(host=2 * hidden - 1)
    without = mico.plan(str(space.model), **big)
    assert without["hidden_in_file"] and "hidden states go to a file" in verb.section(without).lines[2]
    assert within["peak_host_bytes"] - without["peak_host_bytes"] > 0.9 * hidden
    assert without["disk_bytes"] - within["disk_bytes"] == hidden


def test_what_can_never_fit(space: Workspace, room: Any, capsys: pytest.CaptureFixture[str]) -> None:
    room(host=10**6, base=10**6)
    assert cli.main(["plan", str(space.model), "--eval=none"]) == 2
    assert re.search(
        r"even .*--nsamples 16.*--method sparsegpt.* takes [\d.]+ MB, which are needed", capsys.readouterr().err
    )


def test_a_full_disk_is_told(space: Workspace, room: Any, capsys: pytest.CaptureFixture[str]) -> None:
    room(disk=150_000)
    assert cli.main(["plan", str(space.model), "--eval=none", "--save=somewhere"]) == 2
    line = capsys.readouterr().err
    assert "to somewhere, 150 kB are free: free some or move --save, or --no-mi-grouping, which takes" in line
    room(disk=GB)
    assert cli.main(["plan", str(space.model), "--eval=none", "--no-mi-grouping"]) == 0


def test_a_device_has_a_column_of_its_own(space: Workspace, room: Any) -> None:
    room(device=100 * GB)
    report = mico.plan(str(space.model), eval="none")
    table = verb.section(report)
    assert table.columns == ("stage", "host memory", "device memory", "disk", "time")
    assert 0 < report["peak_device_bytes"] < report["peak_host_bytes"]
    room(device=10_000)
    with pytest.raises(UserError, match="of the device, 10 kB are free"):
        mico.plan(str(space.model), eval="none")


def test_the_command_tries_this_machine(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "LEAST_SECONDS", 0)
    monkeypatch.setattr(machine, "FILE_BYTES", 2**20)
    monkeypatch.setattr(machine, "SIDE", 256)
    assert cli.main(["plan", str(space.model), "--eval=none", f"--json={tmp_path / 'plan.json'}"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "plan.json").read_text())
    assert "compress" in shown and "host memory" in shown and "--stream" in shown
    assert report["seconds"] > 0 and report["parameters"] > report["linear_weights"] > 0
    table = verb.section(report)
    for column, key in ((1, "host_bytes"), (3, "seconds")):
        (row,) = [row for row, place in table.strong if place == column]
        assert report["stages"][row][key] == max(stages(report, key).values())


def test_wrong_options_are_refused_as_by_compress(space: Workspace) -> None:
    for options, message in (
        (dict(wbits=1), "--wbits 1"), (dict(arm="mi", method="rtn"), "--arm mi"), (dict(nsamples=0), "--nsamples 0"),
        (dict(seqlen=10**6), "--seqlen"), (dict(eval="novels"), "novels"),
        (dict(profile="vllm", group_size=7), "size 7"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            mico.plan(str(space.model), **options)
