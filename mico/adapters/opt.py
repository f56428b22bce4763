"""OPT (Zhang et al. 2022): pre-norm in every size but 350m, which is post-norm with narrower embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mico.adapters.family import Family, Stream

OPT = Family(
    name="OPT",
    model_types=("opt",),
    blocks="model.decoder.layers",
    before=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
    after=("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head"),
    streams=(
        Stream("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stream("attn_out", ("self_attn.out_proj",)),
        Stream("mlp_in", ("fc1",)),
        Stream("mlp_out", ("fc2",)),
    ),
)


def _same_width(config: Any) -> bool:
    return config.word_embed_proj_dim == config.hidden_size


def _no_final_norm(config: Any) -> bool:
    return not config.do_layer_norm_before or config._remove_final_layer_norm


ABSENT: Mapping[str, Callable[[Any], bool]] = {  # path -> whether a model of this config lacks it
    "model.decoder.project_in": _same_width,
    "model.decoder.project_out": _same_width,
    "model.decoder.final_layer_norm": _no_final_norm,
}
