"""LLaVA-1.5 and LLaVA-NeXT (1.6): the language model is compressed, vision tower and projector when asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mico.adapters.family import Family, Stream, Tower
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
VISION = Tower(
    name="vision tower",
    blocks="model.vision_tower.encoder.layers",
    streams=(
        Stream("vision_attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stream("vision_attn_out", ("self_attn.out_proj",)),
        Stream("vision_mlp_in", ("mlp.fc1",)),
        Stream("vision_mlp_out", ("mlp.fc2",)),
    ),
)
PROJECTOR = Tower(
    name="projector",
    blocks="model.multi_modal_projector",
    streams=(Stream("projector_in", ("linear_1",)), Stream("projector_out", ("linear_2",))),
)
_CLIP = "clip_vision_model"


def with_towers(family: Family, config: Any, *, vision: bool, projector: bool) -> Family:
    """The family with those of its modules that see images which are to be compressed.

    Raises UserError where a model has none, or a vision tower that is not CLIP's.
    """
    if not (vision or projector):
        return family
    option = "--compress-vision" if vision else "--compress-projector"
    if family.name != LLAVA.name:
        raise UserError(f"{option}: model_type {config.model_type!r} sees no images: leave the option out")
    towers = []
    if vision:
        kind = config.vision_config.model_type
        if kind != _CLIP:
            raise UserError(f"{option}: a vision tower {kind!r} is not supported, {_CLIP!r} is: leave the option out")
        towers.append(replace(VISION, count=config.vision_config.num_hidden_layers))
    if projector:
        towers.append(PROJECTOR)
    return replace(family, towers=tuple(towers))
