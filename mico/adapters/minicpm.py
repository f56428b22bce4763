"""MiniCPM 1, 2 and 4: Llama whose embeddings, residuals and logits are scaled. MiniCPM3: latent attention besides.

The classes of `minicpm`, which transformers does not have, are in minicpm_config.py and minicpm_model.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mico.adapters.family import Family, Stream
from mico.adapters.llama import LLAMA
from mico.errors import UserError


def _refuse_experts(family: Family, config: Any) -> Family:
    if getattr(config, "num_experts", 0):
        raise UserError(f"model_type 'minicpm' with num_experts {config.num_experts} is not supported: only dense ones")
    return family


def _full_queries(family: Family, config: Any) -> Family:
    """Without a rank for the queries they are one Linear, which reads what the keys read."""
    if config.q_lora_rank is not None:
        return family
    first = Stream("attn_in", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"))
    return replace(family, streams=(first, *family.streams[2:]))


MINICPM = replace(LLAMA, name="MiniCPM", model_types=("minicpm",), fit=_refuse_experts, ships_code=True)
MINICPM3 = replace(
    LLAMA,
    name="MiniCPM3",
    model_types=("minicpm3",),
    streams=(
        Stream("attn_in", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        Stream("query_latent", ("self_attn.q_b_proj",)),
        Stream("key_latent", ("self_attn.kv_b_proj",)),
        *LLAMA.streams[1:],
    ),
    fit=_full_queries,
    ships_code=True,
)
