"""Names, dtypes and shapes of a model's tensors from the headers of its weight files; no weight is read or fetched."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.loading.names import local_folder, raise_hub_error, resolve
from mico.loading.safety import HEADER_LIMIT, INDEX, WEIGHTS, some, weight_map


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file: its dtype as safetensors names it (BF16, F32 ...) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # BOOL alone has no number
        return self.count * (int(bits[0]) if bits else 8) // 8


def stored_tensors(name: str, *, offline: bool = False, trust_remote_code: bool = False) -> dict[str, Stored]:
    """The tensors of a model by key, from a local folder or, for a hub id, from the hub's files without fetching them.

    Raises UserError naming the file that is missing or broken, or what to do when the hub cannot be asked.
    """
    folder = local_folder(name, weights=False, offline=offline, trust_remote_code=trust_remote_code)
    if Path(resolve(name)).expanduser().is_dir() or (folder / WEIGHTS).exists():
        return folder_headers(folder)
    if (folder / INDEX).exists() and all((folder / file).exists() for file in weight_map(folder)):
        return folder_headers(folder)
    return _hub_headers(name, resolve(name), offline)


def folder_headers(folder: Path) -> dict[str, Stored]:
    """The tensors of all weight files of a folder; only their headers need to be there."""
    found: dict[str, Stored] = {}
    for file, expected in sorted(weight_map(folder).items()):
        entries = _header(folder / file)
        absent = sorted(set(expected) - set(entries))
        if absent:
            raise UserError(f"{folder / file}: {some(absent)} listed in {INDEX} but not in the file: fetch it again")
        found |= entries
    return found


def _header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the model's weights are incomplete, fetch it again")
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"header of {length:,} bytes")
            content = json.loads(stream.read(length))
        content.pop("__metadata__", None)
        return {key: _stored(entry) for key, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{path}: its header is truncated or corrupt ({str(error)[:80]}): fetch it again") from None


def _stored(entry: Any) -> Stored:
    shape = tuple(int(size) for size in entry["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return Stored(str(entry["dtype"]), shape)


def _hub_headers(name: str, repo: str, offline: bool) -> dict[str, Stored]:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import NotASafetensorsRepoError

    if offline or constants.HF_HUB_OFFLINE:
        raise UserError(f"model {name}: the weights of {repo} are not here and the hub is off: allow it, or fetch them")
    try:
        metadata = huggingface_hub.get_safetensors_metadata(repo)
    except NotASafetensorsRepoError:
        raise UserError(f"model {name}: {repo} has no safetensors weights whose headers could be read") from None
    except Exception as error:  # the client raises its own types and those of its http library
        raise_hub_error(name, repo, offline, error)
    tensors = (file.tensors for file in metadata.files_metadata.values())
    return {key: Stored(str(info.dtype), tuple(info.shape)) for file in tensors for key, info in file.items()}
