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

from dataclasses import replace

import torch

from mico.channels.meters import PairedMoments, SecondMoments
from mico.methods.method import Layer, LayerResult, StreamProblem, row_energies
from mico.methods.sparsegpt import collect, fit_grid, used
from mico.methods.support import solve_on_support
from mico.methods.sweep import Factor, factorize, sweep

UNJUDGED_SHRINKAGE = 0.5  # when no batch could be held out


def mico(problem: StreamProblem) -> list[LayerResult]:
    """Compress every Linear of the stream towards the dense model's output."""
    paired = problem.paired
    assert paired is not None, "mico needs the dense model's inputs beside the compressed model's"
    centred = problem.layers[0].bias_R is not None
    dense_RC = problem.weight_RC.float()
    shrinkages = _shrinkages(problem, paired, centred, dense_RC)  # first: its matrices are gone before the next ones
    hessian_CC, drift_CC = _moments(problem.moments, paired.cross_CC, paired.dense_sum_C, centred)
    factor = factorize(hessian_CC, problem.percdamp)
    target_RC = _target_step(dense_RC, drift_CC, factor)
    for segment, shrinkage in zip(problem.segments, shrinkages, strict=True):
        target_RC[segment.rows] *= UNJUDGED_SHRINKAGE if shrinkage is None else shrinkage
    target_RC += dense_RC
    prunes = any(segment.sparsity > 0 or segment.pattern for segment in problem.segments)
    if prunes:  # channels that never fired go first; unpruned they keep their weights, as the grid may lack a zero
        target_RC[:, factor.dead_C] = 0
    pivots_C = factor.pivots_C.float().masked_fill(factor.dead_C, torch.inf)  # those do not shape the grid
    keep_RC = None
    if prunes:
        chosen = sweep(target_RC, factor, problem.segments, None, problem.blocksize)
        keep_RC = chosen.keep_RC
        assert keep_RC is not None
        target_RC = solve_on_support(target_RC, factor.damped_CC, keep_RC, chosen.weight_RC)
    grids = [
        fit_grid(layer, target_RC[s.rows], pivots_C, None if keep_RC is None else keep_RC[s.rows])
        for layer, s in zip(problem.layers, problem.segments, strict=True)
    ]
    swept = sweep(target_RC, factor, problem.segments, used(grids), problem.blocksize, keep_RC)
    results = collect(problem, swept, grids, factor, hessian_CC)
    finished = []
    for layer, result, shrinkage in zip(problem.layers, results, shrinkages, strict=True):
        bias_R = _corrected_bias(layer, result.quantized.dequantize(), problem.moments, paired)
        fallbacks = result.fallbacks
        if shrinkage is None:
            fallbacks += (f"no held-out batch: shrinkage {UNJUDGED_SHRINKAGE}",)
        facts = result.facts | {"shrinkage": UNJUDGED_SHRINKAGE if shrinkage is None else shrinkage}
        finished.append(replace(result, bias_R=bias_R, facts=facts, fallbacks=fallbacks))
    return finished


def _moments(
    own: SecondMoments, cross_CC: torch.Tensor, dense_sum_C: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ̂, Σ_xx̂ - Σ̂) scaled as Hessians (2/n), around the means when a bias can carry those."""
    hessian_CC, drift_CC = own.hessian_CC.double(), cross_CC.double() * (2.0 / own.count)
    if centred:
        hessian_CC -= 2.0 * torch.outer(own.mean_C, own.mean_C)
        drift_CC -= 2.0 * torch.outer(dense_sum_C / own.count, own.mean_C)
    drift_CC -= hessian_CC
    return hessian_CC, drift_CC


def _target_step(weight_RC: torch.Tensor, drift_CC: torch.Tensor, factor: Factor) -> torch.Tensor:
    """W* - W = W (Σ_xx̂ - Σ̂) (Σ̂ + λ I)⁻¹, with (Σ̂ + λ I)⁻¹ = Uᵀ U; channels that never fired stay as they are."""
    upper_CC = factor.upper_CC.to(weight_RC.dtype)
    drift_RC = weight_RC @ drift_CC.to(weight_RC.dtype)
    drift_RC[:, factor.dead_C] = 0
    return (drift_RC @ upper_CC.T) @ upper_CC


def _shrinkages(
    problem: StreamProblem, paired: PairedMoments, centred: bool, dense_RC: torch.Tensor
) -> list[float | None]:
    """For every Linear argmin over a in [0, 1] of ‖W X - (W + a D) X̂‖² on the held-out tokens, None without any.

    D is the step to the target fitted without those tokens; the objective is a parabola in a.
    """
    if paired.held.count == 0:
        return [None] * len(problem.layers)
    hessian_CC, drift_CC = _moments(paired.fit, paired.fit_cross_CC, paired.fit_dense_sum_C, centred)
    step_RC = _target_step(dense_RC, drift_CC, factorize(hessian_CC, problem.percdamp))
    held_CC, held_drift_CC = _moments(paired.held, paired.held_cross_CC, paired.held_dense_sum_C, centred)
    gain_R = ((dense_RC @ held_drift_CC.float()) * step_RC).sum(1, dtype=torch.float64)
    cost_R = row_energies(step_RC, held_CC)
    found: list[float | None] = []
    for segment in problem.segments:
        gain, cost = float(gain_R[segment.rows].sum()), float(cost_R[segment.rows].sum())
        found.append(min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0)
    return found


def _corrected_bias(
    layer: Layer, value_RC: torch.Tensor, own: SecondMoments, paired: PairedMoments
) -> torch.Tensor | None:
    """b + W E[x] - Ŵ E[x̂], rounded to the 16 bits that a bias is stored in."""
    if layer.bias_R is None:
        return None
    dense_mean_R = layer.weight_RC.double() @ paired.dense_mean_C
    bias_R = layer.bias_R.double() + dense_mean_R - value_RC.double() @ own.mean_C
    return bias_R.to(torch.float16).to(layer.bias_R.dtype)
