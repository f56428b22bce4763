"""SparseVLM and its peers: visual tokens that the question does not need leave a LLaVA model between its layers.

    with mico.visual_tokens.enable(model, retain=192) as pruning:
        model.generate(**inputs)
    pruning.trace.kept, pruning.totals.means()

budgets.py says how many tokens go where, methods.py who judges them (METHODS: the place for a new one), evidence.py
what a judge sees, layers.py how the model runs, attach.py what is changed in it, trace.py what is told afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from mico.errors import UserError
from mico.visual_tokens.attach import Pruning, attached
from mico.visual_tokens.evidence import Evidence
from mico.visual_tokens.methods import METHODS, VERSIONS, Method, method_of
from mico.visual_tokens.pruning import Rules

__all__ = ["METHODS", "VERSIONS", "Evidence", "Method", "Pruning", "enable"]


def enable(
    model: Any,
    retain: int | float,
    method: str | Method = "sparsevlm",
    version: str = "2.0",
    adaptive: bool = False,
    seed: int = 0,
    positions: Callable[[int], Iterable[int]] | None = None,
) -> AbstractContextManager[Pruning]:
    """Prune the visual tokens of a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, as long as open.

    retain: mean visual tokens in a layer ("equal tokens"), as an int, or as a share of them when a float up to 1.0;
    an image with fewer keeps all. All images of a sample are one set of visual tokens. Samples of a batch may differ in
    padding and in their number of visual tokens; text alone runs densely.
    method: a name of METHODS or a Method of your own; version: of 'sparsevlm', '2.0' or '1.0'.
    adaptive: each sample keeps more or fewer tokens by the rank of its raters' attention; the budget is then that of a
    sample with a rank of half its raters.
    seed: of 'random' and 'oracle'; draws depend on it and on a prompt's ids, not on its batch.
    positions: for 'oracle', from a sample's index in the batch to the indices of its visual tokens that must stay.

    Logits keep their shape; those at pruned image tokens are 0. Tokens with a label, those where a `question_mask`
    (batch, tokens) given to the forward is false, and generated ones are no part of the question. `generate` works
    with its DynamicCache, batches, sampling and beams. A cache that was filled inside, or a copy of it, goes on inside
    (this or a later `enable`), never outside, where nothing knows which tokens it lacks.
    Raises UserError for other models and unknown values, and while open for what cannot work with pruning: static
    caches, assisted decoding, chunked prefill, output_attentions, output_hidden_states, inputs_embeds.
    """
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    if not isinstance(model, (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)):
        raise UserError(
            f"{type(model).__name__}: visual tokens are pruned in LlavaForConditionalGeneration and "
            "LlavaNextForConditionalGeneration"
        )
    number = isinstance(retain, (int, float)) and not isinstance(retain, bool)
    if not number or not (0 < retain <= 1 if isinstance(retain, float) else retain >= 1):
        raise UserError(
            f"retain={retain!r}: give a whole number of tokens from 1 on, or a share above 0.0 and up to 1.0"
        )
    chosen = method_of(method, version)
    if adaptive and "raters" not in chosen.needs:
        raise UserError(f"method {chosen.name!r} has no raters whose attention has a rank: leave adaptive away")
    if _is_pruned(model):
        raise UserError("token pruning is enabled in this model already: leave the outer one first")
    return attached(model, Rules(retain, chosen, adaptive, seed, positions))


def _is_pruned(model: Any) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), Pruning) for hook in model.model._forward_pre_hooks.values())
