"""Activation statistics of one stream, gathered batch by batch; no activation history is kept.

Suffixes: C input channels, T tokens. GEMMs run in float32 and accumulate in float64 (float32 above 8,192
channels, where a float64 Gram matrix alone would take more than half a gigabyte).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mico.channels.products import linear
from mico.errors import UserError

DOUBLE_LIMIT = 8192
RESERVOIR_ROWS = 4096
PANEL = 256  # columns of one GEMM of a Gram matrix


def accumulator(channels: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A zero (C, C) matrix in the accumulation dtype."""
    dtype = torch.float64 if channels <= DOUBLE_LIMIT else torch.float32
    return torch.zeros(channels, channels, dtype=dtype, device=device)


def add_gram(x_TC: torch.Tensor, total_CC: torch.Tensor) -> None:
    """Add xᵀ x to `total_CC`: the upper triangle by panels of columns, mirrored; half the work of x.T @ x."""
    channels, x_CT = x_TC.shape[1], x_TC.T.contiguous()
    for start in range(0, channels, PANEL):
        end = min(start + PANEL, channels)
        panel_SC = linear(x_CT[start:end], x_CT[start:])
        total_CC[start:end, start:] += panel_SC
        total_CC[end:, start:end] += panel_SC[:, end - start :].T


@dataclass
class SecondMoments:
    """Sum and Gram matrix of the rows seen: `sum_C`, `gram_CC` = sum of x xT, `count` rows."""

    sum_C: torch.Tensor
    gram_CC: torch.Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> SecondMoments:
        return cls(torch.zeros(channels, dtype=torch.float64, device=device), accumulator(channels, device))

    def add(self, x_TC: torch.Tensor) -> None:
        """Add T rows. Raises UserError when they hold NaN or Inf."""
        x_TC = x_TC.float()
        if not torch.isfinite(torch.linalg.vector_norm(x_TC, dim=0).square()).all():
            raise UserError("activations hold NaN or Inf (or overflow float32): try --dtype float32")
        add_gram(x_TC, self.gram_CC)
        self.sum_C += x_TC.sum(0)  # float32 within a batch: a float64 reduction is twenty times slower
        self.count += len(x_TC)

    def reduce(self, total: Callable[[torch.Tensor], None]) -> None:
        """Hand every accumulator to `total`, which puts the sum over several processes in its place.

        Float64 sums of the float32 terms of `add` are exact unless terms differ by some 1e9, so that the order in
        which the batches are summed leaves the bits alone.
        """
        count = torch.tensor(self.count)
        for tensor in (count, self.sum_C, self.gram_CC):
            total(tensor)
        self.count = int(count)

    @property
    def mean_C(self) -> torch.Tensor:
        return self.sum_C / self.count

    @property
    def hessian_CC(self) -> torch.Tensor:
        """2/n sum x xT: the Hessian of the squared output error, as SparseGPT scales it."""
        return self.gram_CC * self.hessian_scale

    @property
    def hessian_scale(self) -> float:
        """What makes the Gram matrix the Hessian."""
        return 2.0 / self.count

    @property
    def covariance_CC(self) -> torch.Tensor:
        """Centred second moments (population)."""
        mean_C = self.mean_C.to(self.gram_CC.dtype)
        return self.gram_CC / self.count - torch.outer(mean_C, mean_C)


@dataclass
class PairedMoments:
    """Moments of the compressed model's inputs x̂ beside the dense model's inputs x of the same tokens.

    Every fourth batch goes into the held-out part, which only judges how far to trust the target
    (mico/methods/mico.py). `cross_CC` = sum of x x̂T.
    """

    channels: int
    device: torch.device | str = "cpu"
    fit: SecondMoments = field(init=False)
    held: SecondMoments = field(init=False)
    fit_cross_CC: torch.Tensor = field(init=False)
    held_cross_CC: torch.Tensor = field(init=False)
    fit_dense_sum_C: torch.Tensor = field(init=False)
    held_dense_sum_C: torch.Tensor = field(init=False)
    batches: int = 0

    def __post_init__(self) -> None:
        self.fit = SecondMoments.empty(self.channels, self.device)
        self.held = SecondMoments.empty(self.channels, self.device)
        self.fit_cross_CC = accumulator(self.channels, self.device)
        self.held_cross_CC = accumulator(self.channels, self.device)
        self.fit_dense_sum_C = torch.zeros(self.channels, dtype=torch.float64, device=self.device)
        self.held_dense_sum_C = torch.zeros_like(self.fit_dense_sum_C)

    def add(self, x_TC: torch.Tensor, dense_TC: torch.Tensor, batch: int | None = None) -> None:
        """Add T rows of the compressed path and the same rows of the dense path. Raises UserError on NaN or Inf.

        batch: its number among all of the calibration; None: those added here are all there are.
        """
        held = (self.batches if batch is None else batch) % 4 == 3
        (self.held if held else self.fit).add(x_TC)
        new_CC = linear(dense_TC.float().T, x_TC.float().T)
        if not torch.isfinite(new_CC).all():
            raise UserError("the dense model's activations hold NaN or Inf (or overflow): try --dtype float32")
        cross_CC = self.held_cross_CC if held else self.fit_cross_CC
        cross_CC += new_CC
        dense_sum_C = self.held_dense_sum_C if held else self.fit_dense_sum_C
        dense_sum_C += dense_TC.float().sum(0)
        self.batches += 1

    def reduce(self, total: Callable[[torch.Tensor], None]) -> None:
        """As of SecondMoments."""
        self.fit.reduce(total)
        self.held.reduce(total)
        for tensor in (self.fit_cross_CC, self.held_cross_CC, self.fit_dense_sum_C, self.held_dense_sum_C):
            total(tensor)

    @property
    def total(self) -> SecondMoments:
        fit, held = self.fit, self.held
        return SecondMoments(fit.sum_C + held.sum_C, fit.gram_CC + held.gram_CC, fit.count + held.count)

    @property
    def cross_CC(self) -> torch.Tensor:
        return self.fit_cross_CC + self.held_cross_CC

    @property
    def dense_sum_C(self) -> torch.Tensor:
        return self.fit_dense_sum_C + self.held_dense_sum_C

    @property
    def dense_mean_C(self) -> torch.Tensor:
        return self.dense_sum_C / self.total.count


class Reservoir:
    """An evenly thinned sample of rows (float16) for the estimators that need joint samples.

    Deterministic: keeps every k-th row and doubles k when full, so no random state is touched. total: the number of
    rows there will be, where it is known: then k is the last one from the start, and `seen` may be set before `add` to
    leave out rows that another process sees.
    """

    def __init__(self, channels: int, rows: int = RESERVOIR_ROWS, total: int = 0) -> None:
        self.rows_TC = torch.empty(0, channels, dtype=torch.float16)
        self.limit, self.stride, self.seen = rows, 1, 0
        while -(-total // self.stride) > rows:
            self.stride *= 2

    def add(self, x_TC: torch.Tensor) -> None:
        offset = -self.seen % self.stride
        kept_TC = x_TC[offset :: self.stride].to("cpu", torch.float16)
        self.rows_TC = torch.cat([self.rows_TC, kept_TC])
        self.seen += len(x_TC)
        while len(self.rows_TC) > self.limit:
            self.rows_TC, self.stride = self.rows_TC[::2].contiguous(), self.stride * 2
