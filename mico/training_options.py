"""The options of `mico finetune` alone; those it shares with other verbs are in options.py. No heavy import here."""

from __future__ import annotations

from typing import Annotated

from mico.options import _choice, _option
from mico.vision_options import METHODS as TOKEN_METHODS

_TEXT, _QUANTIZATION, _TRAINING, _LOG = "Text", "Quantization", "Training", "Log and checkpoints"
_PRUNING, _ADAPTERS = "Visual tokens (--method sparsevlm)", "Adapters"
_WIDTHS = "Learned widths (--method cmibq)"

Method = Annotated[
    str,
    _choice(
        _TRAINING,
        "--method",
        ("paretoq", "sparsevlm", "cmibq"),
        "At few bits, with few visual tokens, or (cmibq) a LLaVA with learned widths of weights and activations.",
    ),
]
WBits = Annotated[
    str | None,
    _option(
        _QUANTIZATION, "--w-bits", metavar="BITS", help="Bits a weight: 1, 1.58, 2, 3 or 4.", show_default="4"
    ),
]  # fmt: skip
GroupSize = Annotated[
    int | None,
    _option(
        _QUANTIZATION, "--group-size", help="Consecutive channels that share a step.",
        show_default="a whole row; cmibq 128",
    ),
]  # fmt: skip
Init = Annotated[
    str | None,
    _choice(
        _QUANTIZATION, "--init", ("mse", "paper"), "Where steps start: least squared error, or as published.",
        show_default="mse",
    ),
]  # fmt: skip
RetainTokens = Annotated[
    int | None,
    _option(
        _PRUNING, "--retain-tokens", metavar="N", help="Visual tokens to keep, on average.", show_default="a third"
    ),
]  # fmt: skip
TokenMethod = Annotated[
    str | None,
    _choice(_PRUNING, "--token-method", TOKEN_METHODS, "Who chooses the visual tokens.", show_default="sparsevlm"),
]
SparseVlmVersion = Annotated[
    str | None, _option(_PRUNING, "--sparsevlm-version", metavar="1.0|2.0", help="Of SparseVLM.", show_default="2.0")
]
Adaptive = Annotated[
    bool, _option(_PRUNING, "--adaptive", help="Let the rank of the attention choose how many tokens stay.")
]
LoraRank = Annotated[int | None, _option(_ADAPTERS, "--lora-rank", help="Rank of the adapters.", show_default="16")]
LoraAlpha = Annotated[
    float | None, _option(_ADAPTERS, "--lora-alpha", help="Adapters count alpha / rank.", show_default="32")
]
LoraDropout = Annotated[
    float | None, _option(_ADAPTERS, "--lora-dropout", help="Of the adapters' inputs.", show_default="0")
]
Stage = Annotated[
    int | None,
    _option(
        _WIDTHS, "--stage", metavar="1|2",
        help="1 learns the widths of MODEL; 2 goes on from MODEL, the folder that stage 1 left, with its widths.",
        show_default="1",
    ),
]  # fmt: skip
BitsAllocation = Annotated[
    str | None,
    _choice(
        _WIDTHS, "--bits-allocation", ("learned", "uniform", "knapsack"),
        "Who chooses widths; knapsack: squared gradients of the dense model.", show_default="learned",
    ),
]  # fmt: skip
TargetBitsAct = Annotated[
    float | None, _option(_WIDTHS, "--target-bits-act", help="Average bits an activation, 2 to 8.", show_default="4")
]
TargetBitsWeight = Annotated[
    float | None, _option(_WIDTHS, "--target-bits-weight", help="Average bits a weight, 2 to 8.", show_default="4")
]
NumGroups = Annotated[
    int | None, _option(_WIDTHS, "--num-groups", help="Channel groups of an activation.", show_default="8")
]
UseIb = Annotated[
    bool | None,
    _option(
        _WIDTHS, "--use-ib/--no-ib", help="The information rate of activations counts in the loss.",
        show_default="use-ib where widths are learned",
    ),
]  # fmt: skip
IbWeight = Annotated[
    float | None,
    _option(_WIDTHS, "--ib-weight", help="Beta, of the rate.", show_default="0.01; in stage 2 that of stage 1"),
]
UseImportance = Annotated[
    bool | None,
    _option(
        _WIDTHS, "--use-importance/--no-importance", help="What gradients tell decides widths.",
        show_default="use-importance",
    ),
]  # fmt: skip
ThetaRate = Annotated[
    float | None, _option(_WIDTHS, "--theta-learning-rate", help="Of what decides widths.", show_default="0.01")
]
UseAlign = Annotated[
    bool | None,
    _option(
        _WIDTHS, "--use-align/--no-align", help="Stage 2: pull pictures to the text that asks about them.",
        show_default="use-align",
    ),
]  # fmt: skip
AlignWeight = Annotated[
    float | None, _option(_WIDTHS, "--align-weight", help="Of the alignment in the loss.", show_default="0.3")
]
UseLora = Annotated[
    bool | None,
    _option(
        _WIDTHS, "--use-lora/--no-lora",
        help="Stage 2: train adapters of projector and language model, or their weights.", show_default="use-lora",
    ),
]  # fmt: skip
TrainFile = Annotated[
    str | None,
    _option(
        _TEXT, "--train-file", metavar="FILE",
        help="JSONL rows with a field 'text', or a text file. sparsevlm, cmibq: LLaVA-Instruct JSON, a webdataset "
        "tar or a folder of them, or 'grids'.", show_default="the documentation inside Python; grids with tiny-llava",
    ),
]  # fmt: skip
ImageFolder = Annotated[
    str | None,
    _option(
        _TEXT, "--image-folder", metavar="DIR", help="Where the picture paths of a LLaVA-Instruct file start.",
        show_default="the folder of the file",
    ),
]  # fmt: skip
EvalFile = Annotated[
    str | None,
    _option(_TEXT, "--eval-file", metavar="FILE", help="Text to evaluate on.", show_default="a share held out"),
]
EvalShare = Annotated[
    float, _option(_TEXT, "--eval-share", help="Share of the documents held out where there is no --eval-file.")
]
Seqlen = Annotated[
    int | None,
    _option(_TEXT, "--seqlen", help="Tokens of a training window.", show_default="the model's maximum, at most 1024"),
]
Epochs = Annotated[
    float | None,
    _option(_TRAINING, "--num-train-epochs", help="Passes over the data.", show_default="1; cmibq 3, in stage 2 2"),
]
MaxSteps = Annotated[
    int | None, _option(_TRAINING, "--max-steps", help="Optimizer steps, instead of epochs.", show_default=False)
]
LearningRate = Annotated[
    float | None,
    _option(
        _TRAINING, "--learning-rate", help="Of the weights.",
        show_default="2e-5; 1e-5 at 3 and 4 bits and in stage 2 of cmibq; sparsevlm 2e-4",
    ),
]  # fmt: skip
ScaleRate = Annotated[
    float | None,
    _option(_TRAINING, "--scale-learning-rate", help="Of the steps.", show_default="--learning-rate; cmibq 0.001"),
]
Scheduler = Annotated[str, _option(_TRAINING, "--lr-scheduler-type", help="A schedule of transformers.")]
Warmup = Annotated[float, _option(_TRAINING, "--warmup-steps", help="Steps; below 1, their share of all.")]
WeightDecay = Annotated[float, _option(_TRAINING, "--weight-decay", help="Of the weights; steps have none.")]
MaxGradNorm = Annotated[float, _option(_TRAINING, "--max-grad-norm", help="Gradients are clipped to this norm.")]
TrainBatch = Annotated[int, _option(_TRAINING, "--per-device-train-batch-size", help="Windows at a time on a device.")]
Accumulation = Annotated[int, _option(_TRAINING, "--gradient-accumulation-steps", help="Batches before a step.")]
Kd = Annotated[
    bool | None,
    _option(_TRAINING, "--kd/--no-kd", help="Learn from the dense model's distribution.", show_default="no-kd"),
]
KdWeight = Annotated[
    float | None,
    _option(
        _TRAINING, "--kd-weight", help="Share in the loss of what the teacher says, 0 to 1.",
        show_default="1 with --kd; sparsevlm 0.5",
    ),
]  # fmt: skip
Teacher = Annotated[
    str | None,
    _option(_TRAINING, "--teacher", metavar="MODEL", help="The model to learn from.", show_default="the dense model"),
]
Bf16 = Annotated[bool, _option(_TRAINING, "--bf16/--no-bf16", help="Compute in bfloat16; masters stay float32.")]
Checkpointing = Annotated[
    bool, _option(_TRAINING, "--gradient-checkpointing", help="Compute activations again instead of keeping them.")
]
Deepspeed = Annotated[
    str | None, _option(_TRAINING, "--deepspeed", metavar="FILE", help="A DeepSpeed configuration.", show_default=False)
]
Fsdp = Annotated[
    str | None, _option(_TRAINING, "--fsdp", help="FSDP options, as 'full_shard auto_wrap'.", show_default=False)
]
LoggingSteps = Annotated[int, _option(_LOG, "--logging-steps", help="Steps between two lines of the log.")]
EvalSteps = Annotated[
    int | None, _option(_LOG, "--eval-steps", help="Steps between two evaluations.", show_default="only at the end")
]
SaveSteps = Annotated[int, _option(_LOG, "--save-steps", help="Steps between two checkpoints; the last two stay.")]
ReportTo = Annotated[str, _option(_LOG, "--report-to", metavar="NAME", help="tensorboard, wandb, both, or none.")]
Device = Annotated[str, _option(_TRAINING, "--device", help="auto, cpu or cuda.")]
