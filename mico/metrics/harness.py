"""Tasks of lm-evaluation-harness, run in process, each kept when it is finished.

Every task runs by itself, as `lm_eval --tasks NAME --seed SEED` runs it; groups are put together from their members by
lm-eval's own code. A task whose result lies in the folder already is not run again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import collect_env

from mico.console import Console
from mico.errors import UserError
from mico.files import atomic_json, atomic_write, fingerprint, read_json, writing
from mico.loading.silence import quiet

OLDEST = "0.4.13"  # version of lm-eval: earlier ones load tasks and aggregate groups by other functions
TASKS = "tasks"  # the folder of finished tasks, inside the one given
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions without source: another one in every process
_ASK_ENVIRONMENT = collect_env.get_pretty_env_info
_LEAVES = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class _Settings:
    """What all tasks of one call share; `facts` go into the digest of every one."""

    num_fewshot: int | None
    limit: float | None
    seed: int
    batch_size: int
    log_samples: bool
    facts: dict[str, Any]


def check_tasks(tasks: Sequence[str], include_path: str | None, *, offline: bool = False) -> None:
    """Raise UserError naming the task that is not known, whose data cannot be loaded, or that cannot be run here.

    Needs no model. offline: data sets come from files and the cache of the hub's client alone.
    """
    _load_tasks(tasks, include_path, offline)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: Path | None,
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    log_samples: bool = False,
    offline: bool = False,
    model_fingerprint: str = "",
    console: Console,
) -> dict[str, Any]:
    """Run tasks, groups and tags of lm-eval on a loaded model and return lm-eval's own dictionary of results.

    folder: belongs to this model alone; each finished task is kept in `folder/tasks/` under a digest of all its result
    depends on (`model_fingerprint` tells models apart, should two share a folder), and the next call finds it there.
    None keeps nothing. limit: questions a task, a share when below 1. log_samples: keep what was asked and answered as
    jsonl. seed: of all that lm-eval draws; the state of the global generators is the same afterwards as before.
    Beside lm-eval's own keys, `tasks` tells of every task: digest, reused, batch_size, batch_halvings, truncated
    (requests longer than the model's context), seconds. Raises UserError as `check_tasks` does, and when memory does
    not even do for one request or log-likelihoods are NaN.
    """
    _check_numbers(num_fewshot, limit, batch_size)
    with _generators_kept(), _settings_kept(model):
        _seed(seed)  # before the data is loaded, as in lm-eval
        loaded = _load_tasks(tasks, include_path, offline)
        from mico.metrics.harness_model import EvaluatedModel, exact_execution

        with _quiet():
            evaluated = EvaluatedModel(model, tokenizer, batch_size, console)
        facts = dict(
            lm_eval=_version(), model=model_fingerprint, dtype=str(model.dtype), max_length=evaluated.max_length,
            seed=seed,
        )  # fmt: skip
        limit = None if limit is None else float(limit)  # 8 and 8.0 ask for the same
        settings = _Settings(num_fewshot, limit, seed, batch_size, log_samples, facts)
        finished = {}
        with exact_execution(model):
            for name, task in loaded["tasks"].items():
                finished[name] = _finished(evaluated, name, task, folder, settings, console)
    return _merged(finished, loaded["groups"])


def _load_tasks(tasks: Sequence[str], include_path: str | None, offline: bool) -> dict[str, Any]:
    with _quiet(), _offline(offline):
        try:
            from mico.metrics import harness_model  # noqa: F401 (what it imports is asked for before weights are read)
            from mico.metrics.harness_tasks import load_tasks
        except ImportError as error:
            raise UserError(
                f"--tasks needs lm-eval {OLDEST} or later and its extra hf ({error}): pip install 'mico[eval]'"
            ) from None
        return load_tasks(tasks, include_path)


def _check_numbers(num_fewshot: int | None, limit: float | None, batch_size: int) -> None:
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot {num_fewshot}: must be at least 0")
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise UserError(f"--limit {limit}: must be above 0: questions a task, or a share of them when below 1")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")


# --- one task -------------------------------------------------------------------------------------------------------


def _finished(
    model: Any, name: str, task: Any, folder: Path | None, settings: _Settings, console: Console
) -> dict[str, Any]:
    """The record of a task: read when it lies in the folder, else made and kept there."""
    digest = fingerprint(_facts(name, task, settings))
    if folder is None:
        return _run(model, name, task, digest, settings, console)[0]
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{digest}"
    file, samples_file = folder / TASKS / f"{stem}.json", folder / TASKS / f"{stem}.samples.jsonl"
    if file.is_file() and (samples_file.is_file() or not settings.log_samples):
        record = read_json(file, "delete it and run again")
        if not isinstance(record.get("result"), dict):
            raise UserError(f"{file} holds no result: delete it and run again")
        console.note(f"task {name}: finished before with batches of {record.get('batch_size')}, read from {file}")
        return record | {"reused": True}
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    record, samples = _run(model, name, task, digest, settings, console)
    if settings.log_samples:  # first: where there is a result, its samples are there too
        atomic_write(samples_file, "".join(f"{line}\n" for line in samples).encode())
    atomic_json(file, record)
    return record


def _facts(name: str, task: Any, settings: _Settings) -> dict[str, Any]:
    """All that the result of a task depends on, but for the rounding that another batch size or device brings."""
    config = task.dump_config()
    (config.get("metadata") or {}).pop("config_source", None)  # where the file lies, not what is in it
    shots = settings.num_fewshot if settings.num_fewshot is not None else config.get("num_fewshot")
    return settings.facts | dict(
        task=name, version=str(task.VERSION), config=_ADDRESS.sub("", _json(config)), limit=settings.limit,
        num_fewshot=settings.num_fewshot, data=_data_digest(task, settings.limit, shots or 0),
    )  # fmt: skip


def _data_digest(task: Any, limit: float | None, shots: int) -> str:
    """sha256 of the questions asked, and of those that examples are drawn from where there are examples."""
    first = int(limit) if limit is not None and limit >= 1 else None
    examples = task.fewshot_docs() if shots else None
    digest = hashlib.sha256()
    for question in itertools.chain(itertools.islice(task.eval_docs, first), examples or ()):
        digest.update(_json(question).encode() + b"\n")
    return digest.hexdigest()


def _json(value: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)


def _run(
    model: Any, name: str, task: Any, digest: str, settings: _Settings, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Run one task; return what is kept of it as plain JSON values, and a line of JSON a question when asked for."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model.task, halvings, started = name, model.halvings, time.monotonic()
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with _quiet() as warnings, contextlib.redirect_stdout(io.StringIO()):
        result: Any = simple_evaluate(
            model, tasks=[task], num_fewshot=settings.num_fewshot, limit=settings.limit,
            batch_size=settings.batch_size, device=str(model.device), log_samples=settings.log_samples,
            task_manager=TaskManager(include_defaults=False),  # the task is made: no index needs to be read
            **dict.fromkeys(seeds, settings.seed),
        )  # fmt: skip
    samples = result.pop("samples", {}).get(name, [])
    truncated = sum("runcating" in warning for warning in warnings)  # lm-eval warns of each that is cut
    if truncated:
        console.note(f"task {name}: requests longer than {model.max_length} tokens lost their start, {truncated} times")
    record = dict(
        digest=digest, reused=False, batch_size=model.batch_size, batch_halvings=model.halvings - halvings,
        truncated=truncated, seconds=round(time.monotonic() - started, 3), result=json.loads(_json(result)),
    )  # fmt: skip
    return record, [_json(sample) for sample in samples]


def _merged(finished: dict[str, dict[str, Any]], groups: dict[str, Any]) -> dict[str, Any]:
    """The results of all tasks in the shape lm-eval gives for one call, groups aggregated by lm-eval."""
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

    results = [record["result"] for record in finished.values()]
    parts: list[dict[str, Any]] = [{n: v for result in results for n, v in result[key].items()} for key in _LEAVES]
    gathered = EvalAcc(
        metrics=parts[0], configs=parts[1], versions=parts[2], num_fewshot=parts[3], higher_is_better=parts[4],
        n_samples=parts[5], groups=groups,
    )  # fmt: skip
    with _quiet():
        whole: dict[str, Any] = dict(aggregate_groups(gathered)._to_eval_results())
    rest = {key: value for key, value in results[-1].items() if key not in (*_LEAVES, "group_subtasks")}
    told = {name: {k: v for k, v in record.items() if k != "result"} for name, record in finished.items()}
    return json.loads(_json(whole | rest | {"tasks": told}))


# --- what lm-eval would leave changed, or say -----------------------------------------------------------------------


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the state of the global generators back afterwards: lm-eval seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _settings_kept(model: Any) -> Iterator[None]:
    training = model.training
    try:
        yield
    finally:
        model.train(training)


class _Collector(logging.Handler):
    """Keeps the messages of a logger instead of showing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Hold back what lm-eval and the libraries below it say, and the bars they draw; yields lm-eval's warnings."""
    from tqdm import tqdm

    collector, made = _Collector(), tqdm.__init__

    def hidden(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options | {"disable": True})

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        for name, handlers in (("lm_eval", [collector]), ("huggingface_hub", [logging.NullHandler()])):
            logger = logging.getLogger(name)
            stack.enter_context(_replaced(logger, "handlers", handlers))
            stack.enter_context(_replaced(logger, "propagate", False))
        stack.enter_context(_replaced(tqdm, "__init__", hidden))
        stack.enter_context(_replaced(collect_env, "get_pretty_env_info", _environment))
        if evaluator := sys.modules.get("lm_eval.evaluator"):  # it asks git, which complains outside a repository
            stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        yield collector.messages


@functools.cache
def _environment() -> str:
    """What lm-eval records of the machine: seconds of work, so it is done once and not for every task."""
    return _ASK_ENVIRONMENT()


@contextlib.contextmanager
def _replaced(owner: Any, field: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, field)
    setattr(owner, field, value)
    try:
        yield
    finally:
        setattr(owner, field, kept)


@contextlib.contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Keep the hub's client from the network, when asked to."""
    import datasets
    import huggingface_hub

    with contextlib.ExitStack() as stack:
        for module in (datasets.config, huggingface_hub.constants) if offline else ():
            stack.enter_context(_replaced(module, "HF_HUB_OFFLINE", True))
        yield
