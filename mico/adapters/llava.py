"""LLaVA-1.5 and LLaVA-NeXT (1.6): the language model is compressed, vision tower and projector stay dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mico.adapters.family import Family
from mico.adapters.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from mico.errors import UserError

_LANGUAGE = tuple(name for row in (LLAMA, MISTRAL, QWEN2, QWEN3) for name in row.model_types)
TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}  # of the authors' own format


def _fit(family: Family, config: Any) -> Family:
    inner = config.get_text_config().model_type
    if inner not in _LANGUAGE:
        raise UserError(
            f"model_type {config.model_type!r} around a language model {inner!r} is not supported: "
            f"it must be one of {', '.join(_LANGUAGE)}"
        )
    return family


LLAVA = replace(
    LLAMA,
    name="LLaVA",
    model_types=("llava", "llava_next"),
    blocks="model.language_model.layers",
    before=("model.language_model.embed_tokens", "model.language_model.rotary_emb"),
    after=("model.language_model.norm", "lm_head"),
    vision=("model.vision_tower", "model.multi_modal_projector"),
    fit=_fit,
    auto="AutoModelForImageTextToText",
)
