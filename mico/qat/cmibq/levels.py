"""The arithmetic of CM-IBQ's quantizers: one width, or a mixture of several, with gradients for all that is learned.

With a step s and a zero point z (weights: 0) a value x lies at r = x / s - z, and

    Q(x) = s (q + z),   q = the half-integer nearest to r in [-h, h],   h = (2^bits - 1) / 2,

2^bits levels, symmetric about s z: those of mico/packed/quantized.py without stored zero points. Straight-through:

               |r| <= h        outside
    dQ/dx      1               0
    dQ/ds      q - r           q + z
    dQ/dz      0               s

Sums over the values that share a step are divided by sqrt(n h) (Esser et al., Learned Step Size Quantization, 2020), n
the channels of the group: were tokens counted too, steps would learn otherwise in smaller batches or several processes.
A mixture is sum_k p_k Q_k(x); the gradient of p_k is sum g (Q_k(x) - x), the true one less a term that is the same for
all k: shares sum to 1, so it changes nothing. Suffixes: N rows of values (tokens, or rows of a weight), C channels,
G groups of channels, K widths, M rows of steps: 1 where all N share them (activations), or N (weights).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BITS = (2, 3, 4, 5, 6, 8)  # the widths that a group may take: K of them
Tensors = tuple[torch.Tensor | None, ...]
# values (N, C), their gradients (N, C) or None, and by group and width the summed (g (Q(x) - x))^2, (G, K)
Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class Steps(NamedTuple):
    """scale_MGK, zero_MGK (None: zero) and half_GK = h by group and width; label_C: the group of a channel."""

    scale_MGK: torch.Tensor
    zero_MGK: torch.Tensor | None
    half_GK: torch.Tensor
    label_C: torch.Tensor

    def only(self, chosen_G: torch.Tensor) -> Steps:
        """Of every group the chosen of the K widths alone."""
        rows, groups, _ = self.scale_MGK.shape
        index_MG1 = chosen_G[None, :, None].expand(rows, groups, 1)
        zero = None if self.zero_MGK is None else self.zero_MGK.gather(2, index_MG1)
        half_G1 = self.half_GK.gather(1, chosen_G[:, None])
        return Steps(self.scale_MGK.gather(2, index_MG1), zero, half_G1, self.label_C)

    def width(self, k: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Scale (M, C), zero (M, C) and h (1, C) of every channel at the k-th width."""
        zero = None if self.zero_MGK is None else self.zero_MGK[..., k].index_select(1, self.label_C)
        half_1C = self.half_GK[None, :, k].index_select(1, self.label_C)
        return self.scale_MGK[..., k].index_select(1, self.label_C), zero, half_1C


def half_levels(bits: torch.Tensor) -> torch.Tensor:
    """h = (2^bits - 1) / 2 in float32."""
    return (2.0 ** bits.float() - 1) / 2


def quantize(x_NC: torch.Tensor, steps: Steps) -> torch.Tensor:
    """Q(x) at the only width of `steps`, differentiable in x, scale and zero; in the dtype of x."""
    assert steps.half_GK.shape[1] == 1
    return _One.apply(x_NC, *steps)


def mixture(x_NC: torch.Tensor, share_GK: torch.Tensor, steps: Steps, watch: Watch | None = None) -> torch.Tensor:
    """sum_k share[g, k] Q_k(x), differentiable in all but h. `watch` is called in the backward pass."""
    return _Mixture.apply(x_NC, share_GK, watch, *steps)


def vote(
    y_NC: torch.Tensor, x_NC: torch.Tensor, share_GK: torch.Tensor, steps: Steps, watch: Watch | None = None
) -> torch.Tensor:
    """y unchanged; its gradient also reaches the shares, as if y were the mixture of x: bits go on learning while the
    forward pass takes one width."""
    return _Vote.apply(y_NC, share_GK, x_NC, watch, *(None if part is None else part.detach() for part in steps))


# --- one width ------------------------------------------------------------------------------------------------------


def _place(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, half: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, q) of every value."""
    r = x / scale if zero is None else x / scale - zero
    return r, ((r - 0.5).round_() + 0.5).clamp_(min=-half, max=half)


def _value(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return scale * (q if zero is None else q + zero)


def _step_terms(
    g: torch.Tensor, r: torch.Tensor, q: torch.Tensor, inside: torch.Tensor, scale: torch.Tensor,
    zero: torch.Tensor | None,
) -> Tensors:  # fmt: skip
    """What every value adds to the gradients of scale and zero, before the division by sqrt(n h)."""
    of_scale = g * torch.where(inside, q - r, q if zero is None else q + zero)
    return of_scale, None if zero is None else g * torch.where(inside, 0.0, scale)


def _by_group(values_NC: torch.Tensor, label_C: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Sums by group, (M, G); over all rows where M is 1."""
    values_MC = values_NC if rows == len(values_NC) else values_NC.sum(0, keepdim=True)
    return values_MC.new_zeros(rows, groups).index_add_(1, label_C, values_MC)


def _damping(steps: Steps, k: int) -> torch.Tensor:
    """1 / sqrt(n h), (1, G): n channels share a step, h is the highest level."""
    channels_G = torch.bincount(steps.label_C, minlength=steps.scale_MGK.shape[1])
    return (channels_G * steps.half_GK[:, k]).clamp_min(1).rsqrt()[None]


