"""The loop over the layers of the language model, with prunings between them.

The layers between two prunings are a segment: they see the same tokens, share one causal mask and one RoPE, and hold
caches of one length. While decoding every segment appends the new tokens to its own mask. The modules are called as
they are: attention kernels, packed and trained Linears stay what they are.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mico.visual_tokens.capture import Watch, query_names, rotated_heads
from mico.visual_tokens.pruning import Rules, start
from mico.visual_tokens.tokens import Prompt, Tokens
from mico.visual_tokens.trace import Trace


@dataclass
class Segment:
    """Layers first … last, the tokens they hold, and by how much their position ids lag behind the input's."""

    first: int
    last: int
    seen_BN: torch.Tensor
    lag_B1: torch.Tensor


@dataclass
class Cached:
    """What belongs to a cache that was filled under pruning: its segments, and how many columns were given so far."""

    segments: list[Segment]
    length: int


def run_layers(
    language: Any, hidden: torch.Tensor, segment: Segment, position: torch.Tensor, cache: Any, options: dict[str, Any]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One segment; its hidden states, and the RoPE that it used.

    Position ids are not handed to the layers, which get their RoPE: kernels read gaps in them as several sequences.
    """
    from transformers.masking_utils import create_causal_mask

    mask = create_causal_mask(
        config=language.config, inputs_embeds=hidden, attention_mask=segment.seen_BN, past_key_values=cache,
        layer_idx=segment.first,
    )  # fmt: skip
    rope = language.rotary_emb(hidden, position_ids=position)
    for layer in language.layers[segment.first : segment.last + 1]:
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache, use_cache=cache is not None,
            **options,
        )  # fmt: skip
    return hidden, rope


def decode(
    language: Any, hidden: torch.Tensor, seen_BN: torch.Tensor, position: torch.Tensor, cache: Any, cached: Cached,
    options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """New tokens behind a pruned cache: each segment with its own mask and positions."""
    for segment in cached.segments:
        segment.seen_BN = torch.cat((segment.seen_BN, seen_BN.to(segment.seen_BN.device)), 1)
        here = position - segment.lag_B1.to(position.device)
        hidden, _ = run_layers(language, hidden, segment, here, cache, options)
    cached.length += seen_BN.shape[1]
    return hidden


def prefill(
    language: Any, rules: Rules, tokens: Tokens, prompt: Prompt, cache: Any, options: dict[str, Any]
) -> tuple[torch.Tensor, Trace, Cached]:
    """The whole prompt. Hidden states behind the last layer at the input's columns (B, L, D), before the final norm;
    zeros at pruned tokens."""
    length = tokens.seen_BN.shape[1]
    run = start(language, rules, tokens, prompt)
    layers = next(schedule.layers for schedule in run.schedules if schedule)
    segments: list[Segment] = []
    last_B1, first = tokens.last_position(), 0
    for stage, last in enumerate((*layers, len(language.layers) - 1)):
        pruning = stage < len(layers)
        watched = pruning and "attention" in rules.method.needs
        attention = language.layers[max(0, last)].self_attn
        with Watch(attention, query_names(attention, f"layer {last}")) if watched else nullcontext() as watch:
            if last >= first:
                now = run.tokens
                segment = Segment(first, last, now.seen_BN, last_B1 - now.last_position().to(last_B1.device))
                hidden, rope = run_layers(language, now.hidden_BND, segment, now.position_BN, cache, options)
                run.tokens = now.at(hidden)
                segments.append(segment)
                run.trace.visual.extend([now.visual_BN.sum(1).tolist()] * (last + 1 - first))
        if pruning:
            with torch.no_grad():
                heads = rotated_heads(watch, rope) if watch is not None else None
            run.prune(stage, last, heads)
        first = last + 1
    hidden = run.tokens.spread(run.tokens.hidden_BND, length)
    return hidden, run.trace, Cached(segments, length)
