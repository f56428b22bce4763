"""Names of lm-eval tasks turned into tasks with their data, or into one line that says what is wrong.

Imports lm-eval: itself imported only where tasks are asked for.
"""

from __future__ import annotations

import difflib
import functools
import glob
import traceback
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mico.errors import UserError

OWN_TASKS = Path(__file__).parent / "tasks"
NEAR = 3  # names proposed for an unknown one
REASON = 200  # characters of a library's message that are shown


def load_tasks(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """lm-eval's own dictionary of tasks and groups: `tasks` and `groups` by name, `group_map`.

    names: of tasks, groups and tags, patterns with *, or YAML files. Raises UserError naming the task.
    """
    manager, found = _resolve(names, include_path)
    try:
        loaded = manager.load(found)
    except UserError:
        raise
    except Exception as error:  # data sets, YAML files and the functions in them fail in any way
        raise _unloadable(error) from error
    for name, task in loaded["tasks"].items():
        _check_kind(name, task)
    return dict(loaded)


def _check_kind(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--tasks {name}: runs code that the model writes: run it with lm_eval itself, in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks {name}: shows images or sound, only text can be measured: leave it out")


# --- names ----------------------------------------------------------------------------------------------------------


def _resolve(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """A manager that knows all names, and the names with patterns expanded.

    lm-eval's own index takes seconds to read, so it is read only when a name is in neither folder at hand.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: is not a folder: give the one that holds the task YAML files")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError("--tasks: no name given: try mico_choice,mico_rolling")
    folders = [OWN_TASKS, *([] if include_path is None else [Path(include_path)])]
    manager = TaskManager(include_defaults=False, include_path=list(folders))
    index = manager.task_index
    if not all(_complete(index, name) for name in names):
        for name, entry in _library().items():
            index.setdefault(name, entry)
    found = [match for name in names for match in _matches(index, name, include_path)]
    return manager, list(dict.fromkeys(found))


@functools.cache
def _library() -> Mapping[str, Any]:
    return dict(TaskManager().task_index)


def _complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether a name, and all members of a group, are in the index."""
    if _is_file(name):
        return False  # it may name other tasks
    entry = index.get(name)
    if entry is None or entry.kind.name != "GROUP":
        return entry is not None
    members = (entry.cfg or {}).get("task")
    return isinstance(members, list) and all(isinstance(one, str) and _complete(index, one) for one in members)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _matches(index: Mapping[str, Any], name: str, include_path: str | None) -> list[str]:
    if name in index:
        return [name]
    if _is_file(name):
        files = sorted(glob.glob(name))
        if not files:
            raise UserError(f"--tasks {name}: there is no such file")
        return [str(Path(file).resolve()) for file in files]
    matches = sorted(known for known in index if fnmatchcase(known, name)) if "*" in name else []
    if matches:
        return matches
    near = difflib.get_close_matches(name, index, NEAR)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
    broken = "" if include_path is None else _broken(Path(include_path))
    raise UserError(f"--tasks {name}: unknown task: {broken or hint}")


def _broken(folder: Path) -> str:
    """What is wrong with the first YAML file that cannot be read: lm-eval passes over it in silence."""
    for file in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # YAML errors, missing includes, what is no mapping
            return f"{file} cannot be read: {_reason(error)}"
    return ""


# --- what goes wrong while a task is made ---------------------------------------------------------------------------


def _unloadable(error: Exception) -> UserError:
    """One line for what went wrong while lm-eval made a task: which task, which data set, what to do."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = next((frame for frame in frames if isinstance(frame.f_locals.get("self"), Task)), None)
    if place is None:
        return UserError(f"--tasks: lm-eval refuses: {_reason(error)}")
    task = place.f_locals["self"]
    config = getattr(task, "_config", None)  # a task that is a class loads its data before it has any
    name = getattr(config, "task", None) or type(task).__name__
    if not any(frame.f_code.co_name == "download" for frame in frames):
        return UserError(f"task {name}: its description is wrong: {_reason(error)}: mend its YAML file")
    files = (getattr(config, "dataset_kwargs", None) or {}).get("data_files")
    if files:
        return UserError(
            f"task {name}: its data_files {_listed(files)} cannot be read ({_reason(error)}): mend them; "
            f"relative paths count from the working folder, {Path.cwd()}"
        )
    return UserError(
        f"task {name}: its data set {task.DATASET_PATH or 'function'} cannot be loaded ({_reason(error)}): check the "
        f"network and leave out --offline, or give --include-path with a YAML whose dataset_path is json and whose "
        f"dataset_kwargs name local data_files"
    )


def _listed(files: Any) -> str:
    if isinstance(files, Mapping):
        files = list(files.values())
    return ", ".join(map(str, files)) if isinstance(files, list) else str(files)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON else f"{text[:REASON]}..."
