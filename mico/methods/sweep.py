"""The one column sweep: SparseGPT, GPTQ and mico are this loop with other targets, grids and masks.

All Linears of a stream go through it together, rows concatenated: they share the Hessian and so the factor.
Weights are held transposed (C, R), where a column of the paper is one contiguous row.
Suffixes: C input channels, R rows of all Linears, G groups, S columns of one sub-block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mico.channels.meters import DOUBLE_LIMIT
from mico.errors import UserError
from mico.packed.grid import Grid, quantize

SUB_BLOCK = 32  # eager rank-one updates stay inside it; everything later waits for one GEMM
DAMPING_STEPS = 6
INVERSE_BLOCK = 256
REVERSED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Factor:
    """upper_CC: U with inv(H + damping) = Uᵀ U; dead_C: channels that never fired.

    hessian_CC: H without its scale; diagonal_C: what takes the place of its diagonal; damping: as a share of the
    mean diagonal; escalated: how often it had to be raised.
    """

    hessian_CC: torch.Tensor
    scale: float
    diagonal_C: torch.Tensor
    upper_CC: torch.Tensor
    dead_C: torch.Tensor
    damping: float
    escalated: int

    @property
    def damped_CC(self) -> torch.Tensor:
        """H + damping, in the dtype of the factor; made anew for every call, as only some methods want it."""
        damped_CC = self.hessian_CC.to(self.upper_CC.dtype, copy=True).mul_(self.scale)
        damped_CC.diagonal().copy_(self.diagonal_C)
        return damped_CC

    @property
    def pivots_C(self) -> torch.Tensor:
        """U_ii: 1 / U_ii² is the variance of channel i given all later ones."""
        return self.upper_CC.diagonal()


def factorize(hessian_CC: torch.Tensor, percdamp: float, scale: float = 1.0) -> Factor:
    """Dampen H by percdamp * mean(diag H) and factor its inverse, in float64 (wide H in its own dtype, see meters).

    With J the reversal, chol(J H J) = L gives H = A Aᵀ for the upper triangular A = J L J, so U = inv(A): one
    Cholesky and one triangular inverse instead of Cholesky, inverse, Cholesky. A failure multiplies the damping
    by ten (`escalated` counts). scale: H is scale * hessian_CC, which spares the caller a second matrix.
    Raises UserError when H is not finite or cannot be factored.
    """
    dtype = torch.float64 if len(hessian_CC) <= DOUBLE_LIMIT else hessian_CC.dtype
    diagonal_C = hessian_CC.diagonal().to(dtype, copy=True) * scale
    if not torch.isfinite(diagonal_C).all():
        raise UserError("the Hessian holds NaN or Inf: the activations overflow, try --dtype float32")
    dead_C = diagonal_C <= 0
    diagonal_C[dead_C] = 1.0  # before the mean is taken, as SparseGPT does
    mean = float(diagonal_C.mean())
    for step in range(DAMPING_STEPS):
        damping = percdamp * 10.0**step
        damped_CC = hessian_CC.flip(0, 1).to(dtype).mul_(scale)
        damped_CC.diagonal().copy_(diagonal_C.flip(0) + damping * mean)
        lower_CC, info = torch.linalg.cholesky_ex(damped_CC)
        del damped_CC  # matrices of a wide stream take a gigabyte each
        if int(info) == 0:
            upper_CC = _reversed_in_place(invert_lower(lower_CC))
            if torch.isfinite(upper_CC).all():
                return Factor(hessian_CC, scale, diagonal_C + damping * mean, upper_CC, dead_C, damping, step)
    raise UserError(f"the Hessian cannot be factored even with damping {damping:g}: more --nsamples are needed")


def _reversed_in_place(matrix_CC: torch.Tensor) -> torch.Tensor:
    """`flip(0, 1)` without a second matrix: the numbers of a dense matrix in reverse order."""
    count, half = matrix_CC.numel(), matrix_CC.numel() // 2
    flat = matrix_CC.as_strided((count,), (1,))
    for start in range(0, half, REVERSED_AT_ONCE):
        end = min(start + REVERSED_AT_ONCE, half)
        head = flat[start:end].flip(0)
        flat[start:end] = flat[count - end : count - start].flip(0)
        flat[count - end : count - start] = head
    return matrix_CC


def invert_lower(lower_CC: torch.Tensor) -> torch.Tensor:
    """Invert a lower triangular matrix in place, by blocks of columns, each solved from its diagonal down."""
    channels = len(lower_CC)
    identity_CS = torch.eye(channels, min(INVERSE_BLOCK, channels), dtype=lower_CC.dtype, device=lower_CC.device)
    for start in range(0, channels, INVERSE_BLOCK):
        end = min(start + INVERSE_BLOCK, channels)
        right_CS = identity_CS[: channels - start, : end - start]
        lower_CC[start:, start:end] = torch.linalg.solve_triangular(lower_CC[start:, start:], right_CS, upper=False)
    return lower_CC


@dataclass(frozen=True)
class Segment:
    """Rows of one Linear inside the concatenation, and how they are pruned."""

    rows: slice
    sparsity: float
    pattern: tuple[int, int] | None


@dataclass(frozen=True)
class Swept:
    """weight_RC on the grid, codes_RC (uint8; None when not quantized), keep_RC (None when dense), loss_R.

    loss_R = sum of ((w - q) / U_ii)² = Δ (H + damping) Δᵀ, exactly the damped output error of each row.
    """

    weight_RC: torch.Tensor
    codes_RC: torch.Tensor | None
    keep_RC: torch.Tensor | None
    loss_R: torch.Tensor


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask of the `count` lowest scores of the whole tensor (ties at the threshold all count)."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    return score <= score.flatten().kthvalue(count).values


def keep_mask(
    score_RC: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None, per_row: bool
) -> torch.Tensor | None:
    """Keep the highest scores: the best n of every m, a share of every row, or a share of the whole layer."""
    rows, channels = score_RC.shape
    if pattern is not None:
        n, m = pattern
        score_RBM = score_RC.reshape(rows, channels // m, m)
        best = score_RBM.topk(n, dim=-1).indices
        return torch.zeros_like(score_RBM, dtype=torch.bool).scatter_(-1, best, True).reshape(rows, channels)
    if sparsity == 0:
        return None
    if not per_row:
        return ~lowest(score_RC, int(score_RC.numel() * sparsity))
    kept = channels - int(channels * sparsity)
    best = score_RC.topk(kept, dim=1).indices
    return torch.zeros_like(score_RC, dtype=torch.bool).scatter_(1, best, True)


class _Levels:
    """Grids of all Linears stacked, indexed by channel: rows of (G, R) matrices."""

    def __init__(self, grids: Sequence[Grid], dtype: torch.dtype) -> None:
        self.label = grids[0].label_C.tolist()
        self.scale_GR = torch.cat([g.scale_RG for g in grids]).T.to(dtype).contiguous()
        self.zero_GR = torch.cat([g.zero_point_RG for g in grids]).T.to(dtype).contiguous()
        maxq = [(g.levels_G - 1)[:, None].expand(-1, len(g.row_scale_RG)) for g in grids]
        self.maxq_GR = torch.cat(maxq, 1).to(dtype).contiguous()

    def nearest(self, weight_R: torch.Tensor, channel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, values) of one column."""
        group = self.label[channel]
        scale_R, zero_R = self.scale_GR[group], self.zero_GR[group]
        code_R = quantize(weight_R, scale_R, zero_R, self.maxq_GR[group])
        return code_R, (code_R - zero_R).mul_(scale_R)


