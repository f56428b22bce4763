"""Verbs that can be called by their module: `mico.compress(...)` and `from mico.compress import compress` both work.

Importing `mico.compress` binds the module to that name of the package, over any function of the same name. So the
module itself answers the call.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _VerbModule(ModuleType):
    """A module that passes a call on to the function that bears its name."""

    @property
    def _verb(self) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._verb(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._verb)


def callable_module(name: str) -> None:
    """Make the module `name` (its `__name__`) callable as the function in it of the same last name."""
    sys.modules[name].__class__ = _VerbModule
