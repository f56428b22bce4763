"""Verb: quantization-aware training; a model or a compressed run in, a packed model out, measured (mico finetune)."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from mico.callable import callable_module
from mico.card import model_card
from mico.checkpoint import write_manifest
from mico.console import Console, peak_host_bytes
from mico.data import Windows
from mico.errors import UserError
from mico.files import atomic_json, atomic_write, check_writable, read_json
from mico.loading import LoadedModel, context_length, describe, load_config, load_model, load_tokenizer, quiet
from mico.loading.names import model_in
from mico.metrics.pair import Pair
from mico.metrics.perplexity import default_texts, evaluation_sets, parse_texts
from mico.pages.run import write_run_page
from mico.qat.corpus import Corpus, TokenWindows, read_corpus
from mico.qat.modules import masks_of, quantize_linears, stream_linears
from mico.qat.recipe import Recipe
from mico.qat.save import last_checkpoint, metrics_of, save_trained
from mico.runs import REPORT, RunFolder
from mico.runs import fingerprint as digest
from mico.settings import PROTOCOLS, choose, record
from mico.solve import model_size
from mico.stages import results_root
from mico.summary import flat, write_markdown

callable_module(__name__)
METHODS = ("paretoq",)
MODEL, TRAINING, BEFORE = "model", "training", "before_results.json"
SEQLEN = 1024  # tokens of a training window, where the model takes as many
LAYOUT = 1


def finetune(
    model: str,
    *,
    method: str = "paretoq",
    train_file: str | None = None,
    eval_file: str | None = None,
    eval_share: float = 0.05,
    seqlen: int | None = None,
    teacher: str | None = None,
    eval: str | Sequence[str] | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    save: str | None = None,
    json: str | None = None,
    console: Console | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Train `model` at few bits and write it packed; return the report that also lies in the run folder.

    model: a dense model, or a run of mico compress, whose pruned weights then stay zero. train_file: JSONL rows with
    'text', or a text file; None: the embedded documentation. training: the fields of Recipe (mico/qat/recipe.py).
    A killed run goes on from its last checkpoint with the same command. Started by torchrun or accelerate, the
    processes share the work; the report of all but the first is empty. Raises UserError for what the user can mend.
    """
    console, recipe = console or Console(), Recipe(**training)
    choose("--method", method, METHODS)
    choose("--device", device, ("auto", "cpu", "cuda"))
    if json is not None:
        check_writable("--json", json)
    leads = int(os.environ.get("RANK", "0")) == 0
    with console.stage("total"), _own_randomness():
        folder_of = _source(model)
        hub = dict(offline=offline, trust_remote_code=trust_remote_code, packed=True)
        config = load_config(folder_of, **hub)
        length = context_length(config, seqlen or min(SEQLEN, context_length(config)))
        tokenizer = load_tokenizer(folder_of, **hub)
        with console.stage("read"):
            corpus = read_corpus(
                tokenizer, length, train_file=train_file, eval_file=eval_file, eval_share=eval_share, seed=recipe.seed
            )
        console.note(corpus.describe())
        texts = default_texts(train_file is None, data_dir) if eval is None else _texts(eval)
        sets = evaluation_sets(
            tokenizer, texts, seqlen=context_length(config), data_dir=data_dir, offline=offline
        ) if texts else {}  # fmt: skip
        loaded = load_model(folder_of, device="cpu" if device == "cpu" else "auto", dtype="float32", **hub)  # type: ignore[arg-type]
        arguments = dict(
            layout=LAYOUT, name=model, method=method, model=loaded.fingerprint, seqlen=length, teacher=teacher,
            tokens={part: digest(ids.tolist()) for part, ids in (("train", corpus.train_NT), ("eval", corpus.eval_NT))},
            eval={name: windows.sha256 for name, windows in sets.items()},
        ) | record(recipe)  # fmt: skip
        name = f"{Path(model).name.lower()}-{method}-{recipe.w_bits:g}bit-{digest(arguments)[:8]}"
        folder = Path(save) if save else results_root() / name
        job = _Job(model, method, recipe, corpus, sets, loaded, teacher, hub, device == "cpu", folder, console)
        if not leads:
            job.train()
            return {}
        with RunFolder.open(folder, arguments) as run:
            if run.completed:
                console.note(f"finetune: {run.path} is finished and whole, reusing it")
                report = read_json(run.path / REPORT)
            else:
                report = job.run_all(run)
    if json:
        atomic_json(json, flat(report))
    return report


