"""What is checked of a packed checkpoint before transformers opens it: all that `load_model` checks of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mico.adapters import family_row
from mico.checkpoint import check_execution, verify_checkpoint
from mico.errors import UserError
from mico.files import read_json
from mico.loading.names import model_in
from mico.loading.safety import check_folder, check_remote_code, is_packed, tensor_shapes


def packed_folder(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the packed checkpoint `name`, or of the one in the run folder `name`, and its config's content.

    Raises UserError when there is none, or when the way it is to be computed is not known.
    """
    folder = model_in(name)
    file = folder / "config.json"
    if not file.is_file() or not is_packed(config := read_json(file, "fetch the model again")):
        raise UserError(f"{name}: no checkpoint packed by mico: give a run folder of mico compress, or its model/")
    check_execution()
    return folder, config


def checked_packed_folder(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """As `packed_folder`. Raises UserError too when files lead out of it, are missing or damaged, or ask to run
    code."""
    folder, _ = packed_folder(name)
    config = check_folder(folder, packed=True)
    check_remote_code(folder, family_row(config.get("model_type")).ships_code)
    tensor_shapes(folder)
    verify_checkpoint(folder)
    return folder, config
