"""TensorBoard and W&B hold what the report holds; a tracker that fails never ends a run."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import mico
from mico.console import Console
from mico.errors import UserError
from mico.summary import flat
from mico.tracking import Tracking, block_values, compression_figures, evaluation_figures, numbers
from tests.workspace import Workspace, workspace

Report = dict[str, Any]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def report(space: Workspace) -> Report:
    return json.loads((space.run / "report.json").read_text(encoding="utf-8"))


def by_block(report: Report) -> dict[int, list[dict[str, Any]]]:
    return {i: [line for line in report["layers"] if line["block"] == i] for i in range(2)}


def track(tracking: Tracking, report: Report, blocks: tuple[int, ...] = (0, 1)) -> None:
    with tracking:
        tracking.open("a-run", report["identity"])
        for index in blocks:
            tracking.block(index, by_block(report)[index])
        tracking.finish(compression_figures(report), report["layers"])


# --- figures --------------------------------------------------------------------------------------------------------


def test_a_block_gives_error_and_bits_of_every_linear(report: Report) -> None:
    values = block_values(by_block(report)[1])
    lines = {line["layer"].removeprefix("model.layers.1."): line for line in by_block(report)[1]}
    assert len(values) == 2 * len(lines) == 14
    line = lines["mlp.down_proj"]
    assert values["error/down"] == line["error"] and values["bits/down"] == pytest.approx(line["bits_per_weight"])


def test_experts_of_a_block_are_one_series_of_the_worst() -> None:
    def line(expert: int, error: float, bits: int) -> dict[str, Any]:
        path = f"model.layers.0.mlp.experts.{expert}.up_proj"
        return dict(layer=path, block=0, stream="x", error=error, weights=10, stored=dict(codes=bits, mask=10))

    assert list(block_values([line(0, 0.5, 20), line(1, 0.25, 40)]).values()) == [0.5, (20 + 10 + 40 + 10) / 20]


def test_figures_of_a_compression_are_the_flat_report_and_more(report: Report) -> None:
    found = compression_figures(report)
    assert found["true_bits"] == flat(report)["true_bits"]
    assert found["dense/wikitext2"] == report["dense"]["wikitext2"]["perplexity"]
    assert found["perplexity/wikitext2"] == found["compressed/wikitext2"]
    assert found["stage_seconds/compress"] == report["seconds"]["compress"]
    assert all(isinstance(value, (int, float)) for value in found.values())


def test_figures_of_an_evaluation() -> None:
    score = dict(perplexity=8.0, kl_divergence=0.1, top1_agreement=0.9, tokens=4096, origin="somewhere")
    result = dict(texts=dict(ptb=score), tasks=dict(piqa={"acc,none": 0.5, "alias": "piqa"}), seconds=3.0)
    assert evaluation_figures(result) == {
        "perplexity/ptb": 8.0, "kl_divergence/ptb": 0.1, "top1_agreement/ptb": 0.9, "tasks/piqa/acc,none": 0.5,
        "seconds": 3.0,
    }  # fmt: skip


def test_numbers_leave_out_what_is_none() -> None:
    assert dict(numbers(dict(a=1, b=dict(c=2.5, d=None), e="text", f=True))) == {"a": 1.0, "b/c": 2.5}


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert tags["tensors"] == ["config"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}


def test_the_event_file_equals_the_report(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    track(Tracking(str(tmp_path / "tb"), None, Console()), report)
    found = scalars(tmp_path / "tb" / "a-run")
    for line in report["layers"]:
        name = line["layer"].rpartition(".")[2].removesuffix("_proj")
        assert found[f"error/{name}"][line["block"]] == pytest.approx(line["error"])
        assert found[f"bits/{name}"][line["block"]] == pytest.approx(line["bits_per_weight"])
    figures = compression_figures(report)
    assert {tag for tag in found if not tag.startswith(("error/", "bits/"))} == set(figures)
    assert {tag: found[tag][0] for tag in figures} == pytest.approx(figures)


def test_compress_and_eval_log_what_they_report(space: Workspace, report: Report, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logs = dict(tensorboard=str(tmp_path))
    mico.compress(str(space.model), eval="wikitext2", arm="mi", save=str(space.run), **space.options, **logs)
    found = scalars(tmp_path / space.run.name)
    assert {tag: found[tag][0] for tag in compression_figures(report)} == pytest.approx(compression_figures(report))
    assert set(found["error/q"]) == {0, 1}
    result = mico.evaluate(str(space.model), eval="wikitext2", data_dir=str(space.texts), **logs)
    figures = evaluation_figures(result)
    found = scalars(tmp_path / f"eval-{space.model.name}")
    assert found.keys() == figures.keys()
    assert found["perplexity/wikitext2"][0] == pytest.approx(result["perplexity"]["wikitext2"])


def test_a_run_that_goes_on_has_every_point_once(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(KeyboardInterrupt), Tracking(str(tmp_path), None, Console()) as tracking:
        tracking.open("a-run", report["identity"])
        tracking.block(0, [line | dict(error=9.0) for line in by_block(report)[0]])
        raise KeyboardInterrupt
    track(Tracking(str(tmp_path), None, Console()), report, blocks=(1,))
    found = scalars(tmp_path / "a-run")
    errors = [line["error"] for line in report["layers"] if line["layer"].endswith("q_proj")]
    assert found["error/q"] == pytest.approx(dict(enumerate(errors)))


def test_a_full_disk_is_said_once_and_counted(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    console, tracking = Console(), None
    tracking = Tracking(str(tmp_path), None, console)
    with tracking:
        tracking.open("a-run", report["identity"])
        full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, closed with the tracker
        tracker: Any = tracking._trackers[0]
        tracker._records._writer = full
        for index, records in by_block(report).items():
            tracking.block(index, records)
        tracking.finish(compression_figures(report))
    full.close()
    assert console.notes == [
        "tensorboard fails ([Errno 28] No space left on device): the run goes on without it",
        "tensorboard: 3 records were lost",
    ]


# --- W&B ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    pytest.importorskip("wandb")
    places = dict.fromkeys(("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), str(tmp_path))
    patient = dict(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false", WANDB__SERVICE_WAIT="300")  # seconds
    for name, value in (places | patient).items():
        monkeypatch.setenv(name, value)
    yield tmp_path


def stored(folder: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format (blocks of 32 KiB, a header of 7 bytes before each piece)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for a header: the block ends in zeros
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def items(updates: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def test_an_offline_run_holds_series_config_and_summary(report: Report, offline: Path) -> None:
    console = Console()
    track(Tracking(None, "team/project", console), report)
    importlib.import_module("wandb").teardown()  # its service may still be writing when `finish` comes back
    history: list[Mapping[str, Any]] = []
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for record in stored(offline):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= items(record.run.config.update)
            assert (record.run.project, record.run.entity, record.run.display_name) == ("project", "team", "a-run")
        elif kind == "history":
            history.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
    assert config["seed"] == report["identity"]["seed"]
    assert [point["block"] for point in history] == [0, 1]
    assert history[1]["error/q"] == block_values(by_block(report)[1])["error/q"]
    figures = compression_figures(report)
    assert {name: summary[name] for name in figures} == pytest.approx(figures)
    assert [note.partition(":")[0] for note in console.notes] == ["wandb"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "library"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_library_is_told_before_any_work(
    option: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=rf"^--{option} .*{library} is not installed: pip install {library}"):
        Tracking(**dict(tensorboard=None, wandb=None, console=Console()) | {option: str(tmp_path / "x")})


def test_wandb_asks_for_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^--wandb project: nobody is logged in: run wandb login, or set WANDB_MODE"):
        Tracking(None, "project", Console())
    with pytest.raises(UserError, match=r"^--wandb a/b/c: give PROJECT or ENTITY/PROJECT"):
        Tracking(None, "a/b/c", Console())


def test_tensorboard_needs_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/file cannot be written"):
        Tracking(str(tmp_path / "file"), None, Console())


def test_nothing_asked_for_is_nothing_done(report: Report) -> None:
    console = Console()
    track(Tracking(None, None, console), report)
    assert console.notes == []
