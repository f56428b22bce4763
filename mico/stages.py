"""What comes before compression, each kept in a folder of its own: calibration data, statistics, channel groups.

A stage is identified by everything its result depends on (model, text, samples, seqlen, seed ...). It is read
when a finished folder of that identity exists and made, block by block and resumable, when not. The verbs
calibrate and mi-group are these stages; compress runs those that are missing.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from mico.adapters import family_of, with_towers
from mico.adapters.family import Family, linears_of
from mico.calibration import calibration
from mico.channels.grouping import cluster, random_groups, sorted_groups
from mico.channels.heat import heat_text, ordered_heat
from mico.channels.information import MIN_ROWS, mutual_information
from mico.channels.meters import SecondMoments
from mico.channels.plan import ChannelGroups
from mico.channels.starved import is_starved, trusted
from mico.console import Console
from mico.costs import NESTED
from mico.data import Windows
from mico.errors import UserError
from mico.files import read_json
from mico.image_text import Pairs
from mico.loading import (
    LoadedModel,
    context_length,
    fingerprint,
    is_reference,
    load_config,
    load_model,
    load_tokenizer,
    local_folder,
    pick_device,
)  # fmt: skip
from mico.methods.sweep import factorize
from mico.runs import RunFolder
from mico.runs import fingerprint as digest
from mico.settings import Compression, Grouping, Source, record
from mico.team import ALONE, StreamMeter, Team
from mico.walk import Block, walk

LAYOUT = 1  # of the tensors in a stage's folder; another number makes old folders unfit
SORTED_GROUPS = 8  # groups of the sorted and random controls when --n-groups is auto
DAMPING = 0.01  # of the factor behind alpha-sorted groups
HEAT = "heat/"  # before the name of a stream: its MI heat map, in the file of a block's groups


def results_root() -> Path:
    """Where folders without a name given by the user go: $MICO_RESULTS or ./results."""
    return Path(os.environ.get("MICO_RESULTS", "results"))


class Preparation:
    """A model and its calibration windows; everything that can be refused is refused before weights are read."""

    def __init__(self, source: Source, console: Console, team: Team = ALONE) -> None:
        self.source, self.console, self.team = source, console, team
        hub = dict(offline=source.offline, trust_remote_code=source.trust_remote_code)
        self.device = pick_device(source.device)
        self.config = load_config(source.model, **hub)
        self.family: Family = with_towers(
            family_of(self.config), self.config, vision=source.compress_vision, projector=source.compress_projector
        )
        if source.towers and not team.alone:
            raise UserError(f"--compress-{source.towers[0]} works in one process: name one --device")
        self.tokenizer = load_tokenizer(source.model, **hub)
        self.seqlen = context_length(self.config, source.seqlen)
        self.reference = is_reference(source.model)
        self.windows: Windows | Pairs = calibration(source, self.config, self.tokenizer, self.seqlen, console)
        console.note(f"calibration {self.windows.describe()}")
        self.folder = local_folder(source.model, **hub)
        self._loaded: LoadedModel | None = None

    @property
    def label(self) -> str:
        """The model's name as part of a folder name."""
        return Path(self.source.model).name.lower()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything the activations depend on."""
        source = self.source
        dtype = "float32" if source.dtype == "auto" and self.device.type == "cpu" else source.dtype
        towers = dict(towers=list(source.towers)) if source.towers else {}
        return dict(
            model=fingerprint(self.folder), text=self.windows.source.name, tokens_sha256=self.windows.sha256,
            nsamples=source.nsamples, seqlen=self.seqlen, seed=source.seed, batch_size=source.batch_size, dtype=dtype,
            device=self.device.type, **towers,
        )  # fmt: skip

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the checkpoint's own numbers are stored in."""
        named = getattr(self.config, "dtype", None)
        return (getattr(torch, named) if isinstance(named, str) else named) or torch.float32

    def load(self) -> LoadedModel:
        """The model in memory, read at the first call."""
        if self._loaded is None:
            source = self.source
            with self.console.stage("load"):
                self._loaded = load_model(
                    source.model, device=source.device, dtype=source.dtype, seqlen=source.seqlen,
                    offline=source.offline, trust_remote_code=source.trust_remote_code, stream=source.stream,
                )  # fmt: skip
            found = self._loaded = replace(self._loaded, family=self.family)
            if found.store is not None and source.towers:
                raise UserError(
                    f"--compress-{source.towers[0]} needs the whole model in memory, which is too small: leave it out"
                )
            kept = "all of it in memory" if found.store is None else "its blocks on disk, each read when it is needed"
            self.console.note(f"model on {found.device} in {str(found.dtype).removeprefix('torch.')}, {kept}")
        return self._loaded

    def forget(self) -> None:
        """Drop the model: it is about to be changed, or is no longer needed."""
        self._loaded = None

    @property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The calibration inputs as the model is called with them."""
        return self.windows.batches(self.source.batch_size)

    def walk(self, paired: bool = False, folder: Path | None = None) -> Iterator[Block]:
        """The blocks of the model, with the batches that this process carries; folder: for what memory cannot hold."""
        loaded = self.load()
        return walk(
            loaded.model, loaded.family, self.batches, paired=paired, resident=loaded.part, share=self.team.share,
            folder=folder, tell=self.console.note,
        )  # fmt: skip

    def blocks(self) -> int:
        return self.family.offset + int(self.config.get_text_config().num_hidden_layers)

    def together(self, stage: str, finished: int, settings: Compression | None = None) -> AbstractContextManager[None]:
        """The other processes of the team then do their part of a stage from block `finished` on (mico/follow.py)."""
        if len(self.batches) < self.team.size:
            self.console.note(
                f"{len(self.batches)} batches for {self.team.size} processes: some have none, lower --batch-size"
            )
        chosen = None if settings is None else record(settings)
        task = dict(stage=stage, finished=finished, settings=chosen, identity=digest(self.identity))
        return self.team.asked(dict(source=asdict(self.source)), task)


def kept_stage(
    kind: str,
    folder: Path,
    identity: dict[str, Any],
    blocks: int,
    console: Console,
    make: Callable[[RunFolder, Callable[[str], None]], None],
) -> RunFolder:
    """The finished folder of a stage, made by `make` (which writes the blocks still missing) unless it is there.

    When another process makes the very same stage, it is waited for. Raises UserError naming the field in which a
    folder given by hand differs.
    """
    arguments = dict(kind=kind, layout=LAYOUT) | identity
    found = RunFolder.view(folder, arguments)
    if found is None:
        with RunFolder.open(folder, arguments, wait=console.note) as run:
            found = RunFolder.view(folder, arguments)  # there now, when it was waited for
            if found is None:
                _make_stage(kind, run, blocks, console, make)
    if found is not None:
        console.note(f"{kind}: reusing {folder}")
        facts = read_json(folder / "report.json")
        console.reused |= {kind: facts["seconds"]} | facts.get("parts", {})
        return found
    console.note(f"{kind}: written to {folder}")
    found = RunFolder.view(folder, arguments)
    assert found is not None
    return found


def _make_stage(
    kind: str, run: RunFolder, blocks: int, console: Console,
    make: Callable[[RunFolder, Callable[[str], None]], None],
) -> None:  # fmt: skip
    with console.stage(kind):
        if run.finished:
            console.note(f"{kind}: {run.finished} of {blocks} blocks were there, going on")
        with console.bar(kind, blocks, run.finished) as advance:
            make(run, advance)
        seconds = {name: round(value, 3) for name, value in console.so_far().items()}
        parts = {name: value for name, value in seconds.items() if NESTED.get(name) == kind}
        run.finish(dict(seconds=seconds[kind], parts=parts))


# --- statistics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Dense activation statistics of every stream, on disk; one block is read at a time."""

    run: RunFolder

    def block(self, index: int) -> dict[str, tuple[SecondMoments, torch.Tensor]]:
        """{stream: (moments, reservoir rows_TC)} of one block."""
        _, tensors, records = self.run.read_block(index)
        counts = {record["stream"]: record["rows"] for record in records}
        return {name: (_moments(tensors, name, count), tensors[f"{name}/rows"]) for name, count in counts.items()}

    def kept_bytes(self) -> dict[str, int]:
        """On disk: `history`, the rows of activations that are kept, and `moments`, sums and products of all rows."""
        found = self.run.extra_bytes()
        return dict(history=found["rows"], moments=found["sum"] + found["gram"])


