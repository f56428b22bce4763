"""SparseGPT and GPTQ as published: joint pruning and quantization on the symmetric target, one grid a row.

H = 2/n sum x xᵀ, dead columns zeroed, damping, blocks of columns, min-max asymmetric grids fitted on the
dense weight before pruning, no reordering. GPTQ is the same sweep without a mask.
"""

from __future__ import annotations

import torch

from mico.methods.method import Layer, LayerResult, StreamProblem, row_energies
from mico.methods.sweep import Factor, Swept, factorize, keep_mask, sweep
from mico.packed.grid import Grid, integer_grid, minmax_grid, symmetric_grid
from mico.packed.quantized import QuantizedWeight


def sparsegpt(problem: StreamProblem) -> list[LayerResult]:
    """Compress every Linear of the stream in one sweep. Source: Frantar & Alistarh 2023; GPTQ 2022."""
    moments = problem.moments
    factor = factorize(moments.gram_CC, problem.percdamp, moments.hessian_scale)
    return [result for part in problem.parts() for result in _solved(part, factor)]


def _solved(problem: StreamProblem, factor: Factor) -> list[LayerResult]:
    pivots_C = factor.pivots_C.float()
    grids = [fit_grid(layer, layer.weight_RC.float(), pivots_C) for layer in problem.layers]
    dead_C = factor.dead_C if bool(factor.dead_C.any()) else None
    parts = [layer.weight_RC.float() for layer in problem.layers]
    start = parts if dead_C is None else [part_RC.masked_fill(dead_C, 0) for part_RC in parts]
    swept = sweep(start, factor, problem.segments, used(grids), problem.blocksize)
    return collect(problem, swept, grids, factor, problem.moments.gram_CC)


def fit_grid(
    layer: Layer, weight_RC: torch.Tensor, pivots_C: torch.Tensor | None = None, keep_RC: torch.Tensor | None = None
) -> Grid | None:
    """The grid of a Linear fitted on these weights, None when its plan does not quantize.

    A symmetric grid is fitted to the weights that the mask keeps, or is likely to keep (before compensation) where
    none is given, each counted by 1 / U_ii², the price of its error in the sweep.
    """
    plan = layer.plan
    if plan.bits_G[0] == 16:
        return None
    if not (plan.factored or plan.integer):
        return minmax_grid(weight_RC, plan.groups.label_C, plan.bits_G)
    cost_C = weight_RC.new_ones(weight_RC.shape[1]) if pivots_C is None else pivots_C.square().reciprocal()
    if keep_RC is None:
        keep_RC = keep_mask(weight_RC.square() * cost_C, plan.sparsity, plan.pattern, per_row=False)
    importance_RC = cost_C.expand_as(weight_RC) if keep_RC is None else cost_C * keep_RC
    fit = integer_grid if plan.integer else symmetric_grid
    return fit(weight_RC, importance_RC, plan.groups.label_C, plan.bits_G)


def used(grids: list[Grid | None]) -> list[Grid] | None:
    """The grids of a stream: all of its Linears are quantized, or none is."""
    found = [grid for grid in grids if grid is not None]
    assert len(found) in (0, len(grids)), "a stream mixes quantized and unquantized Linears"
    return found or None


def pack(
    layer: Layer, value_RC: torch.Tensor, codes_RC: torch.Tensor | None, keep_RC: torch.Tensor | None, grid: Grid | None
) -> QuantizedWeight:
    """The stored form of one swept Linear; not quantized, its values are kept in the dtype of the dense weight."""
    if grid is not None:
        assert codes_RC is not None
        return grid.quantized(codes_RC, keep_RC, layer.plan.pattern)
    half = layer.weight_RC.dtype if layer.weight_RC.element_size() == 2 else torch.float16
    none = torch.zeros(0, 1, dtype=torch.float16)
    plan = layer.plan
    return QuantizedWeight(value_RC.to(half), none, None, None, plan.bits_G, plan.groups.label_C, keep_RC, plan.pattern)


def collect(
    problem: StreamProblem, swept: Swept, grids: list[Grid | None], factor: Factor, gram_CC: torch.Tensor
) -> list[LayerResult]:
    """Cut the sweep's result back into Linears, with the error of each under `gram_CC` (of the inputs it sees).

    The values of `swept` are used up: the errors take their place.
    """
    facts = {"damping": factor.damping, "dead": int(factor.dead_C.sum())}
    fallbacks = (f"damping raised to {factor.damping:g}",) if factor.escalated else ()
    results = []
    for layer, segment, grid in zip(problem.layers, problem.segments, grids, strict=True):
        value_RC, dense_RC = swept.weight_RC[segment.rows], layer.weight_RC.float()
        pruned = swept.keep_RC is not None and bool(segment.sparsity or segment.pattern)
        keep_RC = swept.keep_RC[segment.rows] if pruned and swept.keep_RC is not None else None
        codes_RC = swept.codes_RC[segment.rows] if swept.codes_RC is not None else None
        quantized = pack(layer, value_RC, codes_RC, keep_RC, grid)
        if not quantized.quantized:  # rounded to 16 bits
            value_RC.copy_(quantized.dequantize())
        error, energy = (float(row_energies(w_RC, gram_CC).sum()) for w_RC in (value_RC.sub_(dense_RC), dense_RC))
        own = {"error": error / energy if energy > 0 else 0.0}
        results.append(LayerResult(quantized, None, own | facts, fallbacks))
    return results
