"""How much memory can still be taken: of a device, of this machine, and of what a container or batch job may have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

UNLIMITED = 1 << 62
_CONTROL, _OWN_GROUPS, _MEMORY = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; of the host on Linux, elsewhere, where nobody tells, very many."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_machine(_MEMORY), *_groups(_OWN_GROUPS, _CONTROL)])


def _machine(file: Path) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return UNLIMITED
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _groups(own: Path, control: Path) -> Iterator[int]:
    """What every control group above this process leaves: its limit less what is in use and cannot be dropped.

    own: lists the groups as `number:controllers:path`, 0 with the unified hierarchy (version 2). A container may show
    its own group as the root, whatever path it has outside.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = control, _V2
        elif "memory" in controllers.split(","):
            root, names = control / "memory", _V1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in dict.fromkeys([group, *group.parents, root]):
            if folder == root or root in folder.parents:
                with suppress(OSError, ValueError):  # no such file, or "max"
                    yield _left(folder, *names)


def _left(folder: Path, limit: str, used: str, dropped: tuple[str, ...]) -> int:
    allowed, taken = (int((folder / name).read_text()) for name in (limit, used))
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, allowed - taken + sum(int(facts.get(name, 0)) for name in dropped))
