"""`mico finetune --method paretoq`: a dense model or a compressed run in, a packed model at 1 to 4 bits out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mico.adapters import family_of
from mico.card import model_card
from mico.checkpoint import write_manifest
from mico.console import peak_host_bytes
from mico.data import Windows
from mico.errors import UserError
from mico.files import atomic_write, read_json
from mico.loading import (
    LoadedModel,
    context_length,
    describe,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    local_folder,
)
from mico.loading.names import model_in
from mico.metrics.pair import Pair
from mico.metrics.perplexity import default_texts, evaluation_sets
from mico.pages.run import write_run_page
from mico.qat.corpus import Corpus, TokenWindows, read_corpus
from mico.qat.job import Request, Results, check_room, fit, gathered_state, place_of, write_results
from mico.qat.modules import check_groups, check_trainable, masks_of, quantize_linears, stream_linears
from mico.qat.recipe import WATCHING, Recipe, options_of, processes, refuse_given
from mico.qat.save import save_trained
from mico.runs import REPORT, TRAINING, RunFolder
from mico.settings import PROTOCOLS, record
from mico.solve import model_size
from mico.summary import flat, sections, write_markdown
from mico.tables import Section

MODEL = "model"
SEQLEN = 1024  # tokens of a training window, where the model takes as many
LAYOUT = 2


class ParetoQ:
    """A Job (mico/qat/job.py)."""

    def __init__(self, request: Request, options: dict[str, Any]) -> None:
        self.request, self.recipe, self.console = request, options_of(Recipe, options, request.method), request.console
        refuse_given(request.method, image_folder=request.image_folder)
        self.place = place_of(request, self.recipe)
        self.source = _source(request.model)
        self.config = load_config(self.source, **request.hub)
        self.tokenizer = load_tokenizer(self.source, **request.hub)
        self.seqlen = context_length(self.config, request.seqlen or min(SEQLEN, context_length(self.config)))
        self.teacher = self._teacher_name() if self.recipe.kd else None
        self.corpus = self._corpus()
        self.sets = self._evaluation()
        self.label = f"{Path(request.model).name.lower()}-{request.method}-{self.recipe.w_bits:g}bit"
        self.identity = self._identity()

    # --- before weights are read ---

    def _teacher_name(self) -> str:
        """The model to learn from: --teacher, else the dense model that the training or its compressed run is of."""
        report = Path(self.request.model).expanduser() / REPORT
        name = self.request.teacher or (read_json(report)["model"] if report.is_file() else self.source)
        theirs = load_tokenizer(name, **self.request.hub).get_vocab()
        sizes = [config.get_text_config().vocab_size for config in (load_config(name, **self.request.hub), self.config)]
        if sizes[0] != sizes[1] or theirs != self.tokenizer.get_vocab():
            raise UserError(
                f"--teacher {name}: its vocabulary ({sizes[0]:,}) is not that of {self.request.model} ({sizes[1]:,}), "
                "and a teacher must read the same tokens"
            )
        return name

    def _corpus(self) -> Corpus:
        request = self.request
        with self.console.stage("read"):
            corpus = read_corpus(
                self.tokenizer, self.seqlen, train_file=request.train_file, eval_file=request.eval_file,
                eval_share=request.eval_share, seed=self.recipe.seed,
            )  # fmt: skip
        self.console.note(corpus.describe())
        return corpus

    def _evaluation(self) -> dict[str, Windows]:
        request = self.request
        texts = default_texts(request.train_file is None, request.data_dir) if request.eval is None else request.eval
        if not texts:
            return {}
        return evaluation_sets(
            self.tokenizer, texts, seqlen=context_length(self.config), data_dir=request.data_dir,
            offline=request.offline,
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        options = {name: value for name, value in record(self.recipe).items() if name not in WATCHING}
        return dict(
            layout=LAYOUT, name=self.request.model, method=self.request.method,
            model=fingerprint(local_folder(self.source, offline=self.request.offline)), seqlen=self.seqlen,
            teacher=self.teacher, tokens=self.corpus.digests, processes=processes(),
            eval={name: windows.sha256 for name, windows in self.sets.items()},
        ) | options  # fmt: skip

    # --- the work ---

    def lead(self, run: RunFolder) -> dict[str, Any]:
        """Measure the dense model, train, write the packed model, measure it as it was read back, report."""
        loaded, masks = self._load(self.place)
        architecture, stored = describe(loaded.model, loaded.family), self._stored_dtype(loaded)
        check_groups(loaded.model, loaded.family, self.recipe.group_size)
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        windows = len(self.corpus.train_NT)
        needed = check_room(run.path, parameters, self.place, self.recipe, windows)
        pair = self._pair(run, loaded, needed)
        dense = pair.dense(loaded.model)
        loaded, results = self._train(run.path, loaded, masks)
        with self.console.stage("save"):
            probe_BT = self.corpus.eval_NT[:1].long()
            written, layers, rest = save_trained(loaded, run, MODEL, stored, probe_BT)
        compressed = pair.compressed(written.to(self.place))
        write_results(run.path, results)
        report = self._report(run, architecture, dense, compressed, layers, rest, results)
        write_markdown(report, run.path / "report.md")
        write_run_page(run.path / "report.html", report)
        atomic_write(run.path / MODEL / "README.md", model_card(report).encode())
        facts = {name: report["size"][name] for name in ("true_bits", "nominal_bits", "sparsity", "stored_bits")}
        write_manifest(run.path / MODEL, dict(base_model=report["model"], settings=report["settings"], **facts))
        run.finish(report)
        pair.done()
        return report

    def follow(self, folder: Path) -> None:
        """Train with the others."""
        loaded, masks = self._load(self.place)
        check_groups(loaded.model, loaded.family, self.recipe.group_size)
        self._train(folder, loaded, masks)

    def _load(self, place: torch.device) -> tuple[LoadedModel, dict[str, Any]]:
        """The dense float32 model and the masks that a compression left."""
        check_trainable(family_of(self.config), self.request.method)
        loaded = load_model(self.source, device=str(place), dtype="float32", stream=False, **self.request.hub)
        masks = masks_of(loaded.model)
        if getattr(loaded.model, "is_quantized", False):
            loaded.model.dequantize(torch.float32)  # in place
        return loaded, masks

    def _stored_dtype(self, loaded: LoadedModel) -> torch.dtype:
        named = getattr(loaded.model.config, "dtype", None)
        named = read_json(loaded.folder / "config.json").get("dtype", named) or "float32"
        return getattr(torch, named) if isinstance(named, str) else named

    def _pair(self, run: RunFolder, loaded: LoadedModel, needed: int) -> Pair:
        """What the training starts from, which is dense or a compressed run, and what comes out of it."""
        vocabulary, size = self.config.get_text_config().vocab_size, self.recipe.per_device_train_batch_size
        return Pair(self.sets, run.path, loaded.fingerprint, vocabulary, size, self.console, spare=needed)

    # --- training ---

    def _prepared(self, loaded: LoadedModel, masks: dict[str, Any]) -> Any:
        """The model with trainable QATLinears in place."""
        recipe, count = self.recipe, len(stream_linears(loaded.model, loaded.family))
        with self.console.stage("start"), self.console.bar("start of the steps", count) as advance:
            quantize_linears(loaded.model, loaded.family, recipe.w_bits, recipe.group_size, recipe.init, masks, advance)
        if masks:
            self.console.note(f"finetune: {len(masks)} Linears keep the mask of {self.request.model}")
        return loaded.model.requires_grad_(True)

    def _train(self, folder: Path, loaded: LoadedModel, masks: dict[str, Any]) -> tuple[LoadedModel, Results]:
        """The model with what was learnt in it, whole in the first process, and Trainer's metrics."""
        from transformers import default_data_collator

        from mico.qat.trainer import Distillation, QATTrainer

        recipe = self.recipe
        arguments = recipe.arguments(folder / TRAINING, self.console.quiet or not sys.stderr.isatty(), self._on_cpu())
        trainer = QATTrainer(
            model=self._prepared(loaded, masks), args=arguments, train_dataset=TokenWindows(self.corpus.train_NT),
            eval_dataset=TokenWindows(self.corpus.eval_NT), processing_class=self.tokenizer,
            compute_loss_func=Distillation(self._teacher(), recipe.kd_weight) if recipe.kd else None,
            scale_learning_rate=recipe.scale_rate, data_collator=default_data_collator,
        )  # fmt: skip
        results = fit(trainer, folder, self.console)
        return self._gathered(trainer, loaded, masks), results

    def _on_cpu(self) -> bool:
        """Whether Trainer computes on the CPU; a model that is to be parted lies there first in any case."""
        return self.request.device == "cpu" or not torch.cuda.is_available()

    def _gathered(self, trainer: Any, loaded: LoadedModel, masks: dict[str, Any]) -> LoadedModel:
        """The whole model where processes hold parts of the weights (ZeRO-3, FSDP), in the first of them."""
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return loaded
        state = gathered_state(trainer)
        if state is None:
            return loaded
        whole, _ = self._load(torch.device("cpu"))
        missing, _ = self._prepared(whole, masks).load_state_dict(state, strict=False)
        lost = [name for name in missing if not name.endswith("keep_RC") and name not in _tied(whole.model)]
        if lost:
            raise RuntimeError(f"{lost[0]} and {len(lost) - 1} more were not gathered from the processes")
        return replace(whole, name=loaded.name)

    def _teacher(self) -> Any:
        """In the precision that the training computes in."""
        assert self.teacher is not None
        hub, dtype = self.request.hub, self.recipe.precision
        return load_model(self.teacher, device=str(self.place), dtype=dtype, stream=False, **hub).model

    # --- report ---

    @staticmethod
    def told(report: dict[str, Any]) -> list[Section]:
        """The report of a compression, with a section on the training."""
        return sections(report)

    @staticmethod
    def figures(report: dict[str, Any]) -> dict[str, Any]:
        """What a compression tells."""
        return flat(report)

    def _report(
        self, run: RunFolder, architecture: dict[str, Any], dense: dict[str, Any], compressed: dict[str, Any],
        layers: list[dict[str, Any]], rest: int, results: Results,
    ) -> dict[str, Any]:  # fmt: skip
        size = model_size(run.path / MODEL, architecture, layers, rest)
        settings = dict(method=self.request.method) | record(self.recipe)
        settings |= dict(sparsity=round(size["sparsity"], 4), pattern=None, grouping=None)  # of the mask that stays
        return dict(
            model=self.request.model, arm=None, architecture=architecture, settings=settings,
            calibration=self.corpus.describe(), identity=dict(seed=self.recipe.seed),
            protocol=PROTOCOLS[0], dense=dense, compressed=compressed, training=results,
            size=size, layers=layers, groups=[], fallbacks=[],
            seconds={name: round(value, 3) for name, value in self.console.so_far().items()},
            stage_peaks=dict(self.console.peaks), peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            environment=run.environment, command=sys.argv, folder=str(run.path),
        )  # fmt: skip


def _source(model: str) -> str:
    """The model's name, or the folder of the model that a run of mico wrote."""
    folder = model_in(model)
    return str(folder) if (folder / "config.json").is_file() else model


def _tied(model: Any) -> set[str]:
    """Keys that name a tensor a second time, which a gathered state holds once."""
    return set(getattr(model, "_tied_weights_keys", None) or ())
