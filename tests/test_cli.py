"""The command line: its options are frozen here, its exit codes and its ways of being called are held."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import mico
import mico.compress  # binds the module over any function of that name: the call must work all the same
from mico import cli
from mico.console import Console
from mico.errors import ContractError, UserError
from mico.exits import explain
from tests.workspace import Workspace, workspace

SOURCE = {
    "--calib": None, "--data-dir": None, "--data-file": None, "--nsamples": 128, "--seqlen": None, "--batch-size": 8,
    "--seed": 0, "--offline": False, "--trust-remote-code": False, "--device": "auto", "--dtype": "auto",
    "--stream --no-stream": None, "--image-folder": None, "--compress-vision": False, "--compress-projector": False,
}  # fmt: skip
RUN = {"--debug": False, "--verbose -v": 0, "--quiet -q": False}
GROUPS = {
    "--n-groups": "auto", "--grouping": None, "--mi-method": "gaussian", "--cluster": "spectral", "--statistics": None
}  # fmt: skip
# Changing this table changes what users and their scripts may type: do it deliberately, and say it in CHANGELOG.md.
SURFACE: dict[str, dict[str, Any]] = {
    "plan": {
        "model": None, **SOURCE, **RUN, "--use-mi-grouping --no-mi-grouping": None, "--n-groups": "auto",
        "--grouping": None, "--mi-method": "gaussian", "--cluster": "spectral", "--sparsity": None, "--pattern": None,
        "--wbits": 4, "--target-avg-bits": None, "--method": None, "--arm": None, "--allocation": None,
        "--group-size": None, "--percdamp": 0.01, "--blocksize": 128, "--embed-bits": 16, "--profile": None,
        "--eval": None, "--save": None, "--allow-partial": False, "--json": None,
    },
    "calibrate": {"model": None, **SOURCE, "--save": None, **RUN},
    "mi-group": {"model": None, **SOURCE, **GROUPS, "--grouping": "mi", "--save": None, **RUN},
    "compress": {
        "model": None, **SOURCE, **GROUPS, **RUN, "--groups": None, "--use-mi-grouping --no-mi-grouping": None,
        "--sparsity": None, "--pattern": None, "--wbits": 4, "--target-avg-bits": None, "--method": None,
        "--arm": None, "--allocation": None, "--group-size": None, "--percdamp": 0.01, "--blocksize": 128,
        "--embed-bits": 16, "--profile": None,
        "--eval": None, "--save": None, "--strict": False, "--allow-partial": False, "--json": None,
        "--tensorboard": None, "--wandb": None, "--push-to-hub": None, "--private": False,
    },
    "eval": {
        "model": None, "--eval": None, "--data-dir": None, "--data-file": None, "--seqlen": None, "--batch-size": 8,
        "--offline": False, "--trust-remote-code": False, "--device": "auto", "--dtype": "auto", "--json": None,
        "--protocol": "sparsegpt", "--dense": None, "--kl --no-kl": None, "--tasks": None, "--include-path": None,
        "--num-fewshot": None, "--limit": None, "--log-samples": False, "--samples": 0, "--output-path": None,
        "--suite": None, "--vlm-data": None, "--retain-tokens": None, "--token-method": None,
        "--sparsevlm-version": None, "--adaptive": False,
        "--tensorboard": None, "--wandb": None, **RUN,
    },
    "bench": {
        "model": None, "--prompt-tokens": 128, "--new-tokens": 32, "--batch-size": "1", "--execution": "auto",
        "--repeats": 3, "--device": "auto", "--dtype": "bfloat16", "--json": None, **RUN,
    },
    "report": {
        "runs": None, "--json": None, "--markdown": None, "--html": None, "--figures": None, "--baseline": None,
        "--debug": False,
    },
    "export": {
        "model": None, "--to": None, "--save": None, "--dtype": "auto", "--json": None, **RUN,
    },
    "import-llava": {"source": None, "target": None, "--vision-tower": None, **RUN},
    "push": {
        "run": None, "repo": None, "--private": False, "--commit-message": "Upload model with mico", "--json": None,
        **RUN,
    },
    "models": {},
    "finetune": {
        "model": None, "--method": "paretoq", "--w-bits": None, "--group-size": None, "--init": None,
        "--retain-tokens": None, "--token-method": None, "--sparsevlm-version": None, "--adaptive": False,
        "--lora-rank": None, "--lora-alpha": None, "--lora-dropout": None, "--stage": None, "--bits-allocation": None,
        "--target-bits-act": None, "--target-bits-weight": None, "--num-groups": None, "--use-ib --no-ib": None,
        "--ib-weight": None, "--use-importance --no-importance": None, "--theta-learning-rate": None,
        "--use-align --no-align": None, "--align-weight": None, "--use-lora --no-lora": None,
        "--train-file": None, "--image-folder": None, "--eval-file": None, "--eval-share": 0.05, "--seqlen": None,
        "--num-train-epochs": None, "--max-steps": None, "--learning-rate": None, "--scale-learning-rate": None,
        "--lr-scheduler-type": "cosine", "--warmup-steps": 0.0, "--weight-decay": 0.0, "--max-grad-norm": 1.0,
        "--per-device-train-batch-size": 8, "--gradient-accumulation-steps": 1, "--kd --no-kd": None,
        "--kd-weight": None, "--teacher": None, "--bf16 --no-bf16": False, "--gradient-checkpointing": False,
        "--deepspeed": None, "--fsdp": None, "--logging-steps": 10, "--eval-steps": None, "--save-steps": 200,
        "--report-to": "none", "--seed": 0, "--eval": None, "--data-dir": None, "--offline": False,
        "--trust-remote-code": False, "--save": None, "--device": "auto", "--json": None, **RUN,
    },
}  # fmt: skip
VERBS = {
    "calibrate": "calibrate", "mi-group": "mi_group", "compress": "compress", "eval": "evaluate", "bench": "bench",
    "plan": "plan",
}  # fmt: skip


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.setenv("MICO_RESULTS", str(tmp_path / "results"))
    yield
    os.environ.clear()
    os.environ.update(before)


# --- the surface ----------------------------------------------------------------------------------------------------


def surface() -> dict[str, dict[str, Any]]:
    group: Any = typer.main.get_command(cli.app)
    found = {}
    for name, command in group.commands.items():
        found[name] = {
            " ".join([*parameter.opts, *parameter.secondary_opts]): None if parameter.required else parameter.default
            for parameter in command.params
        }
    return found


def test_the_option_surface_is_frozen() -> None:
    assert surface() == SURFACE


@pytest.mark.parametrize("command", VERBS)
def test_command_and_python_api_have_the_same_defaults(command: str) -> None:
    verb = getattr(import_module(f"mico.{VERBS[command]}"), VERBS[command])
    group: Any = typer.main.get_command(cli.app)
    options = {p.name: p.default for p in group.commands[command].params if not p.required}
    parameters = inspect.signature(verb).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "console"}
    of_the_command = ("debug", "verbose", "quiet", "push_to_hub", "private")  # it pushes by another verb
    assert {name: value for name, value in options.items() if name not in of_the_command} == defaults


def test_help_names_every_option_and_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for command, options in SURFACE.items():
        assert cli.main([command, "-h"]) == 0
        text = capsys.readouterr().out
        assert all(option.split()[0] in text for option in options if option.startswith("-"))
        assert f"Example: mico {command}" in text


def test_help_and_models_need_no_torch() -> None:
    code = """if True:
        import sys
        from mico.cli import main
        assert main([]) == main(["compress", "--help"]) == main(["models"]) == main(["--version"]) == 0
        assert not {"torch", "transformers", "datasets", "sklearn"} & set(sys.modules), "slow imports for a help page"
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "facebook/opt-125m" in done.stdout and "shipped with mico" in done.stdout
    assert f"mico {mico.__version__}" in done.stdout