def sweep(
    weight_RC: torch.Tensor | Sequence[torch.Tensor],
    factor: Factor,
    segments: Sequence[Segment],
    grids: Sequence[Grid] | None,
    blocksize: int = 128,
    keep_RC: torch.Tensor | None = None,
) -> Swept:
    """Prune and quantize column by column, pushing each column's error onto the later ones with row U[i, i:].

    The mask of a column block keeps the largest w² / U_ii² of its current, compensated weights, per Linear;
    n:m keeps the best n of every m columns. A mask given as `keep_RC` is taken as it is instead. Works in the dtype
    of weight_RC (float64 for exact comparisons), which may be given Linear by Linear; channels that never fired count
    as 0 where the caller made them so.
    Source: SparseGPT (Frantar & Alistarh 2023), algorithm 1 joint with quantization.
    """
    parts = [weight_RC] if isinstance(weight_RC, torch.Tensor) else weight_RC
    dtype = parts[0].dtype
    upper_CC = factor.upper_CC.to(dtype)
    pivots_C = upper_CC.diagonal().contiguous()
    work_CR = parts[0].new_empty(parts[0].shape[1], sum(len(part) for part in parts))
    torch.cat([part.T for part in parts], 1, out=work_CR)
    levels = _Levels(grids, dtype) if grids is not None else None
    selects = keep_RC is None and any(s.sparsity > 0 or s.pattern for s in segments)
    keep_CR = keep_RC.T.contiguous() if keep_RC is not None else None
    if selects:
        keep_CR = torch.ones(work_CR.shape, dtype=torch.bool, device=work_CR.device)
    codes_CR = torch.zeros(work_CR.shape, dtype=torch.uint8, device=work_CR.device) if levels else None
    value_CR = torch.empty_like(work_CR)
    loss_R = torch.zeros(work_CR.shape[1], dtype=torch.float64, device=work_CR.device)
    span = max((s.pattern[1] for s in segments if s.pattern), default=1)
    sub_block = max(span, SUB_BLOCK // span * span)

    for start in range(0, len(work_CR), blocksize):
        end = min(start + blocksize, len(work_CR))
        if keep_CR is not None and selects:
            _mask_block(work_CR, keep_CR, pivots_C, segments, slice(start, end))
        error_CR = torch.empty_like(work_CR[start:end])
        for low in range(start, end, sub_block):
            high = min(low + sub_block, end)
            for i in range(low, high):
                if keep_CR is not None and selects and i % span == 0:
                    _mask_pattern(work_CR, keep_CR, pivots_C, segments, i)
                weight_R = work_CR[i]
                if levels is None or codes_CR is None:
                    value_R = value_CR[i].copy_(weight_R)
                else:
                    code_R, nearest_R = levels.nearest(weight_R, i)
                    codes_CR[i] = code_R
                    value_R = value_CR[i].copy_(nearest_R)
                if keep_CR is not None:
                    value_R.mul_(keep_CR[i])
                error_R = torch.sub(weight_R, value_R, out=error_CR[i - start]).div_(pivots_C[i])
                if i + 1 < high:
                    work_CR[i + 1 : high].addr_(upper_CC[i, i + 1 : high], error_R, alpha=-1)
            if high < end:
                done = slice(low - start, high - start)
                work_CR[high:end].addmm_(upper_CC[low:high, high:end].T, error_CR[done], alpha=-1)
        loss_R += error_CR.square().sum(0, dtype=torch.float64)
        if end < len(work_CR):
            work_CR[end:].addmm_(upper_CC[start:end, end:].T, error_CR, alpha=-1)
    return Swept(
        value_CR.T,
        codes_CR.T if codes_CR is not None else None,
        keep_CR.T.contiguous() if keep_CR is not None else None,
        loss_R,
    )


def _mask_block(
    work_CR: torch.Tensor, keep_CR: torch.Tensor, pivots_C: torch.Tensor, segments: Sequence[Segment], columns: slice
) -> None:
    for segment in segments:
        if segment.pattern is None and segment.sparsity > 0:
            score = (work_CR[columns, segment.rows] / pivots_C[columns, None]).square_()
            keep_CR[columns, segment.rows] = ~lowest(score, int(score.numel() * segment.sparsity))


def _mask_pattern(
    work_CR: torch.Tensor, keep_CR: torch.Tensor, pivots_C: torch.Tensor, segments: Sequence[Segment], start: int
) -> None:
    for segment in segments:
        if segment.pattern is None or start % segment.pattern[1]:
            continue
        n, m = segment.pattern
        columns = slice(start, start + m)
        score_MR = (work_CR[columns, segment.rows] / pivots_C[columns, None]).square_()
        best_NR = score_MR.topk(n, dim=0).indices
        keep_CR[columns, segment.rows] = torch.zeros_like(score_MR, dtype=torch.bool).scatter_(0, best_NR, True)
