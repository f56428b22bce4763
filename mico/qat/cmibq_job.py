"""`mico finetune --method cmibq`: a LLaVA with learned widths of weights and activations, in two stages."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mico.adapters import family_of
from mico.adapters.llava import with_towers
from mico.card import model_card
from mico.checkpoint import write_manifest
from mico.console import peak_host_bytes
from mico.errors import UserError
from mico.files import atomic_write, fingerprint, read_json, sha256_file
from mico.loading import (
    LoadedModel,
    context_length,
    describe,
    is_reference,
    load_config,
    load_model,
    load_processor,
    local_folder,
)
from mico.loading import fingerprint as fingerprint_of
from mico.loading.names import model_in
from mico.packed.hf import quantized_inputs
from mico.qat.answers import GRIDS, ImageText, read_answers
from mico.qat.cmibq.recipe import STAGES, Aligning, Quantizing, Shaping
from mico.qat.cmibq.save import read_state, save_quantized
from mico.qat.cmibq.settings import Settings
from mico.qat.cmibq.stages import CHECKPOINTING, aligned, gathered, harden, merged, shaped
from mico.qat.cmibq.student import Student
from mico.qat.cmibq.told import cmibq_sections, quality, write_page
from mico.qat.cmibq.wrap import wrap
from mico.qat.job import Request, Results, check_room, fit, place_of, write_results
from mico.qat.modules import Mask, masks_of
from mico.qat.recipe import WATCHING, options_of, processes, refuse_given
from mico.runs import REPORT, TRAINING, RunFolder
from mico.settings import PROTOCOLS, record
from mico.solve import model_size
from mico.summary import flat
from mico.tables import Section, markdown

MODEL = "model"
LAYOUT = 1


@dataclass(frozen=True)
class Shaped:
    """A finished run of stage 1: where it lies, its report, and how it was quantized."""

    folder: Path
    report: dict[str, Any]
    settings: Settings

    @classmethod
    def of(cls, name: str) -> Shaped:
        """Raises UserError where `name` is no finished run of stage 1."""
        folder, ask = Path(name).expanduser(), "give the folder of a run of mico finetune --method cmibq --stage 1"
        if not folder.is_dir():
            raise UserError(f"--stage 2: {name} is no folder: {ask}")
        if not (folder / REPORT).is_file():
            if (folder / TRAINING).is_dir():
                raise UserError(
                    f"--stage 2: stage 1 is not finished in {name}: give its command again, it goes on there"
                )
            raise UserError(f"--stage 2: {folder / REPORT} does not exist: {ask}")
        report = read_json(folder / REPORT)
        told = report.get("settings", {})
        if told.get("method") != "cmibq" or told.get("stage") != 1:
            kind = " --stage ".join(str(told[part]) for part in ("method", "stage") if part in told)
            raise UserError(f"--stage 2: {name} is a run of another kind ({kind}): {ask}")
        return cls(folder, report, Settings(**report["quantization"]["settings"]))


def _source(model: str) -> str:
    """The model's name, or the folder of the model that a run of mico wrote."""
    folder = model_in(model)
    return str(folder) if Path(model).is_dir() else model


