"""Verb: packed model in, the same model in the format of another program out, checked (mico export)."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mico.callable import callable_module
from mico.console import Console
from mico.errors import UserError
from mico.exports.folder import model_dtype
from mico.exports.source import Exported, PackedSource, read_packed
from mico.exports.targets import check_target
from mico.files import TEMPORARY, atomic_json, check_writable, make_durable, sync_folder, writing
from mico.loading import DTYPES
from mico.settings import EXPORTS, choose
from mico.tables import Section, size_text

callable_module(__name__)
NOTE = 400  # characters of a note that the terminal shows


def export(
    model: str,
    *,
    to: str,
    save: str | None = None,
    dtype: str = "auto",
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Export the packed `model` (a run folder or its `model/`) and return what was written and how it was checked.

    to: dense, vllm (compressed-tensors), gguf or gptq. save: the folder to make, by default beside the run, with the
    target's name at its end. dtype: of a dense export, auto is the checkpoint's own.
    Raises UserError before anything is written when the target cannot hold the model, naming tensors and remedy.
    """
    console = console or Console()
    choose("--to", to, EXPORTS)
    choose("--dtype", dtype, ("auto", *DTYPES))
    if dtype != "auto" and to != "dense":
        raise UserError(f"--dtype {dtype}: only --to dense has a choice, {to} keeps the checkpoint's: leave it out")
    if json is not None:
        check_writable("--json", json)
    out = _output_folder(model, to, save)
    with console.stage("read"):
        source = read_packed(model)
    check_target(to, source.config, source.family)
    staging = out.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{out.name}"
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    try:
        _check_disk(source, out, to, dtype)
        with writing(out, full_alone=True):
            exported = _exporter(to, dtype)(source, staging, console)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report = _report(model, out, exported, console)
    if json is not None:
        atomic_json(json, report)
    return report


def _output_folder(model: str, to: str, save: str | None) -> Path:
    given = _absolute(model)  # '.' and '..' have no name to go by
    run = given.parent if given.name == "model" else given
    out = _absolute(save) if save else run.parent / f"{run.name}-{to}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--save {out}: is there already: delete it or choose another")
    return out


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _check_disk(source: PackedSource, out: Path, to: str, dtype: str) -> None:
    """Refuse what is sure not to fit: a dense export, and codes in less space than they take here."""
    needed = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    if to == "dense":
        needed = source.numbers() * (DTYPES.get(dtype) or model_dtype(source)).itemsize
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out} cannot be written: {size_text(free)} free, {size_text(needed)} needed: free some or choose --save"
        )


def _exporter(to: str, dtype: str) -> Callable[[PackedSource, Path, Console], Exported]:
    if to == "dense":
        from mico.exports.dense import export_dense

        return lambda source, out, console: export_dense(source, out, console, DTYPES.get(dtype))
    if to == "vllm":
        from mico.exports.compressed_tensors import export_compressed_tensors

        return export_compressed_tensors
    if to == "gguf":
        from mico.exports.gguf import export_gguf

        return export_gguf
    from mico.exports.gptq import export_gptq

    return export_gptq


def _publish(staging: Path, out: Path) -> None:
    """Give the finished folder its name; until then nothing bears it."""
    with writing(out):
        make_durable(staging, [path for path in staging.rglob("*") if path.is_file()])
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
        sync_folder(out.parent)


def _report(model: str, out: Path, exported: Exported, console: Console) -> dict[str, Any]:
    sizes = {name: (out / name).stat().st_size for name in exported.files}
    seconds = {name: round(value, 3) for name, value in console.so_far().items()}
    return dict(
        model=model, to=exported.target, folder=str(out), files=sizes, bytes=sum(sizes.values()),
        exact=exported.exact, max_error=exported.max_error, notes=list(exported.notes), seconds=seconds,
    )  # fmt: skip


def section(report: dict[str, Any]) -> Section:
    """What `mico export` shows."""
    exact = "every weight exact" if report["exact"] else f"weights differ by up to {report['max_error']:.3g}"
    rows = (
        ("folder", report["folder"]),
        ("size", size_text(report["bytes"])),
        ("weights", exact),
    )
    return Section(f"Export to {report['to']}", ("", ""), rows, tuple(_short(note) for note in report["notes"]))


def _short(note: str) -> str:
    return note if len(note) <= NOTE else f"{note[:NOTE]}... (--json FILE has all of it)"
