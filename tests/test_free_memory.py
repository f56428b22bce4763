"""Free memory: the least of what the machine has and what control groups leave, in both versions of their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mico.loading import free


def group(folder: Path, limit: str, used: int, stat: str, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, content in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, file in (("_CONTROL", "cgroup"), ("_OWN_GROUPS", "own"), ("_MEMORY", "meminfo")):
        monkeypatch.setattr(free, name, tmp_path / file)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    return tmp_path


def left() -> int:
    return free.free_memory(torch.device("cpu"))


def test_without_groups_the_machine_tells(machine: Path) -> None:
    assert left() == 1_024_000
    (machine / "own").write_text("0::/job\n5:devices:/\n")
    assert left() == 1_024_000
    (machine / "meminfo").unlink()
    assert left() == free.UNLIMITED


def test_the_narrowest_group_above_counts(machine: Path) -> None:
    (machine / "own").write_text("0::/jobs/mine\n")
    group(machine / "cgroup" / "jobs" / "mine", "max", 10, "inactive_file 5", version=2)
    assert left() == 1_024_000
    group(machine / "cgroup" / "jobs", "500000", 90_000, "anon 1\ninactive_file 20000\nactive_file 3000", version=2)
    assert left() == 500_000 - 90_000 + 23_000
    group(machine / "cgroup" / "jobs" / "mine", "400", 600, "inactive_file 5", version=2)
    assert left() == 0


def test_a_container_sees_its_group_as_the_root(machine: Path) -> None:
    (machine / "own").write_text("4:cpu,memory:/docker/0123\n0::/\n")
    stat = "inactive_file 1\ntotal_inactive_file 2000\ntotal_active_file 100"
    group(machine / "cgroup" / "memory", "60000", 10_000, stat, version=1)
    assert left() == 60_000 - 10_000 + 2_100


def test_this_machine_has_some() -> None:
    assert 0 < left() <= free.UNLIMITED