class Bottleneck:
    """A Job (mico/qat/job.py)."""

    def __init__(self, request: Request, options: dict[str, Any]) -> None:
        self.request, self.console = request, request.console
        self.stage = options.pop("stage", 1)
        if self.stage not in STAGES:
            raise UserError(f"--stage {self.stage}: choose 1, or 2 on what stage 1 left")
        self.recipe: Quantizing = options_of(STAGES[self.stage], options, f"{request.method} --stage {self.stage}")
        refuse_given(request.method, teacher=request.teacher, eval=request.eval or None, data_dir=request.data_dir)
        self._check_batch()
        self.place = place_of(request, self.recipe)
        self.before = Shaped.of(request.model) if self.stage == 2 else None
        self.base = _source(request.model) if self.before is None else self.before.report["quantization"]["base"]
        self.config = load_config(self.base, **request.hub)
        self._check_model()
        self.family = with_towers(family_of(self.config), self.config, vision=True, projector=True)
        self.processor = load_processor(
            self.base, offline=request.offline, trust_remote_code=request.trust_remote_code, tell=self.console.note
        )
        self.limit = context_length(self.config, request.seqlen)
        self.data, self.blind = self._data()
        self.settings = self.recipe.settings() if isinstance(self.recipe, Shaping) else self._before().settings
        self.widths = f"w{self.settings.target_bits_weight:g}a{self.settings.target_bits_act:g}"
        self.label = f"{Path(self.base).name.lower()}-{request.method}-stage{self.stage}-{self.widths}"
        self.identity = self._identity()

    # --- before weights are read ---

    def _before(self) -> Shaped:
        assert self.before is not None
        return self.before

    def _check_batch(self) -> None:
        pairs = self.recipe.per_device_train_batch_size * processes()
        if isinstance(self.recipe, Aligning) and self.recipe.use_align and pairs < 2:
            raise UserError(
                "--per-device-train-batch-size 1: alignment tells the pairs of a batch apart, and one pair is alone: "
                "raise it, use more processes, or give --no-align"
            )

    def _check_model(self) -> None:
        name, method = self.base, self.request.method
        if not family_of(self.config).vision:
            raise UserError(f"--method {method}: {name} ({self.config.model_type}) sees no images: give a LLaVA model")
        if (kind := self.config.vision_config.model_type) != "clip_vision_model":
            raise UserError(f"--method {method}: {name} sees with {kind!r}; a CLIP vision tower is needed")
        quantized = getattr(self.config, "quantization_config", None) or {}
        if quantized and quantized.get("quant_method") != "mico":
            kind = quantized.get("quant_method")
            raise UserError(f"--method {method}: {name} is quantized already ({kind}): give the dense model")
        if self.before is not None and self._fingerprint() != self.before.report["quantization"]["fingerprint"]:
            raise UserError(f"--stage 2: {name} is not what it was when stage 1 ran: restore it, or run stage 1 again")

    def _fingerprint(self) -> str:
        return fingerprint_of(local_folder(self.base, offline=self.request.offline))

    def _data(self) -> tuple[ImageText, int]:
        """The data, without answers that are about no picture, and how many of those there were."""
        request = self.request
        if request.train_file is None and not is_reference(self.base):
            raise UserError(
                f"--method {request.method} needs --train-file: LLaVA-Instruct JSON or a webdataset archive of pairs "
                f"like those that {self.base} was trained on"
            )
        with self.console.stage("read"):
            data = read_answers(
                self.processor, self.limit, train_file=request.train_file or GRIDS, image_folder=request.image_folder,
                eval_file=request.eval_file, eval_share=request.eval_share, seed=self.recipe.seed,
            )  # fmt: skip
        blind = 0
        for answers in (data.train, data.held):
            seeing = [sample for sample in answers.samples if sample.picture is not None]
            blind += len(answers.samples) - len(seeing)
            answers.samples = seeing
        self.console.note(data.describe())
        if blind:
            self.console.note(f"finetune: {blind:,} answers are about no picture, and left out")
        return data, blind

    def _identity(self) -> dict[str, Any]:
        options = {name: value for name, value in record(self.recipe).items() if name not in WATCHING}
        images = fingerprint([self.processor.image_processor.to_json_string(), self.processor.chat_template])
        before = None if self.before is None else sha256_file(self.before.folder / REPORT)
        return dict(
            layout=LAYOUT, name=self.request.model, method=self.request.method, stage=self.stage, stage_1=before,
            model=self._fingerprint(), seqlen=self.limit, eval_share=self.request.eval_share, data=self.data.digests,
            processor=images, processes=processes(),
        ) | options  # fmt: skip

    # --- the work ---

    def lead(self, run: RunFolder) -> dict[str, Any]:
        """Measure the dense model, train, choose widths, write the packed model, measure what is read back, report."""
        loaded, masks = self._load(self.place)
        if masks:
            self.console.note(f"finetune: {len(masks)} Linears keep the mask of {self.base}")
        architecture, stored = describe(loaded.model, loaded.family), self._stored()
        size = sum(parameter.numel() for parameter in loaded.model.parameters())
        dense = self._measured(loaded.model, "dense")
        student = self._student(loaded, masks)
        trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        check_room(run.path, trained, self.place, self.recipe, len(self.data.train), (4 + stored.itemsize) * size)
        self.console.note(f"finetune: {trained:,} parameters are trained")
        student, results = self._train(run.path, student)
        with self.console.stage("save"):
            probe = self.data.held.batch([self.data.held[0]])
            written, layers, rest, bits = save_quantized(
                merged(student), loaded, self.family, run, MODEL, stored, probe, self.stage == 1
            )
        del student, loaded
        answers = dict(dense=dense, quantized=self._measured(written.to(self.place), "quantized"))
        write_results(run.path, results)
        report = self._report(run, architecture, answers, layers, rest, bits, results)
        atomic_write(run.path / "report.md", markdown(self.told(report)).encode())
        write_page(run.path / "report.html", report)
        card = f"{model_card(report)}\n#{markdown([quality(report)])}"
        atomic_write(run.path / MODEL / "README.md", card.encode())
        facts = {name: report["size"][name] for name in ("true_bits", "nominal_bits", "sparsity", "stored_bits")}
        facts |= dict(activation_bits=bits["file"]["activations"])
        write_manifest(run.path / MODEL, dict(base_model=self.base, settings=report["settings"], **facts))
        run.finish(report)
        return report

    def follow(self, folder: Path) -> None:
        """Train with the others."""
        self._train(folder, self._student(*self._load(self.place)))

    def _load(self, place: torch.device, dtype: str = "float32") -> tuple[LoadedModel, dict[str, Mask]]:
        """The dense model, and the masks that a compression left."""
        loaded = load_model(self.base, device=str(place), dtype=dtype, stream=False, **self.request.hub)
        if quantized_inputs(loaded.model):
            raise UserError(
                f"--method {self.request.method}: {self.base} was made by it: give the model that its stage 1 started "
                "from, or --stage 2 and the folder of stage 1"
            )
        masks = masks_of(loaded.model)
        if getattr(loaded.model, "is_quantized", False):
            loaded.model.dequantize(getattr(torch, dtype))  # in place
        return replace(loaded, family=self.family), masks

    def _stored(self) -> torch.dtype:
        """What the checkpoint holds, and what is written where nothing is packed."""
        return self.config.dtype or self.config.get_text_config().dtype or torch.float32

    def _student(self, loaded: LoadedModel, masks: dict[str, Mask]) -> Student:
        with self.console.stage("prepare"):
            if isinstance(self.recipe, Shaping):
                return shaped(loaded.model, self.recipe, self.data.train, masks)
            aligning = isinstance(self.recipe, Aligning) and self.recipe.use_align
            teacher = self._load(self.place, self.recipe.precision)[0].model if aligning else None
            return self._second(loaded, masks, teacher)

    def _second(self, loaded: LoadedModel, masks: dict[str, Mask], teacher: Any) -> Student:
        assert isinstance(self.recipe, Aligning)
        state = read_state(self._before().folder)
        return aligned(loaded.model, family_of(self.config), self.recipe, self.settings, state, teacher, masks)

    def _train(self, folder: Path, student: Student) -> tuple[Student, Results]:
        from mico.qat.cmibq.trainer import BottleneckTrainer

        recipe, hidden = self.recipe, self.console.quiet or not sys.stderr.isatty()
        on_cpu = self.request.device == "cpu" or not torch.cuda.is_available()
        arguments = recipe.arguments(folder / TRAINING, hidden, on_cpu)
        arguments.ddp_find_unused_parameters = not student.cmibq.fixed  # no width is learned any more in the last part
        arguments.ddp_broadcast_buffers = False  # each process measures for itself, and CMIBQ.advance takes the mean
        arguments.gradient_checkpointing_kwargs = CHECKPOINTING
        trainer = BottleneckTrainer(
            model=student, args=arguments, train_dataset=self.data.train, eval_dataset=self.data.held,
            data_collator=self.data.train.batch, scale_learning_rate=recipe.scale_learning_rate,
            theta_learning_rate=recipe.theta_learning_rate if isinstance(recipe, Shaping) else recipe.rate,
            choose=lambda: self._choose(student),
        )  # fmt: skip
        results = fit(trainer, folder, self.console)
        return gathered(student, trainer, self._blank) if recipe.weights_apart else student, results

    def _blank(self) -> Student:
        """A student on the CPU, to hold what was trained."""
        loaded, masks = self._load(torch.device("cpu"))
        if isinstance(self.recipe, Shaping):
            wrap(loaded.model, self.settings, None, masks)
            return Student(loaded.model)
        return self._second(loaded, masks, None)

    def _choose(self, student: Student) -> None:
        with self.console.stage("choose widths"):
            harden(student, self.data.train)

    def _measured(self, model: Any, name: str) -> dict[str, float]:
        """Answers held out."""
        from mico.qat.pruned import known_answers

        size = self.recipe.per_device_train_batch_size
        with self.console.stage(f"answers, {name}"):
            batches = math.ceil(len(self.data.held) / size)
            with self.console.bar(f"answers, {name}", batches) as advance:
                return known_answers(model.eval(), self.data.held, size, None, advance)

    # --- report ---

    def _report(
        self, run: RunFolder, architecture: dict[str, Any], answers: dict[str, Any], layers: list[dict[str, Any]],
        rest: int, bits: dict[str, Any], results: Results,
    ) -> dict[str, Any]:  # fmt: skip
        settings = dict(method=self.request.method, stage=self.stage) | record(self.recipe)
        base = str(Path(self.base).resolve()) if Path(self.base).is_dir() else self.base
        quantization = dict(
            base=base, fingerprint=self._fingerprint(), settings=record(self.settings), averages=bits["file"],
            stage_1=None if self.before is None else str(self.before.folder),
        )  # fmt: skip
        size = model_size(run.path / MODEL, architecture, layers, rest)
        settings |= dict(sparsity=round(size["sparsity"], 4), pattern=None, grouping=None)  # of the mask that stays
        return dict(
            model=base, arm=self._arm(size["sparsity"]), architecture=architecture, settings=settings,
            calibration=self.data.describe(),
            identity=dict(seed=self.recipe.seed, model=quantization["fingerprint"]), protocol=PROTOCOLS[0],
            dense={}, compressed={}, training=results,
            answers=answers, quantization=quantization, bit_map=bits, left_out=self.blind,
            rows_cut=len(self.data.train.cut) + len(self.data.held.cut),
            size=size, layers=layers, groups=[], fallbacks=[],
            seconds={name: round(value, 3) for name, value in self.console.so_far().items()},
            stage_peaks=dict(self.console.peaks), peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            environment=run.environment, command=sys.argv, folder=str(run.path),
        )  # fmt: skip

    def _arm(self, sparsity: float) -> str:
        """What comparisons call a run like this one: who chose the widths, targets, the parts left out, the stage."""
        recipe = self.recipe
        if isinstance(recipe, Shaping):
            settings, learned = self.settings, recipe.bits_allocation == "learned"
            parts = dict(ib=settings.use_ib, importance=settings.use_importance) if learned else {}
            name = f"{'cm-ibq' if learned else recipe.bits_allocation} {self.widths}"
            name += f" {sparsity:.0%} sparse" if sparsity else ""
        else:
            assert isinstance(recipe, Aligning)
            parts, name = dict(align=recipe.use_align, lora=recipe.use_lora), f"{self._before().report['arm']}, stage 2"
        return name + "".join(f" -{part}" for part, there in parts.items() if not there)

    @staticmethod
    def told(report: dict[str, Any]) -> list[Section]:
        """What was done, how well answers are known, which widths there are, what it took."""
        return cmibq_sections(report)

    @staticmethod
    def figures(report: dict[str, Any]) -> dict[str, Any]:
        """What a compression tells, with answers and the averages found in the file."""
        more = dict(stage=report["settings"]["stage"], answers=report["answers"])
        return flat(report) | more | dict(averages=report["quantization"]["averages"])
