"""Recycling of pruned tokens (SparseVLM V1): the best of them are clustered, each cluster lives on as its mean.

DPC-kNN: density peaks clustering (Rodriguez and Laio, Science 2014) with the density from the nearest neighbours.
Suffixes: M tokens to cluster, K clusters, D channels.
"""

from __future__ import annotations

import torch


def clusters(tokens_MD: torch.Tensor, count: int) -> torch.Tensor:
    """Cluster of every token, (M,) in 0 … count - 1; every cluster has at least one token.

    density = exp(-mean squared distance to the `count` nearest, itself included), distances over sqrt(D);
    a token's separation is the distance to the nearest denser one, the farthest distance of all for the densest.
    Centres are the tokens with the largest density x separation. Equal densities: the earlier token is the denser.
    """
    size, channels = tokens_MD.shape
    assert 0 < count <= size
    tokens_MD = tokens_MD.float()
    distance_MM = torch.cdist(tokens_MD, tokens_MD, compute_mode="donot_use_mm_for_euclid_dist") / channels**0.5
    density_M = (-distance_MM.topk(count, largest=False).values.square().mean(1)).exp()
    order_M = torch.arange(size, device=tokens_MD.device)
    equal_MM = density_M[None] == density_M[:, None]
    denser_MM = (density_M[None] > density_M[:, None]) | (equal_MM & (order_M[None] < order_M[:, None]))
    separation_M = torch.where(denser_MM, distance_MM, distance_MM.max()).min(1).values
    centre_K = (density_M * separation_M).topk(count).indices
    label_M = distance_MM[:, centre_K].argmin(1)
    label_M[centre_K] = torch.arange(count, device=label_M.device)  # of equal tokens each centre keeps its own cluster
    return label_M


def cluster_means(values_MD: torch.Tensor, label_M: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the values of every cluster, (count, D)."""
    member_KM = torch.nn.functional.one_hot(label_M, count).T.float()
    return ((member_KM @ values_MD.float()) / member_KM.sum(1, keepdim=True)).to(values_MD.dtype)
