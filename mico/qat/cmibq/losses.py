"""The alignment loss of stage 2: pictures, as the quantized projector leaves them, near the text that asks about them.

InfoNCE in both directions over the batches of all processes. A pair counts as a negative only where neither the text
nor the picture is that of the row: several questions about one picture, and one question about several pictures, are
no contradiction. Suffixes: B pairs of this process, A pairs of all processes, T tokens, D channels, E of the heads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.nn import functional

WIDTH = 256
START, SMALLEST, LARGEST = math.log(1 / 0.07), 0.0, math.log(100)  # of the logit scale


class Aligned(NamedTuple):
    """The loss; how often the nearest text of a picture (v2t), picture of a text (t2v), is its own; temperature."""

    loss: torch.Tensor
    acc_v2t: torch.Tensor
    acc_t2v: torch.Tensor
    temperature: torch.Tensor


class Alignment(nn.Module):
    """Heads and temperature of the loss. vision_channels: of the projector; text_channels: of the teacher's states."""

    def __init__(self, vision_channels: int, text_channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the same heads in every process
            torch.manual_seed(0)
            self.vision_head = nn.Linear(vision_channels, WIDTH, bias=False)
            self.text_head = nn.Linear(text_channels, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([START]))  # DeepSpeed takes no scalars

    def forward(
        self, vision_BD: torch.Tensor, text_BD: torch.Tensor, text_key_B: torch.Tensor,
        image_key_B: torch.Tensor | None = None,
    ) -> Aligned:  # fmt: skip
        """The loss of the pairs of all processes, the same in each of them; gradients reach every process's own pairs.

        text_BD is detached: the teacher is not trained. text_key_B, image_key_B: see `keys`; equal ones name equal
        texts, or pictures.
        """
        with torch.no_grad():
            self.logit_scale.clamp_(SMALLEST, LARGEST)
        vision_AE = centered(gather(self.vision_head(vision_BD).float()))
        text_AE = centered(gather(self.text_head(text_BD.detach()).float()))
        same_AA = _equal(gather(text_key_B))
        if image_key_B is not None:
            same_AA = same_AA | _equal(gather(image_key_B))
        logits_AA = self.logit_scale.exp() * vision_AE @ text_AE.T
        own_AA = torch.eye(len(logits_AA), dtype=torch.bool, device=logits_AA.device)
        logits_AA = logits_AA.masked_fill(same_AA & ~own_AA, -math.inf)
        target_A = torch.arange(len(logits_AA), device=logits_AA.device)
        loss = (functional.cross_entropy(logits_AA, target_A) + functional.cross_entropy(logits_AA.T, target_A)) / 2
        v2t, t2v = ((logits.detach().argmax(-1) == target_A).float().mean() for logits in (logits_AA, logits_AA.T))
        return Aligned(loss, v2t, t2v, (-self.logit_scale.detach()).exp().squeeze())


def centered(states_AE: torch.Tensor) -> torch.Tensor:
    """Unit vectors from the mean of all pairs to each.

    What all pictures have in common is most of their mean tokens, and would make all cosines nearly 1.
    """
    return functional.normalize(states_AE - states_AE.mean(0), dim=-1)


def _equal(key_A: torch.Tensor) -> torch.Tensor:
    return key_A[:, None] == key_A[None]


def pooled(states_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean state of the tokens that the mask names, (B, D), in float32. Raises ValueError for a row without any."""
    counts_B = mask_BT.sum(1)
    if not bool((counts_B > 0).all()):
        raise ValueError(f"row {int((counts_B == 0).nonzero()[0])} of the batch has no token to pool")
    weight_BT = mask_BT.float() / counts_B[:, None]
    return torch.einsum("btd,bt->bd", states_BTD.float(), weight_BT)


def keys(rows: Iterable[bytes]) -> torch.Tensor:
    """A whole number for every row of bytes (token ids, pixels), equal for equal rows in every process."""
    digests = [hashlib.blake2b(row, digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def text_keys(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Keys of the token ids that the mask names, on the device of the ids."""
    rows = [ids[mask.bool()].cpu().long().numpy().tobytes() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
    return keys(rows).to(ids_BT.device)


# --- several processes ----------------------------------------------------------------------------------------------


def gather(values: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in the order of their ranks; gradients flow back to the rows of each. Processes may hold
    different numbers of rows. Without processes: `values`."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return values
    return _Gather.apply(values)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        world = distributed.get_world_size()
        counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world)]
        distributed.all_gather(counts, torch.tensor([len(values)], device=values.device))
        sizes = [int(count) for count in counts]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(parts, padded)
        rank = distributed.get_rank()
        ctx.here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        # Every process has the whole loss, and DistributedDataParallel takes the mean over them: so the sum here.
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total[ctx.here]
