"""Llama (1, 2, 3, Vicuna, Yi) and the families that share its module names: Mistral, Qwen2, Qwen3.

Their differences (grouped queries, qkv bias, q/k norm, sliding windows, tied heads) sit beside the Linears.
"""

from __future__ import annotations

from dataclasses import replace

from mico.adapters.family import Family, Stream

LLAMA = Family(
    name="Llama",
    model_types=("llama",),
    blocks="model.layers",
    before=("model.embed_tokens", "model.rotary_emb"),
    after=("model.norm", "lm_head"),
    streams=(
        Stream("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stream("attn_out", ("self_attn.o_proj",)),
        Stream("mlp_in", ("mlp.gate_proj", "mlp.up_proj")),
        Stream("mlp_out", ("mlp.down_proj",)),
    ),
)
MISTRAL = replace(LLAMA, name="Mistral", model_types=("mistral",))
QWEN2 = replace(LLAMA, name="Qwen2", model_types=("qwen2",))  # Qwen2.5 has the same model_type
QWEN3 = replace(LLAMA, name="Qwen3", model_types=("qwen3",))
