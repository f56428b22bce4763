"""The options that commands share: each is declared once, by the name the field uses. No heavy import here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mico.profiles import PROFILES
from mico.settings import ALLOCATIONS, ARMS, CLUSTERINGS, EXPORTS, GROUPINGS, METHOD_NAMES, MI_METHODS, PROTOCOLS

_DATA, _COMPRESSION, _GROUPS, _RUN = "Model and data", "Compression", "Channel groups", "Run"
_MEASURES = "What is measured"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


def _choice(panel: str, name: str, allowed: tuple[str, ...], help: str, **more: Any) -> Any:
    """A name out of a table; a wrong one is refused by the verb, in one line that lists the valid ones."""
    return _option(panel, name, help=f"{help} One of {', '.join(allowed)}.", metavar="NAME", **more)


# --- model and data -------------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help="A name of `mico models`, a hub id, or a local folder.", show_default=False)]
Runs = Annotated[
    list[str],
    typer.Argument(help="Folders of mico compress, or of mico eval --suite.", show_default=False, metavar="FOLDER"),
]
Stream = Annotated[
    bool | None,
    _option(
        _RUN, "--stream/--no-stream", help="Keep the blocks on disk and read each when it is needed.",
        show_default="when the model would take most of the free memory",
    ),
]  # fmt: skip
PackedModel = Annotated[
    str, typer.Argument(help="A run folder of mico compress, or the model/ inside.", show_default=False)
]
Original = Annotated[str, typer.Argument(help="The authors' folder of the model.", show_default=False)]
Converted = Annotated[str, typer.Argument(help="The folder to make.", show_default=False)]
VisionTower = Annotated[
    str | None,
    _option(
        _DATA, "--vision-tower", metavar="FOLDER",
        help="The CLIP model that sees the images, where the checkpoint does not hold it.",
    ),
]  # fmt: skip
Calib = Annotated[
    str | None,
    _option(
        _DATA, "--calib",
        help="Text to calibrate on: wikitext2, ptb, c4 or docs (the documentation inside Python); for a model that "
        "sees, image-text pairs too: LLaVA-Instruct (.json, .jsonl), webdataset (.tar, or a folder of them), grids.",
        show_default="c4; docs for a shipped model without --data-dir, grids for one that sees",
    ),
]  # fmt: skip
ImageFolder = Annotated[
    str | None,
    _option(
        _DATA, "--image-folder", metavar="DIR", help="Where the pictures lie that a LLaVA-Instruct file names.",
        show_default="the folder of the file",
    ),
]  # fmt: skip
CompressVision = Annotated[
    bool, _option(_COMPRESSION, "--compress-vision", help="Compress the blocks of the vision tower too.")
]
CompressProjector = Annotated[
    bool, _option(_COMPRESSION, "--compress-projector", help="Compress the projector to the language model too.")
]
DataDir = Annotated[
    str | None,
    _option(
        _DATA, "--data-dir", show_default="$MICO_DATA_DIR, else the hub",
        help="Folder with wikitext2/, ptb/, c4/ holding train|validation|test in txt, jsonl, json.gz or parquet.",
    ),
]  # fmt: skip
DataFile = Annotated[str | None, _option(_DATA, "--data-file", help="A text of your own, instead of --calib.")]
EvalFile = Annotated[str | None, _option(_DATA, "--data-file", help="A text of your own to measure on.")]
Nsamples = Annotated[int, _option(_DATA, "--nsamples", help="Calibration windows.")]
Seqlen = Annotated[
    int | None,
    _option(_DATA, "--seqlen", help="Tokens a window.", show_default="the model's maximum, at most 2048"),
]
BatchSize = Annotated[int, _option(_DATA, "--batch-size", help="Windows in one forward pass.")]
Seed = Annotated[int, _option(_DATA, "--seed", help="Draws the calibration windows.")]
Eval = Annotated[
    str | None,
    _option(
        _DATA, "--eval", help="Texts to measure perplexity on, with commas: wikitext2,ptb,c4,docs; or all, or none.",
        show_default="wikitext2,ptb,c4; docs for a shipped model without --data-dir",
    ),
]  # fmt: skip
Offline = Annotated[bool, _option(_DATA, "--offline", help="Use what is on this machine; ask no hub.")]
TrustRemoteCode = Annotated[bool, _option(_DATA, "--trust-remote-code", help="Run code that comes with the model.")]

# --- evaluation -----------------------------------------------------------------------------------------------------

EvalTexts = Annotated[
    str | None,
    _option(
        _MEASURES, "--eval", help="Texts for perplexity, with commas: wikitext2,ptb,c4,docs; or all, or none.",
        show_default="none with --tasks or --suite; else those of a run folder; else as mico compress",
    ),
]  # fmt: skip
Protocol = Annotated[
    str, _choice(_MEASURES, "--protocol", PROTOCOLS, "By which paper texts are joined and cut into windows.")
]
Dense = Annotated[
    str | None,
    _option(
        _MEASURES, "--dense", metavar="MODEL", help="Dense model to compare with: KL divergence, agreement, samples.",
        show_default="the one that a run folder was made from",
    ),
]  # fmt: skip
Kl = Annotated[
    bool | None,
    _option(
        _MEASURES, "--kl/--no-kl", help="Measure the dense model too, for KL divergence and agreement.",
        show_default="on where the dense model is known",
    ),
]  # fmt: skip
Tasks = Annotated[
    str | None,
    _option(
        _MEASURES, "--tasks", metavar="NAME,NAME",
        help="Tasks of lm-eval; mico_choice and mico_rolling come with mico and need no network.",
    ),
]  # fmt: skip
IncludePath = Annotated[
    str | None, _option(_MEASURES, "--include-path", metavar="DIR", help="Folder with YAML files of more tasks.")
]
NumFewshot = Annotated[
    int | None,
    _option(_MEASURES, "--num-fewshot", metavar="N", help="Examples before a question.", show_default="the task's own"),
]
Limit = Annotated[
    float | None,
    _option(_MEASURES, "--limit", metavar="N", help="Questions a task or suite, a share of them when below 1."),
]
LogSamples = Annotated[bool, _option(_MEASURES, "--log-samples", help="Keep what tasks asked and what was answered.")]
Samples = Annotated[
    int, _option(_MEASURES, "--samples", metavar="N", help="Heads of N windows that the models go on with, greedily.")
]
OutputPath = Annotated[
    str | None,
    _option(
        _RUN, "--output-path", metavar="DIR", help="Folder for results.json, in lm-eval's shape, and finished tasks.",
        show_default="eval/ of a run folder",
    ),
]  # fmt: skip

# --- compression ----------------------------------------------------------------------------------------------------

Sparsity = Annotated[
    float | None,
    _option(
        _COMPRESSION, "--sparsity", help="Share of the weights to prune.",
        show_default="0.5; 0 with --pattern, --profile, gptq or rtn",
    ),
]  # fmt: skip
Pattern = Annotated[str | None, _option(_COMPRESSION, "--pattern", metavar="N:M", help="Keep n of every m, as 2:4.")]
Wbits = Annotated[int, _option(_COMPRESSION, "--wbits", help="Bits a weight, 2 to 8; 16 only prunes.")]
TargetAvgBits = Annotated[
    float | None,
    _option(
        _COMPRESSION, "--target-avg-bits", show_default="what --wbits would take in all",
        help="Mean bits of the codes of kept weights, spread over the groups.",
    ),
]  # fmt: skip
Method = Annotated[
    str | None,
    _choice(_COMPRESSION, "--method", METHOD_NAMES, "How weights are compressed.", show_default="by --arm, else mico"),
]
Arm = Annotated[
    str | None,
    _choice(
        _COMPRESSION, "--arm", ARMS,
        "A row of the ablation: SparseGPT as published, with groups by importance, or with groups by MI.",
    ),
]  # fmt: skip
Allocation = Annotated[
    str | None,
    _choice(
        _COMPRESSION, "--allocation", ALLOCATIONS, "How groups get their bits.", show_default="by --arm, else rate"
    ),
]  # fmt: skip
GroupSize = Annotated[
    int | None,
    _option(
        _COMPRESSION, "--group-size", help="Consecutive channels that share a scale.",
        show_default="a whole row; 128 with --profile vllm, 32 with gguf",
    ),
]  # fmt: skip
Profile = Annotated[
    str | None,
    _choice(
        _COMPRESSION, "--profile", tuple(PROFILES),
        "Only grids and groups that mico export can write exactly for this target.",
    ),
]  # fmt: skip
Percdamp = Annotated[float, _option(_COMPRESSION, "--percdamp", help="Damping, as a share of the mean diagonal.")]
EmbedBits = Annotated[
    int, _option(_COMPRESSION, "--embed-bits", help="Bits of embedding and output head: 16, 8 or 4.", metavar="N")
]
Blocksize = Annotated[int, _option(_COMPRESSION, "--blocksize", help="Columns swept between two updates.")]

# --- channel groups -------------------------------------------------------------------------------------------------

NGroups = Annotated[str, _option(_GROUPS, "--n-groups", metavar="INTEGER|auto", help="Groups of every stream.")]
UseMiGrouping = Annotated[
    bool | None,
    _option(
        _GROUPS, "--use-mi-grouping/--no-mi-grouping", help="Group channels, by MI unless --grouping says otherwise.",
        show_default="on for method mico",
    ),
]  # fmt: skip
Grouping = Annotated[
    str | None,
    _choice(
        _GROUPS, "--grouping", GROUPINGS, "What makes channels a group; all but mi are controls.",
        show_default="by --arm, else mi",
    ),
]  # fmt: skip
GroupingKind = Annotated[
    str, _choice(_GROUPS, "--grouping", GROUPINGS, "What makes channels a group; all but mi are controls.")
]
MiMethod = Annotated[str, _choice(_GROUPS, "--mi-method", MI_METHODS, "Estimator of mutual information.")]
Cluster = Annotated[str, _choice(_GROUPS, "--cluster", CLUSTERINGS, "Clustering of the channels.")]
StatisticsDir = Annotated[
    str | None,
    _option(_GROUPS, "--statistics", metavar="DIR", help="Folder of mico calibrate.", show_default="found or made"),
]
GroupsDir = Annotated[
    str | None,
    _option(_GROUPS, "--groups", metavar="DIR", help="Folder of mico mi-group.", show_default="found or made"),
]

# --- run ------------------------------------------------------------------------------------------------------------

Save = Annotated[
    str | None,
    _option(
        _RUN, "--save", metavar="DIR", help="Output folder.",
        show_default="a folder in $MICO_RESULTS, else in ./results, named after model and options",
    ),
]  # fmt: skip
Device = Annotated[str, _option(_RUN, "--device", help="auto, cpu, cuda, cuda:1, ...; several: cuda:0,cuda:1")]
Dtype = Annotated[
    str,
    _option(
        _RUN, "--dtype", metavar="NAME",
        help="float32, bfloat16 or float16; auto is float32 on the CPU and the checkpoint's own on a GPU.",
    ),
]  # fmt: skip
Target = Annotated[
    str,
    _choice(
        _RUN, "--to", EXPORTS, "What to write: a dense model, compressed-tensors, a GGUF file, GPTQ.",
        show_default=False,
    ),
]  # fmt: skip
ExportDtype = Annotated[
    str, _option(_RUN, "--dtype", metavar="NAME", help="Of a dense export; auto is the checkpoint's own.")
]
PromptTokens = Annotated[int, _option(_RUN, "--prompt-tokens", help="Tokens of the prompt (prefill).")]
NewTokens = Annotated[int, _option(_RUN, "--new-tokens", help="Tokens that are generated after it (decode).")]
BatchSizes = Annotated[
    str, _option(_RUN, "--batch-size", metavar="N,N", help="Sequences at a time; several with commas, as 1,64.")
]
Repeats = Annotated[int, _option(_RUN, "--repeats", help="Runs of each model; they take turns.")]
Execution = Annotated[
    str,
    _option(
        _RUN, "--execution", metavar="NAME",
        help="auto: kernels for few tokens, dense weights for many; packed: never keep a dense weight; dense: always.",
    ),
]  # fmt: skip
AllowPartial = Annotated[
    bool, _option(_RUN, "--allow-partial", help="Go on when under 90 % of the Linear parameters can be compressed.")
]
Strict = Annotated[bool, _option(_RUN, "--strict", help="Exit with 3 when a fallback was needed.")]
JsonFile = Annotated[str | None, _option(_RUN, "--json", metavar="FILE", help="Write the figures here as JSON.")]
MarkdownFile = Annotated[str | None, _option(_RUN, "--markdown", metavar="FILE", help="Write what is shown here.")]
HtmlFile = Annotated[
    str | None, _option(_RUN, "--html", metavar="FILE", help="Write one page with figures here; it needs no network.")
]
FiguresDir = Annotated[
    str | None, _option(_RUN, "--figures", metavar="DIR", help="Write every figure here, as PNG and as SVG.")
]
Baseline = Annotated[
    str | None,
    _option(
        _RUN, "--baseline", metavar="NAME", help="Arm that the others are tested against: its name, or a folder of it.",
        show_default="that of the first folder",
    ),
]  # fmt: skip
TensorBoard = Annotated[
    str | None,
    _option(_RUN, "--tensorboard", metavar="DIR", help="Log figures for TensorBoard, in DIR a folder a run."),
]
WandB = Annotated[
    str | None,
    _option(_RUN, "--wandb", metavar="PROJECT", help="Log figures to Weights & Biases (WANDB_MODE=offline works)."),
]
PushToHub = Annotated[
    str | None,
    _option(_RUN, "--push-to-hub", metavar="ID", help="Upload the finished model to this repository of the hub."),
]
Private = Annotated[bool, _option(_RUN, "--private", help="Make a new repository private.")]
Repository = Annotated[
    str, typer.Argument(help="NAME or ORGANIZATION/NAME on the hub.", show_default=False, metavar="ID")
]
CommitMessage = Annotated[str, _option(_RUN, "--commit-message", metavar="TEXT", help="What the commit says.")]
Debug = Annotated[bool, _option(_RUN, "--debug", help="Show tracebacks and the warnings of libraries.")]
Verbose = Annotated[
    int, _option(_RUN, "--verbose", "-v", count=True, help="One line a layer.", show_default=False, metavar="")
]
Quiet = Annotated[bool, _option(_RUN, "--quiet", "-q", help="No notes and no bars, only the result.")]
