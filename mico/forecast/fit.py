"""Whether a forecast fits this machine, and which options would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mico.activations import TRACKS, spills
from mico.errors import UserError
from mico.forecast.memory import BLOCK_FILE, Memory, Need, Task, hidden_bytes
from mico.forecast.outline import Outline
from mico.forecast.size import Size, packed_size
from mico.loading.streaming import MEMORY_SHARE
from mico.tables import size_text

LEAST_NSAMPLES, LEAST_SEQLEN = 16, 256  # below, calibration says little


@dataclass(frozen=True)
class Room:
    """What the machine has free, in bytes. base: the memory of a process with the libraries loaded."""

    host: int
    device: int | None
    disk: int
    base: int

    @property
    def weights(self) -> int:
        """Where the weights lie."""
        return self.host if self.device is None else self.device


@dataclass(frozen=True)
class Forecast:
    """Sizes of one task: bytes at the peak of every stage on host and device, and what it leaves on the disk."""

    shape: Outline
    task: Task
    size: Size
    memory: Memory
    needs: dict[str, Need]
    peaks: dict[str, tuple[float, float]]
    disk: dict[str, float]

    @property
    def host(self) -> float:
        return max(host for host, _ in self.peaks.values())

    @property
    def device(self) -> float:
        return max(device for _, device in self.peaks.values())

    def fits(self, room: Room) -> bool:
        """In memory; the disk is another matter."""
        return self.host <= room.host + room.base and (room.device is None or self.device <= room.device)


def forecast(shape: Outline, task: Task, room: Room) -> Forecast:
    """Memory and disk of a task, by the rule of the walk for what goes to a file.

    Raises UserError where the options do not fit the shapes.
    """
    size, hidden = packed_size(shape, task.settings), TRACKS * hidden_bytes(shape, task)
    weights = 0 if task.streamed or room.device is not None else shape.parameters * task.itemsize
    task = replace(task, spilled=spills(hidden, max(room.host - weights, 0)))
    memory = Memory(shape, task, size, room.base)
    needs = memory.stages()
    peaks = {stage: memory.peaks(need, room.device is not None) for stage, need in needs.items()}
    disk = {"compress": BLOCK_FILE * shape.linear_weights, "save": float(size.file)}
    if "statistics" in needs:
        disk["statistics"] = float(memory.statistics_file)
    if task.spilled:
        disk["compress"] += hidden
    return Forecast(shape, task, size, memory, needs, peaks, disk)


def streams(shape: Outline, itemsize: int, room: Room, wanted: bool | None) -> bool:
    """The rule by which loading keeps the blocks on disk."""
    return shape.parameters * itemsize > MEMORY_SHARE * room.weights if wanted is None else wanted


def check_memory(found: Forecast, room: Room) -> None:
    """Raise UserError saying what would fit, unless this does."""
    if found.fits(room):
        return
    on_device = room.device is not None and found.device > room.device
    needed, free = (found.device, room.device or 0) if on_device else (found.host, room.host + room.base)
    place = "the device" if on_device else "memory"
    told = f"does not fit: it takes {size_text(needed)} of {place}, {size_text(free)} are free"
    raise UserError(f"{told}: {_remedy(found, room, on_device)}")


def check_disk(found: Forecast, room: Room, where: str) -> None:
    """Raise UserError unless what the run writes fits the disk."""
    needed = sum(found.disk.values())
    if needed > room.disk:
        statistics = found.disk.get("statistics", 0.0)
        less = f", or --no-mi-grouping, which takes {size_text(needed - statistics)}" if statistics else ""
        raise UserError(
            f"does not fit: it writes {size_text(needed)} to {where}, {size_text(room.disk)} are free: "
            f"free some or move --save{less}"
        )


def _remedy(found: Forecast, room: Room, on_device: bool) -> str:
    """The least change of options that makes the task fit, or what the smallest task takes."""

    def peak(one: Forecast) -> float:
        return one.device if on_device else one.host

    smallest, words = found, ""
    for flags, task in _changes(found.task):
        tried = forecast(found.shape, task, room)
        if tried.fits(room):
            return f"{flags} takes {size_text(peak(tried))}"
        if peak(tried) < peak(smallest):
            smallest, words = tried, flags
    if not words:
        return f"no option lowers that: {size_text(peak(found))} are needed"
    return f"even {words} takes {size_text(peak(smallest))}, which are needed"


def _changes(task: Task) -> Iterator[tuple[str, Task]]:
    """Changes one by one, the mildest first, then more and more of them together."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if not task.streamed:
        steps.append(("--stream", dict(streamed=True)))
    batch = task.batch // 2
    while batch >= 1:
        steps.append((f"--batch-size {batch}", dict(batch=batch)))
        batch //= 2
    for name, least in (("nsamples", LEAST_NSAMPLES), ("seqlen", LEAST_SEQLEN)):
        value = getattr(task, name) // 2
        while value >= least:
            steps.append((f"--{name} {value}", {name: value}))
            value //= 2
    if task.paired:
        plain = replace(task.settings, method="sparsegpt", grouping=None, target_avg_bits=None)
        steps.append(("--method sparsegpt", dict(settings=plain)))
    for flag, change in steps:
        yield flag, replace(task, **change)
    together: dict[str, tuple[str, Any]] = {}
    for flag, change in steps:
        for field, value in change.items():
            together[field] = flag, value
        yield (
            " ".join(words for words, _ in together.values()),
            replace(task, **{field: value for field, (_, value) in together.items()}),
        )
