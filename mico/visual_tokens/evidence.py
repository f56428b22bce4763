"""What a scorer may look at. THE place to extend: a scorer is a function Evidence -> scores_BV, see methods.py.

Suffixes: B batch, N tokens present (left-padded), V visual tokens, Q tokens of the question, R rows of attention,
H heads, K key heads, D channels, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mico.visual_tokens.scoring import attention_rows, gather_rows, packed


@dataclass(frozen=True)
class Heads:
    """Queries and keys of the layer whose output is pruned, with their RoPE applied."""

    queries_BHNd: torch.Tensor
    keys_BKNd: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Evidence:
    """One pruning of one batch. Rows of samples with fewer tokens are padded; `real_BV` and `asked_BQ` tell.

    layer: 0-based, its output is pruned (-1: the embeddings before the first layer); stage: how many prunings before.
    hidden_BND: that output. embeddings_BND: the input embeddings of the same tokens, which are the projector's output
    at visual tokens (of a merged token: the mean of its members).
    positions_BN: position ids. seen_BN: no padding.
    visual_BV, question_BQ: columns of N. The question is the text of the prompt behind the last visual token, without
    generated tokens and answers.
    original_BV: index of a visual token among those of its sample, -1 for a merged one.
    at_start: how many each sample had before the first pruning.
    rater_BQ: the text tokens that SparseVLM lets judge, chosen once on the embeddings.
    heads: queries and keys, for methods that need attention.
    inverse_frequency: of RoPE, (d / 2,).
    cls_BV: attention from CLS in the vision tower, for methods that need it (0 at merged tokens).
    seeds: one a sample, from the settings' seed and the ids of its prompt.
    language, ahead: the language model, and how many of its layers a method looks ahead (lookahead.py).
    positions_of: what the caller gave as `positions`, the answer of an oracle.
    """

    stage: int
    layer: int
    hidden_BND: torch.Tensor
    embeddings_BND: torch.Tensor
    positions_BN: torch.Tensor
    seen_BN: torch.Tensor
    visual_BV: torch.Tensor
    real_BV: torch.Tensor
    original_BV: torch.Tensor
    at_start: tuple[int, ...]
    question_BQ: torch.Tensor
    asked_BQ: torch.Tensor
    rater_BQ: torch.Tensor
    inverse_frequency: torch.Tensor
    seeds: tuple[int, ...]
    language: Any = None
    ahead: int = 0
    heads: Heads | None = None
    cls_BV: torch.Tensor | None = None
    positions_of: Callable[[int], Iterable[int]] | None = None

    @property
    def visual_hidden_BVD(self) -> torch.Tensor:
        return gather_rows(self.hidden_BND, self.visual_BV)

    @property
    def question_hidden_BQD(self) -> torch.Tensor:
        return gather_rows(self.hidden_BND, self.question_BQ)

    @property
    def visual_features_BVD(self) -> torch.Tensor:
        """The projector's output."""
        return gather_rows(self.embeddings_BND, self.visual_BV)

    @property
    def question_embeddings_BQD(self) -> torch.Tensor:
        return gather_rows(self.embeddings_BND, self.question_BQ)

    def raters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the raters (B, R), and which of them are real."""
        chosen_BR, real_BR = packed(self.rater_BQ)
        return self.question_BQ.gather(1, chosen_BR), real_BR

    def last_of_question(self) -> torch.Tensor:
        """Column of the last token of the question, (B, 1)."""
        return self.question_BQ.gather(1, self.asked_BQ.sum(1, keepdim=True).clamp_min(1) - 1)

    def attention_to_visual(self, rows_BR: torch.Tensor) -> torch.Tensor:
        """Attention of the tokens in columns `rows_BR` to the visual ones, (B, H, R, V) float32; 0 where not real."""
        assert self.heads is not None, "a method that uses attention says so in its `needs`"
        heads, width = self.heads.queries_BHNd.shape[1], self.heads.queries_BHNd.shape[-1]
        index = rows_BR[:, None, :, None].expand(-1, heads, -1, width)
        all_BHRN = attention_rows(
            self.heads.queries_BHNd.gather(2, index), self.heads.keys_BKNd, rows_BR, self.seen_BN, self.heads.scaling
        )
        index = self.visual_BV[:, None, None].expand(-1, heads, rows_BR.shape[1], -1)
        return all_BHRN.gather(3, index) * self.real_BV[:, None, None]

    def distance_to_visual(self, rows_BR: torch.Tensor) -> torch.Tensor:
        """Difference of the position ids, (B, R, V)."""
        positions = self.positions_BN
        return positions.gather(1, rows_BR)[..., None] - positions.gather(1, self.visual_BV)[:, None]
