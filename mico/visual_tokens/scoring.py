"""What makes a visual token worth keeping: pure functions of tensors, free of models.

Suffixes: B batch, N tokens present, V visual tokens, Q tokens of the question, R raters, H heads, K key heads,
D channels, d channels of a head. Where samples have unequal numbers, rows are padded and a mask tells which are real.
"""

from __future__ import annotations

import math

import torch

GRAVITY_FLOOR = 0.05  # of the gravity at distance 0; below 1600 tokens and 128 channels a head nothing reaches it
RANK_TOLERANCE = 0.01  # of the largest singular value: what is below adds nothing to a rank


def gather_rows(values_BND: torch.Tensor, columns_BK: torch.Tensor) -> torch.Tensor:
    """values_BND at the columns of each sample, (B, K, D)."""
    return values_BND.gather(1, columns_BK[..., None].expand(-1, -1, values_BND.shape[-1]))


def packed(mask_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns where the mask is true, in order and padded to the most of any sample, and which of them are real."""
    count_B = mask_BN.sum(1)
    columns_BK = (~mask_BN).int().argsort(dim=1, stable=True)[:, : int(count_B.max())]
    return columns_BK, torch.arange(columns_BK.shape[1], device=mask_BN.device)[None] < count_B[:, None]


def select_raters(
    visual_BVD: torch.Tensor, real_BV: torch.Tensor, text_BQD: torch.Tensor, asked_BQ: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Which text tokens judge the visual ones, (B, Q): those above the mean of mean_v softmax_q(v . q).

    Raw embeddings in, computed in float32. Where none is above the mean (a single token, or all equal) every asked
    token is a rater; the second result counts these samples. SparseVLM, section 3.2.
    """
    similar_BVQ = visual_BVD.float() @ text_BQD.float().transpose(1, 2)
    similar_BVQ = similar_BVQ.masked_fill(~asked_BQ[:, None], -math.inf).softmax(2).nan_to_num()
    real_B1 = real_BV.sum(1, keepdim=True).clamp_min(1)
    mean_BQ = (similar_BVQ * real_BV[..., None]).sum(1) / real_B1
    threshold_B1 = mean_BQ.sum(1, keepdim=True) / asked_BQ.sum(1, keepdim=True).clamp_min(1)
    rater_BQ = (mean_BQ > threshold_B1) & asked_BQ
    none_B1 = ~rater_BQ.any(1, keepdim=True) & asked_BQ.any(1, keepdim=True) & real_BV.any(1, keepdim=True)
    return torch.where(none_B1, asked_BQ, rater_BQ), int(none_B1.sum())


def attention_rows(
    queries_BHRd: torch.Tensor, keys_BKNd: torch.Tensor, rows_BR: torch.Tensor, seen_BN: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention after the causal softmax of some rows alone, (B, H, R, N) in float32.

    rows_BR: columns at which the queries stand; seen_BN: tokens that are no padding. Queries and keys carry their RoPE.
    """
    batch, heads, rows, channels = queries_BHRd.shape
    key_heads, tokens = keys_BKNd.shape[1:3]
    grouped = queries_BHRd.float().reshape(batch, key_heads, -1, channels)  # heads that share keys are neighbours
    logits = (grouped @ keys_BKNd.float().transpose(2, 3)).reshape(batch, heads, rows, tokens) * scaling
    causal_BRN = torch.arange(tokens, device=rows_BR.device) <= rows_BR[..., None]
    hidden_BRN = ~(causal_BRN & seen_BN[:, None])
    return logits.masked_fill(hidden_BRN[:, None], -math.inf).softmax(-1).nan_to_num()


def gravity(distance: torch.Tensor, inverse_frequency: torch.Tensor) -> torch.Tensor:
    """What RoPE alone makes of two vectors of ones at a distance: 2 / sqrt(d) sum_i cos(distance f_i), clamped.

    Near tokens are pulled up and far ones pushed down whatever they hold; SparseVLM+ divides it out (section 4.2). The
    sum is negative from distance 1707 (d = 128) or 91 (d = 16) on, where dividing by it would turn scores around:
    it is clamped at GRAVITY_FLOOR of its value at distance 0.
    """
    strength = torch.cos(distance[..., None].float() * inverse_frequency.float()).sum(-1)
    most = len(inverse_frequency)
    return strength.clamp_min(GRAVITY_FLOOR * most) * 2 / math.sqrt(2 * most)


def best_half_of_heads(attention_BHRV: torch.Tensor, real_BR: torch.Tensor) -> torch.Tensor:
    """The attention of the half of the heads that give visual tokens most, (B, ceil(H / 2), R, V). SparseVLM+ 4.3."""
    mass_BH = (attention_BHRV.sum(-1) * real_BR[:, None]).sum(-1)
    chosen_Bh = mass_BH.topk((attention_BHRV.shape[1] + 1) // 2, dim=1).indices
    return attention_BHRV.gather(1, chosen_Bh[..., None, None].expand(-1, -1, *attention_BHRV.shape[2:]))


def information(attention_BHQV: torch.Tensor, real_BV: torch.Tensor) -> torch.Tensor:
    """Nats that each head's look at the image tells: sum_v p log(n p) over its n real tokens, (B, H, Q), at least 0.

    p is the attention over its sum at visual tokens: 0 for one that looks everywhere alike, log n for one at a single
    token; the Kullback-Leibler divergence from the uniform distribution.
    """
    share_BHQV = attention_BHQV / attention_BHQV.sum(-1, keepdim=True).clamp_min(1e-12)
    count_B = real_BV.sum(1).clamp_min(1)
    return torch.special.xlogy(share_BHQV, share_BHQV * count_B[:, None, None, None]).sum(-1).clamp_min(0)


def mean_over_raters(attention_BHRV: torch.Tensor, real_BR: torch.Tensor) -> torch.Tensor:
    """Mean over heads and real raters, (B, V)."""
    total_BV = (attention_BHRV.mean(1) * real_BR[..., None]).sum(1)
    return total_BV / real_BR.sum(1, keepdim=True).clamp_min(1)


def ranks(attention_BHRV: torch.Tensor, real_BR: torch.Tensor, real_BV: torch.Tensor) -> torch.Tensor:
    """Numerical rank of each sample's rater x visual attention (mean over heads), (B,)."""
    matrix_BRV = attention_BHRV.mean(1) * real_BR[..., None] * real_BV[:, None]
    singular_BS = torch.linalg.svdvals(matrix_BRV)
    return ((singular_BS > RANK_TOLERANCE * singular_BS[:, :1]) & (singular_BS > 0)).sum(1)


def adaptive_count(keep: int, present: int, rank: int, raters: int) -> int:
    """How many of `present` tokens to keep when their attention has `rank`: SparseVLM deletes scale x (present - rank).

    The scale is such that a rank of half the raters keeps what the budget says; 1 … present.
    """
    usual = min(raters / 2, present - 1)
    scale = (present - keep) / (present - usual)
    return max(1, min(present, present - int(scale * (present - rank) + 0.5)))


def random_scores(original_V: torch.Tensor, total: int, seed: int) -> torch.Tensor:
    """Uniform scores, (V,): of `total` tokens the same one scores the same at every stage; merged ones (-1) score 0."""
    drawn = torch.rand(max(1, total), generator=torch.Generator().manual_seed(seed)).to(original_V.device)
    return torch.where(original_V >= 0, drawn[original_V.clamp_min(0)], 0.0)
