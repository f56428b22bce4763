"""results.json of `mico eval`: lm-eval's dictionary, with what mico measured itself under `mico`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mico.console import Console
from mico.errors import UserError
from mico.files import read_json
from mico.metrics.vision.run import merged

SAME = ("fingerprint", "dtype")  # of the model, in an earlier call whose figures are kept


def with_earlier(file: Path, found: dict[str, Any], own: dict[str, Any], console: Console) -> dict[str, Any]:
    """What is to be written to `file`: lm-eval's `found` and mico's `own`.

    A call that measures no text keeps those of an earlier call on the same model, and one that runs no task its tasks.
    Suites are kept too, but those asked again with the same visual tokens and limit.
    """
    earlier = _earlier(file, own)
    suites = merged(earlier["mico"].get("suites") or [], own["suites"])
    if not own["texts"] and earlier["mico"].get("texts"):
        own = earlier["mico"]
        console.note(f"eval: {file} keeps the texts of an earlier call")
    if not found["results"] and earlier.get("results"):
        found = {name: value for name, value in earlier.items() if name != "mico"}
        console.note(f"eval: {file} keeps the tasks of an earlier call")
    return found | {"mico": own | {"suites": suites}}


def _earlier(file: Path, own: dict[str, Any]) -> dict[str, Any]:
    """What lies in `file` of the same model; nothing when there is none, or it cannot be read and is written anew."""
    try:
        earlier = read_json(file) if file.is_file() else {}
    except UserError:
        earlier = {}
    block = earlier.get("mico")
    same = isinstance(block, dict) and all(block.get(name) == own[name] for name in SAME)
    return earlier if same else {"mico": {}}
