"""Experts that saw too few tokens for a Hessian: what a method is given instead. Suffixes: C channels, T tokens.

T tokens span at most T of C directions. Below an eighth of them compensation would mostly follow noise, so every
channel is weighed by its own energy alone and the target is the dense weight. Without any token all channels weigh
the same, which makes each method round to nearest.
"""

from __future__ import annotations

import torch

from mico.channels.meters import PairedMoments, SecondMoments

CHANNELS_A_TOKEN = 8  # a Hessian is trusted from a token for so many channels on


def is_starved(moments: SecondMoments) -> bool:
    """Whether the tokens behind these moments are too few for their off-diagonal elements to be used."""
    return moments.count * CHANNELS_A_TOKEN < len(moments.sum_C)


def trusted(moments: SecondMoments) -> SecondMoments:
    """The moments themselves, their diagonal, or those of independent channels of equal energy."""
    if not is_starved(moments):
        return moments
    gram_CC = moments.gram_CC
    if moments.count == 0:
        return SecondMoments(moments.sum_C, torch.eye(len(gram_CC), dtype=gram_CC.dtype, device=gram_CC.device), 2)
    return SecondMoments(torch.zeros_like(moments.sum_C), gram_CC.diagonal().diag(), moments.count)


def trusted_pair(paired: PairedMoments) -> PairedMoments:
    """The same of paired moments; where they are not trusted, both paths read the same, so that the target is W."""
    total = paired.total
    if not is_starved(total):
        return paired
    found = PairedMoments(paired.channels, paired.device)
    found.fit = found.held = trusted(total)
    found.fit_cross_CC = found.held_cross_CC = found.fit.gram_CC
    found.fit_dense_sum_C = found.held_dense_sum_C = found.fit.sum_C
    return found


def note(moments: SecondMoments, block: int, expert: int) -> str | None:
    """How an expert was treated, for the report; None where it went by the book."""
    if not is_starved(moments):
        return None
    who, channels = f"block {block}, expert {expert}: {moments.count} tokens", len(moments.sum_C)
    if moments.count == 0:
        return f"{who}, rounded to nearest"
    return f"{who} for {channels} channels, each weighed alone"
