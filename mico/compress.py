"""Verb: dense model in, compressed model out, measured (mico compress).

Finished blocks are on disk before the next one starts; the same command again goes on after the last one and
ends with the same bytes. What is measured at the end is the model read back from disk.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mico.adapters.family import linears_of, lookup
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.console import Console
from mico.data import Windows
from mico.errors import ContractError, UserError
from mico.loading import LoadedModel, describe, quiet
from mico.methods import METHODS, PAIRED, Layer, StreamProblem
from mico.methods.budget import Budget, Demand, demand, factored_bits, plain_bits
from mico.methods.sweep import factorize
from mico.packed.quantized import SCALE_BITS, QuantizedWeight, label_bits
from mico.perplexity import PROTOCOL, default_texts, evaluate_texts, evaluation_sets, parse_texts, protocol_line
from mico.runs import RunFolder, atomic_json
from mico.runs import fingerprint as digest
from mico.settings import Compression, Grouping, Source, compression_of, record
from mico.stages import Groups, Preparation, Statistics, groups, results_root, statistics
from mico.summary import flat, write_markdown
from mico.walk import Block, walk

MODEL = "model"  # the loadable model inside a run folder
DENSE = "dense.json"  # perplexities of the dense model, kept for a resumed run


def compress(
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
    statistics_dir: str | None = None,
    groups_dir: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    strict: bool = False,
    json_file: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compress `model` and return the report that also lies in the run folder (report.json).

    The names are those of the command line; None means the default told by `mico compress --help`.
    Raises UserError for what the user can mend, ContractError when `strict` and a fallback was needed (the
    result is complete on disk then).
    """
    console = console or Console()
    source = Source(
        model, calib, data_dir, data_file, nsamples, seqlen, batch_size, seed, device, dtype, offline, trust_remote_code
    )
    settings = compression_of(
        sparsity=sparsity, pattern=pattern, wbits=wbits, target_avg_bits=target_avg_bits, n_groups=n_groups,
        use_mi_grouping=use_mi_grouping, grouping=grouping, mi_method=mi_method, cluster=cluster, method=method,
        arm=arm, allocation=allocation, group_size=group_size, percdamp=percdamp, blocksize=blocksize,
    )  # fmt: skip
    texts = parse_texts(eval if isinstance(eval, str) else ",".join(eval)) if eval is not None else None
    with console.stage("total"):
        preparation = Preparation(source, console)
        check_shapes(preparation, settings)
        sets = evaluation_sets(
            preparation.tokenizer,
            texts or default_texts(preparation.reference, data_dir),
            seqlen=preparation.seqlen, data_dir=data_dir, offline=offline,
        )  # fmt: skip
        arguments = _arguments(preparation, settings, sets)
        folder = (
            Path(save)
            if save
            else results_root() / f"{preparation.label}-{arm or settings.method}-{digest(arguments)[:8]}"
        )
        with RunFolder.open(folder, arguments) as run:
            if run.completed:
                console.note(f"compress: {run.path} is finished and whole, reusing it")
                report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
            else:
                for name in run.damaged:
                    console.note(f"{run.path / name} is missing or damaged: written again from the finished blocks")
                job = _Job(preparation, settings, sets, run, console, arm, statistics_dir, groups_dir)
                report = job.run_all()
    if json_file:
        atomic_json(json_file, flat(report))
    if strict and report["fallbacks"]:
        first = report["fallbacks"][0]
        raise ContractError(
            f"--strict: {len(report['fallbacks'])} fallbacks, the first {first['layer']}: {first['what']}"
        )
    return report


def _arguments(preparation: Preparation, settings: Compression, sets: dict[str, Windows]) -> dict[str, Any]:
    """What the run folder's content depends on, with the names that the user knows."""
    evaluation = {name: windows.source.sha256 for name, windows in sets.items()}
    return dict(model=preparation.source.model) | preparation.identity | record(settings) | dict(eval=evaluation)


