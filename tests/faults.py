"""Faults for tests: processes killed at a chosen system call, disks that fill up."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mico.errors import UserError


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process and return its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about threads at any fork
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killing_at(point: int, work: Callable[[], Any], where: Path) -> bool:
    """SIGKILL a child before its `point`-th fsync, rename or mkdir, unfinished data torn; False: it got through."""

    def doomed() -> None:
        calls = 0

        def armed(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if calls == point:
                    for file in where.rglob(".tmp-*"):  # what is not yet synced may be lost by half
                        if file.is_file():
                            os.truncate(file, file.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "mkdir"):
            setattr(os, name, armed(getattr(os, name)))
        work()

    status = in_child(doomed)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def full_disk_message(work: Callable[[], Any], answer: Path, limit: int) -> str:
    """The message of the UserError that `work` raises where no file may grow beyond `limit` bytes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with contextlib.suppress(UserError):
            try:
                work()
            except UserError as error:
                answer.write_text(str(error))
                raise

    assert in_child(limited) == 0
    return answer.read_text()


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
