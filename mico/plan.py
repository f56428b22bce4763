"""Verb: what compress would take, told without reading a weight (mico plan)."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mico.calibration import check_calibration
from mico.callable import callable_module
from mico.console import Console
from mico.errors import UserError
from mico.files import atomic_json, check_writable
from mico.forecast.fit import Forecast, Room, check_disk, check_memory, forecast, streams
from mico.forecast.machine import measure
from mico.forecast.memory import Task
from mico.forecast.outline import outline
from mico.forecast.work import Work
from mico.loading import DTYPES, context_length, is_reference, load_config, pick_device
from mico.loading.free import free_memory
from mico.loading.headers import stored_tensors
from mico.loading.streaming import MEMORY_SHARE
from mico.metrics.perplexity import default_texts, parse_texts
from mico.preflight import check_coverage, check_shapes
from mico.settings import Source, compression_of, record
from mico.stages import results_root
from mico.tables import NOTHING, Section, duration_text, size_text
from mico.team import gather

callable_module(__name__)


def plan(
    model: str,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    wbits: int = 4,
    target_avg_bits: float | None = None,
    n_groups: int | str = "auto",
    use_mi_grouping: bool | None = None,
    grouping: str | None = None,
    mi_method: str = "gaussian",
    cluster: str = "spectral",
    method: str | None = None,
    arm: str | None = None,
    allocation: str | None = None,
    group_size: int | None = None,
    percdamp: float = 0.01,
    blocksize: int = 128,
    profile: str | None = None,
    embed_bits: int = 16,
    calib: str | None = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    eval: str | Sequence[str] | None = None,
    save: str | None = None,
    data_dir: str | None = None,
    data_file: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    image_folder: str | None = None,
    compress_vision: bool = False,
    compress_projector: bool = False,
    allow_partial: bool = False,
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Forecast memory, disk, time and output size of `mico.compress` with the same options.

    Reads config.json and the headers of the weight files, and tries this machine for some seconds; texts are not read.
    Returns plain JSON values (bytes, seconds), also written to `json`. Raises UserError for what compress would refuse
    in these options, and when it cannot fit, saying what would. Image-text pairs count as windows of `seqlen`, the most
    they can be; what --compress-vision and --compress-projector take is not told. Of several devices the first one's
    part is told, as if it carried all batches.
    """
    console = console or Console()
    team = gather(device)
    source = Source(
        model, calib, data_dir, data_file, nsamples, seqlen, batch_size, seed, team.devices[0], dtype, offline,
        trust_remote_code, stream, image_folder, compress_vision, compress_projector,
    )  # fmt: skip
    if source.towers:
        raise UserError(f"--compress-{source.towers[0]}: mico plan forecasts the language model alone: leave it out")
    settings = compression_of(
        sparsity=sparsity, pattern=pattern, wbits=wbits, target_avg_bits=target_avg_bits, n_groups=n_groups,
        use_mi_grouping=use_mi_grouping, grouping=grouping, mi_method=mi_method, cluster=cluster, method=method,
        arm=arm, allocation=allocation, group_size=group_size, percdamp=percdamp, blocksize=blocksize, profile=profile,
        embed_bits=embed_bits,
    )  # fmt: skip
    texts = parse_texts(eval if isinstance(eval, str) else ",".join(eval)) if eval is not None else None
    if texts is None:
        texts = default_texts(is_reference(model), data_dir)
    if json is not None:
        check_writable("--json", json)
    place = pick_device(source.device)
    hub = dict(offline=offline, trust_remote_code=trust_remote_code)
    config = load_config(model, **hub)
    check_calibration(source, config)
    check_shapes(config, source, settings)
    length = context_length(config, seqlen)
    shape = outline(config, stored_tensors(model, **hub), f"model {model}")
    check_coverage(shape.coverage, model, allow_partial)
    folder = Path(save) if save else results_root()
    room = _shared(_room(place, folder), team.size)
    concrete = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else shape.dtype)
    streamed = streams(shape, concrete.itemsize, room, stream)
    task = Task(settings, nsamples, length, batch_size, concrete.itemsize, streamed, bool(texts))
    found = forecast(shape, task, room)
    try:
        check_memory(found, room)
        check_disk(found, room, str(folder))
    except UserError as error:
        raise UserError(f"model {model}: {error}") from None
    with console.stage("machine"):
        machine = measure(place, concrete, folder)
    seconds = Work(shape, task, found.size, machine).seconds(list(found.peaks), texts)
    other = forecast(shape, _other(task), room)
    report = _report(source, found, other, room, seconds) | {"settings": record(settings), "eval": list(texts)}
    report |= {
        "device": str(place),
        "processes": team.size,
        "dtype": str(concrete).removeprefix("torch."),
        "seqlen": length,
    }
    if json is not None:
        atomic_json(json, report)
    return report


