"""What a pruning did: per forward (Trace) and over all forwards (Totals)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mico.visual_tokens.budgets import Schedule
from mico.visual_tokens.flops import Shape, prefill_flops


@dataclass
class Trace:
    """The last prefill with images. Lists run over samples of the batch inside, over stages or layers outside.

    text: tokens that are neither visual nor padding, per sample. schedules: as planned, None for a sample of text.
    kept: [stage][sample] original indices of the visual tokens that survived, ascending (merged ones have none).
    merged: [stage][sample] means of recycled tokens among the survivors. layers: 0-based layers whose output is pruned.
    visual: [layer][sample] visual tokens processed, merged ones included.
    kv_lengths: columns of every layer's cache after the prefill; None where nothing was cached.
    kv_bytes, dense_kv_bytes: of the cache, and of what it would be without pruning.
    raters: text tokens that judged, per sample. without_rater: samples where all of the question had to judge.
    """

    shape: Shape
    layers: tuple[int, ...]
    text: list[int]
    schedules: list[Schedule | None]
    kept: list[list[list[int]]] = field(default_factory=list)
    merged: list[list[int]] = field(default_factory=list)
    visual: list[list[int]] = field(default_factory=list)
    raters: list[int] = field(default_factory=list)
    without_rater: int = 0
    kv_lengths: list[int] | None = None
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    scoring_flops: list[int] = field(default_factory=list)

    def _images(self) -> list[int]:
        return [sample for sample, schedule in enumerate(self.schedules) if schedule is not None]

    def at_start(self, sample: int) -> int:
        schedule = self.schedules[sample]
        return 0 if schedule is None else schedule.visual

    @property
    def planned_kv_lengths(self) -> list[int]:
        """Columns that the schedule foresees for every layer, of the longest sample, without padding."""
        depth = len(self.visual)
        plans = [schedule.per_layer() if schedule else (0,) * depth for schedule in self.schedules]
        return [max(text + plan[layer] for text, plan in zip(self.text, plans, strict=True)) for layer in range(depth)]

    def tokens_per_layer(self, sample: int) -> list[int]:
        """All tokens of a sample that each layer processed."""
        return [self.text[sample] + counts[sample] for counts in self.visual]

    def equal_tokens(self, sample: int) -> float:
        """Mean visual tokens in a layer as the field counts them: a layer that prunes counts as pruned."""
        after = [*self.visual[1:], [len(self.kept[-1][s]) + self.merged[-1][s] for s in range(len(self.text))]]
        counted = [(after if layer in self.layers else self.visual)[layer][sample] for layer in range(len(self.visual))]
        return sum(counted) / len(counted)

    def processed_tokens(self, sample: int) -> float:
        """Mean visual tokens that a layer really processed."""
        return sum(counts[sample] for counts in self.visual) / len(self.visual)

    def flops(self, sample: int) -> int:
        """Of the prefill, the scores that pruning needs included."""
        return prefill_flops(self.shape, self.tokens_per_layer(sample)) + self.scoring_flops[sample]

    def dense_flops(self, sample: int) -> int:
        return prefill_flops(self.shape, [self.text[sample] + self.at_start(sample)] * len(self.visual))


@dataclass
class Totals:
    """Sums over all samples with images; forwards of text alone are counted and otherwise left out."""

    samples: int = 0
    text_only: int = 0
    visual: int = 0
    equal: float = 0.0
    processed: float = 0.0
    flops: int = 0
    dense_flops: int = 0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    without_rater: int = 0

    def add(self, trace: Trace) -> None:
        images = trace._images()
        self.samples += len(images)
        self.text_only += len(trace.text) - len(images)
        self.visual += sum(trace.at_start(sample) for sample in images)
        self.equal += sum(trace.equal_tokens(sample) for sample in images)
        self.processed += sum(trace.processed_tokens(sample) for sample in images)
        self.flops += sum(trace.flops(sample) for sample in images)
        self.dense_flops += sum(trace.dense_flops(sample) for sample in images)
        self.kv_bytes += trace.kv_bytes
        self.dense_kv_bytes += trace.dense_kv_bytes
        self.without_rater += trace.without_rater

    def means(self) -> dict[str, Any]:
        """Per sample with an image, JSON-ready: tokens, FLOPs of the prefill, bytes of keys and values."""
        count = max(1, self.samples)
        return {
            "samples": self.samples,
            "text_only": self.text_only,
            "visual_tokens": self.visual / count,
            "equal_tokens": self.equal / count,
            "processed_tokens": self.processed / count,
            "prefill_flops": self.flops / count,
            "dense_prefill_flops": self.dense_flops / count,
            "kv_bytes": self.kv_bytes / count,
            "dense_kv_bytes": self.dense_kv_bytes / count,
            "samples_without_rater": self.without_rater,
        }
