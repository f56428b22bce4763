"""Operations of a prefill, counted module by module."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3Config

from mico.visual_tokens.flops import Shape, prefill_flops
from tests.visual_tokens.tiny import llava


def test_flops_are_those_that_torch_counts() -> None:
    language = llava(attention="eager").model.language_model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        language(inputs_embeds=torch.zeros(1, 11, 32))
    rope = 2 * 4 * 11  # angles of 4 frequencies at 11 positions, counted as a product of matrices by some releases
    counted = counter.get_total_flops()
    assert counted - prefill_flops(Shape.of(language.config), [11] * 4) in (0, rope)


def test_llava_7b() -> None:
    """32 layers of 4096, 11008: 2 x 6.476e9 weights a token, and attention."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    found = prefill_flops(Shape.of(config), [640] * 32)
    assert found == 2 * 640 * weights + 32 * 4 * 640 * 640 * 4096


def test_heads_of_their_own_width() -> None:
    shape = Shape.of(Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32))
    assert (shape.heads, shape.key_heads, shape.head_dim) == (4, 2, 32)
    assert shape.projections(3) == 2 * 3 * 64 * (128 + 64 + 64 + 128) and shape.scoring(2, 9) == 2 * 2 * 9 * 128
