"""Pruning in a model of transformers: what is changed while it is enabled, refused, and restored.

Four things are hung on the instance, never on a class: the ids are seen before the LLaVA model runs (hook), the
language model runs the loop of layers.py, `generate` tells which tokens are the prompt, and for method 'cls' the vision
tower is watched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mico.errors import UserError
from mico.visual_tokens.capture import Watch, cls_attention, cls_of_visual_tokens, watching_cls
from mico.visual_tokens.layers import Cached, decode, prefill
from mico.visual_tokens.pruning import Rules
from mico.visual_tokens.tokens import Prompt, Tokens
from mico.visual_tokens.trace import Totals, Trace

_HELD = "_mico_pruned"  # attribute of a cache: its copies and later calls of `enable` go on with it
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


class Pruning:
    """What `enable` yields. trace: Trace of the last prefill with images; totals: sums over all of them."""

    def __init__(self, model: Any, rules: Rules) -> None:
        self.model = model
        self.rules = rules
        self.trace: Trace | None = None
        self.totals = Totals()
        self._language: Any = model.model.language_model
        self._dense: Callable[..., Any] = self._language.forward
        self._prompt_length: int | None = None
        self._cls: tuple[torch.Tensor, list[float]] | None = None  # scores, and by what their pictures are known

    # What is hung on the model

    def answers_are_no_question(self, module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        """Before LlavaForConditionalGeneration: tokens with a label are answers, unless a question_mask is given."""
        labels = options.get("labels")
        if labels is not None and options.get("question_mask") is None:
            options["question_mask"] = labels == -100
        return arguments, options

    def see_ids(self, module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        """Before LlavaModel: image tokens and the question, read off the ids, go down with the options."""
        ids_BL = options.get("input_ids", arguments[0] if arguments else None)
        if ids_BL is None:
            raise UserError("token pruning reads input_ids, which tell image tokens: give them, not inputs_embeds")
        question_BL = options.pop("question_mask", None)
        if question_BL is None:
            question_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        if self._prompt_length is not None:
            question_BL = question_BL & (torch.arange(ids_BL.shape[1], device=ids_BL.device) < self._prompt_length)
        visual_BL = ids_BL == self.model.config.image_token_id
        options["prompt"] = Prompt(visual_BL, question_BL.bool(), ids_BL)
        self._check_cls(options.get("mm_encoder_outputs"))
        return arguments, options

    def forward(self, *arguments: Any, prompt: Prompt | None = None, **options: Any) -> Any:
        """In place of the language model's own forward, which still runs where there is nothing to prune."""
        cache = options.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        if cache is not None and not filled:
            vars(cache).pop(_HELD, None)  # emptied, it starts anew
        cached: Cached | None = getattr(cache, _HELD, None)
        images = prompt is not None and bool(prompt.visual_BL.any())
        if not images and cached is None:
            if prompt is not None and not filled:
                self.totals.text_only += len(prompt.ids_BL)
            return self._dense(*arguments, **options)
        assert prompt is not None and not arguments, "LlavaModel calls its language model by keywords"
        return self._pruned(prompt, cached, **options)

    def generate(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """In place of the model's own generate: the prompt's length is known, and what cannot work is refused."""
        config = options.get("generation_config") or getattr(self.model, "generation_config", None)
        for name in _ASSISTED:
            if options.get(name) is not None or getattr(config, name, None) is not None:
                raise UserError(f"{name}: not with token pruning, whose layers hold unequal numbers of tokens")
        ids = options.get("input_ids", options.get("inputs", arguments[0] if arguments else None))
        if ids is None:
            raise UserError("token pruning reads input_ids, which tell image tokens: give them to generate")
        self._prompt_length = ids.shape[1]
        try:
            return original(*arguments, **options)
        finally:
            self._prompt_length = None

    def image_features(self, original: Callable[..., Any], watch: Watch, *arguments: Any, **options: Any) -> Any:
        """In place of LlavaModel.get_image_features, for method 'cls': also keeps what CLS attended to."""
        output = original(*arguments, **options)
        sizes = options.get("image_sizes", arguments[1] if len(arguments) > 1 else None)
        scores = cls_of_visual_tokens(self.model.model, cls_attention(watch), sizes)
        self._cls = scores, _marks(output.pooler_output)
        return output

    # The pruned forward

    def _pruned(
        self, prompt: Prompt, cached: Cached | None, inputs_embeds: torch.Tensor | None = None,
        attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        use_cache: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        from transformers import DynamicCache
        from transformers.modeling_outputs import BaseModelOutputWithPast

        assert inputs_embeds is not None
        language, embeds = self._language, inputs_embeds
        self._refuse(attention_mask, past_key_values, options)
        use_cache = language.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (language.gradient_checkpointing and language.training):
            past_key_values = DynamicCache(config=language.config)
        past = cached.length if cached else 0
        self._check_length(embeds, attention_mask, past, past_key_values, images=bool(prompt.visual_BL.any()))
        batch, new = embeds.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=embeds.device)[None]
        seen_BL = embeds.new_ones(batch, new, dtype=torch.bool)
        if attention_mask is not None:
            seen_BL = attention_mask[:, -new:].to(embeds.device).bool()
        if cached is None:
            scores_BL = self._cls_scores(prompt) if "cls" in self.rules.method.needs else None
            tokens = Tokens.start(embeds, seen_BL, position_ids, prompt, scores_BL)
            hidden, trace, made = prefill(language, self.rules, tokens, prompt, past_key_values, options)
            self._remember(trace, made, past_key_values, embeds)
        else:
            hidden = decode(language, embeds, seen_BL, position_ids, past_key_values, cached, options)
        return BaseModelOutputWithPast(last_hidden_state=language.norm(hidden), past_key_values=past_key_values)

    def _refuse(self, attention_mask: Any, cache: Any, options: dict[str, Any]) -> None:
        from transformers import DynamicCache

        for name in ("output_attentions", "output_hidden_states"):
            if options.pop(name, None) or getattr(self._language.config, name, False):
                raise UserError(f"{name}: not with token pruning, whose layers see unequal numbers of tokens")
        options.pop("return_dict", None)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise UserError(f"{type(cache).__name__}: token pruning needs a DynamicCache, whose layers grow unequally")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UserError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: token pruning needs (batch, tokens)"
            )

    def _check_length(self, embeds: torch.Tensor, attention_mask: Any, past: int, cache: Any, images: bool) -> None:
        new = embeds.shape[1]
        held = cache.get_seq_length() if cache is not None else 0
        if images and held:
            raise UserError(f"an image behind {held} cached tokens: give the whole prompt in one call")
        if attention_mask is not None and attention_mask.shape[1] not in (new, past + new):
            raise UserError(
                f"attention_mask of {attention_mask.shape[1]} tokens for {past} cached and {new} new ones: "
                "a cache that was filled under pruning goes on with the next tokens only"
            )
        window = getattr(self._language.config, "sliding_window", None)
        if window is not None and past + new > window:
            raise UserError(f"{past + new} tokens in a sliding window of {window}: not with token pruning")

    def _remember(self, trace: Trace, made: Cached, cache: Any, embeds: torch.Tensor) -> None:
        if cache is not None:
            setattr(cache, _HELD, made)
            layers = cache.layers[: len(trace.visual)]
            trace.kv_lengths = [layer.get_seq_length() for layer in layers]
            trace.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
            each = layers[0].keys.nbytes + layers[0].values.nbytes
            trace.dense_kv_bytes = each // trace.kv_lengths[0] * embeds.shape[1] * len(layers)
        self.trace = trace
        self.totals.add(trace)

    # Attention of the vision tower

    def _check_cls(self, encoded: Any) -> None:
        """Scores of other pictures than those encoded ahead must not be used."""
        image = encoded.get("image") if encoded else None
        if image is None or "cls" not in self.rules.method.needs:
            return
        known, given = None if self._cls is None else self._cls[1], _marks(image.pooler_output)
        repeated = known is not None and len(given) > len(known) and set(given) == set(known)  # by beams
        if given != known and not repeated:
            raise UserError(
                "mm_encoder_outputs of other pictures than were encoded last: method 'cls' cannot score them, encode "
                "these again or give pixel_values"
            )

    def _cls_scores(self, prompt: Prompt) -> torch.Tensor:
        """CLS attention at the image tokens, (B, L). Beams repeat a sample's row, its pictures were encoded once."""
        if self._cls is None:
            raise UserError("method 'cls' scores pictures that the vision tower encodes: give pixel_values")
        scores = self._cls[0].to(prompt.visual_BL.device)
        counts = prompt.visual_BL.sum(1).tolist()
        times = max(1, sum(counts) // max(1, len(scores)))
        if sum(counts) != len(scores) * times or len(counts) % times:
            raise UserError(f"{sum(counts)} image tokens for pictures of {len(scores)} features")
        rows = torch.split(scores, counts[::times])
        every = torch.cat([row for row in rows for _ in range(times)])
        return torch.zeros(prompt.visual_BL.shape, device=scores.device).masked_scatter(prompt.visual_BL, every)


def _marks(features: Any) -> list[float]:
    """A number for every picture, by which its features are known again."""
    return torch.stack([picture.detach().double().sum() for picture in features]).tolist()


@contextmanager
def attached(model: Any, rules: Rules) -> Iterator[Pruning]:
    """The model prunes inside; at the end, also after an error, it is as it was."""
    pruning = Pruning(model, rules)
    with ExitStack() as undo:
        hook = model.register_forward_pre_hook(pruning.answers_are_no_question, with_kwargs=True)
        undo.callback(hook.remove)
        undo.callback(model.model.register_forward_pre_hook(pruning.see_ids, with_kwargs=True).remove)
        _replace(undo, model, "generate", pruning.generate)
        _replace(undo, model.model.language_model, "forward", lambda original, *a, **k: pruning.forward(*a, **k))
        if "cls" in rules.method.needs:
            tower, layer = model.model.vision_tower, model.config.vision_feature_layer
            watch = undo.enter_context(watching_cls(tower, layer))
            features = functools.partial(_with_watch, pruning, watch)
            _replace(undo, model.model, "get_image_features", features)
        yield pruning


def _with_watch(pruning: Pruning, watch: Watch, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return pruning.image_features(original, watch, *arguments, **options)


def _replace(undo: ExitStack, owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put function(original, …) in place of a method of one instance, with its signature, until `undo` closes."""
    original = getattr(owner, name)
    before = owner.__dict__.get(name)

    @functools.wraps(original)
    def replaced(*arguments: Any, **options: Any) -> Any:
        return function(original, *arguments, **options)

    def restore() -> None:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before

    owner.__dict__[name] = replaced
    undo.callback(restore)
