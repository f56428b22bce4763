"""Compress the blocks of a model in the order of the walk, under one budget, and keep every finished one.

Suffixes: R rows, C channels, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mico.adapters.family import Stream, linears_of
from mico.channels.allocation import WIDTHS
from mico.channels.meters import PairedMoments, SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.channels.starved import note, trusted, trusted_pair
from mico.console import Console
from mico.loading import LoadedModel
from mico.methods import METHODS, PAIRED, Layer, StreamProblem
from mico.methods.budget import Budget, Demand, demand, factored_bits, plain_bits, shared
from mico.methods.sweep import factorize
from mico.packed.quantized import SCALE_BITS, QuantizedWeight, label_bits
from mico.profiles import PROFILES, Profile
from mico.runs import RunFolder
from mico.settings import Compression
from mico.stages import Groups, Preparation, Statistics
from mico.walk import Block, walk

SAFETY = 2e-3  # bits a weight kept back, so that the last mask cannot push the stored size over the plain layout


@dataclass
class Finished:
    """What one block leaves behind: its quantized weights and corrected biases by path, and its records."""

    layers: dict[str, QuantizedWeight]
    biases: dict[str, torch.Tensor]
    records: list[dict[str, Any]]


@dataclass
class Solver:
    """The walk of one run: settings in, finished blocks in the run folder out."""

    preparation: Preparation
    settings: Compression
    run: RunFolder
    console: Console
    overruns: list[str] = field(default_factory=list)  # what the budget could not hold

    def solve(self, loaded: LoadedModel, found: Statistics | None, made: Groups | None) -> list[dict[str, Any]]:
        """Compress `loaded` in place, block by block; return one record a Linear.

        Blocks that the run folder holds are read instead of solved. Statistics of the dense model are there when
        widths are allocated, groups when the plan has channel groups.
        """
        run, records = self.run, []
        budget = self._budget(loaded, found, made) if found is not None else None
        if run.finished:
            self.console.note(f"compress: {run.finished} blocks were finished, going on after them")
        paired = self.settings.method in PAIRED
        blocks = walk(loaded.model, loaded.family, self.preparation.batches, paired=paired, resident=loaded.part)
        with self.console.bar("compress", self.preparation.blocks()) as advance:
            for block in blocks:
                if block.index < run.finished:
                    finished = self._restore(block, budget)
                else:
                    labels = made.block(block.index)[0] if made is not None else {}
                    finished = self._compress(block, labels, budget)
                    run.write_block(block.index, finished.layers, finished.biases, finished.records)
                    for record in finished.records:
                        run.log_layer(record)
                records += finished.records
                advance(f"block {block.index}, error {max(record['error'] for record in finished.records):.3g}")
        if budget is not None and budget.missed_by > 0.01:
            missed = f"the code bits miss their target by {budget.missed_by:.3f} bits a kept weight"
            if self._profile is None or budget.exceeded:
                self.overruns.append(missed)
            else:  # sets of Linears take whole bits together: what is left was too little for any of them
                self.console.note(missed)
        return records

    def _restore(self, block: Block, budget: Budget | None) -> Finished:
        finished = Finished(*self.run.read_block(block.index))
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
        """Compress the streams of a block in dependency order; paired methods measure each after the one before."""
        finished, settings = Finished({}, {}, []), self.settings
        device = next(block.module.parameters()).device
        paired_method = settings.method in PAIRED
        new_meter = lambda channels: SecondMoments.empty(channels, device)  # noqa: E731
        meters = {} if paired_method else block.measure(new_meter, tuple(block.streams))
        for wave in block.waves():
            pairs = block.measure_wave(wave) if paired_method else {}
            for row in wave:
                paired = pairs.pop(row.name, None)
                moments = paired.total if paired is not None else meters.pop(row.name)
                layers = self._layers(block, row.name, labels.get(row.name), budget)
                self._solve_stream(block, row, layers, moments, paired, finished)
                if budget is not None:
                    self._spend(budget, block, row.name, finished.layers)
        return finished

    def _solve_stream(
        self, block: Block, row: Stream, layers: tuple[Layer, ...], moments: SecondMoments,
        paired: PairedMoments | None, finished: Finished,
    ) -> None:  # fmt: skip
        """Compress the Linears of one stream in place and note them in `finished`."""
        settings, more, fallbacks = self.settings, {}, []
        if row.expert is not None:
            more["tokens"] = moments.count
            fallbacks = [what for what in [note(moments, block.index, row.expert)] if what]
            moments, paired = trusted(moments), None if paired is None else trusted_pair(paired)
        problem = StreamProblem(layers, moments, paired, settings.percdamp, settings.blocksize)
        for layer, result in zip(layers, METHODS[settings.method](problem), strict=True):
            block.replace(layer.name, result.quantized, result.bias_R)
            finished.layers[layer.name] = result.quantized
            if result.bias_R is not None:
                finished.biases[layer.name] = result.bias_R
            record = layer_record(block, row.name, layer, result.quantized, first=layer is layers[0])
            finished.records.append(record | result.facts | more | {"fallbacks": [*fallbacks, *result.fallbacks]})
            self.console.note(
                f"{record['layer']}: {record['bits_per_weight']:.2f} bits, error {result.facts['error']:.3g}", 1
            )

    def _layers(
        self, block: Block, stream: str, groups: ChannelGroups | None, budget: Budget | None
    ) -> tuple[Layer, ...]:
        names = {path: self._account(block.index, stream, path) for path in block.streams[stream]}
        widths = budget.widths(list(names.values())) if budget is not None else {}
        found = []
        for path, linear in block.streams[stream].items():
            bias_R = None if linear.bias is None else linear.bias.detach().clone()
            plan = self._plan(linear.in_features, groups, widths.get(names[path]))
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
                        row = next(s for s in loaded.family.streams if s.name == stream)
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


def layer_record(block: Block, stream: str, layer: Layer, quantized: QuantizedWeight, first: bool) -> dict[str, Any]:
    """One record of layers.jsonl; a stream's channel labels are counted with its first Linear."""
    stored = quantized.stored_bits()
    stored["labels"] = label_bits(layer.plan.groups.label_C) if first and quantized.quantized else 0
    stored["bias"] = 0 if layer.bias_R is None else SCALE_BITS * len(layer.bias_R)
    weights, kept = layer.weight_RC.numel(), int(quantized.kept_G().sum())
    return dict(
        block=block.index, stream=stream, layer=block.name_of(layer.name), rows=len(layer.weight_RC),
        channels=layer.weight_RC.shape[1], weights=weights, kept=kept, sparsity=1 - kept / weights,
        sizes=layer.plan.groups.sizes_G.tolist(), bits=list(quantized.bits_G),
        nominal_bits=stored["codes"] / max(kept, 1), stored=stored, bits_per_weight=sum(stored.values()) / weights,
    )  # fmt: skip
