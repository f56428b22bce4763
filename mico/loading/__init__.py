"""Finding, checking and loading models. names -> safety -> model; what other rooms use is listed here.

`model` imports torch and is itself imported at the first use, so that the names alone cost no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mico.loading.names import ALIASES, REFERENCE_DIR, REFERENCES, is_reference, local_folder, resolve
from mico.loading.safety import fingerprint

if TYPE_CHECKING:
    from mico.loading.model import (
        DTYPES,
        LoadedModel,
        context_length,
        copy_processor,
        coverage,
        describe,
        load_config,
        load_model,
        load_tokenizer,
        longest_text,
        pick_device,
        quiet,
        stream_widths,
    )
    from mico.loading.processor import load_processor

__all__ = [
    "ALIASES",
    "DTYPES",
    "REFERENCES",
    "REFERENCE_DIR",
    "LoadedModel",
    "context_length",
    "copy_processor",
    "coverage",
    "describe",
    "fingerprint",
    "is_reference",
    "load_config",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "local_folder",
    "longest_text",
    "pick_device",
    "quiet",
    "resolve",
    "stream_widths",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "mico.loading.processor" if name == "load_processor" else "mico.loading.model"
    return getattr(import_module(module), name)
