"""What a walk carries from block to block: hidden states, on the host, and the arguments that blocks are called with.

The hidden states lie in memory, or in a file where they would fill it. Where memory runs out over a batch, all batches
are halved and the work on them starts anew.
Suffixes: N windows, B windows of a batch, T tokens, C channels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import nn

from mico.errors import UserError, out_of_memory
from mico.files import writing
from mico.loading.free import free_memory

Batch = Mapping[str, torch.Tensor]  # what the model is called with: input_ids, pixel_values
Found = TypeVar("Found")

TRACKS = 2  # of hidden states: inputs of a block, and the dense model's or the outputs
MEMORY_SHARE = 0.5  # of the free memory that hidden states may take; above, they go to a file


def spills(nbytes: float, free: float) -> bool:
    """Whether hidden states of so many bytes go to a file where so many bytes of memory are free."""
    return nbytes > MEMORY_SHARE * free


@dataclass(frozen=True)
class _Slot:
    """Where one batch lies in the file."""

    file: IO[bytes]
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def write(self, x_BTC: torch.Tensor) -> None:
        assert x_BTC.shape == self.shape and x_BTC.dtype == self.dtype, "hidden states keep their shape"
        self.file.seek(self.start)
        self.file.write(_bytes(x_BTC.contiguous()))
        self.file.flush()

    def read(self) -> torch.Tensor:
        x_BTC = torch.empty(self.shape, dtype=self.dtype)
        self.file.seek(self.start)
        count = self.file.readinto(_bytes(x_BTC))  # type: ignore[attr-defined]
        assert count == x_BTC.nbytes, "what was written is there"
        return x_BTC

    def split(self, windows: int) -> list[_Slot]:
        """As torch.Tensor.split: pieces of so many windows, the last one of what is left."""
        found, window = [], self.shape[1:].numel() * self.dtype.itemsize
        for first in range(0, self.shape[0], windows):
            shape = torch.Size((min(windows, self.shape[0] - first), *self.shape[1:]))
            found.append(_Slot(self.file, self.start + first * window, shape, self.dtype))
        return found


def _bytes(x_BTC: torch.Tensor) -> memoryview:
    return memoryview(x_BTC.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Activations:
    """The hidden states of every batch, in order. folder: of the file that holds them; None: they are in memory.

    The file has no name, so nothing is left of it when the process ends in whatever way. Writing raises UserError
    naming the folder when its disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._items = folder, list[torch.Tensor | _Slot]()
        self._file: IO[bytes] | None = None
        self._end = 0
        if folder is not None:
            with writing(folder):
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the last reference)

    def append(self, x_BTC: torch.Tensor) -> None:
        """Add a batch, on the host."""
        self._items.append(x_BTC)
        if self._file is not None:
            self._items[-1] = _Slot(self._file, self._end, x_BTC.shape, x_BTC.dtype)
            self._end += x_BTC.nbytes
            self[len(self) - 1] = x_BTC

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> torch.Tensor:
        item = self._items[place]
        return item.read() if isinstance(item, _Slot) else item

    def __setitem__(self, place: int, x_BTC: torch.Tensor) -> None:
        item = self._items[place]
        if isinstance(item, _Slot):
            assert self.folder is not None
            with writing(self.folder):
                item.write(x_BTC)
        else:
            self._items[place] = x_BTC

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[place] for place in range(len(self)))

    @property
    def sizes(self) -> list[int]:
        """Windows of every batch."""
        return [item.shape[0] for item in self._items]

    def place(self, windows: int) -> int:
        """The batch before which so many windows lie."""
        return list(accumulate(self.sizes, initial=0)).index(windows)

    def split(self, windows: int) -> None:
        """Cut every batch into pieces of at most so many windows; nothing is copied."""
        self._items = [piece for item in self._items for piece in item.split(windows)]

    def copy(self) -> Activations:
        """The same hidden states, to be changed apart."""
        found = Activations(self.folder)
        for x_BTC in self:
            found.append(x_BTC)
        return found


