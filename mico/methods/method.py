"""What a compression method is: the Linears of one stream and their statistics in, quantized weights out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from mico.channels.meters import PairedMoments, SecondMoments
from mico.channels.plan import LayerPlan
from mico.channels.products import linear
from mico.methods.sweep import Segment
from mico.packed.quantized import QuantizedWeight

SWEPT_TOGETHER = 1 << 26  # weights of one sweep


@dataclass(frozen=True)
class Layer:
    """One Linear of a stream: its dense weight_RC and bias_R, and the plan for it."""

    name: str
    weight_RC: torch.Tensor
    bias_R: torch.Tensor | None
    plan: LayerPlan


@dataclass(frozen=True)
class StreamProblem:
    """All Linears that read one tensor. `paired` is there for methods that aim at the dense model's output."""

    layers: tuple[Layer, ...]
    moments: SecondMoments
    paired: PairedMoments | None
    percdamp: float
    blocksize: int

    @property
    def weight_RC(self) -> torch.Tensor:
        """Rows of all Linears concatenated."""
        return torch.cat([layer.weight_RC for layer in self.layers])

    def parts(self) -> list[StreamProblem]:
        """The stream as it is swept: whole, or Linear by Linear where it is so large that memory counts."""
        if sum(layer.weight_RC.numel() for layer in self.layers) <= SWEPT_TOGETHER:
            return [self]
        return [replace(self, layers=(layer,)) for layer in self.layers]

    @property
    def segments(self) -> list[Segment]:
        """Where each Linear's rows lie in `weight_RC`, and how they are pruned."""
        found, start = [], 0
        for layer in self.layers:
            rows = slice(start, start + len(layer.weight_RC))
            found.append(Segment(rows, layer.plan.sparsity, layer.plan.pattern))
            start = rows.stop
        return found


@dataclass(frozen=True)
class LayerResult:
    """A compressed Linear: `bias_R` is the corrected bias (None: unchanged); `facts` go into the report.

    facts: error (relative squared output error on the inputs the layer sees), damping, dead channels, and
    whatever else the method wants to tell; `fallbacks` names what did not go by the book.
    """

    quantized: QuantizedWeight
    bias_R: torch.Tensor | None
    facts: dict[str, float]
    fallbacks: tuple[str, ...] = field(default=())


Method = Callable[[StreamProblem], Sequence[LayerResult]]


PANEL, ROWS = 256, 4096  # columns and rows of one GEMM of an energy


def row_energies(weight_RC: torch.Tensor, gram_CC: torch.Tensor) -> torch.Tensor:
    """diag(W G Wᵀ), (R,) in float64: the squared norm of every output over the tokens behind the Gram matrix.

    By panels of columns, each against itself and the ones before it: G is symmetric, so half of it will do. By panels
    of rows too, as the products copy what they read.
    """
    energy_R = torch.zeros(len(weight_RC), dtype=torch.float64, device=weight_RC.device)
    for start in range(0, len(gram_CC), PANEL):
        end = min(start + PANEL, len(gram_CC))
        panel_SC = gram_CC[start:end, :end].to(weight_RC, copy=True)
        panel_SC[:, :start] *= 2
        for rows_RC, sums_R in zip(weight_RC.split(ROWS), energy_R.split(ROWS), strict=True):
            sums_R += (linear(rows_RC[:, :end], panel_SC) * rows_RC[:, start:end]).sum(1, dtype=torch.float64)
    return energy_R


def output_energy(weight_RC: torch.Tensor, gram_CC: torch.Tensor) -> float:
    """tr(W G Wᵀ): the squared norm of the outputs W x over the tokens behind the Gram matrix."""
    return float(row_energies(weight_RC, gram_CC).sum())


def relative_error(dense_RC: torch.Tensor, value_RC: torch.Tensor, gram_CC: torch.Tensor) -> float:
    """‖(Ŵ - W) X‖² / ‖W X‖²."""
    energy = output_energy(dense_RC, gram_CC)
    return output_energy(value_RC - dense_RC, gram_CC) / energy if energy > 0 else 0.0