def _moments(tensors: dict[str, torch.Tensor], stream: str, count: int) -> SecondMoments:
    return SecondMoments(tensors[f"{stream}/sum"], tensors[f"{stream}/gram"].double(), count)


def statistics(preparation: Preparation, folder: str | None = None) -> Statistics:
    """Second moments and reservoirs of the dense model, from `folder` or made there (float32 on disk)."""
    identity = preparation.identity
    place = Path(folder) if folder else results_root() / f"statistics-{preparation.label}-{digest(identity)[:8]}"

    def make(run: RunFolder, advance: Callable[[str], None]) -> None:
        preparation.load()
        with preparation.together("statistics", run.finished):
            for block, meters in measured(preparation, run.finished, run.path):
                tensors = {}
                for stream, meter in meters.items():
                    tensors[f"{stream}/sum"] = meter.moments.sum_C
                    tensors[f"{stream}/gram"] = meter.moments.gram_CC.float()
                    tensors[f"{stream}/rows"] = meter.reservoir.rows_TC
                run.write_block(block.index, {}, tensors, [_facts(block, s, m) for s, m in meters.items()])
                advance("")

    return Statistics(kept_stage("statistics", place, identity, preparation.blocks(), preparation.console, make))


def measured(
    preparation: Preparation, finished: int, folder: Path | None = None
) -> Iterator[tuple[Block, dict[str, StreamMeter]]]:
    """The blocks from `finished` on with a meter a stream, which has seen all batches in the first process."""
    team, loaded = preparation.team, preparation.load()
    for block in preparation.walk(folder=folder):
        if block.index < finished:
            continue
        if team.alone:
            yield block, block.measure(lambda channels: StreamMeter(channels, loaded.device))
            continue
        rows = _rows(preparation, block)
        meters = block.measure(_in_turn(loaded.device, rows, team.share))
        for stream, meter in meters.items():
            meter.join(team, rows[stream])
        yield block, meters


