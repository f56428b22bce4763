"""The command line: options, help, exit codes. Each verb is imported inside its command, so that help is quick."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole

from mico import __version__
from mico import options as o
from mico import training_options as t
from mico import vision_options as v
from mico.errors import INTERRUPTED, ContractError, UserError
from mico.exits import USAGE, explain, hyphens, quiet_libraries, terminable

BROKEN_PIPE = 141  # what a shell reports for a program that a closed pipe ended

app = typer.Typer(
    name="mico",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=dict(token_normalize_func=hyphens, help_option_names=["-h", "--help"], max_content_width=120),
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
    stream: o.Stream = None, image_folder: o.ImageFolder = None, compress_vision: o.CompressVision = False,
    compress_projector: o.CompressProjector = False, sparsity: o.Sparsity = None, pattern: o.Pattern = None,
    wbits: o.Wbits = 4,
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
        image_folder=image_folder, compress_vision=compress_vision, compress_projector=compress_projector,
        allow_partial=allow_partial, json=json, console=_console(quiet, verbose),
    )  # fmt: skip
    _show(section(result))


@app.command(epilog="Example: mico calibrate opt-125m --calib c4 --nsamples 128 --data-dir texts")
def calibrate(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False, stream: o.Stream = None,
    image_folder: o.ImageFolder = None, compress_vision: o.CompressVision = False,
    compress_projector: o.CompressProjector = False,
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
        trust_remote_code=trust_remote_code, stream=stream, image_folder=image_folder,
        compress_vision=compress_vision, compress_projector=compress_projector, save=save,
        console=_console(quiet, verbose),
    )  # fmt: skip
    if result:  # only the first process of a team has something to show
        _show(section(result))


@app.command("mi-group", epilog="Example: mico mi-group opt-125m --n-groups 10 --mi-method copula --data-dir texts")
def mi_group(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False, stream: o.Stream = None,
    image_folder: o.ImageFolder = None, compress_vision: o.CompressVision = False,
    compress_projector: o.CompressProjector = False,
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
        image_folder=image_folder, compress_vision=compress_vision, compress_projector=compress_projector,
        statistics=statistics, save=save, console=_console(quiet, verbose),
    )  # fmt: skip
    if result:
        _show(section(result))


@app.command(epilog="Example: mico compress tiny-llama --sparsity 0.5 --wbits 4")
def compress(
    model: o.Model, calib: o.Calib = None, data_dir: o.DataDir = None, data_file: o.DataFile = None,
    nsamples: o.Nsamples = 128, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, seed: o.Seed = 0,
    eval: o.Eval = None, offline: o.Offline = False, trust_remote_code: o.TrustRemoteCode = False,
    stream: o.Stream = None, image_folder: o.ImageFolder = None, compress_vision: o.CompressVision = False,
    compress_projector: o.CompressProjector = False, sparsity: o.Sparsity = None, pattern: o.Pattern = None,
    wbits: o.Wbits = 4,
    target_avg_bits: o.TargetAvgBits = None, method: o.Method = None, arm: o.Arm = None,
    allocation: o.Allocation = None, group_size: o.GroupSize = None, percdamp: o.Percdamp = 0.01,
    blocksize: o.Blocksize = 128, profile: o.Profile = None, embed_bits: o.EmbedBits = 16, n_groups: o.NGroups = "auto",
    use_mi_grouping: o.UseMiGrouping = None,
    grouping: o.Grouping = None, mi_method: o.MiMethod = "gaussian", cluster: o.Cluster = "spectral",
    statistics: o.StatisticsDir = None, groups: o.GroupsDir = None, save: o.Save = None, device: o.Device = "auto",
    dtype: o.Dtype = "auto", allow_partial: o.AllowPartial = False, strict: o.Strict = False,
    tensorboard: o.TensorBoard = None, wandb: o.WandB = None, push_to_hub: o.PushToHub = None,
    private: o.Private = False, json: o.JsonFile = None, debug: o.Debug = False,
    verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Compress a model, doing what is missing before it, and measure the result. A killed run goes on when repeated."""
    _before_imports(offline, quiet)
    from mico.compress import compress as run
    from mico.summary import print_report

    if push_to_hub is not None:
        from mico.push import check_push

        check_push(push_to_hub)
    elif private:
        raise UserError("--private has no effect without --push-to-hub: name a repository, or leave it out")
    try:
        report = run(
            model, sparsity=sparsity, pattern=pattern, wbits=wbits, target_avg_bits=target_avg_bits,
            n_groups=_count(n_groups), use_mi_grouping=use_mi_grouping, grouping=grouping, mi_method=mi_method,
            cluster=cluster, method=method, arm=arm, allocation=allocation, group_size=group_size, percdamp=percdamp,
            blocksize=blocksize, profile=profile, embed_bits=embed_bits, calib=calib, nsamples=nsamples, seqlen=seqlen,
            batch_size=batch_size, seed=seed, device=device, dtype=dtype, eval=eval, save=save, data_dir=data_dir,
            data_file=data_file, statistics=statistics, groups=groups, offline=offline,
            trust_remote_code=trust_remote_code, stream=stream, image_folder=image_folder,
            compress_vision=compress_vision, compress_projector=compress_projector, allow_partial=allow_partial,
            strict=strict,
            tensorboard=tensorboard, wandb=wandb, json=json, console=_console(quiet, verbose),
        )  # fmt: skip
    except ContractError as broken:  # the run is whole: its report is shown before the exit code tells of the contract
        if broken.report is not None:
            print_report(broken.report, _output())
            if push_to_hub is not None:
                _console(quiet, verbose).note(
                    f"not pushed; to do so: mico push {broken.report['folder']} {push_to_hub}"
                )
        raise
    if report:
        print_report(report, _output())
        if push_to_hub is not None:
            from mico.push import push, section

            _show(section(push(report["folder"], push_to_hub, private=private, console=_console(quiet, verbose))))


