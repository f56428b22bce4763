"""Options of `mico finetune --method cmibq`, a record for each stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mico.errors import UserError
from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.settings import Settings
from mico.qat.recipe import Training, launched
from mico.settings import choose

ALLOCATIONS = ("learned", "uniform", "knapsack")
GROUP = 128  # columns of a weight that share a scale a row, and a width


@dataclass(frozen=True, kw_only=True)
class Quantizing(Training):
    """Options of both stages.

    scale_learning_rate: of steps, zero points, priors and the heads of the alignment loss. ib_weight: beta, of the rate
    in the loss; None: 0.01, in stage 2 that of stage 1.
    """

    scale_learning_rate: float = 1e-3
    ib_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be("scale_learning_rate", lambda value: 0 < value < math.inf, "above 0")
        self._must_be("ib_weight", lambda value: value is None or 0 <= value < math.inf, "0 or more")
        if self.fsdp is not None or launched("USE_FSDP"):
            raise UserError(
                f"--fsdp {self.fsdp or 'of accelerate'}: FSDP flattens weights and the steps of their quantizers into "
                "one: leave it out, and give --deepspeed with zero_optimization stage 3 to part them among processes"
            )
        if half := self._half:
            raise UserError(
                f"--deepspeed {self.deepspeed or 'of accelerate'}: {half} would hold the steps of the quantizers in 16 "
                "bits, too few to learn in: choose torch_autocast in its place, as pipelines/deepspeed/zero2.json does"
            )

    @property
    def loaded_apart(self) -> bool:
        """Never: what the dense model is measured for, before weights are parted, would take hours on the CPU."""
        return False

    @property
    def _half(self) -> str | None:
        """Which 16-bit format DeepSpeed is to hold parameters in; --bf16 decides where its file is silent."""
        config = self.deepspeed_config
        asked = {"bf16": {"enabled": self.bf16}} | config if config else {}
        on = {True, "auto"} if self.bf16 else {True}
        known = {name: asked.get(name) for name in ("bf16", "fp16")}
        return next(
            (name for name, part in known.items() if isinstance(part, dict) and part.get("enabled") in on), None
        )


@dataclass(frozen=True, kw_only=True)
class Shaping(Quantizing):
    """Stage 1: weights, steps and widths are learned together.

    bits_allocation: learned; or fixed before the training: uniform (every group has the target), knapsack (by squared
    gradients and errors of the dense model). use_ib: None: where widths are learned.
    """

    num_train_epochs: float = 3.0
    bits_allocation: str = "learned"
    target_bits_act: float = 4.0
    target_bits_weight: float = 4.0
    num_groups: int = 8
    group_size: int = GROUP
    use_ib: bool | None = None
    use_importance: bool = True
    theta_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("--bits-allocation", self.bits_allocation, ALLOCATIONS)
        self._must_be("group_size", lambda value: value >= 1, "at least 1")
        self._must_be("theta_learning_rate", lambda value: 0 < value < math.inf, "above 0")
        for option in ("target_bits_act", "target_bits_weight"):
            value = getattr(self, option)
            if self.bits_allocation == "uniform" and value not in BITS:
                raise UserError(
                    f"--{option.replace('_', '-')} {value:g}: with --bits-allocation uniform choose from "
                    f"{', '.join(map(str, BITS))}"
                )
        self.settings()  # which checks the others

    def settings(self) -> Settings:
        learned = self.bits_allocation == "learned"
        weight = Settings.ib_weight if self.ib_weight is None else self.ib_weight
        return Settings(
            target_bits_act=self.target_bits_act, target_bits_weight=self.target_bits_weight,
            num_groups=self.num_groups, weight_group=self.group_size, ib_weight=weight, seed=self.seed,
            use_ib=learned if self.use_ib is None else self.use_ib, use_importance=self.use_importance,
            preference=Settings.preference if learned else 0.0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Aligning(Quantizing):
    """Stage 2: widths stay; adapters, or (use_lora False) the weights of projector and language model, are trained.

    use_align: pull pictures to the text that asks about them, align_weight: of that in the loss.
    """

    num_train_epochs: float = 2.0
    use_align: bool = True
    align_weight: float = 0.3
    use_lora: bool = True
    lora_rank: int = 16
    lora_alpha: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be("lora_rank", lambda value: value >= 1, "at least 1")
        self._must_be("lora_alpha", lambda value: 0 < value < math.inf, "above 0")
        self._must_be("align_weight", lambda value: 0 < value < math.inf, "above 0, or leave it out for --no-align")

    @property
    def rate(self) -> float:
        """Learning rate of the weights, or of their adapters."""
        return self.learning_rate or 1e-5


STAGES: dict[int, type[Quantizing]] = {1: Shaping, 2: Aligning}
