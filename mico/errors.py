"""What can go wrong, by exit code. Messages are one line: the file, layer, row or field, its value, the remedy."""

from __future__ import annotations

import errno
import re
from typing import Any

INTERNAL, USER, CONTRACT, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


class UserError(ValueError):
    """The user or the data must change something; exit code 2."""


class ContractError(Exception):
    """The run finished but a `--strict` contract broke (fallbacks were needed); exit code 3. Holds its report."""

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class Terminated(BaseException):
    """SIGTERM, raised where the program stands so that locks and temporary files are given up in order."""


class Silenced(Exception):
    """This process ends with `code` and says nothing: the first process of its team speaks for all."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the first process of the team tells why (exit code {code})")
        self.code = code


def exit_code(error: BaseException | None) -> int:
    """The code that a program ends with on this error; None is success."""
    if error is None:
        return 0
    if isinstance(error, Silenced):
        return error.code
    for kinds, code in ((ContractError, CONTRACT), (KeyboardInterrupt, INTERRUPTED), (Terminated, TERMINATED)):
        if isinstance(error, kinds):
            return code
    mendable = isinstance(error, UserError) or out_of_memory(error) or disk_is_full(error) or is_forbidden(error)
    return USER if mendable else INTERNAL


# torch is not imported to ask for its type; its CPU allocator and the libraries of CUDA have none of their own.
_NO_MEMORY = re.compile(r"can't allocate memory|CUDA error: out of memory|STATUS_(ALLOC_FAILED|NOT_ENOUGH_WORKSPACE)")


def out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))
    )


def disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_forbidden(error: BaseException) -> bool:
    """Whether a named file may not be used."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS) and bool(error.filename)
