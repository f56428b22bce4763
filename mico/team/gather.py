"""How a team comes about: a launcher (torchrun) started its processes, or the first one starts the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mico.errors import UserError
from mico.team.team import MEETING, Team

HOST = "127.0.0.1"  # the processes that mico starts by itself are on this machine
WORKER = "mico.follow"  # what they run


def gather(device: str) -> Team:
    """The team of this process: its launcher's (torchrun), or one process for each name in `device` (with commas).

    Raises UserError when devices and processes do not match.
    """
    names = tuple(name.strip() for name in device.split(","))
    size = int(os.environ.get("WORLD_SIZE", "1")) if {"RANK", "MASTER_ADDR"} <= os.environ.keys() else 1
    if size > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        here = _local_devices(device, names, local)
        return Team(int(os.environ["RANK"]), tuple(here[rank % local] for rank in range(size)), _met)
    if len({name.partition(":")[0] for name in names}) > 1:
        raise UserError(f"--device {device}: name devices of one kind")
    return Team(0, names, _started if len(names) > 1 else None, at_once=False)


def _local_devices(device: str, names: tuple[str, ...], local: int) -> tuple[str, ...]:
    """The device of every process of this machine."""
    if len(names) > 1 and len(names) != local:
        raise UserError(f"--device {device}: {len(names)} devices for {local} processes: name one for each, or auto")
    if len(names) > 1:
        return names
    if names[0] not in ("auto", "cuda"):
        return names * local
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible == 0 and device == "auto":
        return ("cpu",) * local
    if visible < local:
        raise UserError(
            f"{local} processes for {visible} visible CUDA devices: lower --nproc-per-node, or see CUDA_VISIBLE_DEVICES"
        )
    return tuple(f"cuda:{rank}" for rank in range(local))


def _met(team: Team) -> Any:
    """The store of a team that a launcher started."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=MEETING)))
    return PrefixStore("mico", store)


def _started(team: Team) -> Any:
    """The store of a team whose other processes start now."""
    from torch.distributed import TCPStore

    store = TCPStore(HOST, 0, team.size, True, timeout=MEETING, wait_for_workers=False)
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = dict(WORLD_SIZE=str(team.size), LOCAL_WORLD_SIZE=str(team.size), MICO_STORE=str(store.port))
    more |= dict(PYTHONPATH=os.pathsep.join(paths))
    if team.devices[0] == "cpu":
        more["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // team.size))
    for rank in range(1, team.size):
        environment = os.environ | more | dict(RANK=str(rank), MICO_DEVICES=",".join(team.devices))
        command = [sys.executable, "-m", WORKER]
        team.children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=2))
    return store


def started_here() -> Team:
    """The team of a process that `_started` started."""
    from torch.distributed import TCPStore

    devices, port = tuple(os.environ["MICO_DEVICES"].split(",")), int(os.environ["MICO_STORE"])
    return Team(int(os.environ["RANK"]), devices, lambda team: TCPStore(HOST, port, team.size, False, timeout=MEETING))
