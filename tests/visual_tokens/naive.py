"""SparseVLM as the papers tell it: one sample, lists of columns, whole attention matrices of eager layers."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.visual_tokens.test_recycle import naive as naive_clusters
from tests.visual_tokens.tiny import IMAGE


def embedded(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    features = torch.cat(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == IMAGE] = features
    return embeds


def causal(length: int) -> torch.Tensor:
    return torch.full((1, 1, length, length), -torch.inf).triu(1)


def layer_with_attention(language: Any, index: int, x: torch.Tensor, position: list[int]) -> Any:
    """Output of an eager layer and its (H, T, T) attention."""
    layer = language.layers[index]
    rope = language.rotary_emb(x, position_ids=torch.tensor([position]))
    change, attention = layer.self_attn(
        layer.input_layernorm(x), position_embeddings=rope, attention_mask=causal(x.shape[1])
    )
    x = x + change
    return x + layer.mlp(layer.post_attention_layernorm(x)), attention[0]


def raters(embeds: torch.Tensor, visual: list[int], asked: list[int]) -> list[int]:
    similar = (embeds[0, visual] @ embeds[0, asked].T).softmax(1).mean(0)
    return [column for column, mean in zip(asked, similar, strict=True) if mean > similar.mean()]


def scores(
    language: Any, attention: torch.Tensor, rows: list[int], visual: list[int], position: list[int], version: str
):
    """Of each visual token."""
    frequency = language.rotary_emb.inv_freq
    width = 2 * len(frequency)
    heads = []
    for one in attention:
        part = one[rows][:, visual].clone()
        if version == "2.0":
            for i, row in enumerate(rows):
                for j, column in enumerate(visual):
                    pull = sum(2 * math.cos((position[row] - position[column]) * float(f)) for f in frequency)
                    part[i, j] /= max(pull / math.sqrt(width), 0.05 * math.sqrt(width))
        heads.append(part)
    if version == "2.0":
        heads = sorted(heads, key=lambda part: -float(part.sum()))[: (len(heads) + 1) // 2]
    return torch.stack(heads).mean((0, 1))


def sparsevlm(model: Any, ids: torch.Tensor, pixels: torch.Tensor, version: str, keep: dict[int, int]) -> Any:
    """Logits at the last token, and the original indices (-1: merged) left by each pruning.

    keep: {layer: tokens}. model: with eager attention.
    """
    language = model.model.language_model
    embeds = embedded(model, ids, pixels)
    x, position = embeds, list(range(ids.shape[1]))
    visual = (ids[0] == IMAGE).nonzero()[:, 0].tolist()
    original, left = list(range(len(visual))), []
    rows = raters(embeds, visual, list(range(visual[-1] + 1, ids.shape[1])))
    for index in range(len(language.layers)):
        x, attention = layer_with_attention(language, index, x, position)
        if index not in keep:
            continue
        score = scores(language, attention, rows, visual, position, version)
        ranked = sorted(range(len(visual)), key=lambda i: -float(score[i]))
        kept, pruned = sorted(ranked[: keep[index]]), ranked[keep[index] :]
        means = torch.zeros(0, x.shape[-1])
        if version == "1.0" and pruned:
            best = sorted(pruned[: int(len(pruned) * 0.3) + 1])
            count = len(best) // 10 + 1
            values = x[0, [visual[i] for i in best]]
            label = naive_clusters(values.double().tolist(), count)
            means = torch.stack([values[[n for n, c in enumerate(label) if c == one]].mean(0) for one in range(count)])
        start, end = visual[0], visual[-1] + 1
        parts = (x[0, :start], x[0, [visual[i] for i in kept]], means, x[0, end:])
        removed = (end - start) - len(kept) - len(means)
        position = [*position[:start], *(position[visual[i]] for i in kept), *[0] * len(means), *position[end:]]
        if version == "1.0":
            position = list(range(len(position)))
        x = torch.cat(parts)[None]
        visual = list(range(start, start + len(kept) + len(means)))
        original = [original[i] for i in kept] + [-1] * len(means)
        rows = [row - removed for row in rows]
        left.append(original)
    return model.lm_head(language.norm(x[:, -1:])), left
