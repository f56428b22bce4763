"""Verb: model and calibration data in, activation statistics of every stream on disk (mico calibrate)."""

from __future__ import annotations

import json
from typing import Any

from mico.callable import callable_module
from mico.console import Console
from mico.follow import follow
from mico.settings import Source
from mico.stages import Preparation, statistics
from mico.tables import Section
from mico.team import gather

callable_module(__name__)


def calibrate(
    model: str,
    *,
    calib: str | None = None,
    data_dir: str | None = None,
    data_file: str | None = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    image_folder: str | None = None,
    compress_vision: bool = False,
    compress_projector: bool = False,
    save: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the input of every stream of the dense model; mi_group and compress of the same options find it.

    Returns the folder, what was read, and one record a stream and block: channels, rows, dead channels, and the
    root mean square and largest root mean square of a channel. Raises UserError for what the user can mend.
    In a process of a team that is not the first the result is empty.
    """
    console = console or Console()
    with gather(device) as team:
        source = Source(
            model, calib, data_dir, data_file, nsamples, seqlen, batch_size, seed, team.device, dtype, offline,
            trust_remote_code, stream, image_folder, compress_vision, compress_projector,
        )  # fmt: skip
        if not team.leads:
            follow(team, source)
            return {}
        preparation = Preparation(source, console, team)
        for line in team.describe():
            console.note(line)
        found = statistics(preparation, save)
    records = (found.run.path / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(
        model=model,
        folder=str(found.run.path),
        calibration=preparation.windows.describe(),
        tokens=preparation.windows.tokens,
        seqlen=preparation.seqlen,
        streams=[json.loads(line) for line in records],
    )


def section(result: dict[str, Any]) -> Section:
    """The statistics as one table, a row for every kind of stream."""
    streams: dict[str, list[dict[str, Any]]] = {}
    for record in result["streams"]:
        streams.setdefault(record["stream"], []).append(record)
    rows = []
    for name, members in streams.items():
        rms = [record["rms"] for record in members]
        rows.append(
            (
                name,
                str(len(members)),
                str(members[0]["channels"]),
                f"{members[0]['rows']:,}",
                f"{min(rms):.2g} to {max(rms):.2g}",
                f"{max(record['peak'] for record in members):.3g}",
                str(sum(record["dead"] for record in members)),
            )
        )
    columns = ("stream", "blocks", "channels", "rows", "rms", "peak", "dead")
    lines = (
        "rms: of all channels, over the blocks; peak: of the largest channel; dead: channels that are always 0.",
        result["calibration"],
        f"statistics in {result['folder']}",
    )
    return Section(f"Activations of {result['model']}", columns, tuple(rows), lines)
