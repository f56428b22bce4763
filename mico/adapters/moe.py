"""Mixtral and Qwen-MoE: Llama whose MLP is a router and experts; a Qwen2-MoE layer also has an expert of all tokens.

Experts are Linears of their own in mico (mico/packed/experts.py). The router, and the gate of the shared expert, which
is one row, stay dense.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mico.adapters.family import Family, Stream
from mico.adapters.llama import LLAMA
from mico.errors import UserError

SHARED = (
    Stream("shared_in", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    Stream("shared_out", ("mlp.shared_expert.down_proj",)),
)


def expert_streams(count: int) -> tuple[Stream, ...]:
    """What the experts of a layer read: first the inputs of all of them, then what is between their Linears."""
    path = "mlp.experts.{}.{}_proj".format
    first = [
        Stream(f"experts.{e}.in", (path(e, "gate"), path(e, "up")), expert=e) for e in range(count)
    ]  # fmt: skip
    return (*first, *(Stream(f"experts.{e}.out", (path(e, "down"),), expert=e) for e in range(count)))


def _fit_mixtral(family: Family, config: Any) -> Family:
    return replace(family, streams=(*family.streams, *expert_streams(config.num_local_experts)))


def _fit_qwen(family: Family, config: Any) -> Family:
    """Raises UserError where some layers have no experts: the blocks of a family are alike."""
    for name, value, wanted in (
        ("mlp_only_layers", config.mlp_only_layers, []),
        ("decoder_sparse_step", config.decoder_sparse_step, 1),
    ):
        if value != wanted:
            raise UserError(f"{name} {value!r:.60}: layers without experts are not supported, it must be {wanted!r}")
    return replace(family, streams=(*family.streams, *expert_streams(config.num_experts)))


MIXTRAL = replace(
    LLAMA, name="Mixtral", model_types=("mixtral",), streams=LLAMA.streams[:2], fit=_fit_mixtral
)  # fmt: skip
QWEN2_MOE = replace(
    LLAMA, name="Qwen2-MoE", model_types=("qwen2_moe",), streams=(*LLAMA.streams[:2], *SHARED), fit=_fit_qwen
)
QWEN3_MOE = replace(MIXTRAL, name="Qwen3-MoE", model_types=("qwen3_moe",), fit=_fit_qwen)
