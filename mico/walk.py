"""THE block loop: inputs of block i come from the already compressed blocks 0..i-1.

`walk` yields one `Block` at a time; the caller measures streams and replaces weights, then the walk moves the
activations through the block as it now is. When `paired`, a second track carries the dense model's activations
of the same tokens. Where memory runs out over a batch, all batches are halved and the pass over them starts anew.
Suffixes: N windows, B windows of a batch, T tokens, C channels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from mico.activations import Activations, Batch, Carrier, Found
from mico.adapters.family import Family, Stream, linears_of, lookup, waves
from mico.channels.meters import PairedMoments
from mico.channels.products import FastLinears
from mico.errors import UserError
from mico.packed.experts import ExpertList
from mico.packed.quantized import QuantizedWeight


class Meter(Protocol):
    """Anything that digests the rows of one stream."""

    def add(self, x_TC: torch.Tensor) -> None: ...


AnyMeter = TypeVar("AnyMeter", bound=Meter)

MOMENTS_BYTES = 4 * 2**30  # of the moments of experts that are measured in one pass
PAIRED_MATRICES = 4  # (C, C) of float64 in PairedMoments


class _Stop(Exception):
    """Raised by a hook once everything asked for has been seen: the rest of the block need not run."""


class Block:
    """One block on its way through the walk, with the inputs it gets from the blocks before it."""

    def __init__(self, index: int, module: nn.Module, family: Family, walker: Carrier, dense: nn.Module | None) -> None:
        self.index, self.module, self._walker, self._dense = index, module, walker, dense
        self._path, self.kinds = family.place(index)
        self.streams: dict[str, dict[str, nn.Linear]] = {s.name: linears_of(module, s) for s in self.kinds}
        self.outputs: Activations | None = None

    @property
    def halvings(self) -> int:
        """How often the batches were halved for want of memory, up to here."""
        return self._walker.halvings

    def shape(self, stream: str) -> tuple[int, int]:
        """Rows of all Linears of a stream, and its channels."""
        linears = self.streams[stream].values()
        return sum(linear.out_features for linear in linears), next(iter(linears)).in_features

    def name_of(self, path: str) -> str:
        """Full name of a Linear of this block inside the model."""
        return f"{self._path}.{path}"

    @torch.no_grad()
    def measure(
        self, new_meter: Callable[[int], AnyMeter], streams: Sequence[str] | None = None
    ) -> dict[str, AnyMeter]:
        """Run the inputs through the block as it is; return a meter a stream, fed with its rows (T, C).

        Without `streams` the outputs are kept for `propagate`; with them every batch stops at the last of them,
        which is the shorter way when weights are going to be replaced. The meter of an expert to which no token went
        has seen nothing.
        """
        wanted = [s for s in self.kinds if streams is None or s.name in streams]
        meters, outputs = self._fitting(lambda: self._measure(new_meter, wanted, whole=streams is None))
        self.outputs = outputs if streams is None else None
        return meters

    def _measure(
        self, new_meter: Callable[[int], AnyMeter], wanted: Sequence[Stream], whole: bool
    ) -> tuple[dict[str, AnyMeter], Activations]:
        meters = {s.name: new_meter(self._channels(s)) for s in wanted}
        outputs = Activations(self._walker.inputs.folder)
        for batch, x_BTC in zip(self._walker.numbers, self._walker.inputs, strict=True):

            def digest(stream: Stream, x_TC: torch.Tensor, batch: int = batch) -> None:
                with self._naming(stream, batch):
                    meters[stream.name].add(x_TC)

            out_BTC = self._capture(self.module, wanted, x_BTC, digest, stop=not whole)
            if whole:
                outputs.append(out_BTC)
        return meters, outputs

    @torch.no_grad()
    def expert_rows(self) -> dict[str, list[int]]:
        """How many rows every stream of an expert gets from each batch that is carried here, as batches were given."""
        experts = [s for s in self.kinds if s.expert is not None]
        return self._fitting(lambda: self._expert_rows(experts)) if experts else {}

    def _expert_rows(self, experts: Sequence[Stream]) -> dict[str, list[int]]:
        walker = self._walker
        counts = {s.name: [0] * len(walker.given) for s in experts}
        for number, x_BTC in zip(walker.numbers, walker.inputs, strict=True):

            def count(
                stream: Stream, x_TC: torch.Tensor, place: int = walker.given.index(walker.whole(number))
            ) -> None:
                counts[stream.name][place] += len(x_TC)

            self._capture(self.module, experts, x_BTC, count, stop=False)
        return counts

    def waves(self) -> Iterator[tuple[Stream, ...]]:
        """The streams in runs that can be measured together before any of a run is replaced, bounded in memory."""
        for wave in waves(self.kinds):
            start = 0
            while start < len(wave):
                most = max(1, MOMENTS_BYTES // (PAIRED_MATRICES * 8 * self._channels(wave[start]) ** 2))
                yield wave[start : start + most]
                start += most

    def measure_paired(self, stream: str) -> PairedMoments:
        """Moments of one stream on the compressed path beside the dense path; stops as soon as both are seen."""
        return self.measure_wave([next(s for s in self.kinds if s.name == stream)])[stream]

    @torch.no_grad()
    def measure_wave(self, streams: Sequence[Stream]) -> dict[str, PairedMoments]:
        """The same of several streams that do not feed one another.

        The dense path's tokens go to the experts that the compressed path chooses, so that rows correspond: an
        expert is asked for what the dense one would have made of the tokens it will really get.
        """
        return self._fitting(lambda: self._measure_wave(streams))

    def _measure_wave(self, streams: Sequence[Stream]) -> dict[str, PairedMoments]:
        walker = self._walker
        assert self._dense is not None and walker.dense_inputs is not None, "walk(..., paired=True) is needed"
        moments = {s.name: PairedMoments(self._channels(s), walker.device) for s in streams}
        for batch, x_BTC, dense_BTC in zip(walker.numbers, walker.inputs, walker.dense_inputs, strict=True):
            with _routes(self.module, None) as chosen:
                rows = self._rows(self.module, streams, x_BTC)
            with _routes(self._dense, chosen):
                dense_rows = self._rows(self._dense, streams, dense_BTC)
            for stream in streams:
                if stream.name in rows:  # an expert without a token in this batch has none
                    with self._naming(stream, batch):
                        moments[stream.name].add(rows.pop(stream.name), dense_rows.pop(stream.name), batch)
        return moments

    @torch.no_grad()
    def replace(self, path: str, quantized: QuantizedWeight, bias_R: torch.Tensor | None = None) -> None:
        """Put the values of a quantized weight (and a corrected bias) in place of a Linear's."""
        replace(self.module, path, quantized, bias_R)
        self.outputs = None

    @torch.no_grad()
    def propagate(self) -> None:
        """Move both tracks through the block; outputs kept from an unchanged measuring pass are used again."""
        walker = self._walker
        if self._dense is not None:
            assert walker.dense_inputs is not None
            self._move(self._dense, walker.dense_inputs)
        if self.outputs is not None:
            walker.inputs, self.outputs = self.outputs, None
        else:
            self._move(self.module, walker.inputs)

    def _move(self, module: nn.Module, inputs: Activations) -> None:
        moved = 0  # windows: their batches may be cut on the way

        def move() -> None:
            nonlocal moved
            for place in range(inputs.place(moved), len(inputs)):  # the old activations go as the new ones come
                inputs[place] = self._run(module, inputs[place])
                moved += inputs.sizes[place]

        self._fitting(move)

    def _fitting(self, work: Callable[[], Found]) -> Found:
        return self._walker.fitting(work, f"block {self.index}")

    def _channels(self, stream: Stream) -> int:
        return self.streams[stream.name][stream.linears[0]].in_features

    def _run(self, module: nn.Module, x_BTC: torch.Tensor) -> torch.Tensor:
        call = self._walker.calls[self.index, x_BTC.shape]
        with FastLinears():
            out = module(x_BTC.to(self._walker.device), *call.args, **call.kwargs)
        return (out[0] if isinstance(out, tuple) else out).to(x_BTC.device)

    def _rows(self, module: nn.Module, streams: Sequence[Stream], x_BTC: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        self._capture(module, streams, x_BTC, lambda stream, x_TC: found.__setitem__(stream.name, x_TC), stop=True)
        return found

    def _capture(
        self,
        module: nn.Module,
        wanted: Sequence[Stream],
        x_BTC: torch.Tensor,
        digest: Callable[[Stream, torch.Tensor], None],
        stop: bool,
    ) -> torch.Tensor:
        """Hand the rows of the streams to `digest` as they pass, so that they live no longer than the forward needs."""

        def hook_for(stream: Stream) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                digest(stream, inputs[0].reshape(-1, inputs[0].shape[-1]))
                if stop and stream is wanted[-1]:
                    raise _Stop

            return hook

        handles = [lookup(module, s.linears[0]).register_forward_pre_hook(hook_for(s)) for s in wanted]
        out_BTC = x_BTC
        try:
            out_BTC = self._run(module, x_BTC)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return out_BTC

    @contextmanager
    def _naming(self, stream: Stream, batch: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"block {self.index}, stream {stream.name}, batch {batch}: {error}") from None


@torch.no_grad()
def replace(block: nn.Module, path: str, quantized: QuantizedWeight, bias_R: torch.Tensor | None) -> None:
    """Give a Linear of a block the values of a quantized weight, and a corrected bias where there is one."""
    linear = lookup(block, path)
    assert isinstance(linear, nn.Linear)
    linear.weight.copy_(quantized.dequantize(linear.weight.dtype))
    if bias_R is not None:
        assert linear.bias is not None
        linear.bias.copy_(bias_R)


@contextmanager
def _routes(root: nn.Module, chosen: dict[str, tuple[Any, ...]] | None) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Note how the routers inside send tokens to experts (indices and weights by module), or impose what is given."""
    noted: dict[str, tuple[Any, ...]] = {}

    def hook_for(name: str) -> Callable[..., Any]:
        def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            noted[name] = inputs[1:]

        def impose(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            assert chosen is not None
            return (inputs[0], *chosen[name])

        return note if chosen is None else impose

    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, ExpertList)]
    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in lists]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


Resident = Callable[[int | None], AbstractContextManager[Any]]  # inside, a block (None: the rest) is in memory


def walk(
    model: nn.Module,
    family: Family,
    batches: Sequence[Batch],
    *,
    paired: bool = False,
    resident: Resident = nullcontext,
    share: slice = slice(None),
    folder: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Block]:
    """Yield the blocks of `model` in order, each with the inputs that the blocks before it really produce.

    batches: calibration inputs (`token_batches` for text), without padding. Towers of the family come first, with the
    pictures among the batches alone; what comes after them gets what they make of these as they are then. paired: also
    carry the dense model's activations (one more copy of them, and of one block). resident: for models whose blocks are
    not all in memory (`LoadedModel.part`). share: the batches that this process carries, where several have a part
    each. folder: for the hidden states, where they would fill the memory (None: the system's for temporary files).
    tell: hears, in a line, when that happens and when batches are halved for want of memory. No graph is built, no
    global state is touched: gradients are on between the blocks if they were.
    """
    legs = _legs(model, family, dict(list(enumerate(batches))[share]))

    def carrier(leg: _Leg) -> Carrier:
        return Carrier(leg.enter, leg.blocks, next(model.parameters()).device, leg.batches, folder, tell, leg.alone)

    carriers: list[Carrier] = []
    with torch.no_grad(), resident(None):
        for place, leg in enumerate(legs if paired else legs[:1]):  # the dense inputs of all, while all is dense
            carriers.append(carrier(leg))
            if paired:
                carriers[place].keep_dense(again=place > 0)
    for place, leg in enumerate(legs):
        if place > 0:
            with torch.no_grad(), resident(None):
                if paired:
                    carriers[0].record()
                else:
                    carriers.append(carrier(leg))
        yield from _blocks(leg, family, carriers.pop(0), paired, resident)


def _blocks(leg: _Leg, family: Family, walker: Carrier, paired: bool, resident: Resident) -> Iterator[Block]:
    last = max(leg.blocks)
    for index, module in leg.blocks.items():
        with resident(index):
            block = Block(index, module, family, walker, copy.deepcopy(module) if paired else None)
            yield block
            if index != last:  # nobody reads what leaves the last block
                block.propagate()


@dataclass(frozen=True)
class _Leg:
    """Blocks by their numbers that pass hidden states on, and what makes the inputs of the first: see Carrier."""

    enter: Callable[..., Any]
    blocks: dict[int, nn.Module]
    batches: Mapping[int, Batch]
    alone: bool = False


def _legs(model: nn.Module, family: Family, batches: Mapping[int, Batch]) -> list[_Leg]:
    """The towers, which see the pictures alone, and the language model."""
    base: Any = getattr(model, "base_model", model)
    seen = {
        number: {name: tensor for name, tensor in batch.items() if name != "input_ids"}
        for number, batch in batches.items()
        if "pixel_values" in batch
    }
    legs: list[_Leg] = []
    for tower in family.towers:
        if not seen:
            raise UserError(f"the {tower.name} cannot be calibrated without pictures: give image-text data as --calib")
        first = sum(len(leg.blocks) for leg in legs)
        blocks = {first + place: lookup(model, tower.path(place)) for place in range(tower.length)}
        legs.append(_Leg(base.get_image_features, blocks, seen, tower.count is None))
    layers = lookup(model, family.blocks)
    assert isinstance(layers, nn.ModuleList)
    numbered = dict(enumerate(layers, family.offset))
    return [*legs, _Leg(functools.partial(base, use_cache=False), numbered, batches)]
