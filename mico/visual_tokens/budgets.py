"""How many visual tokens survive behind which layer: the published tables, and every other budget by ratio.

A budget is a mean: `retain` visual tokens in each layer ("equal tokens", as the field counts them: a layer that prunes
its output counts as if it had been pruned already). What is really processed is more, and is reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mico.errors import UserError

VISUAL, DEPTH = 576, 32  # of LLaVA-1.5, which the tables are for
LAYERS = (2, 6, 15)
TABLE: dict[str, dict[int, tuple[int, int, int]]] = {
    "1.0": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
BEFORE = -1  # the "layer" whose output is the embeddings


@dataclass(frozen=True)
class Schedule:
    """The visual tokens of one sample on their way through `depth` layers.

    layers: 0-based; the output of these is pruned (BEFORE: the embeddings), the first of equal tokens counts it pruned.
    keep: tokens chosen there. merged: means of recycled tokens that are added to them.
    """

    visual: int
    depth: int
    layers: tuple[int, ...]
    keep: tuple[int, ...]
    merged: tuple[int, ...]

    def _mean(self, reached: Callable[[int, int], bool]) -> float:
        return sum(self._at(index, reached) for index in range(self.depth)) / self.depth

    def _at(self, index: int, reached: Callable[[int, int], bool]) -> int:
        left = [k + m for layer, k, m in zip(self.layers, self.keep, self.merged, strict=True) if reached(layer, index)]
        return left[-1] if left else self.visual

    def per_layer(self) -> tuple[int, ...]:
        """Visual tokens that each layer processes, and holds keys and values of."""
        return tuple(self._at(index, lambda layer, here: layer < here) for index in range(self.depth))

    @property
    def equal_tokens(self) -> float:
        return self._mean(lambda layer, here: layer <= here)

    @property
    def processed_tokens(self) -> float:
        return sum(self.per_layer()) / self.depth


def recycled(pruned: int) -> tuple[int, int]:
    """Of `pruned` tokens: how many are recycled (the top 30 %), and into how many clusters (one for ten)."""
    if pruned == 0:
        return 0, 0
    candidates = min(pruned, pruned * 3 // 10 + 1)
    return candidates, candidates // 10 + 1


def target(retain: int | float, visual: int) -> float:
    """Mean tokens in a layer that `retain` stands for: an int counts tokens, a float is a share of all of them."""
    return retain * visual if isinstance(retain, float) else min(retain, visual)


def tokens_of_picture(config: Any) -> int | None:
    """Visual tokens of every picture, from the config of a LLaVA; None where pictures differ, as in LLaVA-NeXT."""
    eyes = config.vision_config
    if config.model_type != "llava" or eyes.model_type != "clip_vision_model":
        return None
    patches: int = (eyes.image_size // eyes.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")  # with its CLS


def check_budget(config: Any, retain: int, schedule: Callable[[float, int, int], Schedule]) -> None:
    """Raise UserError, before any weight is read, where a model's pictures have fewer tokens or no schedule fits."""
    visual = tokens_of_picture(config)
    if visual is None:
        return
    if retain > visual:
        raise UserError(
            f"--retain-tokens {retain}: a picture has {visual} visual tokens, so none would be pruned: ask for fewer"
        )
    schedule(target(retain, visual), visual, config.get_text_config().num_hidden_layers)


def scaled_layers(depth: int) -> dict[int, int]:
    """{layer: stage of the table} for a model of `depth` layers; of stages that fall together the last one counts."""
    scaled = {int(layer * depth / DEPTH + 0.5): stage for stage, layer in enumerate(LAYERS)}
    return {layer: stage for layer, stage in scaled.items() if layer < depth - 1}


def progressive(version: str) -> Callable[[float, int, int], Schedule]:
    """The schedule maker of a SparseVLM version: the table itself at its own budgets, else scaled by ratio.

    Layers scale with the depth, tokens with their number; between two budgets of the table the shares are interpolated.
    A common factor on the tokens then makes the equal tokens meet the budget, whatever was rounded.
    """

    def make(mean: float, visual: int, depth: int) -> Schedule:
        _check(mean, visual, depth)
        stages = scaled_layers(depth)
        if (visual, depth) == (VISUAL, DEPTH) and mean in TABLE[version]:
            return _schedule(visual, depth, LAYERS, TABLE[version][int(mean)], version)
        shares = _shares(mean / visual, version)
        return _fitted(mean, visual, depth, tuple(stages), [shares[stage] for stage in stages.values()], version)

    return make


def single(mean: float, visual: int, depth: int) -> Schedule:
    """One pruning behind the first layer of the table, as FastV does, with the same equal tokens."""
    _check(mean, visual, depth)
    return _fitted(mean, visual, depth, (next(iter(scaled_layers(depth))),), [mean / visual], "2.0")


def before(mean: float, visual: int, depth: int) -> Schedule:
    """One pruning before the first layer: every layer processes the budget itself."""
    _check(mean, visual, depth)
    return _schedule(visual, depth, (BEFORE,), (max(1, int(mean + 0.5)),), "2.0")


def _check(mean: float, visual: int, depth: int) -> None:
    assert 0 < mean <= visual, (mean, visual)
    if depth < 2:
        raise UserError(f"the language model has {depth} layer: visual tokens are pruned between layers")


def _schedule(visual: int, depth: int, layers: Sequence[int], keep: Sequence[int], version: str) -> Schedule:
    present, kept, merged = visual, [], []
    for wanted in keep:
        kept.append(min(wanted, present))
        merged.append(recycled(present - kept[-1])[1] if version == "1.0" else 0)
        present = kept[-1] + merged[-1]
    return Schedule(visual, depth, tuple(layers), tuple(kept), tuple(merged))


def _shares(share: float, version: str) -> tuple[float, ...]:
    """Shares of the tokens kept at each stage for a mean of `share`: linear between the rows of the table."""
    rows = {retain / VISUAL: [k / VISUAL for k in keep] for retain, keep in TABLE[version].items()}
    rows[1.0] = [1.0] * len(LAYERS)
    known = sorted(rows)
    if share <= known[0]:
        return tuple(k * share / known[0] for k in rows[known[0]])
    high = next(point for point in known if point >= share)
    low = known[max(0, known.index(high) - 1)]
    weight = (share - low) / (high - low)
    return tuple(a + weight * (b - a) for a, b in zip(rows[low], rows[high], strict=True))


def _fitted(
    mean: float, visual: int, depth: int, layers: tuple[int, ...], shares: Sequence[float], version: str
) -> Schedule:
    """Shares times the factor that brings the equal tokens nearest to `mean`. Raises UserError where none can."""

    def at(factor: float) -> Schedule:
        keep = [max(1, int(factor * share * visual + 0.5)) for share in shares]
        return _schedule(visual, depth, layers, keep, version)

    if mean >= visual:
        return _schedule(visual, depth, layers, [visual] * len(layers), version)
    least = at(0.0).equal_tokens
    if least > mean + 1:
        raise UserError(
            f"retain={mean:g} of {visual} visual tokens: the layers before the first pruning alone make it "
            f"{least:.1f} in the mean of {depth} layers: ask for at least {int(least) + 1}"
        )
    low, high = 0.0, 1 / min(shares)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).equal_tokens < mean else (low, middle)
    return min(at(low), at(high), key=lambda made: abs(made.equal_tokens - mean))
