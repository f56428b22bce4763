"""What the terminal shows while a verb works: one-line notes and progress bars with the time left.

Notes and bars go to stderr, results to stdout, so that results can be piped. The Python API is silent
unless it is given a `Console` of its own.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass
class Console:
    """Notes, bars and stage times of one run; `verbosity` 0 shows notes, 1 also one line a layer."""

    quiet: bool = True
    verbosity: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reused: dict[str, float] = field(default_factory=dict)  # seconds that stages took which an earlier run finished
    peaks: dict[str, int] = field(default_factory=dict)  # most memory the process had had when a stage ended, bytes
    notes: list[str] = field(default_factory=list)
    _running: dict[str, float] = field(default_factory=dict, repr=False)
    _rich: RichConsole = field(default_factory=lambda: RichConsole(stderr=True, highlight=False), repr=False)

    def note(self, text: str, level: int = 0) -> None:
        """Say one line; it is kept in `notes` when it is of level 0."""
        if level == 0:
            self.notes.append(text)
        if not self.quiet and level <= self.verbosity:
            self._rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time of the body to `seconds[name]`."""
        started = self._running[name] = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.peaks[name] = peak_host_bytes()
            del self._running[name]

    def so_far(self) -> dict[str, float]:
        """Seconds of every stage, those that still run counted up to now."""
        now = time.monotonic()
        return self.seconds | {name: self.seconds.get(name, 0.0) + now - at for name, at in self._running.items()}

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A progress bar; call the yielded function after every item, with what to show beside the label."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        hidden = self.quiet or not self._rich.is_terminal  # a log file has no use for bars
        with Progress(*columns, *left, console=self._rich, disable=hidden, transient=True) as progress:
            task = progress.add_task(label, total=total, completed=done)

            def advance(detail: str = "") -> None:
                progress.update(task, advance=1, description=f"{label} {detail}".rstrip())

            yield advance


def peak_host_bytes() -> int:
    """The most memory that this process had."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