@dataclass(frozen=True)
class _Call:
    """The arguments a block gets beside the hidden states; they depend on the block and the batch's shape only."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Carrier:
    """What a walk carries from block to block: hidden states, in batches that fit, and how every block is called.

    enter: runs the model on a batch as far as the blocks at least; blocks: by their numbers; given: numbers of the
    batches as they came; windows: of a batch now, at most; alone: the blocks are one that changes the width.
    """

    def __init__(
        self, enter: Callable[..., Any], blocks: Mapping[int, nn.Module], device: torch.device,
        batches: Mapping[int, Batch], folder: Path | None, tell: Callable[[str], None], alone: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.given, self.halvings = device, list(batches), 0
        self._enter, self._blocks, self._batches, self._folder, self._alone = enter, blocks, batches, folder, alone
        self._sizes, self._tell = [_windows(batch) for batch in batches.values()], tell
        self.windows = max(self._sizes, default=1)
        self.calls: dict[tuple[int, torch.Size], _Call] = {}
        self.dense_inputs: Activations | None = None
        self.inputs = Activations()
        self.record()

    def record(self) -> None:
        """Make the inputs of the first block by what comes before it as it is now."""
        self.fitting(self._record_all, "embeddings")

    def keep_dense(self, again: bool = False) -> None:
        """Take the inputs for those of the dense model, and carry them beside the others from now on.

        again: the others will be recorded when it is their turn.
        """
        self.dense_inputs = self.inputs if again else self.inputs.copy()
        if again:
            self.inputs = Activations()

    # --- batches that fit ---

    @property
    def numbers(self) -> list[int]:
        """Of the batches as they are cut now: those of a walk that had been asked for the smaller batches."""
        counts = [-(-size // self.windows) for size in self._sizes]
        given = zip(self.given, counts, strict=True)
        return [(number << self.halvings) + piece for number, count in given for piece in range(count)]

    def whole(self, number: int) -> int:
        """The batch as it was given that a piece is of."""
        return number >> self.halvings

    def fitting(self, work: Callable[[], Found], where: str) -> Found:
        """What `work` returns once its batches fit: each time memory runs out they are halved and it starts anew.

        Raises UserError when a batch of one window does not fit.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self._halve(where)  # outside the except clause: its traceback would keep the tensors alive

    def _halve(self, where: str) -> None:
        if self.windows == 1:
            raise UserError(
                f"{where}: out of memory on {self.device} with one calibration window: lower --seqlen, "
                "use --stream, or use --device cpu"
            )
        self.windows, self.halvings = smaller(self.windows), self.halvings + 1
        self._tell(f"{where}: out of memory on {self.device}, calibration batches halved to {self.windows} windows")
        self.inputs.split(self.windows)
        if self.dense_inputs is not None:
            self.dense_inputs.split(self.windows)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- how blocks are called ---

    def _record_all(self) -> None:
        self.inputs, windows = Activations(), self.windows
        for batch in self._batches.values():
            for piece in _pieces(batch, windows):
                hidden_BTC = self._record(piece).to("cpu")
                if not len(self.inputs):
                    self.inputs = self._store(TRACKS * self._rows(hidden_BTC, piece) * hidden_BTC[0, 0].nbytes)
                self.inputs.append(hidden_BTC)
        for batch in _one_of_each_kind(self._batches.values()):
            for size in self._sizes_to_come(batch):
                self._record(next(_pieces(batch, size)))

    def _rows(self, hidden_BTC: torch.Tensor, piece: Batch) -> int:
        """Rows of the hidden states of all batches, by those of one piece."""
        tokens, rows = "input_ids" in piece, hidden_BTC[..., 0].numel()
        sizes = [batch["input_ids"].numel() if tokens else _windows(batch) for batch in self._batches.values()]
        return sum(sizes) * rows // (piece["input_ids"].numel() if tokens else _windows(piece))

    def _sizes_to_come(self, batch: Batch) -> set[int]:
        """Windows of the batches of one kind that there will be if memory runs out."""
        kind, found, limit = _kind(batch), set[int](), self.windows
        sizes = {_windows(other) for other in self._batches.values() if _kind(other) == kind}
        now = {count for size in sizes for count in (min(size, limit), size % limit) if count}
        while limit > 1:
            limit = smaller(limit)
            found |= {count for size in sizes for count in (min(size, limit), size % limit) if count}
        return found - now

    def _store(self, nbytes: int) -> Activations:
        if not spills(nbytes, free_memory(torch.device("cpu"))):
            return Activations()
        place = self._folder or Path(tempfile.gettempdir())
        self._tell(f"{nbytes / 1e9:.2f} GB of hidden states would fill the memory: they go to a file in {place}")
        return Activations(place)

    def _record(self, batch: Batch) -> torch.Tensor:
        """One forward in which every block only notes how it was called: exact masks and positions, layer by layer.

        Returns the inputs of the first block.
        """
        first: list[torch.Tensor] = []

        def recorder(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not first:
                    first.append(hidden_states)
                self.calls.setdefault((index, hidden_states.shape), _Call(args, kwargs))
                return own(hidden_states, *args, **kwargs) if self._alone else hidden_states

            return forward

        try:
            for index, block in self._blocks.items():
                block.forward = recorder(index, block.forward)
            self._enter(**{name: tensor.to(self.device) for name, tensor in batch.items()})
        finally:
            for block in self._blocks.values():
                del block.forward
        return first[0]


def _kind(batch: Batch) -> tuple[tuple[str, torch.Size], ...]:
    """What the calls of blocks may depend on besides the number of windows."""
    return tuple((name, tensor.shape[1:]) for name, tensor in batch.items())


def _one_of_each_kind(batches: Iterable[Batch]) -> list[Batch]:
    """The largest batch of every kind."""
    found: dict[tuple[Any, ...], Batch] = {}
    for batch in sorted(batches, key=_windows):
        found[_kind(batch)] = batch
    return list(found.values())


def smaller(windows: int) -> int:
    """What a batch is cut to: the next lower power of two, so that pieces cut once or several times are the same."""
    return 1 << (windows - 1).bit_length() - 1


def _windows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _pieces(batch: Batch, windows: int) -> Iterator[Batch]:
    for start in range(0, _windows(batch), windows):
        yield {name: tensor[start : start + windows] for name, tensor in batch.items()}
