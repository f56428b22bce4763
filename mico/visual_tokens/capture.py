"""Queries and keys seen in passing, by hooks on the modules that make them: whatever their Linears are, sdpa stays.

Suffixes: B batch, N tokens, P images or tiles, T tokens of the vision tower, K key heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mico.errors import UserError
from mico.visual_tokens.evidence import Heads


class Watch:
    """Keeps the last outputs of a layer's query and key modules while it is entered."""

    def __init__(self, attention: nn.Module, names: tuple[str, str]) -> None:
        self.attention = attention
        self.made: dict[str, torch.Tensor] = {}
        self._names = names
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for name in self._names:
            self._handles.append(getattr(self.attention, name).register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
            self.made[name] = output.detach()

        return hook

    def pair(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, (B, heads, N, width)."""
        query, key = (self.made[name] for name in self._names)
        batch, tokens = query.shape[:2]
        return tuple(x.reshape(batch, tokens, -1, width).transpose(1, 2) for x in (query, key))  # type: ignore[return-value]


def query_names(attention: nn.Module, where: str) -> tuple[str, str]:
    """The modules whose outputs are queries and keys before RoPE. Raises UserError where there are none."""
    for names in (("q_norm", "k_norm"), ("q_proj", "k_proj")):  # Qwen3 norms what it projects
        if all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
            return names
    raise UserError(
        f"{where}: {type(attention).__name__} has no q_proj and k_proj: only method 'cls', 'random' or 'oracle' works"
    )


def rotated_heads(watch: Watch, rope: tuple[torch.Tensor, torch.Tensor]) -> Heads:
    """What a decoder layer attended with, after RoPE in its dtype (Llama's: the halves of a head form the pairs)."""
    attention: Any = watch.attention
    queries, keys = watch.pair(attention.head_dim)
    return Heads(turned(queries, rope), turned(keys, rope), attention.scaling)


def turned(heads_BHNd: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys with their RoPE, whose cos and sin are (B, N, d), on any device: layers may lie on several."""
    cos, sin = (part[:, None].to(heads_BHNd.device) for part in rope)
    first, second = heads_BHNd.chunk(2, -1)
    return heads_BHNd * cos + torch.cat((-second, first), -1) * sin


@contextmanager
def watching_cls(tower: nn.Module, feature_layer: int | list[int]) -> Iterator[Watch]:
    """Watches the last layer of the vision tower whose output the projector sees. Raises UserError without a CLS."""
    towers = [module for module in tower.modules() if hasattr(module, "class_embedding")]
    layers = [
        module
        for name, module in tower.named_modules()
        if name.endswith("encoder.layers") and isinstance(module, nn.ModuleList)
    ]
    if not towers or len(layers) != 1:
        raise UserError(f"{type(tower).__name__}: no CLS token in this vision tower: method 'cls' needs one")
    chosen = feature_layer if isinstance(feature_layer, int) else feature_layer[-1]
    depth = len(layers[0])
    index = (chosen if chosen >= 0 else depth + 1 + chosen) - 1  # hidden states begin with the embeddings
    attention: Any = layers[0][max(0, index)].self_attn
    with Watch(attention, query_names(attention, "vision tower")) as watch:
        yield watch


def cls_attention(watch: Watch) -> torch.Tensor:
    """Attention of CLS to all tokens of its picture, mean over heads, (P, T) float32."""
    attention: Any = watch.attention
    queries, keys = watch.pair(attention.head_dim)
    scaling = getattr(attention, "scale", None) or 1 / math.sqrt(attention.head_dim)
    logits = queries[:, :, :1].float() @ keys.float().transpose(2, 3) * scaling
    return logits.softmax(-1).mean(1)[:, 0]


def cls_of_visual_tokens(model: Any, scores_PT: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
    """The CLS attention in the order of the image tokens, (all visual tokens of the batch,).

    LLaVA-NeXT arranges, unpads and breaks the tiles into lines: its own function does so here. A line break, which no
    patch stands behind, scores 0.
    """
    if model.config.vision_feature_select_strategy == "default":
        scores_PT = scores_PT[:, 1:]
    if not hasattr(model, "pack_image_features"):
        return scores_PT.reshape(-1)
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    assert image_sizes is not None
    config = model.config
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]
    features, _ = model.pack_image_features(
        list(torch.split(scores_PT[..., None], tiles)), image_sizes, config.vision_feature_select_strategy,
        image_newline=scores_PT.new_zeros(1),
    )  # fmt: skip
    return torch.cat(features).reshape(-1)
