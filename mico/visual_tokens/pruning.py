"""One prefill on its way through the language model: what is planned for it, and each pruning of its tokens."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mico.errors import UserError
from mico.visual_tokens.budgets import Schedule, recycled, target
from mico.visual_tokens.evidence import Evidence, Heads
from mico.visual_tokens.flops import Shape
from mico.visual_tokens.lookahead import lookahead_flops
from mico.visual_tokens.methods import Method
from mico.visual_tokens.recycle import cluster_means, clusters
from mico.visual_tokens.scoring import adaptive_count, gather_rows, packed, ranks, select_raters
from mico.visual_tokens.tokens import Prompt, Tokens
from mico.visual_tokens.trace import Trace


@dataclass(frozen=True)
class Rules:
    """What `enable` was asked for."""

    retain: int | float
    method: Method
    adaptive: bool
    seed: int
    positions_of: Callable[[int], Iterable[int]] | None


@dataclass
class Prefill:
    """One prefill on its way; see `start` and layers.py."""

    language: Any
    rules: Rules
    tokens: Tokens
    schedules: list[Schedule | None]
    seeds: tuple[int, ...]
    rater_BQ: torch.Tensor
    at_start: tuple[int, ...]
    trace: Trace

    def prune(self, stage: int, layer: int, heads: Heads | None) -> None:
        """Leave the best tokens, and where the method recycles the means of the next best."""
        evidence = self.evidence(stage, layer, heads)
        with torch.no_grad():
            scores_BV = self.rules.method.scorer(evidence)
        shape = tuple(scores_BV.shape)
        if shape != tuple(evidence.real_BV.shape):
            wanted = tuple(evidence.real_BV.shape)
            raise UserError(f"method {self.rules.method.name!r}: scores of shape {shape} for visual tokens {wanted}")
        if scores_BV[evidence.real_BV].isnan().any():
            raise UserError(f"method {self.rules.method.name!r}: scores behind layer {layer} that are no numbers")
        scores_BV = scores_BV.float().masked_fill(~evidence.real_BV, -torch.inf)
        keep_B = self.counts(stage, evidence)
        ranked_BV = scores_BV.argsort(dim=1, descending=True, stable=True)
        rank_BV = ranked_BV.argsort(dim=1)
        chosen_BV = (rank_BV < torch.tensor(keep_B, device=rank_BV.device)[:, None]) & evidence.real_BV
        merged = self.recycle(evidence, scores_BV, chosen_BV) if self.rules.method.recycle else None
        first_B1, tokens = self.tokens.first_position(), self.tokens
        kept_BN = (tokens.seen_BN & ~tokens.visual_BN).scatter(1, evidence.visual_BV, chosen_BV | ~evidence.real_BV)
        kept_BN = torch.where(tokens.visual_BN, kept_BN, tokens.seen_BN)
        self.tokens = tokens.keep(kept_BN, merged)
        if self.rules.method.compact:
            self.tokens = self.tokens.compacted(first_B1)
        self.note(evidence)

    def evidence(self, stage: int, layer: int, heads: Heads | None) -> Evidence:
        tokens = self.tokens
        visual_BV, real_BV = packed(tokens.visual_BN)
        question_BQ, asked_BQ = packed(tokens.asked_BN)
        device = tokens.seen_BN.device
        return Evidence(
            stage=stage, layer=layer, hidden_BND=tokens.hidden_BND, embeddings_BND=tokens.embeddings_BND,
            positions_BN=tokens.position_BN, seen_BN=tokens.seen_BN, visual_BV=visual_BV, real_BV=real_BV,
            original_BV=torch.where(real_BV, tokens.original_BN.gather(1, visual_BV), -1), at_start=self.at_start,
            question_BQ=question_BQ, asked_BQ=asked_BQ, rater_BQ=self.rater_BQ.to(device),
            inverse_frequency=self.language.rotary_emb.inv_freq.to(device), seeds=self.seeds,
            language=self.language, ahead=self.ahead(layer), heads=heads,
            cls_BV=tokens.cls_BN.gather(1, visual_BV) if "cls" in self.rules.method.needs else None,
            positions_of=self.rules.positions_of,
        )  # fmt: skip

    def ahead(self, layer: int) -> int:
        """Layers behind `layer` that the method looks ahead."""
        depth = len(self.language.layers)
        return min(math.ceil(self.rules.method.ahead * depth), depth - 1 - layer)

    def counts(self, stage: int, evidence: Evidence) -> list[int]:
        """How many tokens each sample keeps."""
        keep_B = [schedule.keep[stage] if schedule else 0 for schedule in self.schedules]
        if not self.rules.adaptive:
            return keep_B
        rows_BR, real_BR = evidence.raters()
        ranks_B = ranks(evidence.attention_to_visual(rows_BR), real_BR, evidence.real_BV).tolist()
        present_B, raters_B = evidence.real_BV.sum(1).tolist(), real_BR.sum(1).tolist()
        rows = zip(keep_B, present_B, ranks_B, raters_B, strict=True)
        return [adaptive_count(min(k, v), v, rank, r) if k else 0 for k, v, rank, r in rows]

    def recycle(self, evidence: Evidence, scores_BV: torch.Tensor, chosen_BV: torch.Tensor) -> Tokens | None:
        """Means of the best pruned tokens, as tokens that are padded to the most of any sample."""
        pruned_BV = evidence.real_BV & ~chosen_BV
        counts = [recycled(pruned) for pruned in pruned_BV.sum(1).tolist()]
        most = max(clusters for _, clusters in counts)
        if most == 0:
            return None
        tokens, batch = self.tokens, len(counts)
        hidden, embeddings = (x.new_zeros(batch, most, x.shape[-1]) for x in (tokens.hidden_BND, tokens.embeddings_BND))
        for sample, (candidates, count) in enumerate(counts):
            if count == 0:
                continue
            best_M = scores_BV[sample].masked_fill(~pruned_BV[sample], -torch.inf).topk(candidates).indices
            columns_M = evidence.visual_BV[sample, best_M.sort().values]
            label_M = clusters(tokens.hidden_BND[sample, columns_M].detach(), count)
            hidden[sample, :count] = cluster_means(tokens.hidden_BND[sample, columns_M], label_M, count)
            embeddings[sample, :count] = cluster_means(tokens.embeddings_BND[sample, columns_M], label_M, count)
        device = hidden.device
        seen = torch.arange(most, device=device)[None] < torch.tensor([n for _, n in counts], device=device)[:, None]
        none = torch.full_like(seen, -1, dtype=tokens.column_BN.dtype)
        return Tokens(hidden, embeddings, none + 1, seen, none, seen, torch.zeros_like(seen), none, seen * 0.0)

    def note(self, evidence: Evidence) -> None:
        """Write down what is left, and what the choice cost."""
        tokens, trace = self.tokens, self.trace
        rows = zip(tokens.original_BN.tolist(), tokens.visual_BN.sum(1).tolist(), strict=True)
        kept = [([x for x in original if x >= 0], count) for original, count in rows]
        trace.kept.append([indices for indices, _ in kept])
        trace.merged.append([count - len(indices) for indices, count in kept])
        if ahead := self.ahead(evidence.layer):
            rows = zip(trace.text, evidence.real_BV.sum(1).tolist(), strict=True)
            for sample, (text, visual) in enumerate(rows):
                looked = lookahead_flops(trace.shape, ahead, text, visual) if self.schedules[sample] else 0
                trace.scoring_flops[sample] += looked
        if "attention" in self.rules.method.needs:
            keys = evidence.seen_BN.sum(1).tolist()
            for sample, (raters, count) in enumerate(zip(trace.raters, keys, strict=True)):
                trace.scoring_flops[sample] += trace.shape.scoring(raters, count) if self.schedules[sample] else 0


@lru_cache(maxsize=1024, typed=True)  # 1 is a token, 1.0 is all of them
def planned(make: Callable[[float, int, int], Schedule], retain: int | float, visual: int, depth: int) -> Schedule:
    """The schedule of a sample; images of one size share theirs."""
    return make(target(retain, visual), visual, depth)


def start(language: Any, rules: Rules, tokens: Tokens, prompt: Prompt) -> Prefill:
    """Plan the prunings of every sample and choose the raters."""
    visual_B, asked_B = tokens.visual_BN.sum(1).tolist(), tokens.asked_BN.sum(1).tolist()
    depth, needs = len(language.layers), rules.method.needs
    schedules = [planned(rules.method.schedule, rules.retain, v, depth) if v else None for v in visual_B]
    layers = next(schedule.layers for schedule in schedules if schedule)
    for sample, (schedule, asked) in enumerate(zip(schedules, asked_B, strict=True)):
        if schedule and not asked and "question" in needs:
            raise UserError(
                f"sample {sample}: no question behind its image (text without a label), by which method "
                f"{rules.method.name!r} judges: put it there, or use method 'cls' or 'random'"
            )
        if schedule and schedule.layers != layers:
            raise UserError(
                f"method {rules.method.name!r}: its schedule prunes behind layers {layers} for one sample of a batch "
                f"and behind {schedule.layers} for another: let layers depend on the depth alone"
            )
        if schedule and "attention" in needs and min(schedule.layers) < 0:
            raise UserError(f"method {rules.method.name!r} needs attention and prunes before the first layer")
    (visual_BV, real_BV), (question_BQ, asked_BQ) = packed(tokens.visual_BN), packed(tokens.asked_BN)
    embeddings = tokens.embeddings_BND.detach()
    rater_BQ, none = select_raters(
        gather_rows(embeddings, visual_BV), real_BV, gather_rows(embeddings, question_BQ), asked_BQ
    )
    text_B = (tokens.seen_BN.sum(1) - tokens.visual_BN.sum(1)).tolist()
    raters = rater_BQ.sum(1).tolist() if "raters" in needs else [1] * len(text_B)
    trace = Trace(
        Shape.of(language.config), layers, text_B, schedules, raters=raters,
        without_rater=none if "raters" in needs else 0, scoring_flops=[0] * len(text_B),
    )  # fmt: skip
    return Prefill(
        language, rules, tokens, schedules, seeds(prompt, tokens, rules.seed), rater_BQ, tuple(visual_B), trace
    )


def seeds(prompt: Prompt, tokens: Tokens, seed: int) -> tuple[int, ...]:
    """One seed a sample, from its own prompt: the same in every batch, and whatever is generated behind it."""
    rows = zip(prompt.ids_BL, prompt.question_BL.to(prompt.ids_BL.device), tokens.seen_BN, strict=True)
    texts = [ids_L[asked_L & seen_L.to(ids_L.device)].tolist() for ids_L, asked_L, seen_L in rows]
    return tuple(zlib.crc32(repr((seed, text)).encode()) for text in texts)
