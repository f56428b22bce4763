"""OPT (Zhang et al. 2022): pre-norm in every size but 350m, which is post-norm with narrower embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mico.adapters.family import Family, Stream


def _fit(family: Family, config: Any) -> Family:
    absent = set()
    if config.word_embed_proj_dim == config.hidden_size:
        absent |= {"model.decoder.project_in", "model.decoder.project_out"}
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        absent.add("model.decoder.final_layer_norm")
    before = tuple(path for path in family.before if path not in absent)
    return replace(family, before=before, after=tuple(path for path in family.after if path not in absent))


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
    fit=_fit,
)
