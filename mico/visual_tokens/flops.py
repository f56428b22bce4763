"""Floating point operations of a prefill in the language model. One multiplication with its addition counts as two.

Attention is counted in full, as the field does (a causal kernel may skip half of it). Vision tower, projector and head
do not depend on pruning and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What a decoder layer of Llama's form computes with."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From the config of a language model."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.hidden_size, config.intermediate_size, heads, key_heads, head_dim)

    def projections(self, tokens: int) -> int:
        """q, k, v and o of one layer."""
        return 2 * tokens * self.hidden * self.head_dim * (2 * self.heads + 2 * self.key_heads)

    def attention(self, queries: int, keys: int) -> int:
        """Scores and weighted sum of one layer."""
        return 4 * queries * keys * self.heads * self.head_dim

    def mlp(self, tokens: int) -> int:
        """gate, up and down of one layer."""
        return 6 * tokens * self.hidden * self.intermediate

    def layer(self, tokens: int) -> int:
        return self.projections(tokens) + self.attention(tokens, tokens) + self.mlp(tokens)

    def scoring(self, raters: int, keys: int) -> int:
        """The attention of the raters that a pruning computes once more, without its weighted sum."""
        return 2 * raters * keys * self.heads * self.head_dim


def prefill_flops(shape: Shape, tokens: Sequence[int]) -> int:
    """Of a prefill that processes tokens[i] tokens in layer i."""
    return sum(shape.layer(count) for count in tokens)
