"""The scripts of pipelines/: what they queue, that they resume, spread over GPUs and tell what failed."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mico.loading.names import REFERENCE_DIR
from tests.workspace import make_model, make_texts

PIPELINES = Path(__file__).parents[1] / "pipelines"
SCRIPTS = sorted(path.name for path in PIPELINES.glob("*.sh") if path.name != "common.sh")
EXPERIMENTS = sorted(path.name for path in PIPELINES.glob("*.sh") if "\nbegin " in path.read_text(encoding="utf-8"))
MORE = {"eval_only.sh", "mixtral.sh", "estimator_sweep.sh"}  # with --smoke they make a model first
SUITES = ("mme", "pope")
VISION = {*(f"sparsevlm_{suite}.sh" for suite in SUITES), "sparsevlm_speed.sh"}
CMIBQ = {name for name in EXPERIMENTS if name.startswith("cmibq_")}
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))

# Stands for mico: notes when it ran, where and with what, and leaves the run folder that `--save` names, results.json
# in that of `--output-path`, and the file of `--json`.
FAKE = """#!{python} -IS
import hashlib, json, os, pathlib, signal, sys, time
began, words = time.monotonic(), sys.argv[1:]
def tell(what):
    line = json.dumps([what, os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic(), words]) + chr(10)
    with open(os.environ["RECORD"], "a") as file:
        file.write(line)
def end(*_):
    tell("terminated")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
option = dict(compress="--save", finetune="--save", eval="--output-path").get(words[0], "--json")
if words[0] == "report" or option not in words:
    tell("done")
    sys.exit()
folder = pathlib.Path(words[words.index(option) + 1])
if os.environ.get("HANG", "nothing") in folder.name:
    tell("hanging")
    time.sleep(60)
here = pathlib.Path(os.environ["RECORD"]).parent
(here / ("began-" + str(os.getpid()))).touch()
# No arm ends before TOGETHER of them have begun.
while len(list(here.glob("began-*"))) < int(os.environ.get("TOGETHER", "1")):
    time.sleep(0.01)
if os.environ.get("FAIL", "nothing") in folder.name:
    print("mico: error: broken on purpose")
    tell("failed")
    sys.exit(2)
if option == "--json":
    folder.write_text(json.dumps(dict(command=sys.argv[2:])))
    tell("done")
    sys.exit()
folder.mkdir(parents=True, exist_ok=True)
if words[0] == "eval":
    (folder / "results.json").write_text(json.dumps(dict(mico=dict(command=sys.argv))))
    tell("done")
    sys.exit()
report = json.dumps(dict(command=sys.argv)).encode()
(folder / "report.json").write_bytes(report)
outputs = dict(completed=dict(outputs={{"report.json": hashlib.sha256(report).hexdigest()}}))
(folder / "manifest.json").write_text(json.dumps(outputs))
tell("done")
"""


# Is mico, but stays after the first block of the arm whose folder HOLD names, so that a kill finds it there.
HELD = """
import os, sys, time
from mico import cli, runs
write_block = runs.RunFolder.write_block
def write(run, *block):
    write_block(run, *block)
    if run.path.name == os.environ.get("HOLD"):
        (run.path / ".held").touch()
        time.sleep(600)