# --- how options are typed ------------------------------------------------------------------------------------------


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the compress, calibrate and mi-group commands pass to their verbs, which do not run."""
    options: dict[str, Any] = {}

    def take(model: str, **given: Any) -> dict[str, Any]:
        options.update(given, model=model)
        raise UserError("stop here")

    for name in ("compress", "calibrate", "mi_group"):
        monkeypatch.setattr(import_module(f"mico.{name}"), name, take)
    return options


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "a_model", "--target-avg-bits", "3.5", "--n-groups", "4", "--save", "out_dir", "--no-mi-grouping"],
        ["compress", "--target_avg_bits=3.5", "--n_groups=4", "--save=out_dir", "--no_mi_grouping", "a_model"],
        ["compress", "a_model", "--target_avg_bits", "3.5", "--n_groups", "4", "--save", "out_dir", "--no-mi_grouping"],
    ],
)
def test_underscores_in_names_are_hyphens_and_values_stay(words: list[str], caught: dict[str, Any]) -> None:
    assert cli.main(words) == 2
    wanted = dict(model="a_model", target_avg_bits=3.5, n_groups=4, save="out_dir", use_mi_grouping=False)
    assert {name: caught[name] for name in wanted} == wanted


@pytest.mark.parametrize("command", ["mi_group", "mi-group"])
def test_underscores_in_command_names(command: str, caught: dict[str, Any]) -> None:
    assert cli.main([command, "m", "--mi_method", "knn", "--batch_size=2"]) == 2
    assert (caught["mi_method"], caught["batch_size"], caught["n_groups"]) == ("knn", 2, "auto")


def test_verbosity_and_quiet_reach_the_console(caught: dict[str, Any]) -> None:
    cli.main(["compress", "m", "-v"])
    assert (caught["console"].quiet, caught["console"].verbosity) == (False, 1)
    cli.main(["compress", "m", "-q"])
    assert caught["console"].quiet


def test_offline_is_set_before_libraries_load(caught: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    cli.main(["compress", "m"])
    assert "HF_HUB_OFFLINE" not in os.environ
    cli.main(["compress", "m", "--offline"])
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert caught["offline"] is True


# --- exit codes -----------------------------------------------------------------------------------------------------


def raised(error: BaseException, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(import_module("mico.compress"), "compress", fail)
    return cli.main(["compress", "tiny-llama", *flags])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--wbits 0: choose"), 2, "error: --wbits 0: choose"),
        (ContractError("--strict: 1 fallbacks"), 3, "error: --strict: 1 fallbacks"),
        (RuntimeError("two\nlines"), 1, "internal error: RuntimeError: two lines; run again with --debug"),
        (AssertionError(), 1, "internal error: AssertionError; run again"),
        (MemoryError(), 2, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: /x/y is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y cannot be used"),
        (OSError(errno.EIO, "Input/output error"), 1, "internal error"),
        (KeyboardInterrupt(), 130, "interrupted: finished blocks are kept, the same command again goes on"),
    ],
)
def test_every_failure_is_one_line_and_a_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raised(error, monkeypatch) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("mico: ") and message in shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--suite", "grids"], "answers to suites are kept in --output-path"),
        (["--suite=grids", "--tasks", "arc_easy"], "finished tasks and answers to suites are kept"),
        (["--eval", "docs"], "nothing was written"),
    ],
)
def test_what_an_interrupted_evaluation_keeps_is_told(words: list[str], kept: str) -> None:
    assert explain(KeyboardInterrupt(), ["eval", "tiny-llava", *words])[1].startswith(f"interrupted: {kept}")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert raised(RuntimeError("why"), monkeypatch, "--debug") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "in fail" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress"], "Missing argument"),
        (["compress", "tiny-llama", "--wbit", "4"], "--wbit"),
        (["compress", "tiny-llama", "--wbits", "four"], "Invalid value for '--wbits'"),
        (["squash", "tiny-llama"], "No such command"),
        (["report"], "Missing argument"),
    ],
)
def test_usage_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("mico: error: ") and message in shown.err
    assert len(shown.err.splitlines()) == 1 and "--help" in shown.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def work(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(number)
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(import_module("mico.calibrate"), "calibrate", work)
    assert cli.main(["calibrate", "tiny-llama"]) == code
    assert closed and signal.getsignal(signal.SIGTERM) is before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m mico models | head -n 1"], capture_output=True, text=True
    )
    assert done.stdout == "Models\n" and done.stderr == ""
    assert done.returncode in (0, cli.BROKEN_PIPE)  # 0 when all was written before head closed


# --- commands and API, for real -------------------------------------------------------------------------------------


def test_all_ways_to_call_a_verb() -> None:
    from mico.compress import compress

    assert mico.compress.compress is compress
    assert inspect.signature(mico.compress) == inspect.signature(compress)
    for name in ("calibrate", "compress", "evaluate", "mi_group", "report"):
        assert callable(getattr(mico, name)) and name in dir(mico)
    with pytest.raises(UserError, match="--wbits 0"):
        mico.compress("tiny-llama", wbits=0)
    with pytest.raises(UserError, match="--nsamples 0"):
        mico.calibrate("tiny-llama", nsamples=0)
    with pytest.raises(UserError, match="--n-groups 0"):
        mico.mi_group("tiny-llama", n_groups=0)
    with pytest.raises(UserError, match="--batch-size 0"):
        mico.evaluate("tiny-llama", batch_size=0)
    with pytest.raises(UserError, match="at least one run folder"):
        mico.report([])
    with pytest.raises(AttributeError, match="no attribute 'squash'"):
        _ = mico.squash  # type: ignore[attr-defined]


def test_verbs_by_hand_give_the_bytes_of_the_single_command(
    space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(space.model)
    assert cli.main(["calibrate", model, *space.flags]) == 0
    shown = capsys.readouterr()
    assert "mlp_out" in shown.out and "statistics: written to" in shown.err
    assert cli.main(["mi-group", model, *space.flags]) == 0
    shown = capsys.readouterr()
    assert "Davies-B." in shown.out and "statistics: reusing" in shown.err and "groups: written to" in shown.err

    words = ["compress", model, *space.flags, "--eval=wikitext2", "--arm=mi", f"--save={tmp_path / 'run'}"]
    assert cli.main([*words, f"--json={tmp_path / 'flat.json'}"]) == 0
    shown = capsys.readouterr()
    assert "statistics: reusing" in shown.err and "groups: reusing" in shown.err and "Perplexity" in shown.out
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (space.run / weights).read_bytes()

    figures = json.loads((tmp_path / "flat.json").read_text())
    assert figures["arm"] == "mi" and figures["compressed"].keys() == {"wikitext2"} and 2 < figures["true_bits"] < 5
    assert cli.main(words) == 0
    assert "is finished and whole, reusing it" in capsys.readouterr().err


def test_second_runs_say_that_they_reuse(space: Workspace) -> None:
    assert space.run.is_dir()
    places = dict(statistics=str(space.root / "statistics"))
    console = Console()
    made = mico.mi_group(str(space.model), save=str(space.root / "groups"), console=console, **places, **space.options)
    assert [note.split(" ")[1] for note in console.notes[-2:]] == ["reusing", "reusing"]
    assert {record["stream"] for record in made["streams"]} == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    assert len(made["streams"]) == 8 and sum(made["streams"][0]["sizes"]) == 64


def test_eval_command(space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(space.run), f"--data-dir={space.texts}", "--batch-size=4", f"--json={tmp_path / 'eval.json'}"]
    assert cli.main(words) == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    told = json.loads((space.run / "report.json").read_text())["compressed"]["wikitext2"]["perplexity"]
    assert figures["perplexity"]["wikitext2"] == pytest.approx(told, rel=1e-6)
    assert f"{told:,.2f}" in capsys.readouterr().out


def test_json_that_cannot_be_written_is_refused_first(
    space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compress", str(space.model), *space.flags, f"--json={tmp_path}"]) == 2
    assert "this is a folder" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
