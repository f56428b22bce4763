"""Figures of a run while it goes on: TensorBoard (--tensorboard DIR) and Weights & Biases (--wandb PROJECT).

Series over the blocks (error and stored bits of every Linear, as each block is finished) and, at the end, the figures
of the report. A tracker never ends the run that it tells of: what it cannot write is counted, and said once.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from mico.console import Console
from mico.errors import UserError
from mico.files import fingerprint, writing
from mico.summary import flat, linear_names

OFFLINE_MODES = ("offline", "disabled", "dryrun")  # of WANDB_MODE: nobody has to be logged in
WAIT_SECONDS = 120  # for W&B to take what is left, when the run is over

MEASURES = {"perplexity", "kl_divergence", "top1_agreement"}  # of a text

Values = Mapping[str, float]


class Tracker(Protocol):
    """One place that figures go to. Any method may raise: `Tracking` turns that into one line and a count."""

    name: str

    def open(self, run: str, config: Mapping[str, Any]) -> None:
        """Begin the run `run`, or go on with it; config: what it was asked for, as plain JSON values."""

    def log(self, step: int, values: Values) -> None:
        """The point `step` of several series."""

    def finish(self, figures: Values | None) -> None:
        """Figures of the whole run, the last call; None when the run did not get there."""


class Tracking:
    """All trackers of one run: `with Tracking(tensorboard, wandb, console) as tracking:`."""

    def __init__(self, tensorboard: str | None, wandb: str | None, console: Console) -> None:
        """Raises UserError, before any work, for a library that is missing and for what can be known to fail."""
        self._console = console
        self._trackers: list[Tracker] = []
        self._lost: dict[str, int] = {}  # records by tracker
        self._seen: set[int] = set()  # blocks that were logged
        self._open = False
        if tensorboard is not None:
            self._trackers.append(TensorBoard(tensorboard))
        if wandb is not None:
            self._trackers.append(WandB(wandb, console.note))

    def open(self, run: str, config: Mapping[str, Any]) -> None:
        """run: the name of the run folder; config: its arguments."""
        self._open = True
        self._all("open", run, config)

    def block(self, index: int, records: list[dict[str, Any]]) -> None:
        """A block is finished: error and bits of its Linears (records: its lines of layers.jsonl)."""
        self._seen.add(index)
        if self._trackers:
            self._all("log", index, block_values(records))

    def finish(self, figures: Values | None, layers: list[dict[str, Any]] | None = None) -> None:
        """The run is over. layers: of the report, so that blocks of an earlier run are in the series too."""
        blocks: dict[int, list[dict[str, Any]]] = {}
        for record in layers or []:
            blocks.setdefault(record["block"], []).append(record)
        for index, records in blocks.items():
            if index not in self._seen:
                self.block(index, records)
        self._all("finish", figures)
        self._open = False
        for name, count in self._lost.items():
            self._console.note(f"{name}: {count} records were lost")

    def _all(self, method: str, *arguments: Any) -> None:
        for tracker in self._trackers:
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # libraries and servers fail in ways of their own; none of them is the run's
                if tracker.name not in self._lost:
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    self._console.note(f"{tracker.name} fails ({reason}): the run goes on without it")
                self._lost[tracker.name] = self._lost.get(tracker.name, 0) + 1

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self.finish(None)


# --- figures --------------------------------------------------------------------------------------------------------


def block_values(records: list[dict[str, Any]]) -> dict[str, float]:
    """error/NAME: relative output error, of experts the worst; bits/NAME: stored bits a weight, all counted."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, record in zip(linear_names(records), records, strict=True):
        found.setdefault(name, []).append(record)
    values = {f"error/{name}": max(float(one["error"]) for one in same) for name, same in found.items()}
    for name, same in found.items():
        stored = sum(sum(one["stored"].values()) for one in same)
        values[f"bits/{name}"] = stored / sum(one["weights"] for one in same)
    return values


