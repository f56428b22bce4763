"""What pruning changes in a model, refuses while it is enabled, and gives back."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

from mico.errors import UserError
from mico.packed.linear import PackedLinear
from mico.qat.linear import QATLinear
from mico.visual_tokens import METHODS, budgets, enable
from mico.visual_tokens.capture import turned
from tests.packed.making import pair_of
from tests.visual_tokens.tiny import VISUAL, batched, generated, llava, logits, picture, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


def state(model: Any) -> Any:
    """All that could be left behind: attributes of instances, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: (sorted(vars(module)), *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_restored(method: str) -> None:
    model, inputs = llava(), dict(input_ids=prompt(3, 6), pixel_values=picture())
    dense = logits(model, **inputs)  # transformers hangs hooks of its own on a vision tower when it first runs
    before = state(model)
    with enable(model, 9, method, positions=lambda sample: {1}):
        assert state(model) != before and not torch.equal(logits(model, **inputs), dense)
    assert state(model) == before and torch.equal(logits(model, **inputs), dense)
    with pytest.raises(RuntimeError, match="from within"), enable(model, 9, method):
        raise RuntimeError("from within")
    assert state(model) == before


def test_a_forward_of_the_callers_own_is_given_back() -> None:
    model = llava()
    own = model.model.language_model.forward
    model.model.language_model.forward = lambda *a, **k: own(*a, **k)
    mine = model.model.language_model.forward
    with enable(model, 9):
        assert model.model.language_model.forward is not mine
    assert model.model.language_model.forward is mine


def aware(model: Any) -> Any:
    """Every Linear of the language model's layers made quantization-aware."""
    for layer in model.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, QATLinear.of(linear, 4, 16))
    return model


@pytest.mark.parametrize(
    "made", [lambda: pair_of(llava(), "mico").packed, lambda: aware(llava())], ids=["packed", "qat"]
)
def test_compressed_models_prune(made: Callable[[], Any]) -> None:
    model, inputs = made(), dict(input_ids=prompt(3, 6), pixel_values=picture())
    kind = type(model.model.language_model.layers[0].self_attn.q_proj)
    assert kind in (PackedLinear, QATLinear)
    dense = logits(model, **inputs)
    with enable(model, VISUAL):
        assert float((logits(model, **inputs) - dense).abs().max()) < 1e-5
    with enable(model, 9) as pruning:
        ids, scores = generated(model, **inputs)
        again, expected = generated(model, **inputs, use_cache=False)
    assert torch.equal(ids, again) and float((scores - expected).abs().max()) < 1e-4
    assert pruning.trace.equal_tokens(0) == 9


