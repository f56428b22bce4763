"""SparseGPT and GPTQ as published: joint pruning and quantization on the symmetric target, one grid a row.

H = 2/n sum x xᵀ, dead columns zeroed, damping, blocks of columns, min-max asymmetric grids fitted on the
dense weight before pruning, no reordering. GPTQ is the same sweep without a mask.
"""

from __future__ import annotations

import torch

from mico.methods.method import Layer, LayerResult, StreamProblem, relative_error
from mico.methods.sweep import Factor, Swept, factorize, sweep
from mico.packed.grid import Grid, minmax_grid
from mico.packed.quantized import QuantizedWeight


def sparsegpt(problem: StreamProblem) -> list[LayerResult]:
    """Compress every Linear of the stream in one sweep. Source: Frantar & Alistarh 2023; GPTQ 2022."""
    factor = factorize(problem.moments.hessian_CC, problem.percdamp)
    weight_RC = problem.weight_RC.float()
    grids = [fit_minmax(layer) for layer in problem.layers]
    swept = sweep(weight_RC, factor, problem.segments, used(grids), problem.blocksize)
    return collect(problem, weight_RC, swept, grids, factor)


def fit_minmax(layer: Layer) -> Grid | None:
    """The grid of a Linear, None when its plan does not quantize."""
    if layer.plan.bits_G[0] == 16:
        return None
    return minmax_grid(layer.weight_RC.float(), layer.plan.groups.label_C, layer.plan.bits_G)


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
    groups = layer.plan.groups
    return QuantizedWeight(value_RC.to(half), none, None, None, (16,) * groups.count, groups.label_C, keep_RC, layer.plan.pattern)


def collect(
    problem: StreamProblem, dense_RC: torch.Tensor, swept: Swept, grids: list[Grid | None], factor: Factor
) -> list[LayerResult]:
    """Cut the sweep's result back into Linears, with the error of each on the inputs it sees."""
    results = []
    for layer, segment, grid in zip(problem.layers, problem.segments, grids, strict=True):
        rows = segment.rows
        keep_RC = swept.keep_RC[rows] if swept.keep_RC is not None and (segment.sparsity or segment.pattern) else None
        codes_RC = swept.codes_RC[rows] if swept.codes_RC is not None else None
        quantized = pack(layer, swept.weight_RC[rows], codes_RC, keep_RC, grid)
        facts = {
            "error": relative_error(dense_RC[rows], quantized.dequantize(), problem.moments.gram_CC),
            "damping": factor.damping,
            "dead": int(factor.dead_C.sum()),
        }
        fallbacks = (f"damping raised to {factor.damping:g}",) if factor.escalated else ()
        results.append(LayerResult(quantized, None, facts, fallbacks))
    return results
