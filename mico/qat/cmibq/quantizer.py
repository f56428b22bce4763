"""Quantizers of activations and weights as modules, and the Linear that has one of each.

A quantizer serves groups of consecutive channels. Every group has a static step for each width of BITS, so that each
width clips where it is best, and takes a mixture of them, one of them while their shares go on learning, or one for
good. Steps are learned as logarithms: the optimizer moves them by shares of themselves, whatever their size.
Suffixes: N rows of values (tokens, or rows of a weight), C channels, G groups, K widths, M rows of steps, R rows of a
weight, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mico.packed.grid import stored_shared
from mico.packed.quantized import QuantizedWeight
from mico.qat.cmibq.importance import Meter
from mico.qat.cmibq.levels import BITS, Steps, half_levels, mixture, quantize, vote
from mico.qat.modules import Mask


@dataclass(frozen=True)
class Choice:
    """Which widths the next forward pass takes: the mixture of `share_GK`, or (soft False) the `chosen_G` of BITS.

    share_GK: None where bits are no longer learned.
    """

    share_GK: torch.Tensor | None
    chosen_G: torch.Tensor
    soft: bool = False


class Quantizer(nn.Module):
    """x (N, C) -> its quantized form in the same dtype.

    scale_MGK, zero_MGK: where the steps start; zero None: none is learned (weights). stored: scales are rounded to
    what float16 and bfloat16 both hold, straight-through, as the packed form needs.
    error_GK: squared error of the start over the variance, as it was measured.
    """

    zero: nn.Parameter | None
    label_C: torch.Tensor
    error_GK: torch.Tensor

    def __init__(
        self, scale_MGK: torch.Tensor, zero_MGK: torch.Tensor | None, label_C: torch.Tensor, error_GK: torch.Tensor,
        stored: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.log_scale = nn.Parameter(scale_MGK.log())
        self.zero = None if zero_MGK is None else nn.Parameter(zero_MGK.clone())
        self.register_buffer("label_C", label_C, persistent=False)
        self.register_buffer("error_GK", error_GK)
        self.stored = stored
        self.meter = Meter(label_C, len(error_GK), len(BITS))
        self.choice: Choice | None = None  # given before every forward pass of the model

    def steps(self) -> Steps:
        scale_MGK = self.log_scale.exp()
        if self.stored:
            scale_MGK = scale_MGK + (stored_shared(scale_MGK.detach()) - scale_MGK).detach()
        half_K = half_levels(torch.tensor(BITS, device=self.log_scale.device))
        half_GK = half_K.to(self.log_scale.dtype).expand(len(self.error_GK), -1)
        return Steps(scale_MGK, self.zero, half_GK, self.label_C)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        assert self.choice is not None, "the model's forward pass gives every quantizer its widths"
        steps, share_GK = self.steps(), self.choice.share_GK
        watch = self.meter if self.training else None
        if self.choice.soft:
            assert share_GK is not None
            return mixture(x_NC, share_GK, steps, watch)
        y_NC = quantize(x_NC, steps.only(self.choice.chosen_G))
        if share_GK is None or not share_GK.requires_grad:
            return y_NC
        return vote(y_NC, x_NC, share_GK, steps, watch)

    def step_size(self) -> torch.Tensor:
        """The step of every channel that the next pass takes, (M, C): the mean of the widths' where they are mixed."""
        assert self.choice is not None
        scale_MGK = self.steps().scale_MGK
        share_GK = functional.one_hot(self.choice.chosen_G, len(BITS)).to(scale_MGK.dtype)
        if self.choice.share_GK is not None:
            mixed_GK = self.choice.share_GK
            share_GK = mixed_GK if self.choice.soft else straight_through(share_GK, mixed_GK)
        return (scale_MGK * share_GK).sum(-1).index_select(1, self.label_C)

    def extra_repr(self) -> str:
        return f"channels={len(self.label_C)}, groups={len(self.error_GK)}"