def test_nothing_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public code takes its budget from a misspelt variable when it is imported."""
    for name, value in (("RETAIN_TOKN", "64"), ("RETAIN_TOKEN", "64"), ("USE_VERSION", "1_0")):
        monkeypatch.setenv(name, value)
    for path in Path(budgets.__file__).parent.glob("*.py"):
        assert "environ" not in path.read_text("utf-8") and "getenv" not in path.read_text("utf-8")
    fresh = importlib.util.spec_from_file_location("fresh_budgets", budgets.__file__)
    module = importlib.util.module_from_spec(fresh)
    monkeypatch.setitem(sys.modules, "fresh_budgets", module)  # where dataclasses look their module up
    fresh.loader.exec_module(module)
    assert module.progressive("2.0")(192.0, 576, 32).keep == (300, 200, 118)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(retain=0), "retain=0: give a whole number"),
        (dict(retain=1.5), "retain=1.5: .* a share above 0.0 and up to 1.0"),
        (dict(retain="192"), "retain='192': give a whole number of tokens"),
        (dict(retain=True), "retain=True: give a whole number of tokens"),
        (dict(retain=9, method="best"), "token method 'best': choose from sparsevlm, mico, fastv, cls, random, oracle"),
        (dict(retain=9, version="3.0"), "SparseVLM version '3.0': choose from 1.0, 2.0"),
        (dict(retain=9, method="cls", adaptive=True), "method 'cls' has no raters"),
    ],
)
def test_wrong_values(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        enable(model, **options)


def test_other_models(model: Any) -> None:
    with pytest.raises(UserError, match=r"^LlamaModel: visual tokens are pruned in LlavaForConditionalGeneration and"):
        enable(model.model.language_model, 9)
    with enable(model, 9), pytest.raises(UserError, match="enabled in this model already"):
        enable(model, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_attentions=True), "output_attentions: not with token pruning"),
        (dict(output_hidden_states=True), "output_hidden_states: not with token pruning"),
        (dict(attention_mask=torch.ones(1, 1, 45, 45)), r"attention_mask of shape \(1, 1, 45, 45\)"),
    ],
)
def test_what_a_forward_cannot_do(model: Any, options: dict[str, Any], message: str) -> None:
    with enable(model, 9), pytest.raises(UserError, match=message):
        model(input_ids=prompt(3, 6), pixel_values=picture(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cache_implementation="static"), "StaticCache: token pruning needs a DynamicCache"),
        (dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens: not with token pruning"),
        (dict(assistant_model=object()), "assistant_model: not with token pruning"),
        (dict(prefill_chunk_size=8), "prefill_chunk_size: not with token pruning"),
    ],
)
def test_what_generate_cannot_do(model: Any, options: dict[str, Any], message: str) -> None:
    with enable(model, 9), pytest.raises(UserError, match=message):
        generated(model, input_ids=prompt(3, 6), pixel_values=picture(), **options)


def test_static_caches_of_the_caller(model: Any) -> None:
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with enable(model, 9), pytest.raises(UserError, match="StaticCache"):
        model(input_ids=prompt(3, 6), pixel_values=picture(), past_key_values=cache)


def test_embeddings_without_ids(model: Any) -> None:
    embeds = torch.zeros(1, 5, 32)
    with enable(model, 9), pytest.raises(UserError, match="reads input_ids"):
        model(inputs_embeds=embeds)
    with enable(model, 9), pytest.raises(UserError, match="reads input_ids"):
        model.generate(inputs_embeds=embeds)


def test_no_question(model: Any) -> None:
    inputs = dict(input_ids=prompt(5, 0), pixel_values=picture())
    for method in ("sparsevlm", "fastv"):
        with enable(model, 9, method), pytest.raises(UserError, match=r"^sample 0: no question behind its image"):
            logits(model, **inputs)
    with enable(model, 9, "cls"):
        logits(model, **inputs)


def test_an_image_behind_a_cache(model: Any) -> None:
    with enable(model, 9):
        cache = model(input_ids=prompt(4, 0, visual=0), use_cache=True).past_key_values
        with pytest.raises(UserError, match="an image behind 4 cached tokens"):
            model(input_ids=prompt(3, 6), pixel_values=picture(), past_key_values=cache)


@pytest.mark.parametrize("method", ["sparsevlm", "cls"])
def test_a_cache_goes_on_as_a_copy_and_inside_a_later_enable(model: Any, method: str) -> None:
    start, step = dict(input_ids=prompt(3, 6), pixel_values=picture()), dict(input_ids=torch.tensor([[9, 11]]))
    with enable(model, 9, method), torch.no_grad():
        cache = model(**start, use_cache=True).past_key_values
        copied, kept = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = model(**step, past_key_values=cache).logits
        assert torch.equal(model(**step, past_key_values=copied).logits, expected)
    with enable(model, 20, method):
        assert torch.equal(logits(model, **step, past_key_values=kept), expected)


def test_an_emptied_cache_starts_anew(model: Any) -> None:
    inputs, text = dict(input_ids=prompt(3, 6), pixel_values=picture()), dict(input_ids=prompt(4, 3, visual=0))
    with enable(model, 9), torch.no_grad():
        first = model(**inputs, use_cache=True)
        cache = first.past_key_values
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this release of transformers fills an emptied cache with zeros")
        assert torch.equal(model(**inputs, past_key_values=cache).logits, first.logits)
        cache.reset()
        model(**text, past_key_values=cache)
        found = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits
    expected = logits(model, input_ids=torch.cat((text["input_ids"], torch.tensor([[9]])), 1))
    assert torch.allclose(found[:, -1], expected[:, -1], atol=1e-5)


def test_layers_of_a_schedule_are_the_same_for_all_samples(model: Any) -> None:
    """Of samples with unlike numbers of visual tokens."""

    def schedule(mean: float, visual: int, depth: int) -> budgets.Schedule:
        return budgets.Schedule(visual, depth, (visual // VISUAL % 2,), (5,), (0,))

    own = replace(METHODS["random"], name="own", schedule=schedule)
    inputs = batched(torch.cat((prompt(3, 2), prompt(2, 4)), 1), prompt(3, 6))
    with enable(model, 9, own), pytest.raises(UserError, match=r"layers \(0,\) for one sample .* \(1,\) for another"):
        logits(model, **inputs, pixel_values=picture(count=3))


def test_rope_follows_the_queries_to_their_device() -> None:
    """Layers of a model may lie on several devices, its RoPE is made on one."""
    angles = torch.zeros(1, 5, 4)
    assert turned(torch.zeros(1, 2, 5, 4, device="meta"), (angles, angles)).device.type == "meta"


def test_the_oracle_must_be_told(model: Any) -> None:
    with enable(model, 9, "oracle"), pytest.raises(UserError, match="give `positions`"):
        logits(model, input_ids=prompt(3, 6), pixel_values=picture())


def test_a_window_that_is_too_short() -> None:
    model = llava("mistral", sliding_window=40)
    with enable(model, 9), pytest.raises(UserError, match="45 tokens in a sliding window of 40"):
        logits(model, input_ids=prompt(3, 6), pixel_values=picture())


def test_cls_scores_are_of_the_pictures_at_hand(model: Any) -> None:
    ids = prompt(3, 6)
    with enable(model, 9, "cls"):
        ahead = model.get_image_features(pixel_values=picture(0))
        model(input_ids=ids, mm_encoder_outputs={"image": ahead})
        model.get_image_features(pixel_values=picture(1))
        with pytest.raises(UserError, match="mm_encoder_outputs of other pictures"):
            model(input_ids=ids, mm_encoder_outputs={"image": ahead})
        two = dict(input_ids=torch.cat((ids, ids)))
        ahead = model.get_image_features(pixel_values=torch.cat((picture(0), picture(1))))
        model.get_image_features(pixel_values=torch.cat((picture(0), picture(2))))  # the first one is the same
        with pytest.raises(UserError, match="mm_encoder_outputs of other pictures"):
            model(**two, mm_encoder_outputs={"image": ahead})


def test_cls_scores_are_the_towers_attention() -> None:
    """Against eager attention of the layer whose output the projector sees (-2: the last but one)."""
    model, pixels = llava(), picture(count=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model.model.vision_tower(pixels, output_attentions=True).attentions
    ids = torch.cat([prompt(3, 6)] * 2)
    for layer in (-2, -1, 1):
        model.config.vision_feature_layer = layer
        expected = attention[layer - 1 if layer > 0 else layer].mean(1)[:, 0, 1:]
        with enable(model, 9, "cls") as pruning:
            logits(model, input_ids=ids, pixel_values=pixels)
        assert pruning.trace.kept[0] == [sorted(row.topk(9).indices.tolist()) for row in expected]