def _in_turn(device: torch.device, rows: dict[str, list[int]], share: slice) -> Callable[[int], StreamMeter]:
    """Makes the meters of a block, which asks for them in the order of the family's streams, each time it measures."""
    in_turn = cycle(rows.values())
    return lambda channels: StreamMeter(channels, device, next(in_turn), share)


def _rows(preparation: Preparation, block: Block) -> dict[str, list[int]]:
    """Rows of every stream in every batch, which only the routers know where experts share them."""
    size, batches = preparation.team.size, preparation.batches
    tokens = [batch["input_ids"].numel() for batch in batches]
    counted = preparation.team.gathered(block.expert_rows())
    found = {}
    for stream in preparation.family.streams:
        apart = [part.get(stream.name) for part in counted]
        found[stream.name] = (
            tokens if apart[0] is None else [apart[batch % size][batch // size] for batch in range(len(batches))]
        )
    return found


def _facts(block: Block, stream: str, meter: StreamMeter) -> dict[str, Any]:
    diagonal_C = meter.moments.gram_CC.diagonal() / max(meter.moments.count, 1)
    return dict(
        block=block.index, stream=stream, channels=len(diagonal_C), rows=meter.moments.count,
        dead=int((diagonal_C == 0).sum()), rms=float(diagonal_C.mean().sqrt()), peak=float(diagonal_C.max().sqrt()),
        linears=list(block.streams[stream]),
    )  # fmt: skip


# --- groups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Channel groups of every stream, on disk, with the diagnostics of their making."""

    run: RunFolder

    def block(self, index: int) -> tuple[dict[str, ChannelGroups], list[dict[str, Any]]]:
        """({stream: groups}, diagnostics) of one block."""
        _, tensors, records = self.run.read_block(index)
        labels = {name: label_C for name, label_C in tensors.items() if not name.startswith(HEAT)}
        return {name: ChannelGroups(label_C.long()) for name, label_C in labels.items()}, records

    def heats(self, index: int) -> dict[str, torch.Tensor]:
        """{stream: heat_HH} of one block, of the streams that were grouped by MI (channels/heat.py)."""
        tensors = self.run.read_block(index)[1]
        return {name.removeprefix(HEAT): heat_HH for name, heat_HH in tensors.items() if name.startswith(HEAT)}


def groups(preparation: Preparation, statistics: Statistics, grouping: Grouping, folder: str | None = None) -> Groups:
    """Groups of every stream by MI or by a control, from `folder` or made there."""
    identity = preparation.identity | dict(grouping=record(grouping))
    place = Path(folder) if folder else results_root() / f"groups-{preparation.label}-{digest(identity)[:8]}"

    def make(run: RunFolder, advance: Callable[[str], None]) -> None:
        for index in range(run.finished, preparation.blocks()):
            tensors, records = {}, []
            for stream, (moments, rows_TC) in statistics.block(index).items():
                found, facts, heat_HH = _group(preparation, grouping, index, stream, moments, rows_TC)
                tensors[stream] = found.label_C.to(torch.int32)
                tensors |= {} if heat_HH is None else {f"{HEAT}{stream}": heat_HH}
                records.append(dict(block=index, stream=stream) | facts)
            run.write_block(index, {}, tensors, records)
            advance("")

    return Groups(kept_stage("groups", place, identity, preparation.blocks(), preparation.console, make))


def _group(
    preparation: Preparation, grouping: Grouping, index: int, stream: str, moments: SecondMoments, rows_TC: torch.Tensor
) -> tuple[ChannelGroups, dict[str, Any], torch.Tensor | None]:
    """Groups, diagnostics and, of grouping by MI, the heat map of one stream."""
    channels, seed = len(moments.sum_C), preparation.source.seed
    if any(row.name == stream and row.expert is not None for row in preparation.family.streams):
        if grouping.kind == "mi" and (is_starved(moments) or len(rows_TC) < MIN_ROWS):
            facts = dict(n_groups=1, sizes=[channels], method="mi", tokens=moments.count)
            return ChannelGroups.single(channels), facts, None
        moments = trusted(moments)
    if grouping.kind == "mi":
        with preparation.console.stage("mutual information"):
            mi_CC = mutual_information(grouping.mi_method, moments, rows_TC)
        with preparation.console.stage("clustering"):
            found = cluster(mi_CC, grouping.n_groups, grouping.cluster, seed)
        return found.groups, found.diagnostics, ordered_heat(mi_CC, found.groups)
    count = min(SORTED_GROUPS, channels) if grouping.n_groups == "auto" else int(grouping.n_groups)
    if count > channels:
        raise UserError(f"--n-groups {count}: stream {stream} of block {index} has {channels} channels")
    if grouping.kind == "random":
        made = random_groups(channels, count, seed + 1000 * index)
    else:
        weight_RC = _stream_weight(preparation, index, stream)
        made = sorted_groups(_score(grouping.kind, weight_RC, moments), count)
    return made, dict(n_groups=made.count, sizes=made.sizes_G.tolist(), method=grouping.kind), None


def _score(kind: str, weight_RC: torch.Tensor, moments: SecondMoments) -> torch.Tensor:
    if kind == "importance":
        return moments.gram_CC.diagonal() * weight_RC.square().sum(0)
    if kind == "range":
        return weight_RC.abs().amax(0)
    assert kind == "alpha"
    return factorize(moments.hessian_CC, DAMPING).pivots_C


def _stream_weight(preparation: Preparation, index: int, stream: str) -> torch.Tensor:
    loaded = preparation.load()
    row = next(s for s in loaded.family.place(index)[1] if s.name == stream)
    with loaded.part(index) as block:
        return torch.cat([linear.weight.detach().double().cpu() for linear in linears_of(block, row).values()])


def heat_maps(found: Groups, blocks: int) -> list[dict[str, Any]]:
    """The MI heat maps of the first, middle and last of `blocks` blocks as plain JSON; none without grouping by MI.

    sizes: channels of every group, in the order of the rows; cells: lines that `channels.heat.heat_cells` reads.
    Of the experts of a block only the first one is shown.
    """
    maps: list[dict[str, Any]] = []
    for index in sorted({0, blocks // 2, blocks - 1}):
        heats, records = found.heats(index), found.block(index)[1]
        kinds: dict[str, dict[str, Any]] = {}
        for facts in records:
            if facts["stream"] in heats:
                kinds.setdefault(re.sub(r"\d+", "*", facts["stream"]), facts)
        for facts in kinds.values():
            cells = heat_text(heats[facts["stream"]])
            maps.append(dict(block=index, stream=facts["stream"], sizes=facts["sizes"], cells=cells))
    return maps