def straight_through(taken: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`taken` in value, `share` in gradient."""
    return taken + (share - share.detach())


class SharedInput:
    """The quantizer of a tensor that several Linears read one after the other: it quantizes the tensor once.

    What it made is held until the last of the readers has come, or another tensor does; never longer, so that
    gradient checkpointing saves what it should.
    """

    def __init__(self, quantizer: Callable[[torch.Tensor], torch.Tensor], readers: int, tap: int = 0) -> None:
        self.quantizer, self.readers = quantizer, readers
        self.tap, self.turn = tap, 0  # tokens of a sample that are kept for the rate, from another one on every turn
        self.tapped_BTC: torch.Tensor | None = None
        self.open = True  # whether x is kept: not when checkpointing computes it again, whose graph nobody would free
        self._key: tuple[Any, ...] | None = None
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        self._left = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> the same shape."""
        version = 0 if x.is_inference() else x._version
        place = (x.data_ptr(), x.shape, x.stride())  # of memory that is not given away while it is held
        key = (*place, version, torch.is_grad_enabled(), id(getattr(self.quantizer, "choice", None)))
        if self._held is None or self._key != key:
            if self.tap and self.open:  # the same of every sample, whatever else is in the batch of a process
                stride = -(-x.shape[-2] // self.tap)
                self.tapped_BTC = x[..., self.turn % stride :: stride, :].clone()  # a view would hold all of x
            quantized = self.quantizer(x.reshape(-1, x.shape[-1])).view_as(x)
            self._held, self._key, self._left = (x, quantized), key, self.readers
        (first, found), self._left = self._held, self._left - 1
        if not self._left:
            self._held = None
        return found if first is x or not x.requires_grad else _Read.apply(found, x)


class _Read(torch.autograd.Function):
    """(what one reader had quantized, the same input as another was given it) -> the former.

    ZeRO-3 gives every module its input as a tensor of its own, and frees the module's weights when a backward pass has
    reached that: here it does, without a gradient, which all goes to what was quantized.
    """

    @staticmethod
    def forward(ctx: Any, quantized: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b. `weight` stays float32 under its old name, `weight_quantizer.*` lies beside it.

    inputs: the quantizer of what it reads, which belongs to the whole model (mico/qat/cmibq/wrap.py). mask: weights
    that a compression pruned, which are and stay exactly zero.
    """

    weight_quantizer: Quantizer
    inputs: SharedInput
    keep_RC: torch.Tensor | None
    pattern: tuple[int, int] | None

    @classmethod
    def of(
        cls, linear: nn.Linear, weight_quantizer: Quantizer, inputs: SharedInput, mask: Mask | None = None
    ) -> QuantLinear:
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight = nn.Parameter(linear.weight.detach().float(), linear.weight.requires_grad)
        if linear.bias is None:
            made.bias = None
        else:
            made.bias = nn.Parameter(linear.bias.detach().float(), linear.bias.requires_grad)
        made.weight_quantizer, made.inputs = weight_quantizer, inputs
        made.register_buffer("keep_RC", None if mask is None else mask.keep_RC.bool(), persistent=False)
        made.pattern = None if mask is None else mask.pattern
        return made.train(linear.training)

    def quantized(self) -> torch.Tensor:
        """The weight that the forward pass uses, float32 (R, C)."""
        return self._masked(self.weight_quantizer(self.weight))

    def _masked(self, weight_RC: torch.Tensor) -> torch.Tensor:
        return weight_RC if self.keep_RC is None else weight_RC * self.keep_RC

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., R), in the dtype of x or of autocast."""
        return self.with_weight(x, self.weight)

    def with_weight(self, x: torch.Tensor, weight_RC: torch.Tensor) -> torch.Tensor:
        """As `forward`, had the Linear this weight."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(self.inputs(x), self._masked(self.weight_quantizer(weight_RC)).to(x.dtype), bias)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """The packed form, which dequantizes to `quantized()` bit for bit. For widths that are chosen for good."""
        quantizer, choice = self.weight_quantizer, self.weight_quantizer.choice
        assert choice is not None and not choice.soft, "harden first"
        steps = quantizer.steps().only(choice.chosen_G)
        scale_RC, _, half_1C = steps.width(0)
        # The level nearest to w / s: s q / s is q but for the last bit, and q is a half-integer.
        level_RC = quantize(self.weight, steps) / scale_RC
        codes_RC = self._masked((level_RC + half_1C).round().to(torch.uint8))
        bits_G = tuple(BITS[k] for k in choice.chosen_G.tolist())
        scale_RG = steps.scale_MGK[..., 0].to(torch.float16)
        return QuantizedWeight(codes_RC, scale_RG, None, None, bits_G, quantizer.label_C, self.keep_RC, self.pattern)
