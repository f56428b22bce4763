"""What can go wrong, by exit code. Messages are one line: the file, layer, row or field, its value, the remedy."""

from __future__ import annotations

from typing import Any

INTERNAL, USER, CONTRACT, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


class UserError(ValueError):
    """The user or the data must change something; exit code 2."""


class ContractError(Exception):
    """The run finished but a `--strict` contract broke (fallbacks were needed); exit code 3. Holds its report."""

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report
