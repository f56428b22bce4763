"""Re-solve the surviving weights of a mask together. Suffixes: R rows, C channels.

The sweep fixes columns in order, so an early weight never answers for a later one that is pruned. With the mask
given, every row is a small least-squares problem on its own support; preconditioned conjugate gradients solve all
rows at once with one GEMM a step, where exact solves would need one factorization a row.
"""

from __future__ import annotations

import torch

STEPS = 24


def solve_on_support(
    target_RC: torch.Tensor, hessian_CC: torch.Tensor, keep_RC: torch.Tensor, start_RC: torch.Tensor, steps: int = STEPS
) -> torch.Tensor:
    """argmin over V with V = 0 where not kept of tr((V - T) H (V - T)ᵀ), approached from `start_RC`; (R, C).

    hessian_CC: symmetric positive definite (damped). Jacobi preconditioner; the error never grows, so any number
    of steps is safe. Source: ALPS (Meng et al. 2024), the refinement on a fixed support.
    """
    hessian_CC = hessian_CC.to(target_RC.dtype)
    inverse_C = hessian_CC.diagonal().reciprocal()
    value_RC = start_RC * keep_RC
    residual_RC = ((target_RC - value_RC) @ hessian_CC) * keep_RC
    direction_RC = residual_RC * inverse_C
    energy_R1 = (residual_RC * direction_RC).sum(1, keepdim=True)
    tiny = torch.finfo(target_RC.dtype).tiny
    for _ in range(steps):
        image_RC = (direction_RC @ hessian_CC) * keep_RC
        length_R1 = energy_R1 / (direction_RC * image_RC).sum(1, keepdim=True).clamp_min(tiny)
        value_RC = value_RC + length_R1 * direction_RC
        residual_RC = residual_RC - length_R1 * image_RC
        scaled_RC = residual_RC * inverse_C
        next_R1 = (residual_RC * scaled_RC).sum(1, keepdim=True)
        direction_RC = scaled_RC + next_R1 / energy_R1.clamp_min(tiny) * direction_RC
        energy_R1 = next_R1
    return value_RC