def check_shapes(preparation: Preparation, settings: Compression) -> None:
    """Refuse, before the weights are read, what the shapes of this model cannot take."""
    config = preparation.config
    widths = [config.hidden_size, getattr(config, "intermediate_size", None) or config.ffn_dim]
    if settings.pattern and any(width % settings.pattern[1] for width in widths):
        n, m = settings.pattern
        raise UserError(f"--pattern {n}:{m}: the model's input widths {widths} are not multiples of {m}")
    wanted = settings.grouping.n_groups if settings.grouping else 1
    if isinstance(wanted, int) and wanted > min(widths):
        raise UserError(f"--n-groups {wanted}: more groups than channels, the narrowest stream has {min(widths)}")


@dataclass
class _Job:
    """One compression from dense perplexity to report."""

    preparation: Preparation
    settings: Compression
    sets: dict[str, Windows]
    run: RunFolder
    console: Console
    arm: str | None
    statistics_dir: str | None
    groups_dir: str | None

    def run_all(self) -> dict[str, Any]:
        loaded = self.preparation.load()
        architecture = describe(loaded.model, loaded.family)
        self._announce(architecture)
        dense = self._dense_scores(loaded)
        if self.settings.grouping is not None and self.settings.wbits != 16:
            found = statistics(self.preparation, self.statistics_dir)
            made = groups(self.preparation, found, self.settings.grouping, self.groups_dir)
        else:
            found, made = None, None
        with self.console.stage("compress"):
            outcome = self._walk(loaded, found, made)
        with self.console.stage("save"):
            check = self._save(loaded)
        self.preparation.forget()
        compressed = self._compressed_scores(loaded, check)
        report = self._report(architecture, dense, compressed, outcome, made)
        write_markdown(report, self.run.path / "report.md")
        self.run.finish(report)
        return report

    def _announce(self, architecture: dict[str, Any]) -> None:
        facts = ", ".join(f"{name} {value}" for name, value in architecture.items())
        self.console.note(f"model {self.preparation.source.model}: {facts}")
        for windows in self.sets.values():
            self.console.note(f"evaluation {protocol_line(windows)}")

    # --- perplexities ---

    def _scores(self, model: Any, label: str) -> dict[str, dict[str, Any]]:
        total = sum(len(windows.ids_NT) for windows in self.sets.values())
        size = self.preparation.source.batch_size
        with self.console.stage("evaluate"), self.console.bar(f"perplexity, {label}", total) as advance:
            return evaluate_texts(model, self.sets, batch_size=size, progress=_Steps(advance))

    def _dense_scores(self, loaded: LoadedModel) -> dict[str, dict[str, Any]]:
        kept = self.run.path / DENSE
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        scores = self._scores(loaded.model, "dense")
        atomic_json(kept, scores)
        return scores

    def _compressed_scores(self, loaded: LoadedModel, check: torch.Tensor) -> dict[str, dict[str, Any]]:
        """Perplexities of the model as it lies on disk, after its logits were found equal to the ones in memory."""
        from transformers import AutoModelForCausalLM

        folder, dtype, device = self.run.path / MODEL, loaded.dtype, loaded.device
        del loaded
        with quiet(), self.console.stage("reload"):
            model = (
                AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
            )
        difference = (_logits(model, self._probe(device)) - check).abs().max()
        if difference != 0:
            raise RuntimeError(f"{folder}: logits differ from those in memory by {float(difference):g} after reloading")
        return self._scores(model, "compressed")

    def _probe(self, device: torch.device) -> torch.Tensor:
        return self.preparation.windows.ids_NT[:1].to(device)

    # --- blocks ---

    def _walk(self, loaded: LoadedModel, found: Statistics | None, made: Groups | None) -> list[dict[str, Any]]:
        settings, run = self.settings, self.run
        budget = self._budget(loaded, found, made) if found is not None and made is not None else None
        if run.finished:
            self.console.note(f"compress: {run.finished} blocks were finished, going on after them")
        records: list[dict[str, Any]] = []
        blocks = walk(
            loaded.model, loaded.family, self.preparation.windows.ids_NT,
            batch_size=self.preparation.source.batch_size, paired=settings.method in PAIRED,
        )  # fmt: skip
        with self.console.bar("compress", self.preparation.blocks()) as advance:
            for block in blocks:
                if block.index < run.finished:
                    layers, biases, lines = run.read_block(block.index)
                    for path, quantized in layers.items():
                        block.replace(path, quantized, biases.get(path))
                        if budget is not None:
                            budget.spend(block.name_of(path), quantized)
                else:
                    labels = made.block(block.index)[0] if made is not None else {}
                    layers, biases, lines = self._block(block, labels, budget)
                    run.write_block(block.index, layers, biases, lines)
                    for line in lines:
                        run.log_layer(line)
                records += lines
                advance(f"block {block.index}, error {max(line['error'] for line in lines):.3g}")
        return records

    def _block(
        self, block: Block, labels: dict[str, ChannelGroups], budget: Budget | None
    ) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Compress the streams of a block in dependency order; paired methods measure each after the one before."""
        from mico.channels.meters import SecondMoments

        settings = self.settings
        paired_method = settings.method in PAIRED
        device = next(block.module.parameters()).device
        meters = {} if paired_method else block.measure(lambda channels: SecondMoments.empty(channels, device))
        layers, biases, lines = {}, {}, []
        for stream, linears in block.streams.items():
            paired = block.measure_paired(stream) if paired_method else None
            names = {path: block.name_of(path) for path in linears}
            widths = budget.widths(list(names.values())) if budget is not None else {}
            problem = StreamProblem(
                tuple(
                    Layer(path, linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach().clone(),
                          self._plan(linear.in_features, labels.get(stream), widths.get(names[path])))
                    for path, linear in linears.items()
                ),
                paired.total if paired is not None else meters[stream], paired, settings.percdamp, settings.blocksize,
            )  # fmt: skip
            for layer, result in zip(problem.layers, METHODS[settings.method](problem), strict=True):
                block.replace(layer.name, result.quantized, result.bias_R)
                layers[layer.name] = result.quantized
                if result.bias_R is not None:
                    biases[layer.name] = result.bias_R
                if budget is not None:
                    budget.spend(names[layer.name], result.quantized)
                line = _line(block, stream, layer, result.quantized, first=layer is problem.layers[0])
                lines.append(line | result.facts | {"fallbacks": list(result.fallbacks)})
                self.console.note(
                    f"{names[layer.name]}: bits {line['bits_per_weight']:.2f}, error {result.facts['error']:.3g}", 1
                )
        return layers, biases, lines

    def _plan(self, channels: int, groups: ChannelGroups | None, bits_G: tuple[int, ...] | None) -> LayerPlan:
        settings = self.settings
        if groups is None:
            size = settings.group_size
            groups = ChannelGroups.single(channels) if size is None else ChannelGroups.contiguous(channels, size)
        widths = bits_G or (settings.wbits,) * groups.count
        factored = settings.wbits != 16 and (settings.method in PAIRED or settings.grouping is not None)
        return LayerPlan(groups, widths, settings.sparsity, settings.pattern, factored)

    def _budget(self, loaded: LoadedModel, found: Statistics, made: Groups) -> Budget:
        """Demands of every Linear, and the bits for codes: the mean asked for, or what plain rows would take.

        Without --target-avg-bits the whole stored size may not exceed that of the plain layout at --wbits (one
        scale and zero a row), so that the arms of an ablation compare at equal true bits.
        """
        settings, demands, code_bits = self.settings, {}, 0.0
        with self.console.stage("allocate"), self.console.bar("allocate", self.preparation.blocks()) as advance:
            for index in range(self.preparation.blocks()):
                module = lookup(loaded.model, f"{loaded.family.blocks}.{index}")
                labels = made.block(index)[0]
                for stream, (moments, _) in found.block(index).items():
                    row = next(s for s in loaded.family.streams if s.name == stream)
                    factor, label = factorize(moments.hessian_CC, settings.percdamp), labels[stream]
                    for path, linear in linears_of(module, row).items():
                        weight_RC, plan = linear.weight.detach(), self._plan(linear.in_features, label, None)
                        rates = settings.allocation == "rate"
                        need = demand(weight_RC, moments.gram_CC, factor, plan, rates)
                        demands[f"{loaded.family.blocks}.{index}.{path}"] = need
                        code_bits += self._allowance(weight_RC, need, label.count)
                    if settings.target_avg_bits is None:
                        code_bits -= label_bits(label.label_C)
                advance("")
        return Budget(demands, settings.allocation, code_bits)

    def _allowance(self, weight_RC: torch.Tensor, need: Demand, count: int) -> float:
        kept, wbits = float(need.table.kept_G.sum()), self.settings.wbits
        if self.settings.target_avg_bits is not None:
            return kept * self.settings.target_avg_bits
        return kept * wbits + plain_bits(weight_RC, wbits) - factored_bits(weight_RC, count)

    # --- output ---

    def _save(self, loaded: LoadedModel) -> torch.Tensor:
        """Write the dense-format model (values on the grid); return logits to compare the reloaded one with."""
        model = loaded.model
        logits = _logits(model, self._probe(loaded.device))
        model.config.use_cache = True
        with self.run.publish() as staging, quiet():
            model.save_pretrained(staging / MODEL)
            loaded.tokenizer.save_pretrained(staging / MODEL)
        return logits

    def _report(
        self, architecture: dict[str, Any], dense: dict[str, Any], compressed: dict[str, Any],
        layers: list[dict[str, Any]], made: Groups | None,
    ) -> dict[str, Any]:  # fmt: skip
        fallbacks = [dict(layer=line["layer"], what=what) for line in layers for what in line["fallbacks"]]
        fallbacks += [
            dict(layer=f"eval {name}", what=f"{score['shortfall']:,} tokens short of the protocol")
            for name, score in compressed.items() if score["shortfall"]
        ]  # fmt: skip
        diagnostics = (
            [r for i in range(self.preparation.blocks()) for r in made.block(i)[1]] if made is not None else []
        )
        return dict(
            model=self.preparation.source.model, arm=self.arm, architecture=architecture,
            settings=record(self.settings), calibration=self.preparation.windows.describe(),
            identity=self.preparation.identity, protocol=PROTOCOL, dense=dense, compressed=compressed,
            size=self._size(architecture, layers), layers=layers, groups=diagnostics, fallbacks=fallbacks,
            seconds={name: round(value, 3) for name, value in self.console.seconds.items()},
            peak_host_bytes=_peak_host_bytes(), peak_device_bytes=_peak_device_bytes(),
            environment=self.run.environment, command=sys.argv, folder=str(self.run.path),
        )  # fmt: skip

    def _size(self, architecture: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
        weights = sum(line["weights"] for line in layers)
        kept, codes = sum(line["kept"] for line in layers), sum(line["stored"]["codes"] for line in layers)
        stored = sum(sum(line["stored"].values()) for line in layers)
        rest = architecture["parameters"] - weights
        files = (self.run.path / MODEL).glob("*.safetensors")
        return dict(
            weights=weights, share_compressed=weights / architecture["parameters"], sparsity=1 - kept / weights,
            nominal_bits=codes / kept, true_bits=stored / weights, stored_bits=stored,
            packed_bytes=stored // 8 + 2 * rest, dense_bytes=2 * architecture["parameters"],
            bytes=sum(file.stat().st_size for file in files),
        )  # fmt: skip


class _Steps:
    """Turns `progress(text, done, total)` of the evaluation into steps of one bar."""

    def __init__(self, advance: Any) -> None:
        self._advance, self._done = advance, {}  # type: ignore[var-annotated]

    def __call__(self, text: str, done: int, _total: int) -> None:
        for _ in range(done - self._done.get(text, 0)):
            self._advance(text)
        self._done[text] = done


def _line(block: Block, stream: str, layer: Layer, quantized: QuantizedWeight, first: bool) -> dict[str, Any]:
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


@torch.no_grad()
def _logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits.float().cpu()


def _peak_host_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _peak_device_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
