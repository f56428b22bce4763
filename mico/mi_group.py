"""Verb: activation statistics in, channel groups of every stream on disk (mico mi-group)."""

from __future__ import annotations

from typing import Any

import mico.stages as stages
from mico.callable import callable_module
from mico.console import Console
from mico.follow import follow
from mico.loading import load_config
from mico.preflight import check_grouping
from mico.settings import Grouping, Source
from mico.stages import Preparation
from mico.summary import groups_section
from mico.tables import Section
from mico.team import gather

callable_module(__name__)


def mi_group(
    model: str,
    *,
    n_groups: int | str = "auto",
    grouping: str = "mi",
    mi_method: str = "gaussian",
    cluster: str = "spectral",
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
    statistics: str | None = None,
    save: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Group the channels of every stream; compress of the same options finds the groups.

    Statistics come from `statistics`, or from where calibrate leaves them, and are made when missing.
    Returns the folder and one record a stream and block: number and sizes of the groups, for grouping `mi` also
    mean information within and between them (nats a pair), silhouette and Davies-Bouldin index.
    Raises UserError for what the user can mend. In a process of a team that is not the first the result is empty.
    """
    console = console or Console()
    with gather(device) as team:
        chosen = Grouping(n_groups, grouping, mi_method, cluster)
        source = Source(
            model, calib, data_dir, data_file, nsamples, seqlen, batch_size, seed, team.device, dtype, offline,
            trust_remote_code, stream, image_folder, compress_vision, compress_projector,
        )  # fmt: skip
        if not team.leads:
            follow(team, source)
            return {}
        config = load_config(model, offline=offline, trust_remote_code=trust_remote_code)
        check_grouping(config, source, chosen)  # before the text is read
        preparation = Preparation(source, console, team)
        for line in team.describe():
            console.note(line)
        found = stages.statistics(preparation, statistics)
        made = stages.groups(preparation, found, chosen, save)
    records = [record for index in range(preparation.blocks()) for record in made.block(index)[1]]
    return dict(
        model=model, folder=str(made.run.path), statistics=str(found.run.path), grouping=grouping, streams=records
    )


def section(result: dict[str, Any]) -> Section:
    """The groups as one table, a row for every kind of stream."""
    return groups_section(f"Channel groups of {result['model']}", result["streams"], (f"groups in {result['folder']}",))
