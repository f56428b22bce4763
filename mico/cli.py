"""The command line: options, help, exit codes. Each verb is imported inside its command, so that help is quick."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole

from mico import __version__
from mico import options as o
from mico.errors import (
    CONTRACT,
    INTERNAL,
    INTERRUPTED,
    TERMINATED,
    USER,
    ContractError,
    Silenced,
    Terminated,
    UserError,
    disk_is_full,
    is_forbidden,
    out_of_memory,
)

BROKEN_PIPE = 141  # what a shell reports for a program that a closed pipe ended
_KEPT = "finished blocks are kept, the same command again goes on after them"
_TASKS_KEPT = "finished tasks are kept, the same command again goes on after them"
_USAGE: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever this version of typer keeps it


def _hyphens(token: str) -> str:
    """Option and command names may be typed with underscores, the habit of the research scripts."""
    return token.replace("_", "-")


app = typer.Typer(
    name="mico",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=dict(token_normalize_func=_hyphens, help_option_names=["-h", "--help"], max_content_width=120),
    epilog="Example: mico compress tiny-llama --sparsity 0.5 --wbits 4",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mico {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress language models after training, guided by mutual information, measured in true bits."""


# --- commands -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: mico plan llama2-7b --sparsity 0.5 --wbits 4")
def plan(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    eval: o.Eval = None, offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False,
    stream: o.Stream = None, sparsity: o.Sparsity = None, pattern: o.Pattern = None, wbits: o.Wbits = 4,
    target_avg_bits: o.TargetAvgBits = None, method: o.Method = None, arm: o.Arm = None,
    allocation: o.Allocation = None, group_size: o.GroupSize = None, percdamp: o.Percdamp = 0.01,
    blocksize: o.Blocksize = 128, profile: o.Profile = None, embed_bits: o.EmbedBits = 16, n_groups: o.NGroups = "auto",
    use_mi_grouping: o.UseMiGrouping = None, grouping: o.Grouping = None, mi_method: o.MiMethod = "gaussian",
    cluster: o.Cluster = "spectral", save: o.Save = None, device: o.Device = "auto", dtype: o.Dtype = "auto",
    allow_partial: o.AllowPartial = False, json: o.JsonFile = None, debug: o.Debug = False, verbose: o.Verbose = 0,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Memory, disk, time and output size that compress would take with these options; no weight is read."""
    _before_imports(offline, quiet)
    from mico.plan import plan as run
    from mico.plan import section

    result = run(
        model, sparsity=sparsity, pattern=pattern, wbits=wbits, target_avg_bits=target_avg_bits,
        n_groups=_count(n_groups), use_mi_grouping=use_mi_grouping, grouping=grouping, mi_method=mi_method,
        cluster=cluster, method=method, arm=arm, allocation=allocation, group_size=group_size, percdamp=percdamp,
        blocksize=blocksize, profile=profile, embed_bits=embed_bits, calib=calib, nsamples=nsamples, seqlen=seqlen,
        batch_size=batch_size, seed=seed, device=device, dtype=dtype, eval=eval, save=save, data_dir=data_dir,
        data_file=data_file, offline=offline, trust_remote_code=trust_remote_code, stream=stream,
        allow_partial=allow_partial, json=json, console=_console(quiet, verbose),
    )  # fmt: skip
    _show(section(result))


@app.command(epilog="Example: mico calibrate opt-125m --calib c4 --nsamples 128 --data-dir texts")
def calibrate(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False, stream: o.Stream = None,
    save: o.Save = None, device: o.Device = "auto", dtype: o.Dtype = "auto", debug: o.Debug = False,
    verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Measure the activations of a model once; mi-group and compress of the same options use them."""
    _before_imports(offline, quiet)
    from mico.calibrate import calibrate as run
    from mico.calibrate import section

    result = run(
        model, calib=calib, data_dir=data_dir, data_file=data_file, nsamples=nsamples, seqlen=seqlen,
        batch_size=batch_size, seed=seed, device=device, dtype=dtype, offline=offline,
        trust_remote_code=trust_remote_code, stream=stream, save=save, console=_console(quiet, verbose),
    )  # fmt: skip
    if result:  # only the first process of a team has something to show
        _show(section(result))


@app.command("mi-group", epilog="Example: mico mi-group opt-125m --n-groups 10 --mi-method copula --data-dir texts")
def mi_group(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False, stream: o.Stream = None,
    n_groups: o.NGroups = "auto", grouping: o.GroupingKind = "mi", mi_method: o.MiMethod = "gaussian",
    cluster: o.Cluster = "spectral", statistics: o.StatisticsDir = None, save: o.Save = None,
    device: o.Device = "auto", dtype: o.Dtype = "auto", debug: o.Debug = False, verbose: o.Verbose = 0,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Group the channels that share information; compress of the same options uses the groups."""
    _before_imports(offline, quiet)
    from mico.mi_group import mi_group as run
    from mico.mi_group import section

    result = run(
        model, n_groups=_count(n_groups), grouping=grouping, mi_method=mi_method, cluster=cluster, calib=calib,
        data_dir=data_dir, data_file=data_file, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size, seed=seed,
        device=device, dtype=dtype, offline=offline, trust_remote_code=trust_remote_code, stream=stream,
        statistics=statistics, save=save, console=_console(quiet, verbose),
    )  # fmt: skip
    if result:
        _show(section(result))


@app.command(epilog="Example: mico compress tiny-llama --sparsity 0.5 --wbits 4")
def compress(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    eval: o.Eval = None, offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False,
    stream: o.Stream = None, sparsity: o.Sparsity = None, pattern: o.Pattern = None, wbits: o.Wbits = 4,
    target_avg_bits: o.TargetAvgBits = None, method: o.Method = None, arm: o.Arm = None,
    allocation: o.Allocation = None, group_size: o.GroupSize = None, percdamp: o.Percdamp = 0.01,
    blocksize: o.Blocksize = 128, profile: o.Profile = None, embed_bits: o.EmbedBits = 16, n_groups: o.NGroups = "auto",
    use_mi_grouping: o.UseMiGrouping = None,
    grouping: o.Grouping = None, mi_method: o.MiMethod = "gaussian", cluster: o.Cluster = "spectral",
    statistics: o.StatisticsDir = None, groups: o.GroupsDir = None, save: o.Save = None, device: o.Device = "auto",
    dtype: o.Dtype = "auto", allow_partial: o.AllowPartial = False, strict: o.Strict = False,
    json: o.JsonFile = None, debug: o.Debug = False,
    verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Compress a model, doing what is missing before it, and measure the result. A killed run goes on when repeated."""
    _before_imports(offline, quiet)
    from mico.compress import compress as run
    from mico.summary import print_report

    try:
        report = run(
            model, sparsity=sparsity, pattern=pattern, wbits=wbits, target_avg_bits=target_avg_bits,
            n_groups=_count(n_groups), use_mi_grouping=use_mi_grouping, grouping=grouping, mi_method=mi_method,
            cluster=cluster, method=method, arm=arm, allocation=allocation, group_size=group_size, percdamp=percdamp,
            blocksize=blocksize, profile=profile, embed_bits=embed_bits, calib=calib, nsamples=nsamples, seqlen=seqlen,
            batch_size=batch_size, seed=seed, device=device, dtype=dtype, eval=eval, save=save, data_dir=data_dir,
            data_file=data_file, statistics=statistics, groups=groups, offline=offline,
            trust_remote_code=trust_remote_code, stream=stream, allow_partial=allow_partial, strict=strict, json=json,
            console=_console(quiet, verbose),
        )  # fmt: skip
    except ContractError as broken:  # the run is whole: its report is shown before the exit code tells of the contract
        if broken.report is not None:
            print_report(broken.report, _output())
        raise
    if report:
        print_report(report, _output())


@app.command("eval", epilog="Example: mico eval results/tiny-llama-mico-1a2b3c4d --eval all --data-dir texts")
def evaluate(
    model: o.Model, eval: o.EvalTexts = None, protocol: o.Protocol = "sparsegpt", data_dir: o.DataDir = None,
    data_file: o.EvalFile = None, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, offline: o.Offline = False,
    trust_remote_code: o.TrustRemoteCode = False, dense: o.Dense = None, kl: o.Kl = None, tasks: o.Tasks = None,
    include_path: o.IncludePath = None, num_fewshot: o.NumFewshot = None, limit: o.Limit = None,
    log_samples: o.LogSamples = False, samples: o.Samples = 0, device: o.Device = "auto", dtype: o.Dtype = "auto",
    output_path: o.OutputPath = None, json: o.JsonFile = None, debug: o.Debug = False, verbose: o.Verbose = 0,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Measure a model or a run folder: perplexity, KL divergence to the dense model, tasks of lm-eval, samples."""
    _before_imports(offline, quiet)
    from mico.evaluate import evaluate as run
    from mico.metrics.sections import evaluation_sections
    from mico.tables import print_sections

    result = run(
        model, eval=eval, protocol=protocol, data_dir=data_dir, data_file=data_file, seqlen=seqlen,
        batch_size=batch_size, dense=dense, kl=kl, tasks=tasks, include_path=include_path, num_fewshot=num_fewshot,
        limit=limit, log_samples=log_samples, samples=samples, device=device, dtype=dtype, offline=offline,
        trust_remote_code=trust_remote_code, output_path=output_path, json=json, console=_console(quiet, verbose),
    )  # fmt: skip
    print_sections(evaluation_sections(result), _output())


@app.command(epilog="Example: mico export results/tiny-llama-mico-1a2b3c4d --to dense")
def export(
    model: o.PackedModel, to: o.Target, save: o.Save = None, dtype: o.ExportDtype = "auto", json: o.JsonFile = None,
    debug: o.Debug = False, verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Write a packed model in the format of another program, and check it by reading it back."""
    from mico.export import export as run
    from mico.export import section

    _show(section(run(model, to=to, save=save, dtype=dtype, json=json, console=_console(quiet, verbose))))


@app.command(epilog="Example: mico bench results/tiny-llama-mico-1a2b3c4d --batch-size 1,64")
def bench(
    model: o.Model, prompt_tokens: o.PromptTokens = 128, new_tokens: o.NewTokens = 32, batch_size: o.BatchSizes = "1",
    execution: o.Execution = "auto", repeats: o.Repeats = 3, device: o.Device = "auto", dtype: o.Dtype = "bfloat16",
    json: o.JsonFile = None, debug: o.Debug = False, verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Speed and memory of a packed model beside the dense model of the same weights, in one run."""
    _before_imports(False, quiet)
    from mico.bench import bench as run
    from mico.bench import section

    result = run(
        model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, execution=execution,
        repeats=repeats, device=device, dtype=dtype, json=json, console=_console(quiet, verbose),
    )  # fmt: skip
    _show(section(result))


@app.command("import-llava", epilog="Example: mico import-llava llava-v1.5-7b llava-hf --vision-tower clip-vit-large")
def import_llava(
    source: o.Original, target: o.Converted, vision_tower: o.VisionTower = None, debug: o.Debug = False,
    verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Convert a LLaVA checkpoint in its authors' format to the format of transformers, which compress takes."""
    from mico.import_llava import import_llava as run
    from mico.import_llava import section

    _show(section(run(source, target, vision_tower=vision_tower, console=_console(quiet, verbose))))


@app.command(epilog="Example: mico report results/tiny-llama-original-* results/tiny-llama-mi-*")
def report(
    runs: o.Runs, baseline: o.Baseline = None, json: o.JsonFile = None, markdown: o.MarkdownFile = None,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Show the report of a run again, or compare several: mean and sd over seeds, paired t-tests, ablation tables."""
    from mico.report import report as run

    run(runs, baseline=baseline, json=json, markdown=markdown, console=_output())


@app.command(epilog="Example: mico models")
def models() -> None:
    """List the names that stand for models, and the families that are supported."""
    from mico.adapters import FAMILIES
    from mico.loading.names import ALIASES, REFERENCES
    from mico.tables import Section

    rows = [(name, "shipped with mico" if name in REFERENCES else target) for name, target in ALIASES.items()]
    families = ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    lines = ("Any hub id or local folder works too, when its model_type is of a supported family:", families)
    _show(Section("Models", ("name", "model"), tuple(rows), lines))


# --- what commands share --------------------------------------------------------------------------------------------


def _before_imports(offline: bool, quiet: bool) -> None:
    """Settings that libraries read from the environment when they are imported; the user's own stay."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _console(quiet: bool, verbosity: int) -> Any:
    from mico.console import Console

    return Console(quiet=quiet, verbosity=verbosity)


def _output() -> RichConsole:
    return RichConsole(file=sys.stdout, highlight=False)


def _show(section: Any) -> None:
    from mico.tables import print_sections

    print_sections([section], _output())


def _count(text: str) -> int | str:
    """'4' -> 4; anything else goes to the verb as it is, which accepts 'auto' alone."""
    return int(text) if text.isdecimal() else text


# --- exit codes -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure is one line on stderr.

    0 done; 1 internal; 2 the user or the data must change; 3 finished, but --strict found fallbacks; 130 Ctrl-C;
    143 SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with _terminable(), _quiet_libraries(debug):
            code = app(arguments or ["--help"], prog_name="mico", standalone_mode=False) or 0
            if code == INTERRUPTED:  # typer turns Ctrl-C into this
                raise KeyboardInterrupt
            sys.stdout.flush()
    except SystemExit as stop:  # typer and rich end so when what they write to was closed
        code = BROKEN_PIPE if stop.code == 1 else int(stop.code or 0)
    except BrokenPipeError:
        code = BROKEN_PIPE
    except BaseException as error:
        code, line = explain(error, arguments)
        if debug and isinstance(error, Exception):
            traceback.print_exc()
        with suppress(OSError):
            if line and not (isinstance(error, _USAGE) and os.environ.get("RANK", "0") != "0"):
                print(f"mico: {line}", file=sys.stderr, flush=True)
    if code == BROKEN_PIPE:  # keep Python from complaining at exit about what it cannot flush
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def explain(error: BaseException, arguments: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and the one line that says what went wrong and what to do."""
    text = " ".join(str(error).split())
    command = next((word for word in arguments if not word.startswith("-")), "")
    if isinstance(error, Silenced):
        return error.code, ""
    if isinstance(error, UserError):
        return USER, f"error: {text}"
    if isinstance(error, ContractError):
        return CONTRACT, f"error: {text}"
    if isinstance(error, _USAGE):
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        return USER, f"error: {message} (mico {_hyphens(command)} --help tells more)".replace("mico  ", "mico ")
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted: {_what_is_kept(command, arguments)}"
    if isinstance(error, Terminated):
        return TERMINATED, f"terminated: {_what_is_kept(command, arguments)}"
    if out_of_memory(error):
        return (
            USER,
            f"error: out of memory ({text[:120]}): lower --batch-size, --nsamples or --seqlen, or use --device cpu",
        )
    if isinstance(error, OSError) and disk_is_full(error):
        where = error.filename or "the disk"
        return USER, f"error: {where} is full ({error.strerror}): free disk space and run the same command again"
    if isinstance(error, OSError) and is_forbidden(error):
        return USER, f"error: {error.filename} cannot be used ({error.strerror}): fix its permissions or give another"
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return INTERNAL, f"internal error: {named[:300]}; run again with --debug for the traceback"


def _what_is_kept(command: str, arguments: Sequence[str]) -> str:
    if command == "eval" and any(word.startswith("--tasks") for word in arguments):
        return _TASKS_KEPT
    return _KEPT if _hyphens(command) in ("calibrate", "mi-group", "compress") else "nothing was written"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises inside the body (signals can only be handled by the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(_number: int, _frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Hold back the warnings of libraries: what matters to the user is said by mico itself."""
    if debug:
        yield
        return
    for name, level in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