class _One(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: torch.Tensor, *parts: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_NC, *parts)
        steps = Steps(*parts)  # type: ignore[arg-type]
        scale, zero, half = steps.width(0)
        return _value(_place(x_NC.to(scale.dtype), scale, zero, half)[1], scale, zero).to(x_NC.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        x_NC, *parts = ctx.saved_tensors
        of_x, of_scale, of_zero, _, _ = _gradients(gradients[0], x_NC, None, Steps(*parts))
        return of_x, of_scale, of_zero, None, None


class _Mixture(torch.autograd.Function):
    """Saves x alone: every width is computed again in the backward pass, none is kept."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: torch.Tensor, share_GK: torch.Tensor, watch: Watch | None, *parts: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_NC, share_GK, *parts)
        ctx.watch = watch
        steps = Steps(*parts)  # type: ignore[arg-type]
        x = x_NC.to(steps.scale_MGK.dtype)
        mixed = torch.zeros_like(x)
        for k in range(share_GK.shape[1]):
            scale, zero, half = steps.width(k)
            _, q = _place(x, scale, zero, half)
            mixed.addcmul_(share_GK[None, :, k].index_select(1, steps.label_C), _value(q, scale, zero))
        return mixed.to(x_NC.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        x_NC, share_GK, *parts = ctx.saved_tensors
        of_x, of_scale, of_zero, of_share, squares_GK = _gradients(gradients[0], x_NC, share_GK, Steps(*parts))
        if ctx.watch is not None:
            ctx.watch(x_NC, gradients[0], squares_GK)
        return of_x, of_share, None, of_scale, of_zero, None, None


class _Vote(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_NC: torch.Tensor, share_GK: torch.Tensor, x_NC: torch.Tensor, watch: Watch | None,
        *parts: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x_NC, *parts)
        ctx.watch = watch
        return y_NC.view_as(y_NC)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        x_NC, *parts = ctx.saved_tensors
        of_share, squares_GK = _share_gradients(gradients[0], x_NC, Steps(*parts))
        if ctx.watch is not None:
            ctx.watch(x_NC, gradients[0], squares_GK)
        return gradients[0], of_share, None, None, None, None, None, None


def _gradients(g_NC: torch.Tensor, x_NC: torch.Tensor, share_GK: torch.Tensor | None, steps: Steps) -> Tensors:
    """Gradients of x, scale, zero and the shares (None: one width of share 1), and the summed (g (Q_k(x) - x))^2."""
    dtype, (rows, groups, count) = steps.scale_MGK.dtype, steps.scale_MGK.shape
    x, g = x_NC.to(dtype), g_NC.to(dtype)
    passed = torch.zeros_like(x)
    of_scale: list[torch.Tensor] = []
    of_zero: list[torch.Tensor] = []
    of_share: list[torch.Tensor] = []
    squares: list[torch.Tensor] = []
    for k in range(count):
        scale, zero, half = steps.width(k)
        r, q = _place(x, scale, zero, half)
        inside = r.abs() <= half
        if share_GK is not None:
            effect = g * (_value(q, scale, zero) - x)
            of_share.append(_by_group(effect, steps.label_C, 1, groups)[0])
            squares.append(_by_group(effect.square_(), steps.label_C, 1, groups)[0])
        share = None if share_GK is None else share_GK[None, :, k].index_select(1, steps.label_C)
        passed += inside if share is None else inside * share
        terms = _step_terms(g if share is None else g * share, r, q, inside, scale, zero)
        damping = _damping(steps, k)
        for sums, term in zip((of_scale, of_zero), terms, strict=True):
            if term is not None:
                sums.append(_by_group(term, steps.label_C, rows, groups) * damping)
    return (
        (g * passed).to(x_NC.dtype), torch.stack(of_scale, -1), torch.stack(of_zero, -1) if of_zero else None,
        torch.stack(of_share, -1) if of_share else None, torch.stack(squares, -1) if squares else None,
    )  # fmt: skip


def _share_gradients(g_NC: torch.Tensor, x_NC: torch.Tensor, steps: Steps) -> tuple[torch.Tensor, torch.Tensor]:
    """sum g (Q_k(x) - x) and sum (g (Q_k(x) - x))^2 by group and width, (G, K)."""
    dtype, (_, groups, count) = steps.scale_MGK.dtype, steps.scale_MGK.shape
    x, g = x_NC.to(dtype), g_NC.to(dtype)
    sums, squares = [], []
    for k in range(count):
        scale, zero, half = steps.width(k)
        effect = g * (_value(_place(x, scale, zero, half)[1], scale, zero) - x)
        sums.append(_by_group(effect, steps.label_C, 1, groups)[0])
        squares.append(_by_group(effect.square_(), steps.label_C, 1, groups)[0])
    return torch.stack(sums, -1), torch.stack(squares, -1)


def runs(channels: int, groups: int) -> torch.Tensor:
    """Labels of min(groups, channels) runs of consecutive channels whose lengths differ by one at most."""
    return torch.arange(channels) * min(groups, channels) // channels
