"""The question run ahead over still visual tokens, against whole layers whose visual outputs are put back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from mico.errors import UserError
from mico.visual_tokens import METHODS, Evidence, enable
from mico.visual_tokens.flops import Shape
from mico.visual_tokens.lookahead import lookahead_flops, looked_at
from tests.visual_tokens.tiny import VISUAL, batched, llava, logits, picture, prompt


def seen_by_the_scorer(model: Any, layers: int, **inputs: Any) -> list[tuple[Evidence, list[torch.Tensor]]]:
    """Evidence and lookahead of every pruning of a prefill."""
    found = []

    def scorer(evidence: Evidence) -> torch.Tensor:
        found.append((evidence, list(looked_at(evidence, layers))))
        return torch.zeros_like(evidence.visual_BV, dtype=torch.float32)

    method = replace(METHODS["random"], name="looking", scorer=scorer, needs=frozenset({"question"}))
    with enable(model, retain=20, method=method):
        logits(model, **inputs)
    return found


def naive(model: Any, evidence: Evidence, sample: int, layers: int) -> list[torch.Tensor]:
    """Attention (H, Q, V) of one sample, by layers of an eager model on all of its tokens."""
    language = model.model.language_model
    seen = evidence.seen_BN[sample]
    hidden, position = evidence.hidden_BND[sample, seen][None], evidence.positions_BN[sample, seen][None]
    offset = int((~seen).sum())
    visual = evidence.visual_BV[sample, evidence.real_BV[sample]] - offset
    asked = evidence.question_BQ[sample, evidence.asked_BQ[sample]] - offset
    still = hidden[:, visual]
    found = []
    mask = create_causal_mask(config=language.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
    rope = language.rotary_emb(hidden, position_ids=position)
    for layer in language.layers[evidence.layer + 1 :][:layers]:
        _, attention = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=rope
        )
        found.append(attention[0][:, asked][..., visual])
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope).clone()
        hidden[:, visual] = still
    return found


@pytest.mark.parametrize("text", ["llama", "qwen3"])
@torch.no_grad()
def test_text_runs_ahead_as_in_whole_layers(text: str) -> None:
    model, eager = llava(text, layers=6), llava(text, layers=6, attention="eager")
    inputs = batched(prompt(3, 5), prompt(1, 9, seed=1)) | dict(pixel_values=picture(count=2))
    seen = seen_by_the_scorer(model, 3, **inputs)
    assert [evidence.layer for evidence, _ in seen] == [0, 1, 3]
    assert [len(found) for _, found in seen] == [3, 3, 2]  # the model ends
    for evidence, found in seen:
        for sample in range(2):
            asked, real = evidence.asked_BQ[sample], evidence.real_BV[sample]
            for here, there in zip(found, naive(eager, evidence, sample, 3), strict=True):
                torch.testing.assert_close(here[sample][:, asked][..., real], there, atol=1e-5, rtol=1e-4)
                assert not here[sample][:, ~asked].any() and not here[sample][..., ~real].any()


@torch.no_grad()
def test_the_first_layer_ahead_is_what_the_dense_model_attends_to() -> None:
    model, eager = llava(layers=6), llava(layers=6, attention="eager")
    ids, image = prompt(3, 5), picture()
    evidence, found = seen_by_the_scorer(model, 1, input_ids=ids, pixel_values=image)[0]
    attention = eager(input_ids=ids, pixel_values=image, output_attentions=True).attentions[evidence.layer + 1]
    torch.testing.assert_close(found[0], attention[:, :, 3 + VISUAL :, 3 : 3 + VISUAL], atol=1e-5, rtol=1e-4)


def test_kernels_without_masks_are_refused() -> None:
    language = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    evidence: Any = SimpleNamespace(language=language, layer=0)
    with pytest.raises(UserError, match="'flash_attention_2': looking ahead needs a mask"):
        list(looked_at(evidence, 2))


def test_operations_of_a_lookahead() -> None:
    """Counted by hand: hidden 8, intermediate 12, 4 heads of 2 with 2 key heads; 3 text and 10 visual tokens."""
    shape = Shape(hidden=8, intermediate=12, heads=4, key_heads=2, head_dim=2)
    still = 2 * 10 * 8 * (2 * 2) * 2  # keys and values
    text = 2 * 3 * 8 * (8 + 4 + 4 + 8) + 4 * 3 * 13 * 8 + 6 * 3 * 8 * 12
    assert lookahead_flops(shape, 2, 3, 10) == 2 * (still + text + 2 * 3 * 13 * 8)
