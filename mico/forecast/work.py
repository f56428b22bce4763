"""Time of every stage: counts of the work divided by what this machine does in a second.

Suffixes: R output rows, C input channels, T tokens.
"""

from __future__ import annotations

from mico.channels.allocation import WIDTHS
from mico.channels.meters import DOUBLE_LIMIT, RESERVOIR_ROWS
from mico.data import C4_WINDOWS
from mico.forecast.machine import Machine
from mico.forecast.memory import BLOCK_FILE, Task
from mico.forecast.outline import Outline, StreamShape
from mico.forecast.size import Size
from mico.methods.budget import SAMPLED_ROWS
from mico.methods.support import STEPS

RATE_SEARCH = 0.15  # of the candidates that a symmetric grid is fitted with
TEXT_TOKENS = {"wikitext2": 340_000, "ptb": 120_000, "docs": 100_000}  # as usual tokenizers cut them; c4 is in windows
SUPPORT_PASSES = 14  # over (R, C) numbers in a step of conjugate gradients
LANCZOS_SECONDS = 4e-7  # of a spectral clustering, a channel and neighbour
START_SECONDS = 8.0  # imports, tokenizer, calibration text


class Work:
    """Seconds of the stages of one task on one model and machine."""

    def __init__(self, shape: Outline, task: Task, size: Size, machine: Machine) -> None:
        self.shape, self.task, self.size, self.machine = shape, task, size, machine
        self.streams = [stream for block in shape.blocks for stream in block]

    def seconds(self, stages: list[str], texts: tuple[str, ...]) -> dict[str, float]:
        """Seconds of each of the `stages` that Memory.stages names."""
        scoring = sum(self._score(text) for text in texts)
        known = {
            "load": START_SECONDS + self._reading(self.shape.ends if self.task.streamed else self.shape.parameters),
            "evaluate dense": scoring + (self._blocks_read() if self.task.streamed else 0),
            "statistics": self._statistics(),
            "groups": sum(self._group(stream) for stream in self.streams),
            "embeddings": self._fit(sum(rows * channels for rows, channels in self.shape.tables)),
            "compress": self._compress(),
            "save": self._save(),
        }
        decoding = self.shape.linear_weights * self.machine.unpack_seconds
        passes = 1 + (sum(self._batches(text) for text in texts) if self.task.streamed else 0)
        reload = self.size.file * (1 / self.machine.read + 1 / self.machine.hash) + decoding * passes + scoring
        known |= {"reload": reload, "reload and evaluate": reload}
        return {stage: known[stage] for stage in stages}

    # --- parts ---

    def _reading(self, parameters: int) -> float:
        """From the weight files, converted and looked through for NaN."""
        nbytes = parameters * self.shape.dtype.itemsize
        return nbytes / self.machine.read + 4 * parameters * self.task.itemsize / self.machine.pass_bytes

    def _blocks_read(self) -> float:
        return self._reading(sum(self.shape.block_parameters)) if self.task.streamed else 0.0

    def _tokens_of(self, text: str) -> int:
        return C4_WINDOWS * self.task.seqlen if text == "c4" else TEXT_TOKENS.get(text, TEXT_TOKENS["docs"])

    def _batches(self, text: str) -> float:
        return max(1.0, self._tokens_of(text) / self.task.seqlen / self.task.batch)

    def _score(self, text: str) -> float:
        tokens = self._tokens_of(text)
        head = 2.0 * tokens * self.shape.hidden * self.shape.vocabulary
        return self._forward(tokens) + head / self.machine.forward_flops

    def _forward(self, tokens: float) -> float:
        """All blocks once over this many tokens: products, attention, and passes over what lies between them."""
        products = sum(2.0 * stream.tokens * stream.weights for stream in self.streams) * tokens
        attention = 4.0 * tokens * self.task.seqlen * self.shape.hidden * len(self.shape.blocks)
        between = sum(stream.tokens * (stream.channels + sum(stream.rows)) for stream in self.streams)
        passes = 4 * between * tokens * self.task.itemsize
        return (products + attention) / self.machine.forward_flops + passes / self.machine.pass_bytes

    def _gram(self, stream: StreamShape, matrices: int = 1) -> float:
        tokens, channels = self.task.tokens * stream.tokens, stream.channels
        batches = max(1.0, self.task.nsamples / self.task.batch)
        adding = batches * 3 * 8 * channels**2 * (1 if channels <= DOUBLE_LIMIT else 0.5)
        return matrices * (tokens * channels**2 / self.machine.float32_flops + adding / self.machine.pass_bytes)

    def _factor(self, channels: int) -> float:
        return channels**3 / self.machine.factor_flops / (1 if channels <= DOUBLE_LIMIT else 2)

    def _sweep(self, stream: StreamShape) -> float:
        rows, channels = sum(stream.rows), stream.channels
        update = rows * float(channels) ** 2 / self.machine.float32_flops
        return channels * (self.machine.column_seconds + rows * self.machine.cell_seconds) + update

    def _fit(self, weights: float) -> float:
        return weights * self.machine.symmetric_seconds

    def _energies(self, stream: StreamShape) -> float:
        return 2 * stream.weights * stream.channels / self.machine.float32_flops

    def _solve(self, stream: StreamShape) -> float:
        """One call of the method on one stream."""
        kind, product = self.task.kind, 2.0 * stream.weights * stream.channels / self.machine.float32_flops
        passing = 4 * stream.weights / self.machine.pass_bytes
        if kind in ("wanda", "rtn"):
            return 40 * passing + self._energies(stream)
        fitting = 0.0 if kind.startswith("rows") or self.task.settings.wbits == 16 else self._fit(stream.weights)
        if not kind.startswith("mico"):
            return self._factor(stream.channels) + self._sweep(stream) + fitting + self._energies(stream) + 10 * passing
        judged = 2 * self._factor(stream.channels) + 8 * product + self._energies(stream)
        support = STEPS * (product + SUPPORT_PASSES * passing) if self.task.prunes else 0.0
        sweeps = (2 if self.task.prunes else 1) * self._sweep(stream)
        return judged + support + sweeps + fitting + self._energies(stream)

    # --- stages ---

    def _statistics(self) -> float:
        forward = self._forward(self.task.tokens)
        writing = sum(4 * stream.channels**2 + 2 * RESERVOIR_ROWS * stream.channels for stream in self.streams)
        return forward + sum(map(self._gram, self.streams)) + self._store(writing) + self._blocks_read()

    def _store(self, nbytes: float) -> float:
        return nbytes * (1 / self.machine.write + 1 / self.machine.hash)

    def _fetch(self, nbytes: float) -> float:
        return nbytes * (1 / self.machine.read + 1 / self.machine.hash)

    def _group(self, stream: StreamShape) -> float:
        squares = float(stream.channels) ** 2
        spectrum = LANCZOS_SECONDS * stream.channels * 64 * 8
        return self._fetch(4 * squares) + 40 * 8 * squares / self.machine.pass_bytes + spectrum

    def _compress(self) -> float:
        paired = self.task.paired
        tokens = self.task.tokens
        forward = self._forward(tokens)
        runs = 2 * forward * (1 + self._captured()) if paired else forward * (1 + self._share_before_last())
        moments = sum(self._gram(stream, 3 if paired else 1) for stream in self.streams)
        solving = sum(map(self._solve, self.streams))
        storing = self._store(BLOCK_FILE * self.shape.linear_weights)
        allocating = sum(map(self._demand, self.streams)) if self.task.settings.allocates else 0.0
        return runs + moments + solving + storing + allocating + self._blocks_read()

    def _share_before_last(self) -> float:
        """Share of a block's products that are done when the last stream is reached."""
        weights = [stream.tokens * stream.weights for stream in self.shape.widest]
        return 1 - weights[-1] / sum(weights)

    def _captured(self) -> float:
        """Forwards that capturing the inputs of every stream takes, each in a run that stops there."""
        weights = [stream.tokens * stream.weights for stream in self.shape.widest if stream.expert in (None, 0)]
        return sum(sum(weights[:index]) for index in range(len(weights))) / sum(weights)

    def _demand(self, stream: StreamShape) -> float:
        reading = self._fetch(4 * float(stream.channels) ** 2)
        share = sum(min(1.0, SAMPLED_ROWS / rows) * rows for rows in stream.rows) * stream.channels
        return (
            reading
            + self._factor(stream.channels)
            + RATE_SEARCH * self._fit(len(WIDTHS) * share)
            + self._energies(stream) / 2
        )

    def _save(self) -> float:
        weights = self.shape.linear_weights
        restoring = self._fetch(BLOCK_FILE * weights) + weights * 20 / self.machine.pass_bytes
        probing = self._forward(self.task.seqlen) + (restoring if self.task.streamed else 0)
        packing = weights * self.machine.pack_seconds
        return probing + restoring + packing + 2 * self._store(self.size.file) + 2 * self._blocks_read()