def _source(model: str) -> str:
    """The model's name, or the folder of the model that a run of mico wrote."""
    folder = model_in(model)
    return str(folder) if (folder / "config.json").is_file() else model


def _texts(names: str | Sequence[str]) -> tuple[str, ...]:
    return parse_texts(names if isinstance(names, str) else ",".join(names))


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Trainer seeds the generators of the whole program: they are given back as they were."""
    kept = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


@dataclass
class _Job:
    """One training from the dense model to the report."""

    model: str
    method: str
    recipe: Recipe
    corpus: Corpus
    sets: dict[str, Windows]
    loaded: LoadedModel
    teacher: str | None
    hub: dict[str, Any]
    use_cpu: bool
    folder: Path
    console: Console

    def __post_init__(self) -> None:
        model = self.loaded.model
        self.masks = masks_of(model)
        if getattr(model, "is_quantized", False):
            model.dequantize(torch.float32)  # in place

    def run_all(self, run: RunFolder) -> dict[str, Any]:
        architecture = describe(self.loaded.model, self.loaded.family)
        stored = self._stored_dtype()
        pair = self._pair(run)
        dense = pair.dense(self.loaded.model)
        results = self.train()
        with self.console.stage("save"):
            probe_BT = self.corpus.eval_NT[:1]
            written, layers, rest = save_trained(self.loaded, run, MODEL, stored, probe_BT)
        compressed = pair.compressed(written)
        for name in ("train", "eval", "all"):
            atomic_json(run.path / f"{name}_results.json", results[name])
        report = self._report(run, architecture, dense, compressed, layers, rest, results)
        write_markdown(report, run.path / "report.md")
        write_run_page(run.path / "report.html", report)
        atomic_write(run.path / MODEL / "README.md", model_card(report).encode())
        facts = {name: report["size"][name] for name in ("true_bits", "nominal_bits", "sparsity", "stored_bits")}
        write_manifest(run.path / MODEL, dict(base_model=report["model"], settings=report["settings"], **facts))
        run.finish(report)
        pair.done()
        return report

    def _stored_dtype(self) -> torch.dtype:
        named = getattr(self.loaded.model.config, "dtype", None)
        named = read_json(self.loaded.folder / "config.json").get("dtype", named) or "float32"
        return getattr(torch, named) if isinstance(named, str) else named

    def _pair(self, run: RunFolder) -> Pair:
        """What the training starts from, which is dense or a compressed run, and what comes out of it."""
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        size = self.recipe.per_device_train_batch_size
        return Pair(self.sets, run.path, self.loaded.fingerprint, vocabulary, size, self.console)

    # --- training ---

    def train(self) -> dict[str, dict[str, Any]]:
        """Train from the last checkpoint on; return Trainer's metrics as {'before', 'train', 'eval', 'all'}."""
        from transformers import PrinterCallback, default_data_collator

        from mico.qat.trainer import Distillation, Log, QATTrainer, Start, with_perplexity

        model, recipe = self._prepared(), self.recipe
        training = self.folder / TRAINING
        arguments = recipe.arguments(training, self.console.quiet or not sys.stderr.isatty(), self.use_cpu)
        loss = Distillation(self._teacher(), recipe.kd_weight) if recipe.kd else None
        trainer = QATTrainer(
            model=model, args=arguments, train_dataset=TokenWindows(self.corpus.train_NT), compute_loss_func=loss,
            eval_dataset=TokenWindows(self.corpus.eval_NT), processing_class=self.loaded.tokenizer,
            scale_learning_rate=recipe.scale_rate, data_collator=default_data_collator,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # it writes to stdout, where results go
        start = self.folder / BEFORE
        for callback in (Log(self.console), Start(start)):
            trainer.add_callback(callback)
        with quiet(), self.console.stage("train"):
            metrics = self._train(trainer, training)
            after = with_perplexity(trainer.evaluate())
        self._gather(trainer)
        if not math.isfinite(after["eval_loss"]):
            raise UserError(
                f"the loss is {after['eval_loss']:g} after training: "
                f"lower --learning-rate {recipe.rate:g} or --scale-learning-rate {recipe.scale_rate:g}"
            )
        return dict(before=read_json(start), train=metrics, eval=after, all=metrics | after)

    def _train(self, trainer: Any, folder: Path) -> dict[str, Any]:
        """Train, or go on from the last checkpoint; one that holds the last step is only read."""
        found = last_checkpoint(folder)
        trainer.args.eval_on_start = found is None
        if found is None:
            return trainer.train().metrics
        checkpoint, state = found
        self.console.note(f"finetune: goes on from {checkpoint}, step {state['global_step']} of {state['max_steps']}")
        if state["global_step"] < state["max_steps"]:
            return trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer._load_from_checkpoint(checkpoint)  # Trainer itself would add a step
        return metrics_of(state)

    def _gather(self, trainer: Any) -> None:
        """Put the weights back into the model where processes hold parts of them (ZeRO-3, FSDP)."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        parted = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not parted:
            trainer.model.zero_grad(set_to_none=True)
            return
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        unset_hf_deepspeed_config()  # or the model below would be spread over the processes too
        if trainer.is_world_process_zero():
            whole = load_model(self.loaded.name, device="cpu", dtype="float32", **self.hub)
            self.loaded = replace(whole, name=self.loaded.name)
            self.__post_init__()
            self._prepared().load_state_dict(state, strict=False)

    def _prepared(self) -> Any:
        """The model with trainable QATLinears in place."""
        model, masks = self.loaded.model, self.masks
        count = len(stream_linears(model, self.loaded.family))
        with self.console.stage("start"), self.console.bar("start of the steps", count) as advance:
            recipe = self.recipe
            quantize_linears(model, self.loaded.family, recipe.w_bits, recipe.group_size, recipe.init, masks, advance)
        if masks:
            self.console.note(f"finetune: {len(masks)} Linears keep the mask of {self.model}")
        return model.requires_grad_(True)

    def _teacher(self) -> Any:
        """The model to learn from: --teacher, else the dense model that the training or its compressed run is of."""
        run = Path(self.model).expanduser() / REPORT
        name = self.teacher or (read_json(run)["model"] if run.is_file() else self.loaded.name)
        loaded = load_model(name, device="cpu" if self.use_cpu else "auto", dtype="float32", **self.hub)
        if loaded.model.config.get_text_config().vocab_size != self.loaded.model.config.get_text_config().vocab_size:
            raise UserError(f"--teacher {name}: its vocabulary is not that of {self.model}")
        return loaded.model

    # --- report ---

    def _report(
        self, run: RunFolder, architecture: dict[str, Any], dense: dict[str, Any], compressed: dict[str, Any],
        layers: list[dict[str, Any]], rest: int, results: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        size = model_size(run.path / MODEL, architecture, layers, rest)
        settings = dict(method=self.method) | record(self.recipe)
        settings |= dict(sparsity=round(size["sparsity"], 4), pattern=None, grouping=None)  # of the mask that stays
        return dict(
            model=self.model, arm=None, architecture=architecture, settings=settings,
            calibration=self.corpus.describe(), identity=dict(seed=self.recipe.seed),
            protocol=PROTOCOLS[0], dense=dense, compressed=compressed, training=results,
            size=size, layers=layers, groups=[], fallbacks=[],
            seconds={name: round(value, 3) for name, value in self.console.so_far().items()},
            stage_peaks=dict(self.console.peaks), peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            environment=run.environment, command=sys.argv, folder=str(run.path),
        )  # fmt: skip
