"""Where the question will look: its tokens run ahead through the next layers, over visual tokens that stand still.

What a question needs shows in layers behind the one that prunes: in early layers its words have not yet found one
another. The few text tokens pass through the coming layers as they are; the many visual ones keep their hidden states
and only give keys and values there, a sixth of a layer's work or less (a 25th with 8 key heads of 32).

Suffixes: B batch, N tokens present, T text tokens, V visual tokens, Q tokens of the question, H heads, K key heads,
D channels, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mico.errors import UserError
from mico.visual_tokens.capture import Watch, query_names, turned
from mico.visual_tokens.flops import Shape
from mico.visual_tokens.scoring import gather_rows, packed

if TYPE_CHECKING:
    from mico.visual_tokens.evidence import Evidence


def looked_at(evidence: Evidence, layers: int) -> Iterator[torch.Tensor]:
    """Yield attention of the question's tokens to the visual ones in each of the next `layers` layers, (B, H, Q, V).

    In float32; fewer where the model ends before. Rows and columns that are not real are 0.
    """
    from transformers import DynamicCache

    language, first = evidence.language, evidence.layer + 1
    kernel = str(language.config._attn_implementation)
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            f"attention {kernel!r}: looking ahead needs a mask: load the model with attn_implementation='sdpa'"
        )
    text_BN = evidence.seen_BN & ~torch.zeros_like(evidence.seen_BN).scatter(1, evidence.visual_BV, evidence.real_BV)
    text_BT, spoken_BT = packed(text_BN)
    columns_BS = torch.cat((evidence.visual_BV, text_BT), 1)
    positions_BS = evidence.positions_BN.gather(1, columns_BS)
    real_BS = torch.cat((evidence.real_BV, spoken_BT), 1)
    visual = evidence.visual_BV.shape[1]
    allowed_BTS = (columns_BS[:, None] <= text_BT[..., None]) & real_BS[:, None]
    hidden_BVD, hidden_BTD = evidence.visual_hidden_BVD, gather_rows(evidence.hidden_BND, text_BT)
    mask = torch.zeros(allowed_BTS.shape, dtype=hidden_BTD.dtype, device=hidden_BTD.device)
    mask = mask.masked_fill(~allowed_BTS, torch.finfo(mask.dtype).min)[:, None]
    cos, sin = language.rotary_emb(hidden_BTD, position_ids=positions_BS)
    asked_BQ = (text_BT[:, None] == evidence.question_BQ[..., None]).int().argmax(2)  # place among the text tokens
    allowed_BQS = allowed_BTS.gather(1, asked_BQ[..., None].expand(-1, -1, allowed_BTS.shape[2]))
    real_BQV = evidence.asked_BQ[..., None] & evidence.real_BV[:, None]
    cache = DynamicCache(config=language.config)
    for index in range(first, min(first + layers, len(language.layers))):
        layer = language.layers[index]
        device = next(layer.input_layernorm.parameters()).device if hasattr(layer, "input_layernorm") else cos.device
        cos, sin, mask, hidden_BTD = (x.to(device) for x in (cos, sin, mask, hidden_BTD))
        keys, values = _keys_and_values(layer, hidden_BVD.to(device), (cos[:, :visual], sin[:, :visual]), index)
        cache.update(keys, values, index)
        rope = cos[:, visual:], sin[:, visual:]
        with Watch(layer.self_attn, query_names(layer.self_attn, f"layer {index}")) as watch, _keeping_caches(layer):
            hidden_BTD = layer(hidden_BTD, attention_mask=mask, position_embeddings=rope, past_key_values=cache)
        queries, text_keys = (turned(x, rope) for x in watch.pair(layer.self_attn.head_dim))
        rows = asked_BQ[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1]).to(device)
        every = torch.cat((keys, text_keys), 2)
        attention = _attention(queries.gather(2, rows), every, allowed_BQS.to(device), layer.self_attn.scaling)
        yield attention[..., :visual].to(real_BQV.device) * real_BQV[:, None]


@contextmanager
def _keeping_caches(layer: Any) -> Iterator[None]:
    """Gradient checkpointing, which takes a layer's cache away, is for layers in training only."""
    training, layer.training = layer.training, False  # of this module, not of those inside
    try:
        yield
    finally:
        layer.training = training


def _keys_and_values(layer: Any, hidden_BVD: torch.Tensor, rope: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    attention = layer.self_attn
    if not all(hasattr(attention, name) for name in ("k_proj", "v_proj")) or not hasattr(layer, "input_layernorm"):
        raise UserError(f"layer {index}: {type(layer).__name__} is not built like Llama's: use another --token-method")
    normed = layer.input_layernorm(hidden_BVD)
    batch, visual, _ = normed.shape
    split = (batch, visual, -1, attention.head_dim)
    keys = attention.k_proj(normed).view(split)
    if query_names(attention, f"layer {index}") == ("q_norm", "k_norm"):
        keys = attention.k_norm(keys)
    return turned(keys.transpose(1, 2), rope), attention.v_proj(normed).view(split).transpose(1, 2)


def _attention(
    queries_BHQd: torch.Tensor, keys_BKSd: torch.Tensor, allowed_BQS: torch.Tensor, scaling: float
) -> torch.Tensor:
    batch, heads, rows, channels = queries_BHQd.shape
    key_heads, tokens = keys_BKSd.shape[1:3]
    grouped = queries_BHQd.float().reshape(batch, key_heads, -1, channels)  # heads that share keys are neighbours
    logits = (grouped @ keys_BKSd.float().transpose(2, 3)).reshape(batch, heads, rows, tokens) * scaling
    return logits.masked_fill(~allowed_BQS[:, None], -torch.inf).softmax(-1).nan_to_num()


def lookahead_flops(shape: Shape, layers: int, text: int, visual: int) -> int:
    """Of `looked_at`: keys and values of the visual tokens, the text tokens' layers, the question's scores again."""
    projected = 4 * visual * shape.hidden * shape.head_dim * shape.key_heads
    ahead = shape.projections(text) + shape.mlp(text) + shape.attention(text, text + visual)
    return layers * (projected + ahead + shape.scoring(text, text + visual))
