"""`mico finetune --method sparsevlm`: a LLaVA learns, by LoRA, to answer with few of its visual tokens."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mico.adapters import family_of
from mico.console import peak_host_bytes
from mico.costs import costs_section, total_seconds
from mico.errors import UserError
from mico.files import atomic_write, fingerprint
from mico.loading import (
    LoadedModel,
    context_length,
    copy_processor,
    describe,
    is_reference,
    load_config,
    load_model,
    load_processor,
    local_folder,
    quiet,
)
from mico.loading import fingerprint as fingerprint_of
from mico.loading.names import model_in, resolve
from mico.metrics.vision.run import Tokens
from mico.qat.answers import GRIDS, ImageText, read_answers
from mico.qat.job import Request, Results, check_room, fit, place_of, write_results
from mico.qat.lora import ADAPTER as ADAPTED
from mico.qat.lora import merge_adapters, with_adapters
from mico.qat.recipe import WATCHING, Training, options_of, processes, refuse_given
from mico.runs import TRAINING, RunFolder
from mico.settings import record
from mico.summary import architecture_text, command_text, settings_text
from mico.tables import Section, duration_text, markdown, number
from mico.visual_tokens.budgets import check_budget, tokens_of_picture
from mico.visual_tokens.methods import method_of

MODEL, ADAPTER = "model", "adapter"
RATE = 2e-4  # of the adapters: what LLaVA trains its own with
SHARE = 3  # of the visual tokens, one in so many stays where --retain-tokens is not given
LAYOUT = 1


@dataclass(frozen=True, kw_only=True)
class Pruned(Training):
    """Options of training under pruning. kd_weight: share of the divergence from the unpruned model in the loss.

    retain_tokens and the three behind it: as `mico.visual_tokens.enable` takes them; None: a third of a picture's,
    where all pictures have the same number.
    """

    retain_tokens: int | None = None
    token_method: str = "sparsevlm"
    sparsevlm_version: str = "2.0"
    adaptive: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    kd_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parted:
            raise UserError(
                "--method sparsevlm trains adapters, a few parameters, in processes that hold the whole model: leave "
                "--fsdp and --deepspeed out (torchrun and accelerate work)"
            )
        self._must_be("lora_rank", lambda value: value >= 1, "at least 1")
        self._must_be("lora_alpha", lambda value: 0 < value < math.inf, "above 0")
        self._must_be("lora_dropout", lambda value: 0 <= value < 1, "from 0 to below 1")
        self._must_be("kd_weight", lambda value: 0 <= value <= 1, "from 0 to 1")

    @property
    def rate(self) -> float:
        """Learning rate of the adapters."""
        return self.learning_rate or RATE

    def tokens(self, visual: int) -> Tokens:
        """How tokens are pruned where a picture has `visual` of them. Raises UserError for values that do not exist."""
        retain = max(1, round(visual / SHARE)) if self.retain_tokens is None else self.retain_tokens
        return Tokens(retain, self.token_method, self.sparsevlm_version, self.adaptive)


class SparseVLM:
    """A Job (mico/qat/job.py)."""

    def __init__(self, request: Request, options: dict[str, Any]) -> None:
        self.request, self.recipe, self.console = request, options_of(Pruned, options, request.method), request.console
        refuse_given(request.method, teacher=request.teacher, eval=request.eval or None, data_dir=request.data_dir)
        self.place = place_of(request, self.recipe)
        self.source = str(model_in(request.model)) if model_in(request.model).is_dir() else request.model
        self.config = load_config(self.source, **request.hub)
        self._check_model()
        self.tokens = self._tokens()
        self.processor = load_processor(
            self.source, offline=request.offline, trust_remote_code=request.trust_remote_code, tell=self.console.note
        )
        self.limit = context_length(self.config, request.seqlen)
        self.data = self._data()
        self.label = f"{Path(request.model).name.lower()}-{request.method}-{self.tokens.retain}tokens"
        self.identity = self._identity()

    # --- before weights are read ---

    def _check_model(self) -> None:
        name, method = self.request.model, self.request.method
        if not family_of(self.config).vision:
            raise UserError(f"--method {method}: {name} ({self.config.model_type}) sees no images: give a LLaVA model")
        if getattr(self.config, "quantization_config", None):
            raise UserError(
                f"--method {method}: {name} is packed, and what adapters learn cannot be merged into packed weights: "
                "train the dense model and compress the result"
            )

    def _tokens(self) -> Tokens:
        visual = tokens_of_picture(self.config)
        if visual is None and self.recipe.retain_tokens is None:
            raise UserError(
                f"--method {self.request.method}: pictures of {self.request.model} ({self.config.model_type}) differ "
                "in their numbers of visual tokens: say by --retain-tokens how many stay"
            )
        tokens = self.recipe.tokens(visual or 0)
        check_budget(self.config, tokens.retain, method_of(tokens.method, tokens.version).schedule)
        return tokens

    def _data(self) -> ImageText:
        request = self.request
        if request.train_file is None and not is_reference(request.model):
            raise UserError(
                f"--method {request.method} needs --train-file: LLaVA-Instruct JSON or a webdataset archive of pairs "
                f"like those that {request.model} was trained on"
            )
        with self.console.stage("read"):
            data = read_answers(
                self.processor, self.limit, train_file=request.train_file or GRIDS, image_folder=request.image_folder,
                eval_file=request.eval_file, eval_share=request.eval_share, seed=self.recipe.seed,
            )  # fmt: skip
        self.console.note(data.describe())
        return data

    def _identity(self) -> dict[str, Any]:
        options = {name: value for name, value in record(self.recipe).items() if name not in WATCHING}
        images = fingerprint([self.processor.image_processor.to_json_string(), self.processor.chat_template])
        return dict(
            layout=LAYOUT, name=self.request.model, method=self.request.method,
            model=fingerprint_of(local_folder(self.source, offline=self.request.offline)), seqlen=self.limit,
            eval_share=self.request.eval_share, data=self.data.digests, processor=images, processes=processes(),
        ) | options | dict(retain_tokens=self.tokens.retain)  # fmt: skip

    # --- the work ---

    def lead(self, run: RunFolder) -> dict[str, Any]:
        """Measure the model with and without pruning, train, merge, write, read back, measure again, report."""
        loaded = self._load(self.source, self._dtype())
        architecture, before = describe(loaded.model, loaded.family), self._measured(loaded, "before")
        size = sum(parameter.numel() for parameter in loaded.model.parameters()) * self._stored().itemsize
        adapted = self._adapted(loaded)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        check_room(run.path, trained, self.place, self.recipe, len(self.data.train), size)
        self.console.note(f"finetune: {trained:,} parameters of adapters are trained, those of the model stay")
        results = self._train(run.path, adapted)
        with self.console.stage("save"):
            self._save(run, adapted)
        adapted.to("meta")  # whoever still holds the model, its weights are gone before they are read again
        after = self._measured(self._load(str(run.path / MODEL), self._dtype()), "after")
        write_results(run.path, results)
        report = self._report(run, architecture, before, after, trained, results)
        atomic_write(run.path / "report.md", markdown(self.told(report)).encode())
        atomic_write(run.path / MODEL / "README.md", card(report).encode())
        run.finish(report)
        return report

    def follow(self, folder: Path) -> None:
        """Train with the others."""
        loaded = self._load(self.source, self._dtype())
        self._train(folder, self._adapted(loaded))

    def _dtype(self) -> torch.dtype:
        """What the model is held in: with --bf16 its frozen weights need no more."""
        return torch.bfloat16 if self.recipe.bf16 else torch.float32

    def _stored(self) -> torch.dtype:
        """What the checkpoint holds, and what is written."""
        return self.config.dtype or self.config.get_text_config().dtype or torch.float32

    def _load(self, name: str, dtype: torch.dtype, place: torch.device | None = None) -> LoadedModel:
        named, device = str(dtype).removeprefix("torch."), str(place or self.place)
        return load_model(name, device=device, dtype=named, stream=False, **self.request.hub)

    def _adapted(self, loaded: LoadedModel) -> Any:
        recipe = self.recipe
        return with_adapters(
            loaded.model, loaded.family, rank=recipe.lora_rank, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout,
            seed=recipe.seed,
        )  # fmt: skip

    def _measured(self, loaded: LoadedModel, when: str) -> dict[str, dict[str, float]]:
        """Answers held out, known with all visual tokens and with the pruned ones."""
        from mico.qat.pruned import known_answers

        size, found = self.recipe.per_device_train_batch_size, {}
        with self.console.stage(f"answers, {when}"):
            for name, tokens in (("all", None), ("pruned", self.tokens)):
                batches = math.ceil(len(self.data.held) / size)
                with self.console.bar(f"answers {when} training, {name} tokens", batches) as advance:
                    found[name] = known_answers(loaded.model, self.data.held, size, tokens, advance)
        return found

    def _train(self, folder: Path, adapted: Any) -> Results:
        from mico.qat.pruned import PrunedTrainer

        recipe, hidden = self.recipe, self.console.quiet or not sys.stderr.isatty()
        on_cpu = self.request.device == "cpu" or not torch.cuda.is_available()
        arguments = recipe.arguments(folder / TRAINING, hidden, on_cpu)
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # Trainer would copy the model to the others by DataParallel: copies are not pruned
            self.console.note(f"finetune: one of {torch.cuda.device_count()} GPUs is used; torchrun uses all of them")
        trainer = PrunedTrainer(
            model=adapted, args=arguments, train_dataset=self.data.train, eval_dataset=self.data.held,
            data_collator=self.data.train.batch, tokens=self.tokens, share=recipe.kd_weight,
        )  # fmt: skip
        return fit(trainer, folder, self.console)

    def _save(self, run: RunFolder, adapted: Any) -> None:
        """The adapters, and the model they were merged into, in the layout and dtype of the one it was made of."""
        merged = self._load(self.source, self._stored(), torch.device("cpu"))
        count = merge_adapters(adapted, merged.model)
        self.console.note(f"finetune: adapters of {count} Linears merged")
        merged.model.config.get_text_config().use_cache = True
        adapted.peft_config[ADAPTED].base_model_name_or_path = resolve(self.source)
        with run.publish() as staging, quiet():
            adapted.save_pretrained(staging / ADAPTER, save_embedding_layers=False)
            merged.model.save_pretrained(staging / MODEL)
            merged.tokenizer.save_pretrained(staging / MODEL)
            copy_processor(merged.folder, staging / MODEL)

    # --- report ---

    def _report(
        self, run: RunFolder, architecture: dict[str, Any], before: dict[str, Any], after: dict[str, Any],
        trained: int, results: Results,
    ) -> dict[str, Any]:  # fmt: skip
        cut = len(self.data.train.cut) + len(self.data.held.cut)
        return dict(
            model=self.request.model, architecture=architecture, tokens=asdict(self.tokens),
            settings=dict(method=self.request.method) | record(self.recipe) | dict(grouping=None),
            data=self.data.describe(), rows_cut=cut, trained_parameters=trained,
            answers=dict(before=before, after=after), training=results,
            seconds={name: round(value, 3) for name, value in self.console.so_far().items()},
            stage_peaks=dict(self.console.peaks), peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            environment=run.environment, command=sys.argv, folder=str(run.path),
        )  # fmt: skip

    @staticmethod
    def told(report: dict[str, Any]) -> list[Section]:
        """What was done, how well answers are known before and after, what it took."""
        settings = {name: value for name, value in report["settings"].items() if value not in (None, False)}
        lines = [
            f"model: {report['model']} ({architecture_text(report['architecture'])})",
            f"settings: {settings_text(settings)}",
            f"data: {report['data']}",
            f"trained: {report['trained_parameters']:,} parameters of adapters, merged into {report['folder']}/{MODEL}",
            f"command: {command_text(report['command'])}",
        ]
        if report["rows_cut"]:
            lines.append(f"{report['rows_cut']:,} rows taught nothing: their answers lie behind --seqlen")
        return [Section("Training under pruning", lines=tuple(lines)), _answers(report), costs_section(report)]

    @staticmethod
    def figures(report: dict[str, Any]) -> dict[str, Any]:
        """Losses and right answers before and after, with all tokens and with the pruned ones."""
        return dict(
            model=report["model"], method=report["settings"]["method"], tokens=report["tokens"],
            answers=report["answers"], seconds=total_seconds(report["seconds"]),
            peak_host_bytes=report["peak_host_bytes"],
        )  # fmt: skip


def _answers(report: dict[str, Any]) -> Section:
    """Held-out answers before and after training, with all visual tokens and with the pruned ones."""
    rows, retain = [], report["tokens"]["retain"]
    for kind, name in (("all", "all visual tokens"), ("pruned", f"{retain} visual tokens")):
        was, now = (report["answers"][when][kind] for when in ("before", "after"))
        shares = (f"{one['right']:.1%}" for one in (was, now))
        rows.append((name, number(was["loss"]), number(now["loss"]), *shares))
    train, asked = report["training"]["train"], report["answers"]["after"]["pruned"]
    lines = (
        f"Visual tokens in the mean of the layers: {asked['equal_tokens']:.1f} as the field counts, "
        f"{asked['processed_tokens']:.1f} really processed; for {asked['without_rater']:,} questions no word "
        "stood out, so that all of them judged.",
        f"{asked['answers']:,} answers held out, {asked['tokens']:,} tokens. Loss: cross-entropy a token. "
        "Right: answers whose every token is the likeliest one after those before it. Measured on the files written, "
        "read back.",
        f"Loss while training: {number(train['train_loss'])} on average, {train['epoch']:.3g} epochs in "
        f"{duration_text(train['train_runtime'])}.",
    )
    columns = ("", "loss before", "after", "right before", "after")
    return Section("Answers", columns, tuple(rows), lines, frozenset({(1, 2), (1, 4)}))


def card(report: dict[str, Any]) -> str:
    """README.md of the model that was written."""
    from mico.card import base_model

    base, tokens = base_model(report["model"]), report["tokens"]
    head = f"library_name: transformers\npipeline_tag: image-text-to-text\nbase_model: {base}\ntags: [mico]"
    text = (
        f"{base}, trained by mico {report['environment']['mico']} to answer with {tokens['retain']} visual tokens in "
        f"the mean of its layers (method {tokens['method']}, version {tokens['version']}). The weights are those of a "
        "plain LLaVA: tokens are pruned by `mico.visual_tokens.enable(model, "
        f"retain={tokens['retain']}, method={tokens['method']!r}, version={tokens['version']!r})`."
    )
    _, _, table = markdown([_answers(report)]).partition("\n\n")  # without its title
    return f"---\n{head}\n---\n\n# {Path(report['folder']).name}\n\n{text}\n\n{table}"
