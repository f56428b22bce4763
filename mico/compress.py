"""Verb: dense model in, compressed model out, measured (mico compress).

Finished blocks are on disk before the next one starts; the same command again goes on after the last one and
ends with the same bytes. What is measured at the end is the model read back from disk.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mico.stages as stages
from mico.adapters import auto_class
from mico.calibration import check_calibration
from mico.callable import callable_module
from mico.card import model_card
from mico.checkpoint import save_packed, set_execution, write_manifest
from mico.console import Console, peak_host_bytes
from mico.data import Windows
from mico.ends import put_ends, quantize_ends
from mico.errors import ContractError, UserError
from mico.files import atomic_write, check_writable, read_json
from mico.follow import follow
from mico.loading import LoadedModel, copy_processor, describe, load_config, quiet
from mico.metrics.pair import Pair
from mico.metrics.perplexity import PROTOCOL, default_texts, evaluation_sets, parse_texts, protocol_line
from mico.packed.quantized import QuantizedWeight
from mico.pages.run import write_run_page
from mico.preflight import check_coverage, check_shapes
from mico.runs import RunFolder, atomic_json
from mico.runs import fingerprint as digest
from mico.settings import Compression, Source, compression_of, record
from mico.solve import Solver, model_size
from mico.stages import Groups, Preparation, results_root
from mico.summary import flat, write_markdown
from mico.team import gather
from mico.tracking import Tracking, compression_figures
from mico.walk import replace

callable_module(__name__)
LAYOUT = 2  # of a run folder and of the algorithms behind its bytes; another number makes older folders unfit
MODEL = "model"  # the loadable model inside a run folder


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
    statistics: str | None = None,
    groups: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    image_folder: str | None = None,
    compress_vision: bool = False,
    compress_projector: bool = False,
    allow_partial: bool = False,
    strict: bool = False,
    tensorboard: str | None = None,
    wandb: str | None = None,
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compress `model` and return the report that also lies in the run folder (report.json).

    The names are those of the command line; None means the default told by `mico compress --help`.
    Raises UserError for what the user can mend, ContractError when `strict` and a fallback was needed (the
    result is complete on disk then). In a process of a team that is not the first the report is empty.
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
        settings = compression_of(
            sparsity=sparsity, pattern=pattern, wbits=wbits, target_avg_bits=target_avg_bits, n_groups=n_groups,
            use_mi_grouping=use_mi_grouping, grouping=grouping, mi_method=mi_method, cluster=cluster, method=method,
            arm=arm, allocation=allocation, group_size=group_size, percdamp=percdamp, blocksize=blocksize,
            profile=profile, embed_bits=embed_bits,
        )  # fmt: skip
        texts = parse_texts(eval if isinstance(eval, str) else ",".join(eval)) if eval is not None else None
        if json is not None:
            check_writable("--json", json)
        with Tracking(tensorboard, wandb, console) as tracking, console.stage("total"):
            config = load_config(model, offline=offline, trust_remote_code=trust_remote_code)
            check_calibration(source, config)
            check_shapes(config, source, settings)
            preparation = Preparation(source, console, team)
            for line in team.describe():
                console.note(line)
            sets = evaluation_sets(
                preparation.tokenizer,
                default_texts(preparation.reference, data_dir) if texts is None else texts,
                seqlen=preparation.seqlen, data_dir=data_dir, offline=offline,
            )  # fmt: skip
            arguments = _arguments(preparation, settings, sets)
            name = f"{preparation.label}-{arm or settings.method}-{digest(arguments)[:8]}"
            folder = Path(save) if save else results_root() / name
            with RunFolder.open(folder, arguments) as run:
                tracking.open(folder.name, arguments)
                if run.completed:
                    console.note(f"compress: {run.path} is finished and whole, reusing it")
                    report = read_json(run.path / "report.json")
                else:
                    for name in run.damaged:
                        console.note(f"{run.path / name} is missing or damaged: written again from the finished blocks")
                    job = _Job(
                        preparation, settings, sets, run, console, arm, statistics, groups, allow_partial,
                        tracking.block,
                    )  # fmt: skip
                    report = job.run_all()
            tracking.finish(compression_figures(report), report["layers"])
        if json:
            atomic_json(json, flat(report))
        if strict and report["fallbacks"]:
            first = report["fallbacks"][0]
            raise ContractError(
                f"--strict: {len(report['fallbacks'])} fallbacks, the first {first['layer']}: {first['what']}", report
            )
        return report


def _arguments(preparation: Preparation, settings: Compression, sets: dict[str, Windows]) -> dict[str, Any]:
    """What the run folder's content depends on, with the names that the user knows."""
    evaluation = {name: windows.sha256 for name, windows in sets.items()}
    known = dict(layout=LAYOUT, name=preparation.source.model) | preparation.identity
    return known | record(settings) | dict(eval=evaluation)


