"""A stage that two processes want is made by one of them; the other waits for it and reads it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from mico.console import Console
from mico.runs import RunFolder
from mico.stages import kept_stage


def test_the_second_waits_for_the_first_and_reads_what_it_made(tmp_path: Path) -> None:
    asked, released = threading.Event(), threading.Event()
    made_by: list[str] = []

    def maker(name: str):
        def make(run: RunFolder, advance) -> None:
            made_by.append(name)
            asked.set()
            assert released.wait(30)
            run.write_block(0, {}, dict(value=torch.arange(3)), [])

        return make

    class Second(Console):
        def note(self, text: str, level: int = 0) -> None:
            super().note(text, level)
            released.set()  # the first goes on when the second has said that it waits

    def stage(name: str, console: Console) -> None:
        kept_stage("statistics", tmp_path / "stage", dict(seed=0), 1, console, maker(name))

    first, consoles = threading.Thread(target=stage, args=("first", Console())), Second()
    first.start()
    assert asked.wait(30)
    stage("second", consoles)
    first.join(30)
    assert made_by == ["first"]
    assert "in use by another run" in consoles.notes[0] and consoles.notes[0].endswith("waiting for it")
    assert consoles.notes[1] == f"statistics: reusing {tmp_path / 'stage'}"
    assert "statistics" in consoles.reused and "statistics" not in consoles.seconds