@app.command(epilog="Example: mico finetune tiny-llama --w-bits 2 --train-file text.jsonl")
def finetune(
    model: o.Model, method: t.Method = "paretoq", w_bits: t.WBits = None, group_size: t.GroupSize = None,
    init: t.Init = None, retain_tokens: t.RetainTokens = None, token_method: t.TokenMethod = None,
    sparsevlm_version: t.SparseVlmVersion = None, adaptive: t.Adaptive = False, lora_rank: t.LoraRank = None,
    lora_alpha: t.LoraAlpha = None, lora_dropout: t.LoraDropout = None, stage: t.Stage = None,
    bits_allocation: t.BitsAllocation = None, target_bits_act: t.TargetBitsAct = None,
    target_bits_weight: t.TargetBitsWeight = None, num_groups: t.NumGroups = None, use_ib: t.UseIb = None,
    ib_weight: t.IbWeight = None, use_importance: t.UseImportance = None, theta_learning_rate: t.ThetaRate = None,
    use_align: t.UseAlign = None, align_weight: t.AlignWeight = None, use_lora: t.UseLora = None,
    train_file: t.TrainFile = None, image_folder: t.ImageFolder = None, eval_file: t.EvalFile = None,
    eval_share: t.EvalShare = 0.05, seqlen: t.Seqlen = None, num_train_epochs: t.Epochs = None,
    max_steps: t.MaxSteps = None, learning_rate: t.LearningRate = None, scale_learning_rate: t.ScaleRate = None,
    lr_scheduler_type: t.Scheduler = "cosine", warmup_steps: t.Warmup = 0.0, weight_decay: t.WeightDecay = 0.0,
    max_grad_norm: t.MaxGradNorm = 1.0, per_device_train_batch_size: t.TrainBatch = 8,
    gradient_accumulation_steps: t.Accumulation = 1, kd: t.Kd = None, kd_weight: t.KdWeight = None,
    teacher: t.Teacher = None, bf16: t.Bf16 = False, gradient_checkpointing: t.Checkpointing = False,
    deepspeed: t.Deepspeed = None, fsdp: t.Fsdp = None, logging_steps: t.LoggingSteps = 10,
    eval_steps: t.EvalSteps = None, save_steps: t.SaveSteps = 200, report_to: t.ReportTo = "none",
    seed: o.Seed = 0, eval: o.Eval = None, data_dir: o.DataDir = None, offline: o.Offline = False,
    trust_remote_code: o.TrustRemoteCode = False, save: o.Save = None, device: t.Device = "auto",
    json: o.JsonFile = None, debug: o.Debug = False, verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Train a model at few bits (a compressed one keeps its zeros), a LLaVA for few visual tokens or learned widths."""
    _before_imports(offline, quiet)
    from mico.finetune import finetune as run
    from mico.finetune import sections
    from mico.qat.recipe import bits_of
    from mico.tables import print_sections

    own = dict(
        w_bits=None if w_bits is None else bits_of(w_bits), group_size=group_size, init=init,
        scale_learning_rate=scale_learning_rate, kd=kd, kd_weight=kd_weight, retain_tokens=retain_tokens,
        token_method=token_method, sparsevlm_version=sparsevlm_version, adaptive=adaptive or None, lora_rank=lora_rank,
        lora_alpha=lora_alpha, lora_dropout=lora_dropout, stage=stage, bits_allocation=bits_allocation,
        target_bits_act=target_bits_act, target_bits_weight=target_bits_weight, num_groups=num_groups, use_ib=use_ib,
        ib_weight=ib_weight, use_importance=use_importance, theta_learning_rate=theta_learning_rate,
        use_align=use_align, align_weight=align_weight, use_lora=use_lora, num_train_epochs=num_train_epochs,
    )  # fmt: skip
    report = run(
        model, method=method, train_file=train_file, image_folder=image_folder, eval_file=eval_file,
        eval_share=eval_share, seqlen=seqlen,
        teacher=teacher, eval=eval, data_dir=data_dir, device=device, offline=offline,
        trust_remote_code=trust_remote_code, save=save, json=json, console=_console(quiet, verbose),
        max_steps=max_steps, learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type, warmup_steps=warmup_steps, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, logging_steps=logging_steps, eval_steps=eval_steps,
        save_steps=save_steps, deepspeed=deepspeed, fsdp=fsdp, report_to=report_to, seed=seed,
        **{name: value for name, value in own.items() if value is not None},
    )  # fmt: skip
    if report:
        print_sections(sections(report), _output())


@app.command("eval", epilog="Example: mico eval results/tiny-llama-mico-1a2b3c4d --eval all --data-dir texts")
def evaluate(
    model: o.Model, eval: o.EvalTexts = None, protocol: o.Protocol = "sparsegpt", data_dir: o.DataDir = None,
    data_file: o.EvalFile = None, seqlen: o.Seqlen = None, batch_size: o.BatchSize = 8, offline: o.Offline = False,
    trust_remote_code: o.TrustRemoteCode = False, dense: o.Dense = None, kl: o.Kl = None, tasks: o.Tasks = None,
    include_path: o.IncludePath = None, num_fewshot: o.NumFewshot = None, limit: o.Limit = None,
    log_samples: o.LogSamples = False, samples: o.Samples = 0, suite: v.Suite = None, vlm_data: v.VlmData = None,
    retain_tokens: v.RetainTokens = None, token_method: v.TokenMethod = None,
    sparsevlm_version: v.SparseVlmVersion = None, adaptive: v.Adaptive = False, device: o.Device = "auto",
    dtype: o.Dtype = "auto", output_path: o.OutputPath = None, tensorboard: o.TensorBoard = None, wandb: o.WandB = None,
    json: o.JsonFile = None, debug: o.Debug = False, verbose: o.Verbose = 0,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Measure a model or a run folder: perplexity, KL divergence to the dense model, tasks of lm-eval, suites."""
    _before_imports(offline, quiet)
    from mico.evaluate import evaluate as run
    from mico.metrics.sections import evaluation_sections
    from mico.tables import print_sections

    result = run(
        model, eval=eval, protocol=protocol, data_dir=data_dir, data_file=data_file, seqlen=seqlen,
        batch_size=batch_size, dense=dense, kl=kl, tasks=tasks, include_path=include_path, num_fewshot=num_fewshot,
        limit=limit, log_samples=log_samples, samples=samples, suite=suite, vlm_data=vlm_data,
        retain_tokens=retain_tokens, token_method=token_method, sparsevlm_version=sparsevlm_version, adaptive=adaptive,
        device=device, dtype=dtype, offline=offline, trust_remote_code=trust_remote_code, output_path=output_path,
        tensorboard=tensorboard, wandb=wandb, json=json,
        console=_console(quiet, verbose),
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


@app.command(epilog="Example: mico report results/tiny-llama-original-* results/tiny-llama-mi-* --html arms.html")
def report(
    runs: o.Runs, baseline: o.Baseline = None, json: o.JsonFile = None, markdown: o.MarkdownFile = None,
    html: o.HtmlFile = None, figures: o.FiguresDir = None, debug: o.Debug = False,
) -> None:  # fmt: skip
    """Show the report of a run again, or compare several: mean and sd over seeds, paired t-tests, ablation tables."""
    from mico.report import report as run

    run(runs, baseline=baseline, json=json, markdown=markdown, html=html, figures=figures, console=_output())


@app.command(epilog="Example: mico push results/tiny-llama-mico-1a2b3c4d my-name/tiny-llama-mico")
def push(
    run: o.PackedModel, repo: o.Repository, private: o.Private = False,
    commit_message: o.CommitMessage = "Upload model with mico", json: o.JsonFile = None, debug: o.Debug = False,
    verbose: o.Verbose = 0, quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Upload the model of a finished run to the Hugging Face hub, and check what arrived."""
    _before_imports(False, quiet)
    from mico.push import push as run_push
    from mico.push import section

    result = run_push(
        run, repo, private=private, commit_message=commit_message, json=json, console=_console(quiet, verbose)
    )
    _show(section(result))


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
        with terminable(), quiet_libraries(debug):
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
            if line and not (isinstance(error, USAGE) and os.environ.get("RANK", "0") != "0"):
                print(f"mico: {line}", file=sys.stderr, flush=True)
    if code == BROKEN_PIPE:  # keep Python from complaining at exit about what it cannot flush
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