def _other(task: Task) -> Task:
    """The same with the other way of keeping the model."""
    return replace(task, streamed=not task.streamed)


def _room(device: torch.device, folder: Path) -> Room:
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    host = free_memory(torch.device("cpu"))
    return Room(
        host, free_memory(device) if device.type == "cuda" else None, shutil.disk_usage(place).free, _resident_bytes()
    )


def _shared(room: Room, processes: int) -> Room:
    """What each of several processes on this machine may take: each reads the model."""
    return replace(room, host=room.host // processes)


def _resident_bytes() -> int:
    """Memory of this process: what a run has that has imported the same libraries."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _report(source: Source, found: Forecast, other: Forecast, room: Room, seconds: dict[str, float]) -> dict[str, Any]:
    stages = [
        dict(
            stage=stage, host_bytes=round(host), device_bytes=round(device),
            disk_bytes=round(found.disk.get(stage, 0)), seconds=round(seconds[stage], 1),
        )
        for stage, (host, device) in found.peaks.items()
    ]  # fmt: skip
    shape = found.shape
    return dict(
        model=source.model, family=shape.family.name, layers=len(shape.blocks), parameters=shape.parameters,
        linear_weights=shape.linear_weights, stages=stages, peak_host_bytes=round(found.host),
        peak_device_bytes=round(found.device), disk_bytes=round(sum(found.disk.values())),
        seconds=round(sum(seconds.values()), 1), streams=found.task.streamed, hidden_in_file=found.task.spilled,
        whole_model_bytes=shape.parameters * found.task.itemsize, peak_otherwise_bytes=round(_peak(other)),
        fits_otherwise=other.fits(room), free=dict(host=room.host, device=room.device, disk=room.disk),
        weights_room_bytes=room.weights, packed_bytes=found.size.tensors, bytes=found.size.file,
        stored_bytes=shape.stored_bytes, bits_per_weight=found.size.bits,
    )  # fmt: skip


def _peak(found: Forecast) -> float:
    return found.device or found.host


def section(report: dict[str, Any]) -> Section:
    """The forecast as one table, the largest figure of every column standing out."""
    columns = {"host memory": "host_bytes", "device memory": "device_bytes", "disk": "disk_bytes", "time": "seconds"}
    if not report["peak_device_bytes"]:
        del columns["device memory"]
    stages, rows, strong = report["stages"], [], set()
    for stage in stages:
        cells = [duration_text(stage[key]) if key == "seconds" else _bytes(stage[key]) for key in columns.values()]
        rows.append((stage["stage"], *cells))
    for column, key in enumerate(columns.values(), 1):
        strong.add((max(range(len(stages)), key=lambda row: stages[row][key]), column))
    lines = (
        f"{report['family']}, {report['layers']} layers, {report['parameters']:,} parameters on {report['device']}",
        _peak_line(report),
        _stream_line(report),
        f"output {size_text(report['bytes'])} ({report['bits_per_weight']:.2f} bits a Linear weight), "
        f"dense {size_text(report['stored_bytes'])}; "
        f"disk {size_text(report['disk_bytes'])} of {size_text(report['free']['disk'])} free",
        f"time {duration_text(report['seconds'])} on this machine, by what it does now",
    )
    return Section(f"Plan for {report['model']}", ("stage", *columns), tuple(rows), lines, frozenset(strong))


def _bytes(count: float) -> str:
    return size_text(count) if count else NOTHING


def _peak_line(report: dict[str, Any]) -> str:
    free = report["free"]
    each = f" in each of {report['processes']} processes" if report["processes"] > 1 else ""
    line = f"peak {size_text(report['peak_host_bytes'])} of memory{each}, {size_text(free['host'])} free"
    if free["device"] is not None:
        line += f"; {size_text(report['peak_device_bytes'])} of the device, {size_text(free['device'])} free"
    return line


def _stream_line(report: dict[str, Any]) -> str:
    whole, allowed = size_text(report["whole_model_bytes"]), size_text(MEMORY_SHARE * report["weights_room_bytes"])
    peak = size_text(report["peak_otherwise_bytes"])
    fits = "" if report["fits_otherwise"] else ", which does not fit"
    fits += "; hidden states go to a file" if report["hidden_in_file"] else ""
    if report["streams"]:
        return f"blocks are read from disk one by one (all {whole}, kept up to {allowed}); --no-stream: {peak}{fits}"
    return f"the whole model is in memory ({whole}; streamed above {allowed}); --stream: {peak}{fits}"
