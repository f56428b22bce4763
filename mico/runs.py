"""The run folder: how a long compression never loses work. Suffixes: R output rows, C channels, G groups.

    manifest.json   arguments, environment, finished blocks and outputs with their sha256
    blocks/NNN.safetensors   every QuantizedWeight of a finished block, and its records
    layers.jsonl    one record a layer          report.json    written last
    .lock           held by the living run      .tmp-*         unfinished files, removed on the next open

A killed run resumes after its last finished block; a finished one is recognised by its arguments. Single files
come from mico/files.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import platform
import re
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from mico.errors import UserError
from mico.files import (
    TEMPORARY,
    atomic_json,
    atomic_write,
    differences,
    fingerprint,
    load_tensors,
    make_durable,
    plain,
    read_json,
    save_tensors,
    sha256_file,
    sync_folder,
    writing,
)
from mico.packed.quantized import QuantizedWeight

__all__ = [
    "RunFolder",
    "atomic_json",
    "atomic_write",
    "fingerprint",
    "load_tensors",
    "pack_weight",
    "save_tensors",
    "sha256_file",
    "unpack_weight",
    "versions",
]
MANIFEST, LOCK, BLOCKS, LAYERS, REPORT = "manifest.json", ".lock", "blocks", "layers.jsonl", "report.json"
EVALUATION = "eval"  # what mico eval found later, no output of the run
TRAINING = "training"  # checkpoints of mico finetune, which a finished run no longer needs
FORMAT, VERSION = "mico-run", 1
_HEADER = "mico"  # the one metadata key of a block file


class RunFolder:
    """One output folder, owned by one living run: `with RunFolder.open(path, arguments) as run:`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.environment_changes: list[str] = []  # on resume: versions that are not those of the first run
        self._lock = lock
        self._manifest: dict[str, Any] = {}

    @classmethod
    def open(
        cls, path: str | Path, arguments: dict[str, Any], resume: bool = True, wait: Callable[[str], None] | None = None
    ) -> RunFolder:
        """Create or reopen a run folder, and own it until it is closed or the process ends.

        arguments: JSON values; a folder of other arguments is refused. resume False: start over. wait: a living run's
        folder is waited for, after `wait` was told so.
        Raises UserError when the folder cannot be written, is not a run folder, belongs to a living run, or was
        made with other arguments (the first differing fields are named).
        """
        path = Path(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            visible = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        if visible and MANIFEST not in visible:
            raise UserError(f"{path} is not empty ({visible[0]}) and not a run folder: choose another --save folder")
        run = cls(path, _take_lock(path, wait))
        try:
            run._start(plain(arguments), resume)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def view(cls, path: str | Path, arguments: dict[str, Any]) -> RunFolder | None:
        """A finished run to read from, without owning it; None when it is absent, unfinished or damaged.

        Raises UserError naming the fields in which the arguments of the folder differ.
        """
        path = Path(path)
        if not os.path.isfile(path / MANIFEST):
            return None
        run = cls(path, lock=-1)
        run._manifest = read_json(path / MANIFEST)
        _check_manifest(path / MANIFEST, run._manifest, plain(arguments))
        whole = run.completed and all(run._has_block(i) for i in range(run._manifest["completed"]["blocks"]))
        return run if whole else None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder up; the lock file stays (removing it would let two runs hold two locks)."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _start(self, arguments: dict[str, Any], resume: bool) -> None:
        file = self.path / MANIFEST
        known = read_json(file) if file.exists() else None
        if known is not None:
            _check_manifest(file, known, arguments)
        with writing(self.path):
            _remove_temporary(self.path)
            _remove_temporary(self.path / BLOCKS)
        now, here = _now(), versions()
        if known is None or not resume:
            known = dict(format=FORMAT, version=VERSION, arguments=arguments, started=now, environment=here, blocks={})
        self.environment_changes = differences(known["environment"], here)
        self._manifest = known | dict(opened=now)
        leading = range(next(i for i in range(len(known["blocks"]) + 1) if not self._has_block(i)))
        self._manifest["blocks"] = {str(i): known["blocks"][str(i)] for i in leading}
        atomic_json(file, self._manifest)  # also shows, before any work, that the folder can be written
        with writing(self.path):
            (self.path / BLOCKS).mkdir(exist_ok=True)
            sync_folder(self.path)
        if "completed" not in known:  # the blocks of a finished run may be deleted, its outputs stay as they are
            self._rebuild_layers()

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and platform of the first run in this folder."""
        return dict(self._manifest["environment"])

    # --- blocks ---

    @property
    def finished(self) -> int:
        """Number of leading blocks that are written: work goes on at this index."""
        return next(i for i in range(len(self._manifest["blocks"]) + 1) if str(i) not in self._manifest["blocks"])

    def write_block(
        self,
        index: int,
        layers: dict[str, QuantizedWeight],
        extra: dict[str, torch.Tensor],
        records: list[dict[str, Any]],
    ) -> None:
        """Store a finished block durably: its layers, other changed tensors (biases), its lines of layers.jsonl.

        The same input always gives the same bytes. Raises UserError when the disk is full; the blocks before stay.
        """
        assert self._lock >= 0, "not the owner of the folder"
        tensors = {f"extra/{name}": tensor for name, tensor in extra.items()}
        small = {}
        for name, weight in layers.items():
            parts, small[name] = pack_weight(weight)
            tensors |= {f"layer/{name}/{part}": tensor for part, tensor in parts.items()}
        header = json.dumps(dict(layers=small, extra=list(extra), records=records), separators=(",", ":"))
        digest = save_tensors(self._block_file(index), tensors, {_HEADER: header})
        entry = dict(file=str(self._block_file(index).relative_to(self.path)), sha256=digest)
        self._update(blocks=self._manifest["blocks"] | {str(index): entry})

    def read_block(
        self, index: int
    ) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor], list[dict[str, Any]]]:
        """What `write_block` was given. Raises UserError naming the file when it is damaged."""
        file = self._block_file(index)
        tensors = load_tensors(file, self._manifest["blocks"][str(index)]["sha256"])
        header = _read_header(file)
        layers = {name: unpack_weight(tensors, f"layer/{name}/", small) for name, small in header["layers"].items()}
        return layers, {name: tensors[f"extra/{name}"] for name in header["extra"]}, header["records"]

    def extra_bytes(self) -> Counter[str]:
        """Bytes of the extra tensors in the finished blocks, by the last part of their names."""
        found: Counter[str] = Counter()
        for index in range(self.finished):
            with safe_open(self._block_file(index), framework="pt") as opened:
                for name in (name for name in opened.keys() if name.startswith("extra/")):  # noqa: SIM118
                    part = opened.get_slice(name)
                    size = math.prod(part.get_shape()) * int(re.sub(r"\D", "", part.get_dtype())) // 8
                    found[name.rpartition("/")[2]] += size
        return found

    def _block_file(self, index: int) -> Path:
        return self.path / BLOCKS / f"{index:03d}.safetensors"

    def _has_block(self, index: int) -> bool:
        return str(index) in self._manifest["blocks"] and self._block_file(index).exists()

    # --- layers.jsonl ---

    def log_layer(self, record: dict[str, Any]) -> None:
        """Append one JSON line to layers.jsonl (made durable by the `write_block` that holds the same record)."""
        assert self._lock >= 0, "not the owner of the folder"
        with writing(self.path / LAYERS), open(self.path / LAYERS, "a", encoding="utf-8") as file:
            file.write(_line(record))

    def _rebuild_layers(self) -> None:
        headers = [_read_header(self._block_file(i)) for i in range(self.finished)]
        lines = (_line(record) for header in headers for record in header["records"])
        atomic_write(self.path / LAYERS, "".join(lines).encode())

    # --- outputs ---

    @contextlib.contextmanager
    def publish(self) -> Iterator[Path]:
        """A temporary folder whose files move into the run folder when the body succeeds, whole and durable.

        For libraries that write by themselves (`save_pretrained`): none of their files is ever half there.
        config.json moves last, so that a model cut short while moving does not load.
        """
        assert self._lock >= 0, "not the owner of the folder"
        staging = self.path / f"{TEMPORARY}{secrets.token_hex(4)}-publish"
        with writing(self.path):
            staging.mkdir()
            try:
                yield staging
                files = [file for file in sorted(staging.rglob("*")) if file.is_file()]
                make_durable(staging, files)
                for file in sorted(files, key=lambda file: file.name == "config.json"):
                    target = self.path / file.relative_to(staging)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
                for folder in {self.path / file.relative_to(staging).parent for file in files} | {self.path}:
                    sync_folder(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def finish(self, report: dict[str, Any]) -> None:
        """Write report.json and mark the run finished, with every output file and its sha256."""
        assert self._lock >= 0, "not the owner of the folder"
        self._rebuild_layers()
        atomic_json(self.path / REPORT, report)
        outputs = {name: sha256_file(self.path / name) for name in self._output_names()}
        self._update(completed=dict(at=_now(), blocks=self.finished, outputs=outputs))
        self.__dict__.pop("damaged", None)

    def _output_names(self) -> list[str]:
        names = (file.relative_to(self.path) for file in self.path.rglob("*") if file.is_file())
        ours = (name for name in names if not any(part.startswith(".") for part in name.parts))
        return sorted(name.as_posix() for name in ours if name.parts[0] not in (MANIFEST, BLOCKS, EVALUATION, TRAINING))

    @functools.cached_property
    def damaged(self) -> list[str]:
        """Outputs of a finished run that are missing or no longer what was written; mico report may renew its pages."""
        outputs = self._manifest.get("completed", {}).get("outputs", {})
        kept = ((name, None if name in ("report.md", "report.html") else digest) for name, digest in outputs.items())
        files = ((name, self.path / name, digest) for name, digest in kept)
        return [name for name, file, digest in files if not file.is_file() or digest not in (None, sha256_file(file))]

    @property
    def completed(self) -> bool:
        """Whether an earlier run with these arguments finished and every output is still as written.

        False with a non-empty `damaged` means: say which files, and write the outputs again from the blocks.
        """
        return "completed" in self._manifest and not self.damaged

    def _update(self, **fields: Any) -> None:
        updated = self._manifest | fields
        atomic_json(self.path / MANIFEST, updated)
        self._manifest = updated


# --- the lock and the manifest --------------------------------------------------------------------------------------


def _take_lock(path: Path, wait: Callable[[str], None] | None) -> int:
    """The descriptor of the locked `.lock`; the kernel frees it when its owner ends, however it ends."""
    with writing(path):
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "pid unknown"
                used = f"{path} is in use by another run ({owner}): wait"
                if wait is None:
                    raise UserError(f"{used} for it or choose another --save") from None
                wait(f"{used}ing for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _check_manifest(file: Path, known: dict[str, Any], arguments: dict[str, Any]) -> None:
    if (known.get("format"), known.get("version")) != (FORMAT, VERSION):
        found = f"{known.get('format')} version {known.get('version')}"
        raise UserError(f"{file} is of {found}, not {FORMAT} version {VERSION}: choose another --save folder")
    if not all(isinstance(known.get(field), dict) for field in ("arguments", "environment", "blocks")):
        raise UserError(f"{file} lacks arguments, environment or blocks: delete {file.parent} and run again")
    changed = differences(known["arguments"], arguments)
    if changed:
        raise UserError(
            f"{file.parent} was made with other arguments ({'; '.join(changed[:3])}): "
            "choose another --save folder, or delete this one"
        )


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, Any]:
    """What may change the bits of a result beside the arguments."""
    versions = {name: _version(name) for name in ("torch", "transformers", "mico")}
    return dict(
        python=platform.python_version(), **versions, platform=platform.platform(), threads=torch.get_num_threads()
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a clone that is not installed
        return "not installed"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


# --- block files ----------------------------------------------------------------------------------------------------


def pack_weight(weight: QuantizedWeight) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of one layer (mask as one bit a weight) and its small fields."""
    parts = dict(codes=weight.codes_RC, row_scale=weight.row_scale_RG, group_scale=weight.group_scale_G)
    parts |= dict(zero=weight.zero_RG, label=weight.label_C.to(torch.int32))
    if weight.keep_RC is not None:
        parts["keep"] = torch.from_numpy(np.packbits(weight.keep_RC.cpu().numpy()))
    present = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return present, dict(bits=list(weight.bits_G), pattern=weight.pattern)


def unpack_weight(tensors: dict[str, torch.Tensor], prefix: str, small: dict[str, Any]) -> QuantizedWeight:
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    codes_RC, keep_RC = part["codes"], None
    if "keep" in part:
        flat = np.unpackbits(part["keep"].numpy(), count=codes_RC.numel())
        keep_RC = torch.from_numpy(flat).bool().view(codes_RC.shape)
    return QuantizedWeight(
        codes_RC=codes_RC,
        row_scale_RG=part["row_scale"],
        group_scale_G=part.get("group_scale"),
        zero_RG=part.get("zero"),
        bits_G=tuple(small["bits"]),
        label_C=part["label"].long(),
        keep_RC=keep_RC,
        pattern=tuple(small["pattern"]) if small["pattern"] else None,
    )


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads(opened.metadata()[_HEADER])
    except Exception as error:  # besides its own type the library raises what a mutated header happens to cause
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is truncated or damaged ({reason}): delete it and run again") from error
