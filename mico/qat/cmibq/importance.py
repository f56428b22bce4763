"""How much the loss depends on a group of channels, and on every width it could take: measured in backward passes.

importance = E[(x dL/dx)^2], the squared effect of losing a value, by first order; distortion = sum over a batch of
(dL/dx (Q_k(x) - x))^2, that of quantizing the values of a group: the diagonal empirical Fisher information times the
squared error. Both are moving averages over batches, and detached. Suffixes: N rows of values, C channels, G groups,
K widths, I groups of all sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn

DECAY = 0.98  # of the averages, a batch: about the last fifty count


class Meter(nn.Module):
    """Averages of one quantizer's groups; `levels.Watch` calls it in the backward pass.

    even: all batches since the last `reset` count alike, else later ones more. counts: whether they count at all.
    """

    importance_G: torch.Tensor
    distortion_GK: torch.Tensor
    batches: torch.Tensor
    label_C: torch.Tensor

    def __init__(self, label_C: torch.Tensor, groups: int, widths: int) -> None:
        super().__init__()
        self.register_buffer("label_C", label_C, persistent=False)
        self.register_buffer("importance_G", torch.zeros(groups))
        self.register_buffer("distortion_GK", torch.zeros(groups, widths))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.even, self.counts = False, True

    @torch.no_grad()
    def forward(self, x_NC: torch.Tensor, gradient_NC: torch.Tensor, squares_GK: torch.Tensor) -> None:
        """Add one batch. The first ones are averaged evenly, so that nothing remains of the zeros at the start."""
        if not self.counts:
            return
        self.batches += 1
        share = 1 / self.batches if self.even else torch.clamp_min(1 / self.batches, 1 - DECAY)
        effect_C = (x_NC.float() * gradient_NC.float()).square().mean(0)
        sizes_G = torch.bincount(self.label_C, minlength=len(self.importance_G))
        effect_G = torch.zeros_like(self.importance_G).index_add_(0, self.label_C, effect_C) / sizes_G
        self.importance_G.lerp_(effect_G, share)
        self.distortion_GK.lerp_(squares_GK.float(), share)

    def reset(self) -> None:
        """Forget: what comes is measured afresh."""
        self.importance_G.zero_(), self.distortion_GK.zero_(), self.batches.zero_()


def average_over_ranks(meters: Sequence[Meter]) -> None:
    """The same averages in every process: their means, by the batches that each has seen. One call of the network."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    parts = [part for meter in meters for part in (meter.importance_G, meter.distortion_GK)]
    batches = meters[0].batches.to(parts[0].dtype)  # of all alike
    flat = torch.cat([batches.reshape(1), *(part.reshape(-1) * batches for part in parts)])
    distributed.all_reduce(flat)
    means = (flat[1:] / flat[0].clamp_min(1)).split([part.numel() for part in parts])
    for part, values in zip(parts, means, strict=True):
        part.copy_(values.view_as(part))
    for meter in meters:
        meter.batches.clamp_min_(1)  # it knows what the others have seen


def share_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes those of the first, in place: what GPUs add up in an order of their own may differ."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def normalized(importance_I: torch.Tensor, modality_I: torch.Tensor) -> torch.Tensor:
    """Importance over the mean of its modality: gradients of pictures and of text differ more than tenfold.

    modality_I: whole numbers. A modality without any importance yet gets 1 everywhere.
    """
    count = int(modality_I.max()) + 1
    sums = importance_I.new_zeros(count).index_add_(0, modality_I, importance_I)
    means = sums / torch.bincount(modality_I, minlength=count).clamp_min(1)
    mean_I = means[modality_I]
    return torch.where(mean_I > 0, importance_I / mean_I.clamp_min(torch.finfo(importance_I.dtype).tiny), 1.0)
