"""The contract of every model family, on tiny models with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

from mico.adapters import FAMILIES, family_of
from mico.adapters.family import linears_of, lookup
from mico.errors import UserError

TOKENS = 24
LLAMA: dict[str, Any] = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    vocab_size=80, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "opt-125m": lambda: OPTConfig(**OPT),
    "opt-350m": lambda: OPTConfig(**{**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-untied": lambda: OPTConfig(**OPT, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**LLAMA),
    "llama-tied-mha": lambda: LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-3.1-rope": lambda: LlamaConfig(
        **LLAMA,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral-window": lambda: MistralConfig(**LLAMA, sliding_window=TOKENS // 3, head_dim=16),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "qwen2-tied": lambda: Qwen2Config(**{**LLAMA, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
}  # fmt: skip


def build(name: str) -> Any:
    """A model with random weights and biases, made without leaving a trace in the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1: give them values too
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def ids() -> torch.Tensor:
    return torch.randint(2, 80, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@contextmanager
def inputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the first input of every module during a forward."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def stream_inputs(model: Any, block: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what each stream of a block reads, by stream, after checking that its Linears read one tensor."""
    streams = {stream.name: linears_of(block, stream) for stream in family_of(model.config).streams}
    flat: dict[str, nn.Module] = {path: linear for linears in streams.values() for path, linear in linears.items()}
    with inputs_of(flat) as seen:
        model(input_ids=ids(), use_cache=False)
    for linears in streams.values():
        assert len({id(seen[path]) for path in linears}) == 1
    return {name: seen[next(iter(linears))].clone() for name, linears in streams.items()}


def test_every_linear_of_a_block_is_in_exactly_one_stream(model: Any) -> None:
    family = family_of(model.config)
    blocks = lookup(model, family.blocks)
    assert len(list(blocks.children())) == model.config.num_hidden_layers
    for block in blocks.children():
        listed = [path for stream in family.streams for path in linears_of(block, stream)]
        present = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
        assert sorted(listed) == sorted(present)


def test_linears_of_a_stream_read_one_tensor_and_streams_read_different_ones(model: Any) -> None:
    for block in lookup(model, family_of(model.config).blocks).children():
        seen = stream_inputs(model, block)
        tensors = list(seen.values())
        for i, first in enumerate(tensors):
            for second in tensors[i + 1 :]:
                assert first.shape != second.shape or not torch.equal(first, second)


def test_streams_are_in_dependency_order(model: Any) -> None:
    """Changing a stream changes what the next one reads, and neither its own input nor an earlier one."""
    block = next(iter(lookup(model, family_of(model.config).blocks).children()))
    streams = family_of(model.config).streams
    before = stream_inputs(model, block)
    for position, stream in enumerate(streams):
        linears = linears_of(block, stream)
        saved = {path: linear.weight.clone() for path, linear in linears.items()}
        for linear in linears.values():
            linear.weight.mul_(1.7)
        after = stream_inputs(model, block)
        for earlier in streams[: position + 1]:
            assert torch.equal(before[earlier.name], after[earlier.name])
        if position + 1 < len(streams):
            following = streams[position + 1].name
            assert not torch.equal(before[following], after[following])
        for path, linear in linears.items():
            linear.weight.copy_(saved[path])


def test_before_blocks_and_after_hold_every_parameter_and_after_gives_the_logits(model: Any) -> None:
    family = family_of(model.config)
    parts = [lookup(model, path) for path in (*family.before, family.blocks, *family.after)]
    held = {id(parameter) for part in parts for parameter in part.parameters()}
    assert held == {id(parameter) for parameter in model.parameters()}

    outputs: list[Any] = []
    last = list(lookup(model, family.blocks).children())[-1]
    hook = last.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(input_ids=ids(), use_cache=False).logits
    hook.remove()
    hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    for path in family.after:
        hidden = lookup(model, path)(hidden)
    assert torch.equal(hidden, logits)


def test_before_runs_before_the_first_block(model: Any) -> None:
    family = family_of(model.config)
    order: list[str] = []
    first = next(iter(lookup(model, family.blocks).children()))
    modules = {**{path: lookup(model, path) for path in family.before}, "block 0": first}
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, m in modules.items()]
    model(input_ids=ids(), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert sorted(order) == sorted(modules) and order[-1] == "block 0"


def test_save_and_load_is_exact(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, use_safetensors=True).eval()
    assert torch.equal(loaded(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_sliding_window_is_shorter_than_the_sequence() -> None:
    """The contract above covers a window that really cuts: a token beyond every layer's reach changes nothing."""
    model = build("mistral-window")
    assert model.config.sliding_window < TOKENS
    changed = ids()
    changed[:, 0] = (changed[:, 0] - 1) % 80
    reach = model.config.num_hidden_layers * (model.config.sliding_window - 1)
    plain, other = (model(input_ids=x, use_cache=False).logits for x in (ids(), changed))
    assert not torch.equal(plain[:, reach], other[:, reach])
    assert torch.equal(plain[:, reach + 1 :], other[:, reach + 1 :])


def test_shapes_differ_where_they_should() -> None:
    narrow, wide = family_of(build("opt-350m").config), family_of(build("opt-125m").config)
    assert "model.decoder.project_in" in narrow.before and "model.decoder.project_in" not in wide.before
    assert narrow.after == ("model.decoder.project_out", "lm_head")
    assert wide.after == ("model.decoder.final_layer_norm", "lm_head")


def test_each_family_is_tested() -> None:
    assert {family_of(make()).name for make in CONFIGS.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "chatglm", "mixtral", None])
def test_other_families_are_refused_with_the_list(model_type: str | None) -> None:
    with pytest.raises(UserError, match=f"model_type {model_type!r} is not supported.*OPT.*Llama.*Qwen3") as caught:
        family_of(SimpleNamespace(model_type=model_type))
    assert "\n" not in str(caught.value)


def test_a_missing_module_and_a_foreign_linear_are_named() -> None:
    model = build("llama")
    with pytest.raises(UserError, match=r"'model\.decoder' not found in LlamaForCausalLM"):
        lookup(model, "model.decoder.layers")
    block = model.model.layers[0]
    block.mlp.up_proj = nn.Identity()
    with pytest.raises(UserError, match=r"'mlp\.up_proj' is a Identity"):
        linears_of(block, family_of(model.config).streams[2])
