"""What mico must know of a model family: where its blocks are and which Linears read the same tensor.

A family is data, one row of `FAMILIES` (mico/adapters/__init__.py), not a class to inherit from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mico.errors import UserError

if TYPE_CHECKING:  # the table itself is read without torch, which takes seconds to import
    from torch import nn


@dataclass(frozen=True)
class Stream:
    """All Linears of a block that read one tensor: they share one Hessian, one MI matrix, one grouping.

    expert: the number of the expert, which sees some of the tokens alone; None where all tokens pass.
    """

    name: str
    linears: tuple[str, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Tower:
    """Blocks that see images, compressed when asked for; they come before those of the language model.

    blocks: path of their list, or of one block by itself where `count` is None.
    """

    name: str
    blocks: str
    streams: tuple[Stream, ...]
    count: int | None = None

    @property
    def length(self) -> int:
        return 1 if self.count is None else self.count

    def path(self, index: int) -> str:
        return self.blocks if self.count is None else f"{self.blocks}.{index}"


@dataclass(frozen=True)
class Family:
    """Paths of one family. `streams` are in dependency order: the output of one feeds a later one.

    before: modules that turn token ids into the input of block 0; after: modules between the last block and the logits;
    vision: modules that see images; towers: what of them is compressed too, in the order of the data; fit: the row as a
    model of this config needs it, UserError where mico cannot take the config; auto: the class of transformers that
    loads a model with its head; ships_code: its checkpoints ask for code of their own, which is ignored: a class of
    transformers or of mico does the same.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    streams: tuple[Stream, ...]
    vision: tuple[str, ...] = ()
    fit: Callable[[Family, Any], Family] | None = None
    auto: str = "AutoModelForCausalLM"
    ships_code: bool = False
    towers: tuple[Tower, ...] = ()

    @property
    def offset(self) -> int:
        """Blocks of the towers: they have the first numbers, the language model's follow."""
        return sum(tower.length for tower in self.towers)

    def place(self, index: int) -> tuple[str, tuple[Stream, ...]]:
        """Path and streams of the block of a number."""
        for tower in self.towers:
            if index < tower.length:
                return tower.path(index), tower.streams
            index -= tower.length
        return f"{self.blocks}.{index}", self.streams


def waves(streams: Sequence[Stream]) -> list[tuple[Stream, ...]]:
    """The streams cut into runs that one pass can measure: those of several experts do not feed one another."""
    runs: list[list[Stream]] = []
    for stream in streams:
        seen = {other.expert for other in runs[-1]} if runs else {None}
        if stream.expert is None or None in seen or stream.expert in seen:
            runs.append([])
        runs[-1].append(stream)
    return [tuple(run) for run in runs]


def lookup(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path. Raises UserError naming the first part that is missing."""
    from torch import nn

    module = root
    for depth, part in enumerate(path.split(".")):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            raise UserError(f"module '{'.'.join(path.split('.')[: depth + 1])}' not found in {type(root).__name__}")
        module = child
    return module


def linears_of(block: nn.Module, stream: Stream) -> dict[str, nn.Linear]:
    """The Linears of one stream of one block by path. Raises UserError when one is not an nn.Linear."""
    from torch import nn

    found: dict[str, nn.Linear] = {}
    for path in stream.linears:
        module = lookup(block, path)
        if not isinstance(module, nn.Linear):
            raise UserError(f"'{path}' is a {type(module).__name__}, not a Linear: the model is already quantized?")
        found[path] = module
    return found
