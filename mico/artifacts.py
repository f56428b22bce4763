"""Files that survive a kill, a full disk and a flipped bit; and the statistics and groups folders made of them.

A file under its final name is always whole: it is written under a hidden temporary name in the same folder,
flushed to the disk and renamed. What was written is known by its sha256.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mico.errors import UserError

TEMPORARY = ".tmp-"
ARTIFACT_FILE, ARTIFACT_FORMAT, ARTIFACT_VERSION = "artifact.json", "mico-artifact", 1
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems cannot flush a folder


# --- single files ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the file system below into one line that names `path` and the remedy (UserError)."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own type
        reason = getattr(error, "strerror", None) or str(error)
        full = getattr(error, "errno", None) in _FULL or any(f"os error {code}" in reason for code in _FULL)
        remedy = (
            "free disk space or raise the file size limit, then run the same command again (finished work is kept)"
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError naming the file when it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path} cannot be read ({error}): delete it, or its folder, and run again") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a {type(value).__name__}, not an object: delete it, or its folder, and run again"
        )
    return value


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


# --- statistics and groups folders ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A verified folder of tensors: what it was made from (`identity`) and what else is known of it (`facts`)."""

    folder: Path
    identity: dict[str, Any]
    facts: dict[str, Any]
    sha256: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sha256)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one file, read when asked for: the whole may be larger than memory."""
        return load_tensors(self.folder / f"{name}.safetensors")


def save_artifact(
    folder: str | Path,
    kind: str,
    identity: dict[str, Any],
    tensors_by_file: Mapping[str, Mapping[str, torch.Tensor]] | Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    facts: dict[str, Any],
) -> None:
    """Write a whole folder `folder` of `{name}.safetensors` files and an artifact.json, or nothing.

    kind: "statistics", "groups", ...; identity: JSON values the content depends on (model, data, seed, seqlen);
    tensors_by_file: a mapping, or pairs made one at a time. An older artifact of the same kind is replaced.
    Raises UserError when `folder` holds anything else or cannot be written.
    """
    folder = Path(folder).resolve()
    pairs = tensors_by_file.items() if isinstance(tensors_by_file, Mapping) else tensors_by_file
    _refuse_to_replace(folder, kind)
    with _building(folder) as building:
        sha256 = {name: save_tensors(building / f"{_checked(name)}.safetensors", part) for name, part in pairs}
        record = dict(format=ARTIFACT_FORMAT, version=ARTIFACT_VERSION, kind=kind, identity=identity)
        atomic_json(building / ARTIFACT_FILE, record | dict(facts=facts, sha256=sha256))
        with writing(folder), _alone_in(folder.parent):
            _swap(building, folder)


def load_artifact(folder: str | Path, kind: str, identity: dict[str, Any] | None = None) -> Artifact | None:
    """The artifact in `folder`, every file verified by sha256; None when the folder is absent or empty.

    Raises UserError naming the first identity fields that differ (None: any identity is accepted), or the
    file that is damaged, or the folder when it holds something else.
    """
    folder = Path(folder)
    if all(name.startswith(".") for name in _entries(folder)):
        return None
    record = _read_artifact(folder, kind)
    changed = differences(record["identity"], plain(identity)) if identity is not None else []
    if changed:
        raise UserError(f"{folder} holds {kind} of another run ({'; '.join(changed[:3])}): give another folder")
    for name, digest in record["sha256"].items():
        verify(folder / f"{_checked(name)}.safetensors", digest)
    return Artifact(folder, record["identity"], record["facts"], record["sha256"])


def _entries(folder: Path) -> set[str]:
    """Names in the folder; none when it does not exist."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{folder} is not a folder that can be read ({error.strerror}): give another one") from error


def _refuse_to_replace(folder: Path, kind: str) -> None:
    """Raise UserError when replacing the folder would delete anything that is not an artifact of this kind."""
    entries = _entries(folder)
    if entries:
        ours = {f"{name}.safetensors" for name in _read_artifact(folder, kind)["sha256"]} | {ARTIFACT_FILE}
        foreign = sorted(entries - ours)
        if foreign:
            raise UserError(f"{folder / foreign[0]} is not part of the {kind} there: move it, or give another folder")


def _checked(name: str) -> str:
    if Path(name).name != name:
        raise UserError(f"'{name}' is not the name of a file of an artifact: a path may not leave its folder")
    return name


def _read_artifact(folder: Path, kind: str) -> dict[str, Any]:
    if not (folder / ARTIFACT_FILE).exists():
        raise UserError(f"{folder} is not empty and holds no {ARTIFACT_FILE}: give another folder for the {kind}")
    record = read_json(folder / ARTIFACT_FILE)
    if (record.get("format"), record.get("version")) != (ARTIFACT_FORMAT, ARTIFACT_VERSION):
        raise UserError(
            f"{folder / ARTIFACT_FILE} is of version {record.get('version')}: made by another mico; redo it"
        )
    if record.get("kind") != kind:
        raise UserError(f"{folder} holds {record.get('kind')}, not {kind}: give the folder of the {kind}")
    if not all(isinstance(record.get(field), dict) for field in ("identity", "facts", "sha256")):
        raise UserError(f"{folder / ARTIFACT_FILE} lacks identity, facts or sha256: delete the folder and run again")
    return record


@contextlib.contextmanager
def _alone_in(folder: Path, operation: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Lock a folder; False when another holds it (LOCK_NB), or cannot be locked (some network file systems)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        locked = False
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, operation)
            locked = True
        yield locked
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, locked while its writer lives; what dead writers left is removed."""
    building = folder.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{folder.name}"
    with contextlib.ExitStack() as life:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(folder.parent) as alone:  # so that nobody sees the new folder before it is locked
                if alone:
                    _remove_leftovers(folder)
                building.mkdir()
                life.callback(shutil.rmtree, building, ignore_errors=True)
                life.enter_context(_alone_in(building, fcntl.LOCK_EX | fcntl.LOCK_NB))
        yield building


def _remove_leftovers(folder: Path) -> None:
    for path in folder.parent.iterdir():
        if path.name.startswith(TEMPORARY) and path.name.endswith(f"-{folder.name}") and path.is_dir():
            with _alone_in(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as dead:
                if dead:
                    shutil.rmtree(path, ignore_errors=True)


def _swap(building: Path, folder: Path) -> None:
    """Give `building` the name `folder`. A kill between the two renames leaves no artifact, never a mixed one."""
    aside = folder.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{folder.name}"
    sync_folder(building)
    if _entries(folder):
        os.replace(folder, aside)
    os.replace(building, folder)
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
