"""Files that survive a kill, a full disk and a flipped bit, and what identifies their content.

A file under its final name is always whole: it is written under a hidden temporary name in the same folder,
flushed to the disk and renamed. What was written is known by its sha256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mico.errors import UserError

TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_FULL_TEXT = re.compile(rf"\(os error ({'|'.join(map(str, _FULL))})\)|\d+ requested and \d+ written")  # Rust, numpy
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems cannot flush a folder


# --- single files ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, full_alone: bool = False) -> Iterator[None]:
    """Turn a failure of the file system below into one line that names `path` and the remedy (UserError).

    full_alone: only what a full disk causes, for work below that may fail for other reasons too.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk as types of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        full = getattr(error, "errno", None) in _FULL or bool(_FULL_TEXT.search(reason))
        if not full and (full_alone or not isinstance(error, (OSError, SafetensorError))):
            raise
        remedy = (
            "free disk space or raise the file size limit, then run the same command again"
            if full
            else "choose a folder that can be written, or fix its permissions"
        )
        raise UserError(f"{path} cannot be written ({reason}): {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: a rename is durable only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all, durably, with the permissions the umask asks for.

    Raises UserError naming the path when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}"
    with writing(path):
        try:
            # Not tempfile: its files have mode 0600 whatever the umask says.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def atomic_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, atomically."""
    atomic_write(path, (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode())


def check_writable(option: str, path: str | Path) -> None:
    """Refuse, before any work, a result file that cannot be written. Raises UserError naming option and path."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: this is a folder, give a file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()


def read_json(path: Path, remedy: str = "delete it, or its folder, and run again") -> dict[str, Any]:
    """Read a JSON object. Raises UserError naming the file and the remedy when it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object: {remedy}")
    return value


def make_durable(staging: Path, files: list[Path]) -> None:
    """Give the files the mode the umask asks for (safetensors makes 0600) and flush them."""
    probe = os.open(staging / f"{TEMPORARY}mode", os.O_CREAT | os.O_WRONLY, 0o666)
    mode = os.fstat(probe).st_mode & 0o777  # reading the umask itself would change it for other threads
    os.close(probe)
    (staging / f"{TEMPORARY}mode").unlink()
    for file in files:
        file.chmod(mode)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file atomically and return its sha256; the same tensors always give the same bytes.

    Tensors may be on any device, strided, or share memory (each name gets its own copy on disk).
    """
    data = save(_separate(tensors), metadata=metadata)
    if metadata is not None and len(metadata) > 1:
        data = _sorted_metadata(data)
    atomic_write(path, data)
    return hashlib.sha256(data).hexdigest()


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # safetensors refuses shared memory
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def _sorted_metadata(data: bytes) -> bytes:
    """Sort the metadata in a safetensors header: the library writes it in the random order of a hash map."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors that follow stay aligned
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_tensors(path: str | Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file, first comparing its sha256 when given.

    Raises UserError naming the file when it is missing, truncated, damaged, or not the one that was written.
    """
    path = Path(path)
    verify(path, sha256)
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or delete its folder and run again") from error
    except Exception as error:  # besides its own type the library raises what a mutated header happens to cause
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is truncated or damaged ({reason}): delete it and run again") from error


def verify(path: Path, sha256: str | None) -> None:
    """Raise UserError naming the file unless it can be read and, when given, has this sha256."""
    try:
        found = sha256_file(path) if sha256 is not None else None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): delete its folder and run again") from error
    if found != sha256:
        raise UserError(
            f"{path} is truncated or damaged (sha256 {str(found)[:12]}..., written as {str(sha256)[:12]}...): "
            "delete it and run again"
        )


# --- identity -------------------------------------------------------------------------------------------------------


def plain(obj: Any) -> Any:
    """`obj` as JSON would give it back (tuples become lists), so that it compares with what was read."""
    return json.loads(json.dumps(obj, allow_nan=False))


def fingerprint(obj: Any) -> str:
    """16 hex digits of the sha256 of `obj` as canonical JSON (keys sorted, no spaces)."""
    canonical = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


_ABSENT = object()


def differences(there: Any, here: Any, field: str = "") -> list[str]:
    """The fields in which two plain records differ, as `field: there X, here Y` with dotted field names."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = list(dict.fromkeys([*here, *there]))
        pairs = [(f"{field}.{name}".lstrip("."), there.get(name, _ABSENT), here.get(name, _ABSENT)) for name in names]
        return [line for name, old, new in pairs for line in differences(old, new, name)]
    return [] if there == here else [f"{field}: there {_show(there)}, here {_show(here)}"]


def _show(value: Any) -> str:
    text = "nothing" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
