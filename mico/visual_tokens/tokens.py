"""The tokens that are present between two layers, and how they are laid out anew when some of them go.

Samples may keep unequal numbers: tokens are left-padded to the longest, so that the last column is always the last
token. Suffixes: B batch, L columns of the input, N tokens present, M merged tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from mico.visual_tokens.scoring import gather_rows


@dataclass(frozen=True)
class Prompt:
    """What the ids of a batch tell: visual_BL image tokens; question_BL tokens of the prompt that are not generated."""

    visual_BL: torch.Tensor
    question_BL: torch.Tensor
    ids_BL: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """hidden: at this point; embeddings: at the input; position: ids for RoPE; seen: no padding.

    column: in the input, -1 for merged ones and padding; visual, asked: image tokens, tokens of the question;
    original: index among the sample's visual tokens, -1 for all others; cls: see Evidence.
    """

    hidden_BND: torch.Tensor
    embeddings_BND: torch.Tensor
    position_BN: torch.Tensor
    seen_BN: torch.Tensor
    column_BN: torch.Tensor
    visual_BN: torch.Tensor
    asked_BN: torch.Tensor
    original_BN: torch.Tensor
    cls_BN: torch.Tensor

    @classmethod
    def start(
        cls,
        embeds_BLD: torch.Tensor,
        seen_BL: torch.Tensor,
        position_BL: torch.Tensor,
        prompt: Prompt,
        scores_BL: torch.Tensor | None,
    ) -> Tokens:
        """All tokens of a batch, before the first layer."""
        batch, length = seen_BL.shape
        column_BL = torch.arange(length, device=embeds_BLD.device).expand(batch, -1)
        visual_BL, question_BL = (mask_BL.to(seen_BL.device) for mask_BL in (prompt.visual_BL, prompt.question_BL))
        visual_BL = visual_BL & seen_BL
        last_B1 = torch.where(visual_BL, column_BL, -1).amax(1, keepdim=True)
        asked_BL = question_BL & seen_BL & ~visual_BL & (column_BL > last_B1)
        original_BL = torch.where(visual_BL, visual_BL.cumsum(1) - 1, -1)
        scores_BL = (
            torch.zeros_like(seen_BL, dtype=torch.float32) if scores_BL is None else scores_BL.to(seen_BL.device)
        )
        return cls(
            embeds_BLD, embeds_BLD, position_BL.expand(batch, -1), seen_BL, torch.where(seen_BL, column_BL, -1),
            visual_BL, asked_BL, original_BL, scores_BL,
        )  # fmt: skip

    def at(self, hidden_BND: torch.Tensor) -> Tokens:
        """The same tokens behind a layer, on its device."""
        device = hidden_BND.device
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Tokens(**{**moved, "hidden_BND": hidden_BND})

    def keep(self, kept_BN: torch.Tensor, merged: Tokens | None = None) -> Tokens:
        """The kept tokens in their order, `merged` ones behind the last place of a visual token."""
        place_BN = torch.arange(kept_BN.shape[1], device=kept_BN.device).expand_as(kept_BN)
        everything, valid_BS, place_BS = self, kept_BN, place_BN.float()
        if merged is not None:
            behind_B1 = torch.where(self.visual_BN, place_BN, -1).amax(1, keepdim=True) + 0.5
            everything = self._beside(merged)
            valid_BS = torch.cat((kept_BN, merged.seen_BN), 1)
            place_BS = torch.cat((place_BN.float(), behind_B1.expand_as(merged.seen_BN)), 1)
        length = int(valid_BS.sum(1).max())
        order_BS = torch.where(valid_BS, place_BS, -1.0).argsort(dim=1, stable=True)[:, -length:]
        return everything._take(order_BS, valid_BS.gather(1, order_BS))

    def _beside(self, other: Tokens) -> Tokens:
        names = [field.name for field in fields(self)]
        return Tokens(**{name: torch.cat((getattr(self, name), getattr(other, name)), 1) for name in names})

    def _take(self, order_BN: torch.Tensor, valid_BN: torch.Tensor) -> Tokens:
        def of(values_BN: torch.Tensor, padding: int | bool) -> torch.Tensor:
            return torch.where(valid_BN, values_BN.gather(1, order_BN), padding)

        return Tokens(
            gather_rows(self.hidden_BND, order_BN), gather_rows(self.embeddings_BND, order_BN),
            of(self.position_BN, 0), valid_BN, of(self.column_BN, -1), of(self.visual_BN, False),
            of(self.asked_BN, False), of(self.original_BN, -1), of(self.cls_BN, 0),
        )  # fmt: skip

    def compacted(self, first_B1: torch.Tensor) -> Tokens:
        """Position ids that count on from `first_B1` without gaps."""
        running_BN = (self.seen_BN.cumsum(1) - 1).clamp_min(0)
        return replace(self, position_BN=torch.where(self.seen_BN, first_B1 + running_BN, 0))

    def first_position(self) -> torch.Tensor:
        """Position id of each sample's first token, (B, 1)."""
        return self.position_BN.gather(1, self.seen_BN.int().argmax(1, keepdim=True))

    def last_position(self) -> torch.Tensor:
        """Position id of each sample's last token, (B, 1)."""
        last_B1 = torch.where(self.seen_BN, torch.arange(self.seen_BN.shape[1], device=self.seen_BN.device), 0)
        return self.position_BN.gather(1, last_B1.amax(1, keepdim=True))

    def spread(self, hidden_BND: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states back at the columns of the input, (B, length, D); zeros where tokens were pruned."""
        batch, _, width = hidden_BND.shape
        spare = torch.where(self.column_BN >= 0, self.column_BN, length).to(hidden_BND.device)  # one column to spill
        full = hidden_BND.new_zeros(batch, length + 1, width)
        return full.scatter(1, spare[..., None].expand(-1, -1, width), hidden_BND)[:, :length]
