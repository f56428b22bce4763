"""Wanda and round-to-nearest: no compensation, no Hessian factor; the plainest peers of the table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mico.methods.method import Layer, LayerResult, StreamProblem, relative_error
from mico.methods.sparsegpt import fit_grid, pack
from mico.methods.sweep import keep_mask
from mico.packed.grid import quantize


def wanda(problem: StreamProblem) -> list[LayerResult]:
    """Prune by |w| * ‖x_c‖ within each output row, then round to nearest. Source: Sun et al. 2023."""
    norm_C = problem.moments.gram_CC.diagonal().sqrt().float()
    return [_round(problem, layer, lambda w_RC: w_RC.abs() * norm_C, per_row=True) for layer in problem.layers]


def rtn(problem: StreamProblem) -> list[LayerResult]:
    """Round to nearest; with a sparsity, the smallest magnitudes of the layer go first."""
    return [_round(problem, layer, torch.abs, per_row=False) for layer in problem.layers]


def _round(
    problem: StreamProblem, layer: Layer, score: Callable[[torch.Tensor], torch.Tensor], per_row: bool
) -> LayerResult:
    weight_RC = layer.weight_RC.float()
    keep_RC = keep_mask(score(weight_RC), layer.plan.sparsity, layer.plan.pattern, per_row)
    grid = fit_grid(layer, weight_RC)
    value_RC, codes_RC = weight_RC, None
    if grid is not None:
        label_C = grid.label_C
        scale_RC, zero_RC = grid.scale_RG[:, label_C], grid.zero_point_RG[:, label_C]
        codes_RC = quantize(weight_RC, scale_RC, zero_RC, (grid.levels_G - 1)[label_C])
    if keep_RC is not None:
        value_RC = value_RC * keep_RC
    quantized = pack(layer, value_RC, codes_RC, keep_RC, grid)
    error = relative_error(weight_RC, quantized.dequantize(), problem.moments.gram_CC)
    return LayerResult(quantized, None, {"error": error, "damping": 0.0, "dead": 0})
