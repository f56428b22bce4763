"""Several processes that compress one model together, each on a device of its own: `with gather(device) as team:`.

Each carries every size-th batch of the calibration; sums of moments go to an owner, which solves; results go to all.
The first process (rank 0) alone owns folders, shows anything, and says what the others do next (`ask`); a team of one
does all of this without a message. Tasks, errors and the end pass through a small key-value store that every process
polls, so that none waits for one that has failed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import Any

import torch

from mico.errors import Silenced, UserError, exit_code

GENEROUS = timedelta(days=2)  # one process may solve for hours while the others wait
MEETING = timedelta(minutes=10)  # until every process is there
LOOK_SECONDS = 0.3  # between two looks at the store while a message is awaited
EXCUSE_SECONDS = 3.0  # for the others to say why a connection broke
END_SECONDS = 20.0  # for processes that end to hear one another


class Team:
    """One process among `len(devices)`; `rank` 0 leads."""

    def __init__(
        self, rank: int, devices: tuple[str, ...], meet: Callable[[Team], Any] | None = None, at_once: bool = True
    ) -> None:
        """meet: gives the store; at_once False: only when there is work, as it starts the other processes."""
        self.rank, self.devices, self._meet, self._at_once = rank, devices, meet, at_once
        self.store: Any = None
        self.children: list[subprocess.Popen[bytes]] = []
        self._asked = 0
        self._wire: torch.device | None = None  # where tensors lie while they travel; None: not connected yet

    # --- who and where ---

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def device(self) -> str:
        return self.devices[self.rank]

    @property
    def share(self) -> slice:
        """The batches that this process carries: every size-th."""
        return slice(self.rank, None, self.size)

    def who(self, rank: int) -> str:
        return f"process {rank} on {self.devices[rank]}"

    def describe(self) -> list[str]:
        """What every process does and why, a line each; none for a team of one."""
        if self.alone:
            return []
        work = (
            f"reads the model, carries 1/{self.size} of the calibration batches, owns streams so that all solve alike"
        )
        lines = [f"process {rank}: {device}, {work}" for rank, device in enumerate(self.devices)]
        lines[0] += "; leads: folders, channel groups, bits, evaluation and saving are its alone"
        return lines

    # --- coming together and leaving ---

    def __enter__(self) -> Team:
        if self._meet is not None and self._at_once:
            self.store = self._meet(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the others end too, with the exit code of the first; of several errors the first process tells one."""
        try:
            if self.leads:
                self._dismiss(error)
            elif error is not None and self.store is not None:
                raise Silenced(self._confess(error)) from None
        finally:
            if self._wire is not None and (error is None or self._wire.type == "cpu"):
                torch.distributed.destroy_process_group()
            self._wire = None

    def _dismiss(self, error: BaseException | None) -> None:
        if self.store is None:
            return
        with suppress(RuntimeError):
            self.store.set("end", str(exit_code(error)))
            for rank in range(1, self.size) if error is None or not self.children else ():
                self._await(f"gone/{rank}", END_SECONDS if error is None else EXCUSE_SECONDS)
        for child in self.children:
            if error is not None:
                child.terminate()
            try:
                child.wait(END_SECONDS / 4)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _confess(self, error: BaseException) -> int:
        """Tell the first process what happened, and hear with which code all end."""
        code = exit_code(error)
        with suppress(RuntimeError):
            if not isinstance(error, Silenced):
                text = " ".join(str(error).split()) if code == 2 else f"{type(error).__name__}: {error}"
                told = dict(rank=self.rank, code=code, text=text, trace="".join(traceback.format_exception(error)))
                self.store.set("failed", json.dumps(told))
            heard = self._await("end", END_SECONDS if isinstance(error, Exception) else 1.0)
            self.store.set(f"gone/{self.rank}", "1")
            return int(heard) if heard is not None else code
        return code

    def _await(self, key: str, seconds: float) -> bytes | None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.store.check([key]):
                return self.store.get(key)
            time.sleep(0.05)
        return None

    # --- tasks ---

    @contextmanager
    def asked(self, job: Mapping[str, Any], task: Mapping[str, Any]) -> Iterator[None]:
        """The first process: inside, all others do `task`. job: what they need to know once, before their first."""
        assert self.leads
        if self.alone:
            yield
            return
        if self.store is None:
            assert self._meet is not None
            self.store = self._meet(self)
            self.store.set("job", json.dumps(job))
        self.store.set(f"task/{self._asked}", json.dumps(task))
        self._asked += 1
        self._connect()
        before = torch.get_num_threads()
        if self.children and self.devices[0] == "cpu":
            torch.set_num_threads(max(1, before // self.size))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def job(self) -> dict[str, Any]:
        """What the first process gave as `job`."""
        self.store.wait(["job"], GENEROUS)
        return json.loads(self.store.get("job"))

    def tasks(self) -> Iterator[dict[str, Any]]:
        """The other processes: what they are asked for, until the first one ends. Raises Silenced when it failed."""
        for number in count():
            pause = 0.02
            while not self.store.check([f"task/{number}"]):
                if self.store.check(["end"]):
                    self.store.set(f"gone/{self.rank}", "1")
                    if code := int(self.store.get("end")):
                        raise Silenced(code)
                    return
                time.sleep(pause)
                pause = min(pause * 1.5, 0.5)
            task = json.loads(self.store.get(f"task/{number}"))
            self._connect()
            yield task

    def _connect(self) -> None:
        if self._wire is not None:
            return
        from torch import distributed

        if distributed.is_initialized():
            raise UserError("torch.distributed is in use in this process: let mico form its team in one of its own")
        self.store.set(f"here/{self.rank}", "1")
        for rank in range(self.size):  # forming the group cannot be interrupted: first all must be there
            while not self.store.check([f"here/{rank}"]):
                self._look()
                time.sleep(0.02)
        here = set(self.devices)
        own_gpus = all(name.startswith("cuda") for name in here) and len(here) == self.size
        backend = "nccl" if own_gpus and distributed.is_nccl_available() else "gloo"
        self._wire = torch.device(self.device if backend == "nccl" else "cpu")
        distributed.init_process_group(
            backend, store=distributed.PrefixStore("wire", self.store), rank=self.rank, world_size=self.size,
            timeout=GENEROUS,
        )  # fmt: skip

    # --- messages ---

    def total(self, owner: int) -> Callable[[torch.Tensor], None]:
        """A function that puts the sum over all processes into a tensor of `owner`; what others hold is lost."""

        def total(tensor: torch.Tensor) -> None:
            if self.alone:
                return
            wired = tensor.to(self._wire).contiguous()
            self._finish(torch.distributed.reduce(wired, owner, async_op=True))
            if self.rank == owner:
                tensor.copy_(wired)

        return total

    def send(
        self, source: int, record: Any = None, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """`record` (JSON) and tensors of process `source` in every process; the others' own are ignored."""
        if self.alone:
            return record, dict(tensors or {})
        kinds = {name: (str(t.dtype).removeprefix("torch."), t.shape) for name, t in (tensors or {}).items()}
        header = torch.frombuffer(bytearray(json.dumps([record, kinds]).encode()), dtype=torch.uint8)
        length = int(self._broadcast(torch.tensor([len(header)]), source))
        if self.rank == source:
            self._broadcast(header, source)
            for tensor in (tensors or {}).values():
                self._broadcast(tensor, source)
            return record, dict(tensors or {})
        header = self._broadcast(torch.empty(length, dtype=torch.uint8), source)
        record, kinds = json.loads(header.numpy().tobytes())
        empty = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in kinds.items()}
        return record, {name: self._broadcast(tensor, source) for name, tensor in empty.items()}

    def _broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of `source`, on the device of the one given here, which has its shape; as bytes, of any dtype."""
        wired = tensor.detach().to(self._wire).contiguous()
        if wired.numel():
            self._finish(torch.distributed.broadcast(wired.reshape(-1).view(torch.uint8), source, async_op=True))
        return wired.to(tensor.device)

    def gathered(self, record: Any) -> list[Any]:
        """The records of all processes, by rank, in every process."""
        return [self.send(rank, record)[0] for rank in range(self.size)]

    # --- waiting, without hanging on a process that is no more ---

    def _finish(self, work: Any) -> None:
        pause, looked = 0.0002, time.monotonic()
        while not work.is_completed():  # polled: signals are heard, and so are the others' errors
            time.sleep(pause)
            pause = min(pause * 1.5, 0.005)
            if time.monotonic() - looked > LOOK_SECONDS:
                self._look()
                looked = time.monotonic()
        try:
            work.wait()
        except RuntimeError as error:
            self._broken(error)

    def _look(self) -> None:
        """Raise when another process has failed."""
        if not self.leads:
            if self.store.check(["end"]) or self.store.check(["broken"]):
                raise Silenced(1)
            return
        if self.store.check(["failed"]):
            told = json.loads(self.store.get("failed"))
            text = f"{self.who(told['rank'])}: {told['text']}"
            error: Exception = UserError(text) if told["code"] == 2 else RuntimeError(text)
            error.add_note(told["trace"])
            raise error
        for rank, child in enumerate(self.children, 1):
            if child.poll() is not None:
                raise UserError(f"{self.who(rank)} was ended{_by(child.returncode)}: {_AGAIN}")
        if self.store.check(["broken"]):
            raise UserError(f"a process of this run was ended from outside: {_AGAIN}")

    def _broken(self, error: RuntimeError) -> None:
        """A connection broke, as when a process is killed: leave with the best reason that can be had."""
        until = time.monotonic() + (EXCUSE_SECONDS if self.leads else 0)
        while time.monotonic() < until:
            self._look()
            time.sleep(0.1)
        self.store.set("broken", "1")
        if not self.leads:
            raise Silenced(1)
        others = " or ".join(self.who(rank) for rank in range(1, self.size))
        raise UserError(f"{others} was ended from outside: {_AGAIN}") from error


_AGAIN = "the same command again goes on after the finished blocks"


def _by(code: int) -> str:
    want = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f" by signal {-code}{want}" if code < 0 else f" with exit code {code}"


ALONE = Team(0, ("auto",))
