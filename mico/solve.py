"""Compress the blocks of a model in the order of the walk, under one budget, and keep every finished one.

Suffixes: R rows, C channels, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mico.adapters.family import Stream, linears_of
from mico.channels.allocation import WIDTHS
from mico.channels.meters import PairedMoments, SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.channels.starved import note, trusted, trusted_pair
from mico.checkpoint import exactly
from mico.console import Console, peak_host_bytes
from mico.loading import LoadedModel
from mico.methods import METHODS, PAIRED, Layer, StreamProblem
from mico.methods.budget import Budget, Demand, demand, factored_bits, plain_bits, shared
from mico.methods.sweep import factorize
from mico.packed.quantized import QuantizedWeight, label_bits
from mico.profiles import PROFILES, Profile
from mico.runs import RunFolder, pack_weight, unpack_weight
from mico.settings import Compression
from mico.stages import Groups, Preparation, Statistics
from mico.team import Balance, Team
from mico.walk import Block

SAFETY = 2e-3  # bits a weight kept back, so that the last mask cannot push the stored size over the plain layout


@dataclass
class Finished:
    """What one block leaves behind: its quantized weights and corrected biases by path, and its records."""

    layers: dict[str, QuantizedWeight]
    biases: dict[str, torch.Tensor]
    records: list[dict[str, Any]]

    def send(self, team: Team, source: int) -> Finished:
        """What process `source` has, in every process."""
        small, tensors = {}, {f"bias/{path}": bias_R for path, bias_R in self.biases.items()}
        for path, weight in self.layers.items() if not team.alone and team.rank == source else ():
            parts, small[path] = pack_weight(weight)
            tensors |= {f"layer/{path}/{part}": tensor for part, tensor in parts.items()}
        (small, records), tensors = team.send(source, (small, self.records), tensors)
        if team.rank == source:
            return self
        layers = {path: unpack_weight(tensors, f"layer/{path}/", facts) for path, facts in small.items()}
        biases = {name.removeprefix("bias/"): bias_R for name, bias_R in tensors.items() if name.startswith("bias/")}
        return Finished(layers, biases, records)

    def add(self, more: Finished) -> None:
        self.layers |= more.layers
        self.biases |= more.biases
        self.records += more.records


@dataclass
class Solver:
    """The walk of one run: settings in, finished blocks in the run folder out.

    In a team every process walks, with its batches; the first one alone has the run folder, statistics and groups.
    """

    preparation: Preparation
    settings: Compression
    run: RunFolder | None
    console: Console
    on_block: Callable[[int, list[dict[str, Any]]], None] = lambda index, records: None  # told of every new block
    overruns: list[str] = field(default_factory=list)  # what the budget could not hold
    spent: dict[str, float] = field(default_factory=lambda: dict(solving_seconds=0.0, solving_cpu_seconds=0.0))

    def __post_init__(self) -> None:
        self.team = self.preparation.team
        self.balance = Balance(self.team.size)
        self.shares: list[dict[str, Any]] = []  # of the processes, when all is solved
        self.halvings = 0  # of the calibration batches of this process, for want of memory

    def solve(self, loaded: LoadedModel, found: Statistics | None, made: Groups | None) -> list[dict[str, Any]]:
        """Compress `loaded` in place, block by block; return one record a Linear.

        Blocks that the run folder holds are read instead of solved. Statistics of the dense model are there when
        widths are allocated, groups when the plan has channel groups.
        """
        assert self.run is not None
        budget = self._budget(loaded, found, made) if found is not None else None
        if self.run.finished:
            self.console.note(f"compress: {self.run.finished} blocks were finished, going on after them")
        with self.preparation.together("compress", self.run.finished, self.settings):
            records = self.pass_through(loaded, self.run.finished, made, budget)
            self.shares = self.processes()
        if budget is not None and budget.missed_by > 0.01:
            missed = f"the code bits miss their target by {budget.missed_by:.3f} bits a kept weight"
            if self._profile is None or budget.exceeded:
                self.overruns.append(missed)
            else:  # sets of Linears take whole bits together: what is left was too little for any of them
                self.console.note(missed)
        return records

    def pass_through(
        self, loaded: LoadedModel, done: int, made: Groups | None = None, budget: Budget | None = None
    ) -> list[dict[str, Any]]:
        """The part of every process: `done` blocks are read, the others solved together."""
        run, records = self.run, []
        blocks = self.preparation.walk(self.settings.method in PAIRED, None if run is None else run.path)
        with self.console.bar("compress", self.preparation.blocks()) as advance:
            for block in blocks:
                if block.index < done:
                    finished = self._restore(block, budget)
                else:
                    labels = made.block(block.index)[0] if made is not None else {}
                    finished = self._compress(block, labels, budget)
                    if run is not None:
                        run.write_block(block.index, finished.layers, finished.biases, finished.records)
                        for record in finished.records:
                            run.log_layer(record)
                    self.on_block(block.index, finished.records)
                records += finished.records
                self.halvings = max(self.halvings, block.halvings)  # each tower has batches of its own
                advance(f"block {block.index}, error {max(record['error'] for record in finished.records):.3g}")
                del finished  # its codes are on disk: they need not live while the next block is solved
        return records

    def processes(self) -> list[dict[str, Any]]:
        """What every process of the team did, by rank."""
        own = dict(rank=self.team.rank, device=str(self.preparation.device), peak_host_bytes=peak_host_bytes())
        rounded = {name: round(value, 3) for name, value in self.spent.items()}
        own |= rounded | dict(share=self.balance.share(self.team.rank), batch_halvings=self.halvings)
        return self.team.gathered(own)

    def _restore(self, block: Block, budget: Budget | None) -> Finished:
        known = ({}, {}, []) if self.run is None else self.run.read_block(block.index)
        finished = Finished(*known).send(self.team, 0)
        for path, quantized in finished.layers.items():
            block.replace(path, quantized, finished.biases.get(path))
        if budget is not None:
            for stream in block.streams:
                self._spend(budget, block, stream, finished.layers)
        return finished

    @property
    def _profile(self) -> Profile | None:
        return None if self.settings.profile is None else PROFILES[self.settings.profile]

    def _account(self, index: int, stream: str, path: str) -> str:
        """The name by which the budget knows a Linear of a block: its own, or that of all that share its width."""
        return f"{index}.{stream if self._profile is not None and self._profile.fused else path}"

    def _spend(self, budget: Budget, block: Block, stream: str, layers: dict[str, QuantizedWeight]) -> None:
        """Charge the finished Linears of one stream to their accounts."""
        accounts: dict[str, list[QuantizedWeight]] = {}
        for path in block.streams[stream]:
            accounts.setdefault(self._account(block.index, stream, path), []).append(layers[path])
        for name, finished in accounts.items():
            budget.spend(name, *finished)

    def _compress(self, block: Block, labels: dict[str, ChannelGroups], budget: Budget | None) -> Finished:
        """Compress the streams of a block in dependency order; paired methods measure each after the one before.

        Streams measured together are solved by their owners at the same time, unless a budget makes the widths of one
        depend on what the one before it took.
        """
        finished, device = Finished({}, {}, []), next(block.module.parameters()).device
        for wave in block.waves() if self.settings.method in PAIRED else (tuple(block.kinds),):
            moments: dict[str, Any]
            if self.settings.method in PAIRED:
                moments = dict(block.measure_wave(wave))
            else:
                new_meter = lambda channels: SecondMoments.empty(channels, device)  # noqa: E731
                moments = dict(block.measure(new_meter, tuple(block.streams)))
            for rows in [(row,) for row in wave] if self.settings.allocates else [wave]:
                finished.add(self._solve(block, rows, moments, labels, budget))
        return finished

    def _solve(
        self, block: Block, rows: Sequence[Stream], moments: dict[str, SecondMoments | PairedMoments],
        labels: dict[str, ChannelGroups], budget: Budget | None,
    ) -> Finished:  # fmt: skip
        """Compress some streams of a block, each in the process that owns it, and put the results in place in all."""
        team, together, own = self.team, Finished({}, {}, []), {}
        owners = self.balance.owners([block.shape(row.name) for row in rows])
        for row, owner in zip(rows, owners, strict=True):
            layers = self._layers(block, row.name, labels.get(row.name), budget)
            seen = moments.pop(row.name)
            seen.reduce(team.total(owner))
            if owner == team.rank:
                own[row.name] = layers, seen
        mine = {row.name: self._solve_stream(block, row, *own.pop(row.name)) for row in rows if row.name in own}
        for row, owner in zip(rows, owners, strict=True):
            result = mine.pop(row.name, Finished({}, {}, [])).send(team, owner)
            for path, quantized in result.layers.items():
                block.replace(path, quantized, result.biases.get(path))
            for record in result.records:
                by = "" if team.alone else f", by {team.who(owner)}"
                self.console.note(
                    f"{record['layer']}: {record['bits_per_weight']:.2f} bits, error {record['error']:.3g}{by}", 1
                )
            together.add(result)
            if budget is not None:
                self._spend(budget, block, row.name, result.layers)
        return together

    def _solve_stream(
        self, block: Block, row: Stream, layers: tuple[Layer, ...], seen: SecondMoments | PairedMoments
    ) -> Finished:
        """The Linears of one stream, compressed; the block is as it was."""
        settings, finished = self.settings, Finished({}, {}, [])
        more: dict[str, Any] = {}
        fallbacks: list[str] = []
        moments, paired = (seen.total, seen) if isinstance(seen, PairedMoments) else (seen, None)
        if row.expert is not None:
            more["tokens"] = moments.count
            fallbacks = [what for what in [note(moments, block.index, row.expert)] if what]
            moments, paired = trusted(moments), None if paired is None else trusted_pair(paired)
        problem = StreamProblem(layers, moments, paired, settings.percdamp, settings.blocksize)
        wall, cpu = time.monotonic(), time.process_time()
        results = METHODS[settings.method](problem)
        self.spent["solving_seconds"] += time.monotonic() - wall
        self.spent["solving_cpu_seconds"] += time.process_time() - cpu
        for layer, result in zip(layers, results, strict=True):
            finished.layers[layer.name] = result.quantized
            if result.bias_R is not None:
                finished.biases[layer.name] = result.bias_R
            bias_bits = self._bias_bits(layer, result.bias_R)
            record = layer_record(block, row.name, layer, result.quantized, bias_bits, first=layer is layers[0])
            finished.records.append(record | result.facts | more | {"fallbacks": [*fallbacks, *result.fallbacks]})
        return finished

    def _bias_bits(self, layer: Layer, corrected_R: torch.Tensor | None) -> int:
        """What the bias of a finished Linear takes where it is stored."""
        bias_R = layer.bias_R if corrected_R is None else corrected_R
        return 0 if bias_R is None else 8 * exactly(bias_R, self.preparation.stored_dtype).nbytes

    def _layers(
        self, block: Block, stream: str, groups: ChannelGroups | None, budget: Budget | None
    ) -> tuple[Layer, ...]:
        """The Linears of a stream with their plans: what the first process of a team plans holds for all."""
        names = {path: self._account(block.index, stream, path) for path in block.streams[stream]}
        widths = budget.widths(list(names.values())) if budget is not None else {}
        if self.settings.allocates:
            label = {} if groups is None else dict(label=groups.label_C)
            widths, label = self.team.send(0, widths, label)
            groups = ChannelGroups(label["label"]) if label else None
        found = []
        for path, linear in block.streams[stream].items():
            bias_R = None if linear.bias is None else linear.bias.detach().clone()
            bits_G = tuple(widths[names[path]]) if widths else None
            plan = self._plan(linear.in_features, groups, bits_G)
            found.append(Layer(path, linear.weight.detach(), bias_R, plan))  # solved before it is replaced
        return tuple(found)

    def _plan(self, channels: int, groups: ChannelGroups | None, bits_G: tuple[int, ...] | None) -> LayerPlan:
        settings, profile = self.settings, self._profile
        if profile is not None:
            groups = ChannelGroups.contiguous(channels, profile.group_size(channels, settings.group_size))
            width = bits_G[0] if bits_G else settings.wbits
            return LayerPlan(groups, (width,) * groups.count, settings.sparsity, settings.pattern, integer=True)
        if groups is None:
            size = settings.group_size
            groups = ChannelGroups.single(channels) if size is None else ChannelGroups.contiguous(channels, size)
        widths = bits_G or (settings.wbits,) * groups.count
        factored = settings.wbits != 16 and (settings.method in PAIRED or settings.grouping is not None)
        return LayerPlan(groups, widths, settings.sparsity, settings.pattern, factored)

    def _budget(self, loaded: LoadedModel, found: Statistics, made: Groups | None) -> Budget:
        """Demands of every Linear, and the bits for codes: the mean asked for, or what plain rows would take.

        Without --target-avg-bits the whole stored size may not exceed that of the plain layout at --wbits (one
        scale and zero a row), so that the arms of an ablation compare at equal true bits.
        """
        code_bits = 0.0
        demands: dict[str, list[Demand]] = {}
        widths = WIDTHS if self._profile is None else self._profile.widths
        with self.console.stage("allocate"), self.console.bar("allocate", self.preparation.blocks()) as advance:
            for index in range(self.preparation.blocks()):
                labels = made.block(index)[0] if made is not None else {}
                with loaded.part(index) as module:
                    for stream, (moments, _) in found.block(index).items():
                        row = next(s for s in loaded.family.place(index)[1] if s.name == stream)
                        moments = moments if row.expert is None else trusted(moments)
                        needs = self._demands(linears_of(module, row), moments, labels.get(stream), widths)
                        for path, (need, allowance) in needs.items():
                            demands.setdefault(self._account(index, stream, path), []).append(need)
                            code_bits += allowance
                        if self.settings.target_avg_bits is None and stream in labels:
                            code_bits -= label_bits(labels[stream].label_C)
                advance("")
        least = widths[0] * sum(float(need.table.kept_G.sum()) for same in demands.values() for need in same)
        if code_bits < least:
            self.overruns.append(
                f"--wbits {self.settings.wbits} leaves no room for scales and labels of groups: "
                f"{(least - code_bits) / 8 / 1024:.1f} KiB more than the plain layout"
            )
        one = {name: shared(together) if self._profile else together[0] for name, together in demands.items()}
        return Budget(one, self.settings.allocation, max(code_bits, least), widths)

    def _demands(
        self, linears: dict[str, nn.Linear], moments: SecondMoments, label: ChannelGroups | None,
        widths: tuple[int, ...],
    ) -> dict[str, tuple[Demand, float]]:  # fmt: skip
        """Of the Linears of one stream: what each may spend bits on, and how many it brings."""
        settings, found = self.settings, {}
        device = next(iter(linears.values())).weight.device
        factor = factorize(moments.hessian_CC.to(device), settings.percdamp)
        for path, linear in linears.items():
            weight_RC, plan = linear.weight.detach(), self._plan(linear.in_features, label, None)
            need = demand(weight_RC, moments.gram_CC, factor, plan, settings.allocation == "rate", widths)
            found[path] = need, self._allowance(weight_RC, need, plan.groups.count)
        return found

    def _allowance(self, weight_RC: torch.Tensor, need: Demand, count: int) -> float:
        kept, wbits = float(need.table.kept_G.sum()), self.settings.wbits
        if self.settings.target_avg_bits is not None:
            return kept * self.settings.target_avg_bits
        whole = kept * wbits + plain_bits(weight_RC, wbits) - factored_bits(weight_RC, count)
        return whole - SAFETY * weight_RC.numel()


def layer_record(
    block: Block, stream: str, layer: Layer, quantized: QuantizedWeight, bias_bits: int, first: bool
) -> dict[str, Any]:
    """One record of layers.jsonl; a stream's channel labels are counted with its first Linear."""
    labels = label_bits(layer.plan.groups.label_C) if first and quantized.quantized else 0
    return weight_record(block.index, stream, block.name_of(layer.name), quantized, labels, bias_bits)


