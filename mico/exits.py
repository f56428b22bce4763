"""How the program ends: exit codes, the one line that says why, and what signals and libraries may do meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from mico.errors import (
    CONTRACT,
    INTERNAL,
    INTERRUPTED,
    TERMINATED,
    USER,
    ContractError,
    Silenced,
    Terminated,
    UserError,
    disk_is_full,
    is_forbidden,
    out_of_memory,
)

_KEPT = "finished blocks are kept, the same command again goes on after them"
_EVALUATED = {"--tasks": "finished tasks", "--suite": "answers to suites"}
USAGE: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever this version of typer keeps it


def hyphens(token: str) -> str:
    """Option and command names may be typed with underscores, the habit of the research scripts."""
    return token.replace("_", "-")


def explain(error: BaseException, arguments: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and the one line that says what went wrong and what to do."""
    text = " ".join(str(error).split())
    command = next((word for word in arguments if not word.startswith("-")), "")
    if isinstance(error, Silenced):
        return error.code, ""
    if isinstance(error, UserError):
        return USER, f"error: {text}"
    if isinstance(error, ContractError):
        return CONTRACT, f"error: {text}"
    if isinstance(error, USAGE):
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        return USER, f"error: {message} (mico {hyphens(command)} --help tells more)".replace("mico  ", "mico ")
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted: {_what_is_kept(command, arguments)}"
    if isinstance(error, Terminated):
        return TERMINATED, f"terminated: {_what_is_kept(command, arguments)}"
    if out_of_memory(error):
        less = "lower --batch-size, --nsamples or --seqlen, or use --device cpu"
        if command == "finetune":
            less = "lower --per-device-train-batch-size or --seqlen, or use --gradient-checkpointing or --deepspeed"
        return USER, f"error: out of memory ({text[:120]}): {less}"
    if isinstance(error, OSError) and disk_is_full(error):
        where = error.filename or "the disk"
        return USER, f"error: {where} is full ({error.strerror}): free disk space and run the same command again"
    if isinstance(error, OSError) and is_forbidden(error):
        return USER, f"error: {error.filename} cannot be used ({error.strerror}): fix its permissions or give another"
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return INTERNAL, f"internal error: {named[:300]}; run again with --debug for the traceback"


def _what_is_kept(command: str, arguments: Sequence[str]) -> str:
    asked = [kept for option, kept in _EVALUATED.items() if any(word.split("=")[0] == option for word in arguments)]
    if command == "eval" and asked:
        kept = " and ".join(asked)
        return f"{kept} are kept in --output-path (eval/ of a run folder), the same command again goes on after them"
    if command == "push":
        return "files that arrived stay on the hub, the same command again sends the others"
    if command == "finetune":
        return "checkpoints are kept, the same command again goes on after the last one"
    return _KEPT if hyphens(command) in ("calibrate", "mi-group", "compress") else "nothing was written"


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises inside the body (signals can only be handled by the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(_number: int, _frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def quiet_libraries(debug: bool) -> Iterator[None]:
    """Hold back the warnings of libraries: what matters to the user is said by mico itself."""
    if debug:
        yield
        return
    for name, level in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
