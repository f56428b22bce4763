"""SparseGPT as its paper and its public scripts lay it out: the peer of the speed benchmark.

Per block: hooks gather one Hessian for each Linear, every Linear is factored and swept alone, then the block runs
again to feed the next one. float32 throughout. Shares no code with mico; written for clarity and at the speed
that clear PyTorch gives, not slowed down anywhere. Two details are fixed by what mico stores, and cost nothing:
scales are rounded to float16, and a block of columns loses exactly its share of weights.
Suffixes: R output rows, C input channels, S columns of one sweep block, N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import torch
from torch import nn


@dataclass
class Clock:
    """Seconds of processor time by stage, all threads together: neighbours on a busy machine do not count."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + process_time() - start


class MinMaxQuantizer:
    """One asymmetric grid a row, fitted on the dense weight; zero is always on the grid."""

    def __init__(self, weight_RC: torch.Tensor, bits: int) -> None:
        self.maxq = 2**bits - 1
        low_R, high_R = weight_RC.amin(1).clamp(max=0), weight_RC.amax(1).clamp(min=0)
        flat_R = (low_R == 0) & (high_R == 0)
        low_R[flat_R], high_R[flat_R] = -1, 1
        self.scale_R = ((high_R - low_R) / self.maxq).half().float()
        self.zero_R = torch.round(-low_R / self.scale_R).clamp(max=self.maxq)

    def __call__(self, weight_R: torch.Tensor) -> torch.Tensor:
        codes_R = torch.clamp(torch.round(weight_R / self.scale_R) + self.zero_R, 0, self.maxq)
        return self.scale_R * (codes_R - self.zero_R)


class LayerPruner:
    """Hessian and sweep of one Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        channels = linear.in_features
        self.hessian_CC = torch.zeros(channels, channels)
        self.windows = 0

    def add_batch(self, x_BTC: torch.Tensor) -> None:
        """Running mean over windows of 2 x xᵀ."""
        total = self.windows + len(x_BTC)
        x_TC = x_BTC.reshape(-1, x_BTC.shape[-1]).float()
        self.hessian_CC.addmm_(x_TC.T, x_TC, beta=self.windows / total, alpha=2 / total)
        self.windows = total

    def factor(self, percdamp: float) -> torch.Tensor:
        """The upper Cholesky factor of the inverse of the damped Hessian; the Hessian is used up."""
        hessian_CC = self.hessian_CC
        diagonal_C = hessian_CC.diagonal()
        dead_C = diagonal_C == 0
        diagonal_C[dead_C] = 1
        self.linear.weight[:, dead_C] = 0
        diagonal_C += percdamp * diagonal_C.mean()
        inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC))
        return torch.linalg.cholesky(inverse_CC, upper=True)

    def sweep(self, upper_CC: torch.Tensor, sparsity: float, bits: int, blocksize: int) -> None:
        """Prune and quantize the weight in place."""
        weight_RC = self.linear.weight.detach().clone().float()
        quantizer = MinMaxQuantizer(weight_RC, bits)
        columns = weight_RC.shape[1]
        for start in range(0, columns, blocksize):
            end = min(start + blocksize, columns)
            block_RS = weight_RC[:, start:end].clone()
            value_RS, error_RS = torch.zeros_like(block_RS), torch.zeros_like(block_RS)
            upper_SS = upper_CC[start:end, start:end]
            score_RS = block_RS**2 / upper_SS.diagonal() ** 2
            threshold = torch.sort(score_RS.flatten())[0][int(score_RS.numel() * sparsity) - 1]
            pruned_RS = score_RS <= threshold
            for i in range(end - start):
                weight_R = block_RS[:, i]
                kept_R = weight_R.clone()
                kept_R[pruned_RS[:, i]] = 0
                value_R = quantizer(kept_R)
                error_R = (weight_R - value_R) / upper_SS[i, i]
                block_RS[:, i:] -= error_R[:, None] @ upper_SS[None, i, i:]
                value_RS[:, i], error_RS[:, i] = value_R, error_R
            weight_RC[:, start:end] = value_RS
            weight_RC[:, end:] -= error_RS @ upper_CC[start:end, end:]
        self.linear.weight.copy_(weight_RC.to(self.linear.weight.dtype))


class _Caught(Exception):
    pass


def block_inputs(model: nn.Module, block: nn.Module, ids_NT: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Hidden states before the first block, one window each, and the keyword arguments that blocks get."""
    inputs: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.update(kwargs)
        raise _Caught

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    for ids_T in ids_NT:
        with suppress(_Caught):
            model(input_ids=ids_T[None], use_cache=False)
    handle.remove()
    return inputs, arguments


@torch.no_grad()
def sparsegpt(
    model: nn.Module,
    blocks: nn.ModuleList,
    ids_NT: torch.Tensor,
    *,
    sparsity: float,
    bits: int,
    percdamp: float = 0.01,
    blocksize: int = 128,
    clock: Clock | None = None,
) -> None:
    """Prune and quantize every Linear of every block in place, one window at a time through the blocks."""
    clock = clock or Clock()
    inputs, arguments = block_inputs(model, blocks[0], ids_NT)
    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        pruners = [LayerPruner(linear) for linear in linears]

        def hook_for(pruner: LayerPruner) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
                with clock.stage("Hessians"):
                    pruner.add_batch(args[0])

            return hook

        handles = [pruner.linear.register_forward_hook(hook_for(pruner)) for pruner in pruners]
        with clock.stage("first pass"):
            for x_BTC in inputs:
                block(x_BTC, **arguments)
        for handle in handles:
            handle.remove()
        for pruner in pruners:
            with clock.stage("factors"):
                upper_CC = pruner.factor(percdamp)
            with clock.stage("sweeps"):
                pruner.sweep(upper_CC, sparsity, bits, blocksize)
        del pruners, handles
        with clock.stage("second pass"):
            inputs = [block(x_BTC, **arguments) for x_BTC in inputs]
