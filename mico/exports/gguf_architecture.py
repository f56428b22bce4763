"""What llama.cpp must be told about a model, and which models it computes as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mico.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A model type in llama.cpp. name: its key in gguf.MODEL_ARCH.

    interleaved: rotary pairs are neighbours (2i, 2i+1) of a head, so that the rows of q and k, which transformers
        holds as halves (i, i + d/2), must be reordered; biased: modules that may have a bias.
    """

    name: str
    interleaved: bool
    biased: tuple[str, ...]


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Architecture("LLAMA", True, (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"))
ARCHITECTURES: Mapping[str, Architecture] = {  # by model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("QWEN2", False, _QKV),
    "qwen3": Architecture("QWEN3", False, _QKV),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a config. Raises UserError naming what llama.cpp would compute in another way."""
    model_type = str(getattr(config, "model_type", None))
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"model_type {model_type!r} has no architecture in llama.cpp (known: {known}): use --to dense")
    arch, rope = ARCHITECTURES[model_type], rope_of(config)
    if config.hidden_act != "silu":
        raise _refusal(f"hidden_act is {config.hidden_act!r} and llama.cpp computes silu")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise _refusal(f"rope_type {rope['rope_type']!r} is not one of default, linear, llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(f"partial_rotary_factor is {rope['partial_rotary_factor']}")
    heads, width = config.num_attention_heads, head_dim(config)
    if arch.name == "QWEN2" and heads * width != config.hidden_size:
        raise _refusal(f"{heads} heads of {width} are not hidden_size {config.hidden_size}")
    return arch


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def describe(writer: Any, config: Any) -> list[str]:
    """Write the hyperparameters into a gguf.GGUFWriter; returns what a user of the file must know."""
    rope, width = rope_of(config), head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        return [f"llama.cpp has no sliding window here: texts beyond {window} tokens give other logits"]
    return []


def rope_factors(config: Any) -> torch.Tensor | None:
    """By how much llama3 scaling divides each frequency, (head_dim / 2); None for the other kinds."""
    if rope_of(config)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_dim(config)
    plain = rope_of(config)["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled


def row_order(arch: Architecture, config: Any, key: str) -> torch.Tensor | None:
    """Which row of the tensor `key` each row of the file is, (R,) int64; None when they are the same."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = key.rsplit(".", 2)[-2]
    if not arch.interleaved or module not in heads:
        return None
    half = head_dim(config) // 2
    return torch.arange(heads[module] * 2 * half).reshape(heads[module], 2, half).mT.flatten()


def check_bias(arch: Architecture, key: str) -> None:
    """Raise UserError when `key` is a bias that the architecture has no place for."""
    module, _, last = key.rpartition(".")
    if last == "bias" and module.rsplit(".", 1)[-1] not in arch.biased:
        raise _refusal(f"{key} has no place in llama.cpp's {arch.name.lower()}")


def _refusal(why: str) -> UserError:
    return UserError(f"llama.cpp would compute another model: {why}; export with --to dense")