def compression_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The flat report (mico/summary.py), every measure of every text, and the seconds of every stage."""
    found = dict(numbers(flat(dict(report)))) | _measures(report["compressed"])
    return found | {f"stage_seconds/{stage}": value for stage, value in report["seconds"].items()}


def evaluation_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Every measure of every text, every metric of every task and every figure of every suite of `mico eval`."""
    from mico.metrics.vision.sections import label

    found = _measures(result["texts"]) | dict(numbers(result.get("tasks") or {}, "tasks"))
    found |= dict(numbers({label(one): one["figures"] for one in result.get("suites") or ()}, "suites"))
    return found | dict(seconds=result["seconds"])


def _measures(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {f"{measure}/{text}": score[measure] for text, score in texts.items() for measure in MEASURES & set(score)}


def numbers(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """('dense/wikitext2', 33.5), ...: the numbers of nested objects by their path."""
    for name, value in values.items():
        path = f"{above}/{name}" if above else name
        if isinstance(value, Mapping):
            yield from numbers(value, path)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield path, float(value)


# --- trackers -------------------------------------------------------------------------------------------------------


def _need(option: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{option}: {library} is not installed: pip install {library} (or mico[track])")


class TensorBoard:
    """An event file in DIR/NAME OF THE RUN; a run that goes on replaces there what it had written before."""

    name = "tensorboard"

    def __init__(self, folder: str) -> None:
        _need(f"--tensorboard {folder}", "tensorboard")
        self.folder = Path(folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "Permission denied", str(self.folder))

    def open(self, run: str, config: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        place = self.folder / run
        place.mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter: it writes in a thread, which shows a traceback of its own when the disk is full.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(place / name, "ab")  # noqa: SIM115, closed by finish
        self._records = RecordWriter(self._file)
        self._event(file_version="brain.Event:2")
        self._event(step=0, session_log=SessionLog(status=SessionLog.START))  # earlier points are void from here on
        self._text("config", "\n".join(f"- {name}: {value}" for name, value in config.items()))

    def log(self, step: int, values: Values) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        made = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(step=step, summary=Summary(value=made))

    def finish(self, figures: Values | None) -> None:
        try:
            if figures is not None:
                self.log(0, figures)
        finally:
            self._file.close()

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._event(step=0, summary=text_pb(tag, text))

    def _event(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


class WandB:
    """A run of a W&B project, by the same id when it goes on. WANDB_MODE and the other variables of W&B hold."""

    name = "wandb"

    def __init__(self, project: str, tell: Callable[[str], None]) -> None:
        option = f"--wandb {project}"
        _need(option, "wandb")
        self._entity, _, self._project = project.rpartition("/")
        if not self._project or "/" in self._entity:
            raise UserError(f"{option}: give PROJECT or ENTITY/PROJECT")
        self._tell = tell
        if os.environ.get("WANDB_MODE", "online") not in OFFLINE_MODES:
            import wandb

            try:
                known = wandb.login(verify=False)  # asks on a terminal
            except wandb.Error:
                known = False
            if not known:
                raise UserError(f"{option}: nobody is logged in: run wandb login, or set WANDB_MODE=offline")

    def open(self, run: str, config: Mapping[str, Any]) -> None:
        import wandb

        # Its notes go with mico's, and the terminal stays mico's own.
        settings = wandb.Settings(console="off", silent=True, finish_timeout=WAIT_SECONDS, finish_timeout_raises=True)
        self._run = wandb.init(
            project=self._project, entity=self._entity or None, name=run, config=dict(config), settings=settings,
            id=fingerprint(dict(run=run, config=dict(config)))[:16], resume="allow",
        )  # fmt: skip
        self._run.define_metric("*", step_metric="block")
        self._tell(f"wandb: {Path(self._run.dir).parent if self._run.offline else self._run.url}")

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values) | dict(block=step))

    def finish(self, figures: Values | None) -> None:
        self._run.summary.update(dict(figures or {}))
        self._run.finish(exit_code=int(figures is None))
