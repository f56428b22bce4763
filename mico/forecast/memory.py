"""Peak memory of every stage, from counts of what the code holds at its fullest moments.

Every figure is a sum of matrices: (C, C) ones of a stream's moments and factors, (R, C) ones of its weights,
activations of all calibration tokens or of one batch. What one call of a method takes is in SOLVING, measured with the
profiler of PyTorch; tests/forecast/test_memory.py holds it to what the methods take today.
Suffixes: R output rows of all Linears of a stream, C its input channels, T tokens of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mico.channels.meters import DOUBLE_LIMIT, PANEL, RESERVOIR_ROWS
from mico.forecast.outline import Outline, StreamShape
from mico.forecast.size import Size
from mico.methods import PAIRED
from mico.methods.method import SWEPT_TOGETHER
from mico.metrics.perplexity import LOGIT_BYTES, ROWS
from mico.packed.hf import SHARD_BYTES
from mico.settings import Compression
from mico.walk import MOMENTS_BYTES, PAIRED_MATRICES

# Of one call of a method beyond moments and dense weights: (factors, weights) at each moment that can be the fullest;
# factors: (C, C) in the dtype of the moments, weights: (R, C) in float32.
_FACTOR = (2.0, 0.0)  # the damped Hessian and its Cholesky factor, inverted in place
SOLVING: dict[str, tuple[tuple[float, float], ...]] = {
    "rows": (_FACTOR, (1.2, 4.35)),  # min-max grids
    "rows dense": (_FACTOR, (1.2, 3.75)),
    "symmetric": (_FACTOR, (1.2, 5.3)),
    "symmetric dense": (_FACTOR, (1.2, 4.45)),
    "mico": ((4.2, 5.9), (3.5, 11.3)),
    "mico dense": ((4.4, 3.6), (3.0, 7.3)),
    "wanda": ((0.2, 8.1),),
    "rtn": ((0.2, 6.8),),
}
FACTOR_COLUMNS = 400  # right-hand sides and solutions while a factor is inverted, in its dtype
LIBRARY_FACTORS = 1.0  # (C, C): what LAPACK takes beside PyTorch's allocator while it makes a factor
START_BYTES = 40 * 10**6  # what a run imports beyond what a forecast does
HEAP_SHARE, HEAP_BYTES = 0.6, 300 * 10**6  # of what is in use and freed, the C library keeps pieces below 32 MiB
BLOCK_FILE = 1.125  # bytes a weight: a code and a mask bit
FINISHED = 2.0  # bytes a weight of a finished Linear in memory: code and mask


@dataclass(frozen=True)
class Task:
    """What is to be done, as far as memory and time depend on it.

    itemsize: of the dtype that the model computes in; spilled: hidden states between blocks are in a file.
    """

    settings: Compression
    nsamples: int
    seqlen: int
    batch: int
    itemsize: int
    streamed: bool
    evaluates: bool
    spilled: bool = False

    @property
    def tokens(self) -> int:
        return self.nsamples * self.seqlen

    @property
    def batch_tokens(self) -> int:
        return min(self.batch, self.nsamples) * self.seqlen

    @property
    def paired(self) -> bool:
        return self.settings.method in PAIRED

    @property
    def prunes(self) -> bool:
        return bool(self.settings.sparsity or self.settings.pattern)

    @property
    def kind(self) -> str:
        """The row of SOLVING."""
        settings = self.settings
        if settings.method in ("wanda", "rtn"):
            return settings.method
        symmetric = settings.grouping is not None or settings.profile is not None
        name = settings.method if settings.method == "mico" else "symmetric" if symmetric else "rows"
        return name if self.prunes else f"{name} dense"


@dataclass(frozen=True)
class Need:
    """Bytes at the fullest moment of a stage: beside the weights on the computing device, and always on the host."""

    device: float
    host: float = 0.0


def moment_bytes(channels: int) -> int:
    """One accumulated (C, C) matrix."""
    return channels**2 * accumulator_itemsize(channels)


def accumulator_itemsize(channels: int) -> int:
    return 8 if channels <= DOUBLE_LIMIT else 4


def solve_bytes(stream: StreamShape, kind: str, library: float = 0.0) -> float:
    """What one call of a method takes beyond its moments and dense weights.

    library: (C, C) matrices that LAPACK takes for itself while a factor is made (LIBRARY_FACTORS).
    """
    channels, weights = stream.channels, _swept(stream, kind)
    moments, itemsize = moment_bytes(channels), accumulator_itemsize(channels)
    held = [factors * moments + matrices * 4 * weights for factors, matrices in SOLVING[kind]]
    if kind in ("wanda", "rtn"):
        return max(held) + PANEL * channels * 4
    held[0] += FACTOR_COLUMNS * channels * itemsize + library * moments  # the factorization comes first
    return max(held)


def _swept(stream: StreamShape, kind: str) -> int:
    """Weights of one sweep: of a large stream those of its largest Linear."""
    if kind in ("wanda", "rtn") or stream.weights <= SWEPT_TOGETHER:
        return stream.weights
    return stream.channels * max(stream.rows)


def gram_bytes(channels: int, tokens: float, paths: int = 1) -> float:
    """What adding a batch takes: transposed rows and a panel of products; of two paths the whole product, widened."""
    if paths == 1:
        return 4.0 * tokens * channels + 3 * 4 * PANEL * channels
    widened = 8 * channels**2 if channels <= DOUBLE_LIMIT else 0
    return 4 * channels**2 + max(4.0 * paths * tokens * channels, widened)


def hidden_bytes(shape: Outline, task: Task) -> int:
    """Hidden states of all calibration windows between two blocks."""
    return task.tokens * shape.hidden * task.itemsize


class Memory:
    """Peak memory of the stages of one task on one model."""

    def __init__(self, shape: Outline, task: Task, size: Size, base: int) -> None:
        self.shape, self.task, self.size, self.base = shape, task, size, base + START_BYTES
        self.block = max(shape.block_parameters) * task.itemsize
        self.ends = shape.ends * task.itemsize
        self.stored_block = max(shape.block_parameters) * shape.dtype.itemsize
        self.stored_ends = shape.ends * shape.dtype.itemsize
        self.model = 0 if task.streamed else shape.parameters * task.itemsize
        self.hidden = 0 if task.spilled else hidden_bytes(shape, task)

    # --- stages ---

    def stages(self) -> dict[str, Need]:
        """The fullest moment of every stage that the task has, in order."""
        settings = self.task.settings
        found = {"load": self._load()}
        if self.task.evaluates:
            found["evaluate dense"] = self._running()
        if settings.allocates:
            found["statistics"] = self._statistics()
        if settings.allocates and settings.grouping is not None:
            found["groups"] = self._groups()
        if settings.embed_bits != 16:
            found["embeddings"] = self._tables()
        found["compress"] = self._compress()
        found["save"] = self._save()
        found["reload and evaluate" if self.task.evaluates else "reload"] = self._reload()
        return found

    def peaks(self, need: Need, cuda: bool) -> tuple[float, float]:
        """(host, device) bytes; without a device all is on the host."""
        host = need.host if cuda else need.host + need.device
        return self.base + host + min(HEAP_SHARE * host, HEAP_BYTES), need.device if cuda else 0.0

    def _load(self) -> Need:
        if self.task.streamed:
            return Need(self.ends, self.stored_ends)
        return Need(self.model, self.shape.stored_bytes)  # the files are mapped while they are read

    def forward_bytes(self, tokens: float) -> float:
        """Activations inside one block at its fullest: attention, or the wide part of the feed-forward network."""
        widest = 0
        for stream in self.shape.widest:
            if stream.expert is None:
                widest = max(widest, sum(stream.rows) + 2 * stream.channels, 3 * stream.channels)
        return tokens * self.task.itemsize * (widest + 2 * self.shape.hidden)

    def _logits(self, windows: int) -> float:
        """Logits of a batch of windows, and some rows of them in float32."""
        vocabulary = self.shape.vocabulary
        return windows * self.task.seqlen * vocabulary * self.task.itemsize + 2 * 4 * ROWS * vocabulary

    def _windows(self) -> int:
        limit = LOGIT_BYTES // (4 * self.task.seqlen * self.shape.vocabulary)
        return max(1, min(self.task.batch, limit))

    def _running(self) -> Need:
        windows = self._windows()
        inside = max(self._logits(windows), self.forward_bytes(windows * self.task.seqlen))
        shown = self.ends + self.block if self.task.streamed else self.model
        return Need(shown + inside, max(self.stored_ends, self.stored_block) if self.task.streamed else 0)

    def _resident(self, dense: bool = False) -> float:
        """Weights in memory while one block is worked on; dense: with a copy of the block before its compression."""
        return (self.block if self.task.streamed else self.model) + (self.block if dense else 0)

    def _recording(self) -> Need:
        """The one forward that notes the inputs of the first block."""
        shown = self.ends if self.task.streamed else self.model
        return Need(shown, self.hidden + (self.stored_ends if self.task.streamed else 0))

    def _statistics(self) -> Need:
        streams = self.shape.widest
        moments = sum(moment_bytes(stream.channels) for stream in streams)
        halves = 4 * sum(stream.channels**2 for stream in streams)
        rows = sum(min(RESERVOIR_ROWS, self.task.tokens) * stream.channels * 2 for stream in streams)
        measuring = self._resident() + moments + self._measuring(streams, 1)
        writing = self._resident() + moments
        host = 2 * self.hidden + 2 * rows  # inputs and kept outputs; sampled rows and those they are joined with
        return _largest(Need(measuring, host), Need(writing, host + 2 * halves), self._recording())

    @property
    def statistics_file(self) -> int:
        """Bytes of the statistics of all blocks on disk."""
        rows = 2 * min(RESERVOIR_ROWS, self.task.tokens)
        streams = (stream for block in self.shape.blocks for stream in block)
        return sum(4 * stream.channels**2 + (rows + 8) * stream.channels for stream in streams)

    def _measuring(self, streams: tuple[StreamShape, ...], paths: int) -> float:
        tokens = self.task.batch_tokens
        adding = max(gram_bytes(stream.channels, stream.tokens * tokens, paths) for stream in streams)
        captured = max(paths - 1, 0) * max(stream.channels for stream in streams) * tokens * self.task.itemsize
        return max(self.forward_bytes(tokens), adding + captured + tokens * self.shape.hidden * self.task.itemsize * 2)

    def _groups(self) -> Need:
        squares = sum(stream.channels**2 for stream in self.shape.widest)
        widest = max(stream.channels for stream in self.shape.widest)
        clustering = 8 * squares + 5 * moment_bytes(widest)
        return Need(0 if self.task.streamed else self.model, max(12 * squares, clustering))

    def _tables(self) -> Need:
        rows, channels = max(self.shape.tables, key=math.prod)
        codes = sum(map(math.prod, self.shape.tables))
        return Need((self.ends if self.task.streamed else self.model) + codes + rows * channels * 4)

    # --- compress ---

    def _compress(self) -> Need:
        task = self.task
        tracks = 2 if task.paired else 1
        found = [self._recording()]
        host = tracks * self.hidden
        resident = self._resident(dense=task.paired)
        if task.streamed:
            found.append(Need(resident, host + self.stored_block))
        found += [Need(resident + need, host) for need in self._solving()]
        weights = sum(stream.weights for stream in self.shape.widest)
        found.append(Need(resident + FINISHED * weights, host + 2 * BLOCK_FILE * weights))
        found.append(Need(resident + self.forward_bytes(task.batch_tokens), host))
        if task.settings.allocates:
            found.append(self._allocate())
        return _largest(*found)

    def _solving(self) -> list[float]:
        """What every stream of the widest block takes beside weights and activations."""
        streams, kind = self.shape.widest, self.task.kind
        found, done = [], 0.0
        if not self.task.paired:
            moments = sum(moment_bytes(stream.channels) for stream in streams)
            found.append(moments + self._measuring(streams, 1))
            for stream in streams:
                found.append(moments + done + solve_bytes(stream, kind, LIBRARY_FACTORS))
                moments -= moment_bytes(stream.channels)
                done += FINISHED * stream.weights
            return found
        for stream in streams:
            one = moment_bytes(stream.channels)
            together = PAIRED_MATRICES * one
            if stream.expert is not None:  # experts are measured in waves
                together = max(together, min(MOMENTS_BYTES, together * self._experts()))
            found.append(done + together + self._measuring((stream,), 2))
            found.append(done + together + one + solve_bytes(stream, kind, LIBRARY_FACTORS))
            done += FINISHED * stream.weights
        return found

    def _experts(self) -> int:
        return 1 + max(stream.expert or 0 for stream in self.shape.widest)

    def _allocate(self) -> Need:
        squares = sum(stream.channels**2 for stream in self.shape.widest)
        solving = []
        for stream in self.shape.widest:
            factor = max(factors for factors, _ in SOLVING["rows"]) * moment_bytes(stream.channels)
            solving.append(factor + 5 * 4 * stream.channels * max(stream.rows))
        return Need(self._resident() + max(solving), 12 * squares)

    # --- the packed model ---

    def _save(self) -> Need:
        waiting = min(SHARD_BYTES, self.size.tensors)  # tensors of a file, and the file's bytes made of them
        codes = FINISHED * sum(stream.weights for stream in self.shape.widest)
        largest = 3 * 4 * max(stream.channels * max(stream.rows) for stream in self.shape.widest)
        logits = self._logits(1) + self.task.seqlen * self.shape.vocabulary * 4
        if not self.task.streamed:
            return Need(self.model + logits, 2 * waiting)
        probing = Need(self.ends + self.block + max(logits, largest), self.stored_block + codes)
        writing = Need(self.ends, 2 * waiting)
        return _largest(probing, writing, Need(self.block, waiting + self.stored_block + codes))

    def _reload(self) -> Need:
        dense = max(stream.channels * max(stream.rows) for stream in self.shape.widest) * 4
        if not self.task.streamed:
            dense = self.shape.linear_weights * self.task.itemsize
        packed = self.size.tensors - self.shape.ends * self.shape.dtype.itemsize
        inside = self._logits(self._windows() if self.task.evaluates else 1)
        return _largest(Need(self.ends + packed, self.size.file), Need(self.ends + packed + 1.5 * dense + inside))


def _largest(*needs: Need) -> Need:
    return max(needs, key=lambda need: need.device + need.host)