runs.RunFolder.write_block = write
sys.exit(cli.main())
"""


@dataclass
class Shell:
    """Runs a pipeline in an environment whose bin/mico is a stand-in, or the real one."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unset = ("SEEDS", "GPUS", "JOBS", "CONTROLS", "RESULTS", "MICO_RESULTS", "CUDA_VISIBLE_DEVICES")
        unset += ("RETAIN_TOKEN", "RETAIN_TOKN", "USE_VERSION", "STAGE1", "STAGE2", "ZERO", "OFFLOAD")
        unset += ("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT")
        self.env = {name: value for name, value in os.environ.items() if name not in unset}
        self.env |= dict(MICO_VENV=str(self.root), RECORD=str(self.root / "record"), RESULTS=str(self.results))
        python = shlex.quote(sys.executable)
        self.program("python", f'#!/bin/sh\nexec {python} "$@"\n')
        self.program("mico", FAKE.format(python=sys.executable))

    @property
    def results(self) -> Path:
        return self.root / "results"

    def program(self, name: str, text: str) -> None:
        (self.root / "bin").mkdir(exist_ok=True)
        (self.root / "bin" / name).write_text(text)
        (self.root / "bin" / name).chmod(0o755)

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        command = ["bash", str(PIPELINES / script), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=self.env | env, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=self.root
        )

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **env)
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def record(self) -> list[tuple[str, str, float, float, list[str]]]:
        """(what, CUDA_VISIBLE_DEVICES, began, ended, words) of every call of the stand-in."""
        file = self.root / "record"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def value(words: list[str], option: str) -> str:
    """What click takes: the last one given."""
    return words[len(words) - words[::-1].index(option)]


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# --- every script ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_bash_can_parse_it(script: str) -> None:
    text = (PIPELINES / script).read_text(encoding="utf-8")
    assert "\nset -euo pipefail\n" in text or script == "common.sh"
    subprocess.run(["bash", "-n", str(PIPELINES / script)], check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run([str(SHELLCHECK), *map(str, PIPELINES.glob("*.sh"))], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", [*EXPERIMENTS, "smoke.sh", "quickstart.sh", "setup.sh"])
def test_help_needs_no_environment(script: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RESULTS"} | dict(
        MICO_VENV=str(tmp_path / "no")
    )
    command = ["bash", str(PIPELINES / script), "--help"]
    found = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0 and f"bash pipelines/{script}" in found.stdout and not list(tmp_path.iterdir())
    assert ("CUDA_VISIBLE_DEVICES" in found.stdout) == (script in EXPERIMENTS)


def test_smoke_runs_every_experiment() -> None:
    listed = (PIPELINES / "smoke.sh").read_text(encoding="utf-8").partition("experiments=(quick")[2].partition(")")[0]
    assert sorted(f"{name}.sh" for name in f"quick{listed}".split()) == EXPERIMENTS


# --- what is queued -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "option", "values"),
    [
        ("quick_test.sh", "--arm", ["original", "enhanced", "mi"]),
        ("opt_ablation.sh", "--arm", ["original", "enhanced", "mi"] * 3),
        ("k_sweep.sh", "--n-groups", ["5", "10", "20", "50"]),
        ("estimator_sweep.sh", "--mi-method", ["gaussian", "copula", "histogram"]),
        ("sparsity_sweep.sh", "--sparsity", ["0.3", "0.5", "0.7"] * 2),
    ],
)
def test_arms_of_a_sweep(shell: Shell, script: str, option: str, values: list[str]) -> None:
    found = shell.run(script, "--wbits", "3")
    assert found.returncode == 0, found.stderr
    *arms, report = [words for _, _, _, _, words in shell.record()]
    assert [value(words, option) for words in arms] == values
    assert {value(words, "--wbits") for words in arms} == {"3"}
    folders = [value(words, "--save") for words in arms]
    assert len(set(folders)) == len(arms) and report[: len(arms) + 1] == ["report", *folders]
    assert {device for _, device, *_ in shell.record()} == {"0"}


def test_no_gpu_may_be_named(shell: Shell) -> None:
    assert shell.run("quick_test.sh", CUDA_VISIBLE_DEVICES="").returncode == 0
    assert {device for _, device, *_ in shell.record()} == {""}


@pytest.mark.parametrize("script", [name for name in EXPERIMENTS if name not in MORE | VISION | CMIBQ])
def test_smoke_takes_a_shipped_model_and_no_hub(shell: Shell, script: str) -> None:
    assert shell.run(script, "--smoke").returncode == 0
    *arms, _ = [words for _, _, _, _, words in shell.record()]
    assert {words[1] for words in arms} <= {"tiny-llama", "tiny-opt"} and all("--offline" in words for words in arms)
    texts = {value(words, "--data-dir") for words in arms}
    assert {value(words, "--eval") for words in arms} == {"wikitext2"}
    assert arms[0][0] == "finetune" or value(arms[0], "--calib") == "docs"
    assert (Path(texts.pop()) / "wikitext2" / "test.txt").stat().st_size > 10_000


def test_training_takes_every_width(shell: Shell) -> None:
    found = shell.run("paretoq_minicpm4.sh", "--train-file=text.jsonl", "--kd", W_BITS="2 1.58")
    assert found.returncode == 0, found.stderr
    *arms, report = [words for _, _, _, _, words in shell.record()]
    assert [words[:4] for words in arms] == [["finetune", "minicpm4-0.5b", "--w-bits", bits] for bits in ("2", "1.58")]
    assert all("--kd" in words and "--train-file=text.jsonl" in words for words in arms) and report[0] == "report"


def test_models_seeds_and_controls(shell: Shell) -> None:
    found = shell.run("quick_test.sh", "org/one", "two", "--wbits=3", SEEDS="0 7", CONTROLS="1")
    assert found.returncode == 0, found.stderr
    *arms, _ = [words for _, _, _, _, words in shell.record()]
    assert len(arms) == 2 * 2 * 6 and {words[1] for words in arms} == {"org/one", "two"}
    assert {value(words, "--seed") for words in arms} == {"0", "7"}
    assert {value(words, "--grouping") for words in arms if "--grouping" in words} == {"random", "range", "alpha"}
    assert Path(value(arms[0], "--save")).name == "one-original-seed0"


@pytest.mark.parametrize(
    ("script", "given"), [("quick_test.sh", "--save=x"), ("quick_test.sh", "--arm"), ("k_sweep.sh", "--n_groups")]
)
def test_what_the_experiment_sets_is_refused(shell: Shell, script: str, given: str) -> None:
    found = shell.run(script, given, "mi")
    assert found.returncode == 2 and "is set by this experiment" in found.stderr and not shell.record()


@pytest.mark.parametrize(("env", "said"), [(dict(JOBS="0"), "JOBS=0"), (dict(JOBS="2", GPUS="0 1"), "exclude")])
def test_wrong_variables_are_refused(shell: Shell, env: dict[str, str], said: str) -> None:
    found = shell.run("quick_test.sh", **env)
    assert found.returncode == 2 and said in found.stderr and not shell.record()


def test_eval_only_measures_runs_in_place_and_models_apart(shell: Shell) -> None:
    run = shell.root / "run"
    run.mkdir()
    (run / "report.json").write_text("{}")
    assert shell.run("eval_only.sh").returncode == 2
    found = shell.run("eval_only.sh", str(run), "org/model", "--tasks", "piqa")
    assert found.returncode == 0, found.stderr
    first, second, report = [words for _, _, _, _, words in shell.record()]
    assert first[:2] == ["eval", str(run)] and "--output-path" not in first and value(first, "--tasks") == "piqa"
    assert second[:2] == ["eval", "org/model"] and value(second, "--output-path") == str(shell.results / "model")
    assert report[:3] == ["report", str(run), "--html"]


def arms_beside_report(shell: Shell) -> tuple[list[list[str]], list[str]]:
    """The words of every arm, and those of the report behind them."""
    *arms, report = [words for _, _, _, _, words in shell.record()]
    assert report[0] == "report"
    return arms, report


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_asked_at_every_budget_by_both_versions(shell: Shell, suite: str) -> None:
    found = shell.run(f"sparsevlm_{suite}.sh", "org/llava", "--vlm-data=suites", "--limit", "8")
    assert found.returncode == 0, found.stderr
    arms, report = arms_beside_report(shell)
    assert all(words[:4] == ["eval", "org/llava", "--suite", suite] for words in arms) and len(arms) == 9
    assert all("--vlm-data=suites" in words and value(words, "--limit") == "8" for words in arms)
    assert "--retain-tokens" not in arms[0]
    asked = [(value(words, "--sparsevlm-version"), value(words, "--retain-tokens")) for words in arms[1:]]
    assert asked == [(version, retain) for version in ("1.0", "2.0") for retain in ("192", "128", "96", "64")]
    folders = [value(words, "--output-path") for words in arms]
    assert folders[1] == str(shell.results / f"llava-{suite}-192-v1.0") and len(set(folders)) == 9
    assert report[1:10] == folders
    calls = len(shell.record())
    again = shell.run(f"sparsevlm_{suite}.sh", "org/llava", "--vlm-data=suites", "--limit", "8")
    assert again.stderr.count("skipped\n") == 9 and len(shell.record()) == calls + 1


@pytest.mark.parametrize("name", ["RETAIN_TOKEN", "RETAIN_TOKN"])
def test_the_environment_of_sparsevlm_names_budget_and_version(shell: Shell, name: str) -> None:
    assert shell.run("sparsevlm_mme.sh", GPUS="0 1", **{name: "96"}, USE_VERSION="2_0").returncode == 0
    arms, _ = arms_beside_report(shell)
    assert sorted(Path(value(words, "--output-path")).name for words in arms) == [
        "llava-1.5-7b-mme-96-v2.0", "llava-1.5-7b-mme-all"
    ]  # fmt: skip


@pytest.mark.parametrize("script", sorted(VISION))
@pytest.mark.parametrize(
    ("env", "told"),
    [
        (dict(RETAIN_TOKEN="19O"), "RETAIN_TOKEN=19O"),
        (dict(RETAIN_TOKEN="192 0"), "RETAIN_TOKEN=192 0"),
        (dict(USE_VERSION="3_0"), "USE_VERSION=3_0"),
        (dict(RETAIN_TOKEN="64", RETAIN_TOKN="192"), "RETAIN_TOKN=192 differ"),
    ],
)
def test_budgets_and_versions_that_are_none_are_refused(
    shell: Shell, script: str, env: dict[str, str], told: str
) -> None:
    found = shell.run(script, **env)
    assert found.returncode == 2 and told in found.stderr and not shell.record()


def test_smoke_of_a_suite_makes_its_pictures_and_needs_no_hub(shell: Shell) -> None:
    found = shell.run("sparsevlm_pope.sh", "--smoke")
    assert found.returncode == 0, found.stderr
    arms, _ = arms_beside_report(shell)
    assert all(words[1] == "tiny-llava" and "--offline" in words for words in arms)
    assert [value(words, "--retain-tokens") for words in arms[1:]] == ["48", "32", "24", "16"] * 2
    (data,) = {value(words, "--vlm-data") for words in arms}
    assert len((Path(data) / "pope" / "coco_pope_popular.json").read_text().splitlines()) == 12


def test_speed_is_measured_by_the_benchmark_once(shell: Shell) -> None:
    stand_in, python = shell.root / "bin" / "mico", shlex.quote(sys.executable)
    shell.program("python", f'#!/bin/sh\nif [ "$1" = -m ]; then exec {stand_in} "$@"; fi\nexec {python} "$@"\n')
    command = ("sparsevlm_speed.sh", "one", "two", "--repeats", "3")
    assert shell.run(*command, RETAIN_TOKEN="192 64").returncode == 0
    first, second = [words for _, _, _, _, words in shell.record()]
    assert first == [
        "-m", "benchmarks.visual_tokens", "--model", "one", "--retain", "192,64", "--arms", "1.0,2.0,fastv",
        "--repeats", "3", "--json", str(shell.results / "one-speed.json"),
    ]  # fmt: skip
    assert value(second, "--model") == "two"
    assert shell.run(*command, RETAIN_TOKEN="192 64").stderr.count("skipped\n") == 2
    assert shell.run(*command, RETAIN_TOKEN="64").returncode == 0 and len(shell.record()) == 4


# --- CM-IBQ ---------------------------------------------------------------------------------------------------------


def cluster(shell: Shell, gpus: int) -> None:
    """A torchrun that notes its options and starts one process, and as many GPUs."""
    shell.program("nvidia-smi", f"#!/bin/sh\n{f'seq 0 {gpus - 1}' if gpus else 'exit 9'}\n")
    shell.env["PATH"] = f"{shell.root / 'bin'}:{shell.env['PATH']}"
    note = 'echo "$*" >>"$RECORD.torchrun"; while [ "$1" != mico ]; do shift; done; shift'
    shell.program("torchrun", f'#!/bin/sh\n{note}\nexec "{shell.root}/bin/mico" "$@"\n')


def launches(shell: Shell) -> list[str]:
    """The options of every torchrun."""
    file = shell.root / "record.torchrun"
    return [line.partition(" -m mico ")[0] for line in file.read_text().splitlines()] if file.exists() else []


def test_stage_2_waits_for_stage_1_and_each_has_options_of_its_own(shell: Shell) -> None:
    command = ("cmibq_quick_test.sh", "org/llava", "--train-file", "pairs.json", "--max-steps=7")
    stages = dict(STAGE1="--target-bits-act 5", STAGE2="--lora-rank 8")
    found = shell.run(*command, JOBS="2", **stages)
    assert found.returncode == 0, found.stderr
    (_, _, _, ended, first), (_, _, began, _, second), report = shell.record()
    assert first[:4] == ["finetune", "org/llava", "--method", "cmibq"] and ended <= began
    assert second[1] == value(first, "--save") and (value(first, "--stage"), value(second, "--stage")) == ("1", "2")
    assert value(first, "--target-bits-act") == "5" and "--target-bits-act" not in second
    assert value(second, "--lora-rank") == "8" and "--lora-rank" not in first
    assert all("--max-steps=7" in words and value(words, "--train-file") == "pairs.json" for words in (first, second))
    assert report[4][:3] == ["report", second[1], value(second, "--save")]


def test_every_arm_of_cmibq_is_asked_the_suites(shell: Shell) -> None:
    command = ("cmibq_full.sh", "org/llava", "--suite=pope", "--train-file", "pairs.json", "--vlm-data", "suites")
    found = shell.run(*command)
    assert found.returncode == 0, found.stderr
    arms, report = arms_beside_report(shell)
    trained, asked = ([words for words in arms if words[0] == verb] for verb in ("finetune", "eval"))
    assert all("--vlm-data" not in words and "--suite=pope" not in words for words in trained)
    chosen = [value(words, "--bits-allocation") for words in trained if "--bits-allocation" in words]
    assert len(trained) == 4 and chosen == ["uniform", "knapsack"]
    folders = [value(words, "--save") for words in trained]
    assert [words[1] for words in asked] == ["org/llava", *folders]
    assert all("--suite=pope" in words and value(words, "--vlm-data") == "suites" for words in asked)
    assert report[1:10] == [*folders, *(value(words, "--output-path") for words in asked)]


def test_no_suite_is_asked_without_its_data(shell: Shell) -> None:
    assert shell.run("cmibq_full.sh", "--train-file=pairs.json").returncode == 0
    arms, _ = arms_beside_report(shell)
    assert [words[0] for words in arms] == ["finetune"] * 4 and arms[0][1] == "llava-1.5-7b"


@pytest.mark.parametrize("gpus", [{"GPUS": "0 1 2"}, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, {}])
def test_one_training_takes_all_gpus(shell: Shell, gpus: dict[str, str]) -> None:
    cluster(shell, 3)
    found = shell.run("cmibq_stage1_multi_gpu.sh", "--train-file=pairs.json", **gpus)
    assert found.returncode == 0, found.stderr
    (_, device, _, _, words), _ = shell.record()
    assert launches(shell) == ["--nproc-per-node 3 --standalone"] and device == "0,1,2"
    assert value(words, "--stage") == "1" and {"--bf16", "--gradient-checkpointing"} <= set(words)


def test_without_a_gpu_two_processes_share_the_cpu(shell: Shell) -> None:
    cluster(shell, 0)
    found = shell.run("cmibq_stage2_multi_gpu.sh", "some/run", "--train-file=pairs.json")
    assert found.returncode == 0, found.stderr
    (_, device, _, _, words), _ = shell.record()
    assert launches(shell) == ["--nproc-per-node 2 --standalone"] and device == ""
    assert words[1] == "some/run" and value(words, "--stage") == "2" and value(words, "--device") == "cpu"


@pytest.mark.parametrize(
    ("stage", "offload", "name"),
    [("", "", "zero2"), ("2", "1", "zero2_offload"), ("3", "", "zero3"), ("3", "1", "zero3_offload")],
)
def test_deepspeed_is_launched_on_one_gpu_too(shell: Shell, stage: str, offload: str, name: str) -> None:
    cluster(shell, 1)
    found = shell.run("cmibq_deepspeed.sh", "--train-file=pairs.json", ZERO=stage, OFFLOAD=offload)
    assert found.returncode == 0, found.stderr
    arms, _ = arms_beside_report(shell)
    assert launches(shell) == ["--nproc-per-node 1 --standalone"] * 2
    assert all("--gradient-checkpointing" in words and "--bf16" not in words for words in arms)
    (file,) = {Path(value(words, "--deepspeed")) for words in arms}
    zero = json.loads(file.read_text())["zero_optimization"]
    assert file == PIPELINES / "deepspeed" / f"{name}.json" and zero["stage"] == int(stage or 2)
    assert zero.get("offload_optimizer", {}).get("device") == ("cpu" if offload else None)


def test_a_node_takes_a_port_a_training_and_leaves_the_report_to_the_first(shell: Shell) -> None:
    cluster(shell, 2)
    nodes = dict(NODE_RANK="1", NNODES="3", MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    found = shell.run("cmibq_multi_node.sh", "--train-file=pairs.json", **nodes)
    assert found.returncode == 0, found.stderr
    told = "--nnodes 3 --node-rank 1 --master-addr 10.0.0.1 --rdzv-conf timeout=86400"
    assert launches(shell) == [f"--nproc-per-node 2 --master-port {port} {told}" for port in (4000, 4001)]
    assert [words[0] for *_, words in shell.record()] == ["finetune"] * 2


def test_smoke_of_several_nodes_starts_two_here(shell: Shell) -> None:
    cluster(shell, 0)
    (shell.results / "grids").mkdir(parents=True)  # pictures take seconds
    found = shell.run("cmibq_multi_node.sh", "--smoke", TOGETHER="2")
    assert found.returncode == 0, found.stderr
    first = [launch for launch in launches(shell) if "--master-port 29500" in launch]
    assert sorted(launch.partition("--node-rank ")[2][0] for launch in first) == ["0", "1"]
    assert [words[0] for *_, words in shell.record()].count("report") == 1


@pytest.mark.parametrize(
    ("script", "env", "told"),
    [
        ("cmibq_deepspeed.sh", dict(ZERO="two"), "ZERO=two: give 2 or 3"),
        ("cmibq_stage2_multi_gpu.sh", {}, "name a folder that stage 1 left"),
        ("cmibq_multi_node.sh", dict(MASTER_ADDR="host"), "NODE_RANK from 0 on each machine"),
        ("cmibq_multi_node.sh", dict(NODE_RANK="0"), "MASTER_ADDR: name the machine of NODE_RANK=0"),
        ("cmibq_multi_node.sh", dict(NODE_RANK="2", MASTER_ADDR="host"), "must be below NNODES=2"),
    ],
)
def test_what_cmibq_cannot_do_is_refused_in_a_line(shell: Shell, script: str, env: dict[str, str], told: str) -> None:
    found = shell.run(script, **env)
    assert found.returncode == 2 and not shell.record()
    (line,) = found.stderr.splitlines()
    assert told in line


# --- how the queue runs ---------------------------------------------------------------------------------------------


def test_arms_spread_over_gpus_one_at_a_time_each(shell: Shell) -> None:
    found = shell.run("quick_test.sh", GPUS="3 5,6", SEEDS="0 1", TOGETHER="2", CUDA_VISIBLE_DEVICES="9")
    assert found.returncode == 0, found.stderr
    arms = [entry for entry in shell.record() if entry[4][0] == "compress"]
    assert len(arms) == 6 and {device for _, device, *_ in arms} == {"3", "5,6"}
    for device in ("3", "5,6"):
        spans = sorted((began, ended) for _, where, began, ended, _ in arms if where == device)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert (shell.results / "logs" / "tiny-llama-mi-seed1.log").exists()


def test_jobs_run_beside_each_other(shell: Shell) -> None:
    assert shell.run("quick_test.sh", JOBS="3", TOGETHER="3").returncode == 0
    arms = [entry for entry in shell.record() if entry[4][0] == "compress"]
    assert max(began for _, _, began, _, _ in arms) < min(ended for _, _, _, ended, _ in arms)


def test_a_failed_arm_is_told_and_the_others_run(shell: Shell) -> None:
    found = shell.run("quick_test.sh", FAIL="enhanced", JOBS="2")
    assert found.returncode == 2
    assert "FAILED tiny-llama-enhanced-seed0 (status 2)" in found.stderr and "broken on purpose" in found.stderr
    report = shell.record()[-1][4]
    assert [Path(word).name for word in report[1:3]] == ["tiny-llama-original-seed0", "tiny-llama-mi-seed0"]
    calls = len(shell.record())
    again = shell.run("quick_test.sh")
    assert again.returncode == 0 and again.stderr.count("skipped\n") == 2
    assert [words[0] for _, _, _, _, words in shell.record()[calls:]] == ["compress", "report"]


def test_an_arm_of_another_command_or_with_a_damaged_report_runs_again(shell: Shell) -> None:
    arms = ["original", "enhanced", "mi"]
    shell.run("quick_test.sh")
    (shell.results / "tiny-llama-mi-seed0" / "report.json").write_text("{")
    calls = len(shell.record())
    assert shell.run("quick_test.sh").returncode == 0
    assert [value(words, "--arm") for *_, words in shell.record()[calls:-1]] == ["mi"]
    calls = len(shell.record())
    shell.run("quick_test.sh", "--wbits", "3")
    assert [value(words, "--arm") for *_, words in shell.record()[calls:-1]] == arms


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_the_arm_too(shell: Shell, number: int, status: int) -> None:
    process = shell.start("quick_test.sh", HANG="enhanced")
    until(lambda: any(what == "hanging" for what, *_ in shell.record()), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status and "the same command goes on" in err
    assert [what for what, *_ in shell.record()] == ["done", "hanging", "terminated"]
    with pytest.raises(ProcessLookupError):  # nobody of its process group is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_smoke_run_leaves_no_experiment_behind(shell: Shell, number: int, status: int) -> None:
    process = shell.start("smoke.sh", "quick_test", "k_sweep", HANG="enhanced", JOBS="1")
    until(lambda: any(what == "hanging" for what, *_ in shell.record()), process)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == status
    assert [what for what, *_ in shell.record()] == ["done", "hanging", "terminated"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_smoke_tells_the_time_of_each_and_what_failed(shell: Shell) -> None:
    found = shell.run("smoke.sh", "quick_test", "k_sweep", FAIL="n-groups-10", JOBS="2")
    assert found.returncode == 2
    assert [line.split("s  ")[1] for line in found.stdout.splitlines()] == [
        "status 0  quick_test", "status 2  k_sweep", "1 of 2 failed",
    ]  # fmt: skip
    assert "FAILED tiny-llama-mi-n-groups-10-seed0 (status 2)" in found.stderr


@pytest.mark.slow
def test_a_killed_sweep_repeats_no_finished_arm(shell: Shell) -> None:
    """With the compressions of mico itself on a model of two layers."""
    shell.program("stand-in", FAKE.format(python=sys.executable))
    python, root = shlex.quote(sys.executable), shlex.quote(str(PIPELINES.parent))
    (shell.root / "held.py").write_text(HELD)
    report = f'[ "$1" != report ] || exec "{shell.root}/bin/stand-in" "$@"'
    held = shlex.quote(str(shell.root / "held.py"))
    shell.program("mico", f'#!/bin/sh\n{report}\nPYTHONPATH={root} exec {python} {held} "$@"\n')
    model, texts = make_model(shell.root / "tiny"), make_texts(shell.root / "texts")
    command = (str(model), "--data-dir", str(texts), "--calib", "wikitext2", "--eval", "none", "--nsamples", "4")
    env = dict(N_GROUPS="2 3", MICO_RESULTS=str(shell.results), OMP_NUM_THREADS="1")
    first, second = (shell.results / f"tiny-mi-n-groups-{count}-seed0" for count in (2, 3))
    process = shell.start("k_sweep.sh", *command, HOLD=second.name, **env)
    until(lambda: (second / ".held").exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (first / "report.json").exists() and not (second / "report.json").exists()
    before = (first / "report.json").stat()
    again = shell.run("k_sweep.sh", *command, **env)
    assert again.returncode == 0, again.stderr
    after = (first / "report.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert f"{first.name}: finished before by the same command, skipped" in again.stderr
    assert f"{second.name}: done in" in again.stderr and "1 done, 1 skipped, 0 failed" in again.stderr
    assert json.loads((second / "report.json").read_text())["resumed_blocks"] == 1
    assert shell.record()[-1][4][:3] == ["report", str(first), str(second)]


# --- the small Mixtral ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "nearest"), [(0.0, 0.0), (0.05, 1e-3)])
def test_an_upcycled_mixtral_computes_what_its_llama_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float, nearest: float
) -> None:
    spec = importlib.util.spec_from_file_location("upcycle", PIPELINES / "upcycle.py")
    assert spec is not None and spec.loader is not None
    upcycle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upcycle)
    monkeypatch.setattr(upcycle, "NOISE", noise)
    upcycle.upcycle(REFERENCE_DIR / "tiny-llama", tmp_path / "mixtral")
    ids = torch.arange(40).unsqueeze(0) * 7
    logits = []
    for folder in (REFERENCE_DIR / "tiny-llama", tmp_path / "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(ids).logits)
    difference = float((logits[0] - logits[1]).abs().max())
    assert nearest <= difference < nearest * 1e4 + 1e-4
