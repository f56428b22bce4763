"""What `mico eval` is asked for beside texts: tasks of lm-eval; options that have no effect are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mico.console import Console
from mico.errors import UserError
from mico.loading import LoadedModel
from mico.metrics.harness import run_tasks

LM_EVAL = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config")


def task_names(tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    if tasks is None:
        return ()
    names = tuple(name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip())
    if not names:
        raise UserError(f"--tasks '{tasks}': name at least one task of lm-eval, several with commas between them")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Tasks:
    """Which tasks, and how: as `run_tasks` takes them."""

    names: tuple[str, ...]
    include_path: str | None
    num_fewshot: int | None
    limit: float | None
    log_samples: bool
    batch_size: int
    offline: bool

    def run(self, loaded: LoadedModel, output: Path | None, console: Console) -> dict[str, Any]:
        """lm-eval's dictionary of results; of the same shape, and empty, without tasks."""
        if not self.names:
            return {name: {} for name in LM_EVAL}
        options = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "names"}
        model, mark = loaded.model, loaded.fingerprint
        with console.stage("tasks"):
            return run_tasks(
                model, loaded.tokenizer, self.names, output, model_fingerprint=mark, console=console, **options
            )


def check_options(batch_size: int, samples: int, tasks: Tasks, suites: bool) -> None:
    """Raise UserError naming the option whose value cannot be, or that does nothing."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    for option, value in (("--samples", samples), ("--num-fewshot", tasks.num_fewshot or 0)):
        if value < 0:
            raise UserError(f"{option} {value}: must be at least 0")
    if tasks.limit is not None and not 0 < tasks.limit < math.inf:
        raise UserError(f"--limit {tasks.limit}: must be above 0: questions a task, or a share of them when below 1")
    for option in ("include_path", "num_fewshot", "limit", "log_samples"):
        given = getattr(tasks, option)
        if option == "limit" and suites:
            continue
        if given is not None and given is not False and not tasks.names:
            raise UserError(f"--{option.replace('_', '-')} has no effect without --tasks: name tasks, or leave it out")
