"""How a model is trained: options of `mico finetune` as validated records, and as arguments of the Trainer."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mico.errors import UserError
from mico.files import read_json
from mico.packed.bits import TERNARY
from mico.qat.paretoq import STARTS, WIDTHS
from mico.settings import choose

TRACKERS = ("tensorboard", "wandb", "none")
SCHEDULES = (
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt",
)  # fmt: skip
FSDP_WORDS = (
    "full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2", "offload", "auto_wrap",
)  # fmt: skip
FEW_BITS_RATE, MORE_BITS_RATE = 2e-5, 1e-5  # of the paper, at 1 to 2 bits and at 3 and 4
SCALE_RATE = 1.0  # of a step's learning rate to that of the weights
PATIENCE = 24 * 3600  # seconds that processes wait for the first, which measures the dense model before it joins them
GATHERED = "stage3_gather_16bit_weights_on_model_save"
WATCHING = ("report_to",)  # options that change nothing of what comes out
_COUNTS = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_steps",
    "save_steps",
)  # fmt: skip

Options = TypeVar("Options", bound="Training")


def launched(name: str) -> bool:
    """Whether `accelerate launch` asks for it."""
    return os.environ.get(f"ACCELERATE_{name}", "false").lower() == "true"


def processes() -> int:
    """How many processes train together, as torchrun and accelerate tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of every method: schedule, batches, precision, devices, log. None: the default that a property gives."""

    num_train_epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 200
    deepspeed: str | None = None
    fsdp: str | None = None
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for option in _COUNTS:
            self._must_be(option, lambda value: value >= 1, "at least 1")
        for option in ("learning_rate", "num_train_epochs"):
            self._must_be(option, lambda value: 0 < value < math.inf, "above 0")
        for option in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
            self._must_be(option, lambda value: 0 <= value < math.inf, "0 or more")
        choose("--lr-scheduler-type", self.lr_scheduler_type, SCHEDULES)
        if self.deepspeed is not None and not Path(self.deepspeed).is_file():
            raise UserError(f"--deepspeed {self.deepspeed}: no such file")
        if self.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"--deepspeed {self.deepspeed}: deepspeed is not installed: pip install deepspeed")
        if self.weights_apart and self.deepspeed_config["zero_optimization"].get(GATHERED) is not True:
            raise UserError(
                f'--deepspeed {self.deepspeed or "of accelerate"}: set "{GATHERED}": true in zero_optimization '
                "(accelerate launch without a file: --zero3_save_16bit_model true), or the weights that stage 3 parts "
                "are never written"
            )
        for word in (self.fsdp or "").split():
            choose("--fsdp", word, FSDP_WORDS)
        for name in self.trackers:
            choose("--report-to", name, TRACKERS)
            if name != "none" and importlib.util.find_spec(name) is None:
                raise UserError(f"--report-to {name}: {name} is not installed: pip install 'mico[track]'")

    def _must_be(self, option: str, holds: Any, what: str) -> None:
        value = getattr(self, option)
        if value is not None and not holds(value):
            raise UserError(f"--{option.replace('_', '-')} {value}: must be {what}")

    @property
    def trackers(self) -> list[str]:
        return [name.strip() for name in self.report_to.split(",") if name.strip()]

    @property
    def rate(self) -> float:
        """Learning rate of the weights."""
        return self.learning_rate or FEW_BITS_RATE

    @property
    def parted(self) -> bool:
        """Whether each process is to hold a part of the model: asked for here, or of `accelerate launch`."""
        return self.deepspeed is not None or self.fsdp is not None or launched("USE_DEEPSPEED") or launched("USE_FSDP")

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """What DeepSpeed is asked for, by its names; {} without it. Raises UserError for a file that is no JSON."""
        file = self.deepspeed
        if file is None and launched("USE_DEEPSPEED"):
            file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
            if file == "none":
                stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
                return dict(zero_optimization={"stage": stage, GATHERED: launched("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")})
        return {} if file is None else read_json(Path(file), "give a DeepSpeed configuration as JSON")

    @property
    def precision(self) -> str:
        """What is multiplied in; a model that is not trained is held in it."""
        cast = self.deepspeed_config.get("torch_autocast")
        half = isinstance(cast, dict) and cast.get("enabled") is True and cast.get("dtype") in ("bfloat16", "bf16")
        return "bfloat16" if self.bf16 or half else "float32"

    @property
    def weights_apart(self) -> bool:
        """Whether every process holds a part of the weights while training (ZeRO-3)."""
        zero = self.deepspeed_config.get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3

    @property
    def loaded_apart(self) -> bool:
        """Whether no process takes the whole model to its GPU, which is then read in the memory of the host."""
        return self.parted

    def steps(self, windows: int) -> int:
        """Optimizer steps over `windows` training windows."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes()
        return self.max_steps or max(1, math.ceil(self.num_train_epochs * windows / batch))

    def arguments(self, folder: Path, quiet: bool, use_cpu: bool) -> Any:
        """TrainingArguments of transformers, which writes its checkpoints into `folder`."""
        from transformers import TrainingArguments

        evaluates: Any = {} if self.eval_steps is None else dict(eval_strategy="steps", eval_steps=self.eval_steps)
        try:
            return TrainingArguments(
                output_dir=str(folder), run_name=folder.parent.name, use_cpu=use_cpu, disable_tqdm=quiet,
                num_train_epochs=self.num_train_epochs, max_steps=self.max_steps or -1, learning_rate=self.rate,
                lr_scheduler_type=self.lr_scheduler_type, warmup_steps=self.warmup_steps,
                weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm,
                per_device_train_batch_size=self.per_device_train_batch_size,
                per_device_eval_batch_size=self.per_device_train_batch_size,
                gradient_accumulation_steps=self.gradient_accumulation_steps, bf16=self.bf16,
                gradient_checkpointing=self.gradient_checkpointing, logging_steps=self.logging_steps,
                logging_nan_inf_filter=False, save_steps=self.save_steps, save_total_limit=2,
                deepspeed=self.deepspeed, fsdp=self.fsdp, ddp_timeout=PATIENCE, report_to=self.trackers or ["none"],
                seed=self.seed, data_seed=self.seed, remove_unused_columns=False, label_names=["labels"],
                dataloader_pin_memory=not use_cpu, **evaluates,
            )  # fmt: skip
        except (ValueError, ImportError) as error:  # of an option that transformers alone can judge
            raise UserError(f"these options of training do not go together: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """Options of ParetoQ.

    w_bits: 1, 1.58, 2, 3 or 4. kd_weight: share of the divergence from the dense model in the loss.
    """

    w_bits: float = 4
    group_size: int | None = None
    init: str = "mse"
    scale_learning_rate: float | None = None
    kd: bool = False
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.w_bits not in WIDTHS:
            raise UserError(f"--w-bits {self.w_bits:g}: choose from {', '.join(f'{bits:g}' for bits in WIDTHS)}")
        choose("--init", self.init, tuple(STARTS))
        super().__post_init__()
        self._must_be("group_size", lambda value: value >= 1, "at least 1")
        self._must_be("scale_learning_rate", lambda value: 0 < value < math.inf, "above 0")
        self._must_be("kd_weight", lambda value: 0 <= value <= 1, "from 0 to 1")

    @property
    def rate(self) -> float:
        """Learning rate of the weights."""
        return self.learning_rate or (FEW_BITS_RATE if self.w_bits <= 2 else MORE_BITS_RATE)

    @property
    def scale_rate(self) -> float:
        """Learning rate of the steps."""
        return self.scale_learning_rate or SCALE_RATE * self.rate


def options_of(kind: type[Options], options: dict[str, Any], method: str) -> Options:
    """The record of a method from the options that were given. Raises UserError for one that the method lacks."""
    known = {field.name for field in fields(kind)}
    refuse_given(method, **{name: value for name, value in options.items() if name not in known})
    return kind(**options)


def refuse_given(method: str, **options: Any) -> None:
    """Raise UserError naming the first of the options that is not None: the method has no use for it."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} {value}: --method {method} has no such option: leave it out")


def bits_of(text: str) -> float:
    """'1.58' -> TERNARY, '2' -> 2. Raises UserError for no number."""
    try:
        return TERNARY if float(text) == TERNARY else int(text)
    except ValueError:
        raise UserError(f"--w-bits {text}: choose from {', '.join(f'{bits:g}' for bits in WIDTHS)}") from None
