"""mico: the asymmetric target with shrinkage, weights re-solved on the mask, symmetric factored grids, bias correction.

The compressed model's inputs x̂ differ from the dense model's x. ‖W X - Ŵ X̂‖² = ‖Ŵ - W*‖² under Σ̂, plus a
constant, with W* = (W Σ_xx̂ + λ W) (Σ̂ + λ I)⁻¹. W* fits the calibration tokens; how much of the step from W
to W* helps on tokens it has not seen is measured on held-out batches, in closed form, per Linear.
A first sweep chooses the mask; the weights it keeps are then re-solved together (mico/methods/support.py), and a second
sweep quantizes them. The re-solved weights are optimal on their support, so the quantization error adds to the
pruning error and no cross term is left.
Where a Linear has a bias, the bias carries the means: centred moments, and b += W E[x] - Ŵ E[x̂].
Source: algorithm notes, asymmetric target (GPTAQ) and shrinkage. Suffixes: R rows, C channels, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mico.channels.meters import PairedMoments, SecondMoments
from mico.methods.method import Layer, LayerResult, StreamProblem
from mico.methods.sparsegpt import collect, fit_grid, used
from mico.methods.support import solve_on_support
from mico.methods.sweep import Factor, factorize, sweep

UNJUDGED_SHRINKAGE = 0.5  # when no batch could be held out


def mico(problem: StreamProblem) -> list[LayerResult]:
    """Compress every Linear of the stream towards the dense model's output."""
    paired = problem.paired
    assert paired is not None, "mico needs the dense model's inputs beside the compressed model's"
    centred = problem.layers[0].bias_R is not None
    hessian_CC, cross_CC = _moments(problem.moments, paired.cross_CC, paired.dense_sum_C, centred)
    factor = factorize(hessian_CC, problem.percdamp)
    dense_RC = problem.weight_RC.float()
    step_RC = _target_step(dense_RC, hessian_CC, cross_CC, factor)
    judge = _Judge.of(problem, paired, centred)
    shrinkages = [judge.shrinkage(dense_RC[s.rows]) for s in problem.segments]
    target_RC = dense_RC.clone()
    for segment, (shrinkage, _) in zip(problem.segments, shrinkages, strict=True):
        target_RC[segment.rows] += shrinkage * step_RC[segment.rows]
    target_RC[:, factor.dead_C] = 0
    pivots_C = factor.pivots_C.float()
    keep_RC = None
    if any(segment.sparsity > 0 or segment.pattern for segment in problem.segments):
        chosen = sweep(target_RC, factor, problem.segments, None, problem.blocksize)
        keep_RC = chosen.keep_RC
        assert keep_RC is not None
        target_RC = solve_on_support(target_RC, factor.damped_CC, keep_RC, chosen.weight_RC)
    grids = [
        fit_grid(layer, target_RC[s.rows], pivots_C, None if keep_RC is None else keep_RC[s.rows])
        for layer, s in zip(problem.layers, problem.segments, strict=True)
    ]
    swept = sweep(target_RC, factor, problem.segments, used(grids), problem.blocksize, keep_RC)
    results = collect(problem, dense_RC, swept, grids, factor)
    return [
        replace(
            result,
            bias_R=_corrected_bias(layer, result.quantized.dequantize(), problem.moments, paired),
            facts=result.facts | {"shrinkage": shrinkage},
            fallbacks=result.fallbacks + (() if judged else (f"no held-out batch: shrinkage {UNJUDGED_SHRINKAGE}",)),
        )
        for layer, result, (shrinkage, judged) in zip(problem.layers, results, shrinkages, strict=True)
    ]


def _moments(
    own: SecondMoments, cross_CC: torch.Tensor, dense_sum_C: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ̂, Σ_xx̂) scaled as Hessians (2/n), around the means when a bias can carry those."""
    scale = 2.0 / own.count
    hessian_CC, cross_CC = own.hessian_CC.double(), cross_CC.double() * scale
    if centred:
        hessian_CC = hessian_CC - 2.0 * torch.outer(own.mean_C, own.mean_C)
        cross_CC = cross_CC - 2.0 * torch.outer(dense_sum_C / own.count, own.mean_C)
    return hessian_CC, cross_CC


def _target_step(
    weight_RC: torch.Tensor, hessian_CC: torch.Tensor, cross_CC: torch.Tensor, factor: Factor
) -> torch.Tensor:
    """W* - W = W (Σ_xx̂ - Σ̂) (Σ̂ + λ I)⁻¹, with (Σ̂ + λ I)⁻¹ = Uᵀ U."""
    upper_CC = factor.upper_CC.to(weight_RC.dtype)
    drift_RC = weight_RC @ (cross_CC - hessian_CC).to(weight_RC.dtype)
    drift_RC[:, factor.dead_C] = 0
    return (drift_RC @ upper_CC.T) @ upper_CC


@dataclass(frozen=True)
class _Judge:
    """The target fitted without the held-out batches, and the moments of those."""

    hessian_CC: torch.Tensor | None
    cross_CC: torch.Tensor | None
    factor: Factor | None
    drift_CC: torch.Tensor | None
    held_CC: torch.Tensor | None

    @classmethod
    def of(cls, problem: StreamProblem, paired: PairedMoments, centred: bool) -> _Judge:
        if paired.held.count == 0:
            return cls(None, None, None, None, None)
        fit_CC, fit_cross_CC = _moments(paired.fit, paired.fit_cross_CC, paired.fit_dense_sum_C, centred)
        held_CC, held_cross_CC = _moments(paired.held, paired.held_cross_CC, paired.held_dense_sum_C, centred)
        factor = factorize(fit_CC, problem.percdamp)
        return cls(fit_CC, fit_cross_CC, factor, held_cross_CC - held_CC, held_CC)

    def shrinkage(self, weight_RC: torch.Tensor) -> tuple[float, bool]:
        """argmin over a in [0, 1] of ‖W X - (W + a D) X̂‖² on held-out tokens; False when there were none."""
        if self.factor is None or self.held_CC is None:
            return UNJUDGED_SHRINKAGE, False
        assert self.hessian_CC is not None and self.cross_CC is not None and self.drift_CC is not None
        step_RC = _target_step(weight_RC, self.hessian_CC, self.cross_CC, self.factor)
        gain = float(((weight_RC @ self.drift_CC.float()) * step_RC).sum(dtype=torch.float64))
        cost = float(((step_RC @ self.held_CC.float()) * step_RC).sum(dtype=torch.float64))
        return (min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0), True


def _corrected_bias(
    layer: Layer, value_RC: torch.Tensor, own: SecondMoments, paired: PairedMoments
) -> torch.Tensor | None:
    if layer.bias_R is None:
        return None
    dense_mean_R = layer.weight_RC.double() @ paired.dense_mean_C
    return (layer.bias_R.double() + dense_mean_R - value_RC.double() @ own.mean_C).to(layer.bias_R.dtype)