@dataclass
class _Job:
    """One compression from dense perplexity to report."""

    preparation: Preparation
    settings: Compression
    sets: dict[str, Windows]
    run: RunFolder
    console: Console
    arm: str | None
    statistics: str | None
    groups: str | None
    allow_partial: bool
    on_block: Callable[[int, list[dict[str, Any]]], None]  # told of every block that is finished

    def __post_init__(self) -> None:
        self.resumed = self.run.finished
        for change in self.run.environment_changes:
            self.console.note(f"resumed in another environment, bytes may differ: {change}")

    def run_all(self) -> dict[str, Any]:
        loaded = self.preparation.load()
        architecture = describe(loaded.model, loaded.family)
        self._check_coverage(architecture)
        needed = self._check_disk(architecture["parameters"])
        self._announce(architecture)
        pair = self._pair(loaded, needed)
        with loaded.running():
            dense = pair.dense(loaded.model)
        found = stages.statistics(self.preparation, self.statistics) if self.settings.allocates else None
        made = None
        if found is not None and self.settings.grouping is not None:
            made = stages.groups(self.preparation, found, self.settings.grouping, self.groups)
        with self.console.stage("embeddings") if self.settings.embed_bits != 16 else nullcontext():
            tables = quantize_ends(loaded, self.settings.embed_bits)
        with self.console.stage("compress"):
            solver = Solver(self.preparation, self.settings, self.run, self.console, self.on_block)
            outcome = solver.solve(loaded, found, made)
        with self.console.stage("save"):
            check, rest = self._save(loaded, tables)
        dtype, device = loaded.dtype, loaded.device
        execution = "dense" if loaded.store is None else "lean"  # what did not fit dense is not made dense now
        self.preparation.forget()
        del loaded  # before the saved model is read back: one model in memory at a time
        compressed = self._compressed_scores(pair, dtype, device, execution, check)
        report = self._report(architecture, dense, compressed, outcome, solver, made, rest)
        report["activations"] = {} if found is None else found.kept_bytes()
        write_markdown(report, self.run.path / "report.md")
        write_run_page(self.run.path / "report.html", report)
        self._describe(report)
        self.run.finish(report)
        pair.done()
        return report

    def _pair(self, loaded: LoadedModel, needed: int) -> Pair:
        vocabulary, mark = loaded.model.config.get_text_config().vocab_size, self.preparation.identity["model"]
        size = self.preparation.source.batch_size
        return Pair(self.sets, self.run.path, mark, vocabulary, size, self.console, spare=needed)

    def _check_coverage(self, architecture: dict[str, Any]) -> None:
        share = architecture["coverage"]
        stays, towers = architecture.get("vision", 0), architecture.get("towers")
        dense = f"; {stays:,} parameters that see images stay dense" if stays else ""
        where = "the language model" + (f", {towers}" if towers else "")
        self.console.note(f"compress: {share:.1%} of the Linear parameters of {where}{dense}")
        check_coverage(share, self.preparation.source.model, self.allow_partial)

    def _check_disk(self, parameters: int) -> int:
        """Bytes for the saved model (at most 16 bits a weight) and the blocks (a code and a mask bit a weight).

        Raises UserError when they do not fit.
        """
        left = 1 - self.run.finished / self.preparation.blocks()
        needed, free = int(parameters * (2 + 1.2 * left)), shutil.disk_usage(self.run.path).free
        if free < needed:
            raise UserError(
                f"{self.run.path}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed: free some or move --save"
            )
        return needed

    def _announce(self, architecture: dict[str, Any]) -> None:
        facts = ", ".join(f"{name} {value}" for name, value in architecture.items())
        self.console.note(f"model {self.preparation.source.model}: {facts}")
        for windows in self.sets.values():
            self.console.note(f"evaluation {protocol_line(windows)}")

    # --- perplexities ---

    def _compressed_scores(
        self, pair: Pair, dtype: torch.dtype, device: torch.device, execution: str, check: torch.Tensor
    ) -> dict[str, dict[str, Any]]:
        """Perplexities of the model as it lies on disk, after its logits were found equal to the ones in memory."""
        folder, loader = self.run.path / MODEL, auto_class(self.preparation.config.model_type)
        with quiet(), self.console.stage("reload"):
            model: Any = loader.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        model.to(device).eval()
        set_execution(model, execution)  # in 16 bits the kernels round otherwise than a dense product
        if not torch.isfinite(check).all():
            raise UserError(f"{folder}: the compressed model's logits hold NaN or Inf in {dtype}: use --dtype float32")
        difference = (_logits(model, self._probe(device)) - check).abs().max()
        if difference != 0:
            raise RuntimeError(f"{folder}: logits differ from those in memory by {float(difference):g} after reloading")
        return pair.compressed(model)

    def _probe(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The first calibration window, or a sample with its picture where there is one."""
        batches = self.preparation.windows.batches(1)
        seen = [batch for batch in batches if "pixel_values" in batch] or batches
        return {name: tensor.to(device) for name, tensor in seen[0].items()}

    # --- output ---

    def _save(self, loaded: LoadedModel, tables: dict[str, QuantizedWeight]) -> tuple[torch.Tensor, int]:
        """Write the packed model; return logits to compare the reloaded one with, and bytes outside the Linears."""
        model, family = loaded.model, loaded.family
        if loaded.store is not None:
            loaded.store.changed = lambda index, part: self._put_finished(index, part, tables)
        with loaded.running():
            logits = _logits(model, self._probe(loaded.device))
        model.config.get_text_config().use_cache = True

        def weights(index: int) -> dict[str, QuantizedWeight]:
            layers, block = self.run.read_block(index)[0], family.place(index)[0]
            return {f"{block}.{path}": quantized for path, quantized in layers.items()}

        dtype = self.preparation.stored_dtype
        with self.run.publish() as staging, quiet():
            (staging / MODEL).mkdir()
            rest = save_packed(staging / MODEL, model, family, tables, weights, dtype, loaded.part)
            loaded.tokenizer.save_pretrained(staging / MODEL)
            copy_processor(loaded.folder, staging / MODEL)
        return logits, rest

    def _put_finished(self, index: int | None, part: nn.Module, tables: dict[str, QuantizedWeight]) -> None:
        if index is None:
            return put_ends(part, tables)
        layers, biases, _ = self.run.read_block(index)
        for path, quantized in layers.items():
            replace(part, path, quantized, biases.get(path))

    def _describe(self, report: dict[str, Any]) -> None:
        """Model card and manifest of the checkpoint, written when its figures are known."""
        folder = self.run.path / MODEL
        atomic_write(folder / "README.md", model_card(report).encode())
        facts = {name: report["size"][name] for name in ("true_bits", "nominal_bits", "sparsity", "stored_bits")}
        write_manifest(folder, dict(base_model=report["model"], settings=report["settings"], **facts))

    def _report(
        self, architecture: dict[str, Any], dense: dict[str, Any], compressed: dict[str, Any],
        layers: list[dict[str, Any]], solver: Solver, made: Groups | None, rest: int,
    ) -> dict[str, Any]:  # fmt: skip
        fallbacks = [dict(layer=line["layer"], what=what) for line in layers for what in line["fallbacks"]]
        fallbacks += [dict(layer="budget", what=what) for what in solver.overruns]
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
            size=model_size(self.run.path / MODEL, architecture, layers, rest),
            layers=layers, groups=diagnostics, fallbacks=fallbacks,
            heat_maps=stages.heat_maps(made, self.preparation.blocks()) if made is not None else [],
            seconds={name: round(value, 3) for name, value in self.console.so_far().items()},
            stage_peaks=dict(self.console.peaks), reused_seconds=self.console.reused, resumed_blocks=self.resumed,
            environment_changes=self.run.environment_changes,
            processes=solver.shares, peak_host_bytes=peak_host_bytes(), peak_device_bytes=_peak_device_bytes(),
            environment=self.run.environment, command=sys.argv, folder=str(self.run.path),
        )  # fmt: skip


@torch.no_grad()
def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).logits.float().cpu()


def _peak_device_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
