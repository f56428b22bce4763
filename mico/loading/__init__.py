"""Finding, checking and loading models. names -> safety -> model; what other rooms use is listed here."""

from __future__ import annotations

from mico.loading.model import (
    DTYPES,
    LoadedModel,
    context_length,
    coverage,
    describe,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    quiet,
)
from mico.loading.names import ALIASES, REFERENCE_DIR, REFERENCES, is_reference, local_folder, resolve
from mico.loading.safety import fingerprint

__all__ = [
    "ALIASES",
    "DTYPES",
    "REFERENCES",
    "REFERENCE_DIR",
    "LoadedModel",
    "context_length",
    "coverage",
    "describe",
    "fingerprint",
    "is_reference",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "pick_device",
    "quiet",
    "resolve",
]