def weight_record(
    block: int, stream: str, name: str, quantized: QuantizedWeight, labels: int, bias: int
) -> dict[str, Any]:
    """What is told of a compressed Linear; labels and bias: bits of what is stored beside the weight."""
    stored = quantized.stored_bits() | dict(labels=labels, bias=bias)
    rows, channels = quantized.codes_RC.shape
    weights, kept = rows * channels, int(quantized.kept_G().sum())
    sizes = torch.bincount(quantized.label_C.cpu(), minlength=len(quantized.bits_G)).tolist()
    return dict(
        block=block, stream=stream, layer=name, rows=rows, channels=channels, weights=weights, kept=kept,
        sparsity=1 - kept / weights, sizes=sizes, bits=list(quantized.bits_G),
        nominal_bits=stored["codes"] / max(kept, 1), stored=stored, bits_per_weight=sum(stored.values()) / weights,
    )  # fmt: skip


def model_size(folder: Path, architecture: dict[str, Any], layers: list[dict[str, Any]], rest: int) -> dict[str, Any]:
    """The size of a packed model by the records of its Linears; rest: bytes of all other tensors."""
    weights, kept = sum(line["weights"] for line in layers), sum(line["kept"] for line in layers)
    stored = sum(sum(line["stored"].values()) for line in layers)
    return dict(
        weights=weights, share_compressed=weights / architecture["parameters"], sparsity=1 - kept / weights,
        nominal_bits=sum(line["stored"]["codes"] for line in layers) / kept, true_bits=stored / weights,
        stored_bits=stored, packed_bytes=stored // 8 + rest, dense_bytes=2 * architecture["parameters"],
        bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )  # fmt: skip
