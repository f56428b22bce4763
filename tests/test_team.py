"""Several processes compress one model: the same bytes as one, the work shared, and no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mico
from mico.channels.meters import PairedMoments, Reservoir
from mico.errors import ContractError, UserError
from mico.exits import explain
from mico.files import read_json, sha256_file
from mico.follow import settings_of
from mico.settings import Compression, Grouping, record
from mico.team import ALONE, Balance, StreamMeter, Team, gather, in_order, solving_cost
from tests.workspace import Workspace, make_model, workspace

PROMPT_SECONDS = 20  # in which all processes must have ended after one has failed


@pytest.fixture
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products on other numbers of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- who does what --------------------------------------------------------------------------------------------------


def test_costly_streams_come_first_and_no_process_always_gets_the_widest() -> None:
    balance, llama = Balance(2), [(6144, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    widest = [balance.owners(llama)[3] for _ in range(32)]
    assert set(widest) == {0, 1}
    assert max(balance.share(0), balance.share(1)) < 0.52
    work = sum(solving_cost(*shape) for shape in llama) * 32
    assert work / max(balance.load) > 1.9


def test_streams_that_follow_one_another_are_shared_too() -> None:
    balance = Balance(3)
    for _ in range(12):
        for shape in ((300, 100), (100, 100), (600, 100), (100, 300)):
            balance.owners([shape])
    assert max(balance.load) / sum(balance.load) < 0.40


def test_a_team_of_one_does_all_without_a_message() -> None:
    tensor = torch.ones(3)
    ALONE.total(0)(tensor)
    assert tensor.tolist() == [1, 1, 1] and ALONE.leads and list(range(5))[ALONE.share] == list(range(5))
    assert ALONE.send(0, {"a": 1}, {"t": tensor}) == ({"a": 1}, {"t": tensor})
    assert Balance(1).owners([(4, 4), (8, 8)]) == [0, 0]
    assert ALONE.describe() == []


@given(st.integers(1, 5), st.lists(st.integers(1, 9), max_size=12))
def test_shares_are_a_partition(size: int, batches: list[int]) -> None:
    teams = [Team(rank, ("cpu",) * size) for rank in range(size)]
    numbers = [number for team in teams for number in list(range(len(batches)))[team.share]]
    assert sorted(numbers) == list(range(len(batches)))


@pytest.mark.parametrize(
    ("device", "environment", "message"),
    [
        ("cpu,cuda:0", {}, "--device cpu,cuda:0: name devices of one kind"),
        ("cpu,cpu,cpu", dict(WORLD_SIZE="2"), "3 devices for 2 processes"),
    ],
)
def test_devices_and_processes_must_match(
    device: str, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (dict(RANK="0", MASTER_ADDR="127.0.0.1") | environment if environment else {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        gather(device)


def test_a_launcher_gives_rank_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(RANK="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", MASTER_ADDR="host").items():
        monkeypatch.setenv(name, value)
    team = gather("cuda:0,cuda:1")
    assert (team.rank, team.device, team.devices) == (3, "cuda:1", ("cuda:0", "cuda:1") * 2)
    assert not team.leads and team.share == slice(3, None, 4)
    assert "process 2: cuda:0" in team.describe()[2]


def test_settings_travel() -> None:
    for settings in (
        Compression(sparsity=0.5, wbits=4, grouping=Grouping(4, "random")),
        Compression(method="sparsegpt", pattern=(2, 4), wbits=3, group_size=16),
    ):
        assert settings_of(record(settings)) == settings


# --- sums over shares -----------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 40))
def test_rows_of_all_shares_are_those_of_one(size: int, rows: list[int], limit: int) -> None:
    content_TC = torch.arange(sum(rows), dtype=torch.float32)[:, None]
    batches = content_TC.split(rows)
    whole = Reservoir(1, limit)
    parts = [Reservoir(1, limit, sum(rows)) for _ in range(size)]
    for number, batch in enumerate(batches):
        if len(batch):
            whole.add(batch)
            part = parts[number % size]
            part.seen = sum(rows[:number])
            part.add(batch)
    assert all(part.stride == whole.stride for part in parts)
    assert torch.equal(in_order([part.rows_TC for part in parts], rows, whole.stride), whole.rows_TC)


def test_a_meter_of_a_share_skips_batches_that_have_no_rows() -> None:
    rows = [3, 2, 0, 4, 5, 1]  # the second process of two has batches 1, 3, 5; the first 0, 2, 4
    first = StreamMeter(1, torch.device("cpu"), rows, slice(0, None, 2))
    content_TC = torch.arange(15.0)[:, None]
    for start, length in ((0, 3), (9, 5)):
        first.add(content_TC[start : start + length])
    assert first.reservoir.rows_TC.flatten().tolist() == [0, 1, 2, 9, 10, 11, 12, 13]
    assert first.reservoir.seen == 14


def test_sums_of_moments_do_not_depend_on_who_adds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 50, 24, generator=generator) for _ in range(9)]
    whole, parts = PairedMoments(24), [PairedMoments(24) for _ in range(2)]
    for number, (own_TC, dense_TC) in enumerate(batches):
        whole.add(own_TC, dense_TC)
        parts[number % 2].add(own_TC, dense_TC, number)
    given: list[torch.Tensor] = []
    parts[1].reduce(given.append)
    theirs = iter(given)
    parts[0].reduce(lambda tensor: tensor.add_(next(theirs)))
    assert parts[0].held.count == whole.held.count == 100 and parts[0].fit.count == 350
    for name in ("gram_CC", "sum_C", "mean_C", "hessian_CC"):
        assert torch.equal(getattr(parts[0].total, name), getattr(whole.total, name)), name
    for name in ("cross_CC", "dense_sum_C", "held_cross_CC"):
        assert torch.equal(getattr(parts[0], name), getattr(whole, name)), name


# --- two processes --------------------------------------------------------------------------------------------------


def in_two(work: Callable[[Team], None], folder: Path) -> list[tuple[int, str]]:
    """Exit code and last words of two forked processes that do `work`; both must end soon."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code, line = 0, ""
            try:
                with gather("cpu") as team:
                    work(team)
            except BaseException as error:
                code, line = explain(error)
            (folder / f"said-{rank}").write_text(line)
            os._exit(code)
        processes.append(pid)
    ended: dict[int, int] = {}
    started = time.monotonic()
    while len(ended) < 2 and time.monotonic() - started < PROMPT_SECONDS:
        for pid in set(processes) - ended.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in set(processes) - ended.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = [folder / f"said-{rank}" for rank in range(2)]
    return [
        (ended.get(pid, -999), file.read_text() if file.exists() else "")
        for pid, file in zip(processes, said, strict=True)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
@pytest.mark.parametrize("kind", ["messages", "killed", "failed", "leader", "interrupted"])
def test_two_processes_end_together(kind: str, tmp_path: Path) -> None:
    def collective(team: Team) -> None:
        if kind == "killed" and not team.leads:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "failed" and not team.leads:
            raise UserError("block 3, batch 5: NaN")
        if kind == "leader" and team.leads:
            raise ContractError("--strict: 1 fallback")
        if kind == "interrupted" and team.leads:
            raise KeyboardInterrupt
        tensor = torch.full((3,), team.rank + 1.0, dtype=torch.float64)
        team.total(1)(tensor)
        assert team.leads or tensor.tolist() == [3, 3, 3]
        sent = dict(mask=torch.tensor([True, False]), half=torch.ones(2, 0).half(), code=torch.arange(5).byte())
        told, found = team.send(1, [team.rank, None], sent if team.rank == 1 else None)
        assert told == [1, None] and found.keys() == sent.keys()
        assert all(torch.equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype for name in sent)
        assert team.gathered(team.rank) == [0, 1]

    def work(team: Team) -> None:
        if team.leads:
            with team.asked({}, dict(number=7)):
                collective(team)
        for task in () if team.leads else team.tasks():
            assert task == dict(number=7)
            collective(team)

    (code, said), (other, silence) = in_two(work, tmp_path)
    expected = {"messages": (0, 0), "killed": (2, -signal.SIGKILL), "failed": (2, 2), "leader": (3, 3)}
    assert (code, other) == expected.get(kind, (130, 130)), (said, silence)
    assert silence == ""
    if kind in ("killed", "failed"):
        assert "process 1 on cpu" in said and "\n" not in said
    assert ("block 3, batch 5: NaN" in said) == (kind == "failed")


def blocks(run: Path) -> list[str]:
    return [sha256_file(file) for file in sorted((run / "blocks").iterdir())]


def options(space: Workspace) -> dict[str, object]:
    return space.options | dict(eval="none")


def check_processes(single: dict, shared: dict) -> None:
    """Each of two processes has at most 1 / 1.6 of the work of one."""
    assert [one["rank"] for one in shared["processes"]] == [0, 1]
    assert single["processes"][0]["share"] == 1
    assert max(one["share"] for one in shared["processes"]) <= 1 / 1.6
    assert all(one["solving_seconds"] > 0 for one in shared["processes"])


def test_devices_with_commas_go_on_after_finished_blocks(space: Workspace, tmp_path: Path, one_thread: None) -> None:
    """Two processes end what one has begun, with the same bytes; both read what is there."""
    model, one, two = str(make_model(tmp_path / "model", layers=4)), tmp_path / "one", tmp_path / "two"
    common = dict(method="sparsegpt", **options(space))
    single = mico.compress(model, save=str(one), **common)
    shutil.copytree(one, two)
    shutil.rmtree(two / "model")
    for number in (2, 3):
        (two / "blocks" / f"00{number}.safetensors").unlink()
    shared = mico.compress(model, save=str(two), device="cpu,cpu", **common)
    assert blocks(one) == blocks(two) and len(blocks(two)) == 4
    assert (one / "layers.jsonl").read_bytes() == (two / "layers.jsonl").read_bytes()
    check_processes(single, shared)
    assert "process 1 on cpu" in (two / "report.md").read_text()
    assert not torch.distributed.is_initialized()


def test_torchrun_gives_the_same_bytes(space: Workspace, tmp_path: Path, one_thread: None) -> None:
    model, root = str(make_model(tmp_path / "model", layers=4)), tmp_path
    flags = dict(save=str(root / "one"), statistics=str(root / "s1"), groups=str(root / "g1"))
    single = mico.compress(model, method="mico", **flags, **options(space))
    two = ["--method=mico", f"--save={root / 'two'}", f"--statistics={root / 's2'}", f"--groups={root / 'g2'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "mico", "compress", model, "--device=cpu", "--eval=none", *space.flags, *two]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Time and memory") == 1 and first.stderr.count("process 1: cpu") == 1
    for name in ("one", "s1", "g1"):
        assert blocks(root / name) == blocks(root / dict(one="two", s1="s2", g1="g2")[name]), name
    check_processes(single, read_json(root / "two" / "report.json"))
