"""SparseGPT and GPTQ written down as plainly as possible, in float64: explicit inverse, one column at a time.

Shares no code with mico. After column i is fixed the inverse Hessian of the remaining columns is found by
Gaussian elimination (the OBS recursion itself, no Cholesky factor).
"""

from __future__ import annotations

import numpy as np


def minmax(weight: np.ndarray, labels: np.ndarray, bits: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scale, zero, maxq) of every weight: per row and group, asymmetric, scales rounded to float16."""
    scale, zero, maxq = (np.zeros_like(weight) for _ in range(3))
    for r in range(weight.shape[0]):
        for g, b in enumerate(bits):
            members = labels == g
            low, high = min(weight[r, members].min(), 0.0), max(weight[r, members].max(), 0.0)
            if low == high == 0.0:
                low, high = -1.0, 1.0
            s = float(np.float16((high - low) / (2**b - 1)))
            scale[r, members], maxq[r, members] = s, 2**b - 1
            zero[r, members] = min(np.round(-low / s), 2**b - 1)
    return scale, zero, maxq


def obs(
    weight: np.ndarray,
    hessian: np.ndarray,
    percdamp: float = 0.01,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    labels: np.ndarray | None = None,
    bits: list[int] | None = None,
    blocksize: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (compressed weight, kept mask)."""
    weight, hessian = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    rows, channels = weight.shape
    grid = None if bits is None else minmax(weight, labels, bits)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    hessian[np.diag_indices(channels)] += percdamp * np.diag(hessian).mean()
    weight[:, dead] = 0.0
    inverse = np.linalg.inv(hessian)
    # Variance of channel i given all later ones: the pivots are known before any weight is chosen.
    pivots, rest = np.zeros(channels), inverse.copy()
    for i in range(channels):
        pivots[i] = rest[i, i]
        rest = rest - np.outer(rest[:, i], rest[i, :]) / rest[i, i]
    keep = np.ones((rows, channels), dtype=bool)
    for i in range(channels):
        if pattern is None and sparsity > 0 and i % blocksize == 0:
            block = slice(i, min(i + blocksize, channels))
            score = weight[:, block] ** 2 / pivots[block]
            count = int(score.size * sparsity)
            keep[:, block] = score > np.sort(score, axis=None)[count - 1]
        if pattern is not None and i % pattern[1] == 0:
            n, m = pattern
            for r in range(rows):
                score = weight[r, i : i + m] ** 2 / pivots[i : i + m]
                keep[r, i : i + m] = np.isin(np.arange(m), np.argsort(-score)[:n])
        value = weight[:, i].copy()
        if grid is not None:
            scale, zero, maxq = (part[:, i] for part in grid)
            value = scale * (np.clip(np.round(value / scale + zero), 0, maxq) - zero)
        value = np.where(keep[:, i], value, 0.0)
        error = (weight[:, i] - value) / inverse[i, i]
        weight[:, i:] -= np.outer(error, inverse[i, i:])
        weight[:, i] = value
        inverse = inverse - np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return weight, keep
