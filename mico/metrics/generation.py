"""Text that a model writes after the heads of evaluation windows, so that two models can be read side by side.

Suffixes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from mico.data import Windows
from mico.loading import longest_text

PROMPT_TOKENS, NEW_TOKENS = 32, 48


@dataclass(frozen=True)
class Prompt:
    """The first tokens of one window of a text."""

    text: str
    window: int
    ids_T: torch.Tensor

    def words(self, tokenizer: Any) -> str:
        """The prompt as text, without the mark of its beginning."""
        return str(tokenizer.decode(self.ids_T, skip_special_tokens=True))


def cut_prompts(sets: Mapping[str, Windows], count: int) -> list[Prompt]:
    """`count` prompts, the texts in turn: the first window of each, then the second. Fewer where windows run out."""
    by_text = ([(name, i) for i in range(min(count, len(windows.ids_NT)))] for name, windows in sets.items())
    places = [place for turn in zip_longest(*by_text) for place in turn if place is not None]
    return [Prompt(name, i, sets[name].ids_NT[i, :PROMPT_TOKENS]) for name, i in places[:count]]


def continuations(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """What the model writes after each prompt: greedy, at most NEW_TOKENS tokens, ended by its end-of-text token.

    Decoded here and not by `generate` of transformers, which mixes in the sampling and penalties of the model's
    generation_config. Fewer tokens where the model takes no more.
    """
    ends = end_tokens(model, tokenizer)
    found = [_greedy(model, prompt.ids_T, ends) for prompt in prompts]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


@torch.inference_mode()
def _greedy(model: Any, ids_T: torch.Tensor, ends: set[int]) -> list[int]:
    room = (longest_text(model.config) or len(ids_T) + NEW_TOKENS) - len(ids_T)
    device = model.get_input_embeddings().weight.device
    step, cache, found = ids_T[None].to(device), None, list[int]()
    while len(found) < min(NEW_TOKENS, room):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        if (token := int(step)) in ends:
            break
        found.append(token)
    return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a text: those the model's generation_config names, else the tokenizer's; none where nobody tells."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = tokenizer.eos_token_id if named is None else named
    return set(named if isinstance(named, list) else [] if named is None else [named])
