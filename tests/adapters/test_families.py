"""The contract of every model family, on tiny models with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mico.adapters import FAMILIES, auto_class, family_of
from mico.adapters.family import linears_of, lookup
from mico.checkpoint import set_execution
from mico.errors import UserError
from mico.loading import coverage, load_model
from mico.packed.experts import unfuse
from tests.packed.making import logits, pair_of
from tests.tiny import train_tokenizer

TOKENS = 24
LLAMA: dict[str, Any] = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    vocab_size=80, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
)  # fmt: skip
MINICPM: dict[str, Any] = dict(LLAMA, scale_emb=12, scale_depth=1.4, dim_model_base=16)
MINICPM3: dict[str, Any] = dict(
    LLAMA, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=10, dim_model_base=16,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(LLAMA, moe_intermediate_size=24, num_experts_per_tok=2)


def llava(text: Any, kind: Any = LlavaConfig, **more: Any) -> Any:
    """A model that sees pictures of 2 x 2 patches."""
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return kind(vision_config=eyes, text_config=text, image_token_index=79, image_seq_length=4, **more)


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
    "mixtral": lambda: MixtralConfig(**LLAMA, num_local_experts=3),
    "qwen2-moe": lambda: Qwen2MoeConfig(**EXPERTS, num_experts=3, shared_expert_intermediate_size=40),
    "qwen3-moe": lambda: Qwen3MoeConfig(**EXPERTS, num_experts=3, head_dim=16),
    "minicpm": lambda: AutoConfig.for_model("minicpm", **MINICPM),
    "minicpm-tied": lambda: AutoConfig.for_model("minicpm", **{**MINICPM, "tie_word_embeddings": True}),
    "minicpm3": lambda: MiniCPM3Config(**MINICPM3),
    "minicpm3-full-queries": lambda: MiniCPM3Config(**{**MINICPM3, "q_lora_rank": None}),
    "llava": lambda: llava(LlamaConfig(**LLAMA)),
    "llava-next-mistral": lambda: llava(
        MistralConfig(**LLAMA), LlavaNextConfig, image_grid_pinpoints=[[8, 16], [16, 8]]
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """A model with random weights and biases, made without leaving a trace in the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIGS[name]()
        model = auto_class(config.model_type).from_config(config).eval().requires_grad_(False)
        unfuse(model)
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


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def test_every_linear_of_a_block_is_in_exactly_one_stream(model: Any) -> None:
    family = family_of(model.config)
    blocks = lookup(model, family.blocks)
    assert len(list(blocks.children())) == model.config.get_text_config().num_hidden_layers
    for block in blocks.children():
        listed = [path for stream in family.streams for path in linears_of(block, stream)]
        present = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
        assert sorted(listed) == sorted(path for path in present if not path.endswith("shared_expert_gate"))


def test_linears_of_a_stream_read_one_tensor_and_streams_read_different_ones(model: Any) -> None:
    for block in lookup(model, family_of(model.config).blocks).children():
        seen = stream_inputs(model, block)
        tensors = list(seen.values())
        for i, first in enumerate(tensors):
            for second in tensors[i + 1 :]:
                assert not same(first, second)


def test_streams_are_in_dependency_order(model: Any) -> None:
    """Changing a stream changes what a later one reads, and neither its own input nor an earlier one."""
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
            assert same(before[earlier.name], after[earlier.name])
        last = stream.linears[0].endswith(("down_proj", "fc2"))
        later = [s.name for s in streams[position + 1 :]]
        assert last or any(not same(before[name], after[name]) for name in later)
        for path, linear in linears.items():
            linear.weight.copy_(saved[path])


def test_before_blocks_and_after_hold_every_parameter_and_after_gives_the_logits(model: Any) -> None:
    family = family_of(model.config)
    parts = [lookup(model, path) for path in (*family.before, family.blocks, *family.after, *family.vision)]
    held = {id(parameter) for part in parts for parameter in part.parameters()}
    between = [parameter for name, parameter in model.named_parameters() if name == "model.image_newline"]
    assert held | {id(parameter) for parameter in between} == {id(parameter) for parameter in model.parameters()}

    outputs: list[Any] = []
    last = list(lookup(model, family.blocks).children())[-1]
    hook = last.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(input_ids=ids(), use_cache=False).logits
    hook.remove()
    hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    for path in family.after:
        hidden = lookup(model, path)(hidden)
    assert torch.equal(hidden / getattr(model.config, "logits_scaling", 1), logits)  # MiniCPM: a power of two here


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
    loader = auto_class(model.config.model_type)
    loaded = loader.from_pretrained(tmp_path, dtype=torch.float32, use_safetensors=True).eval()
    unfuse(loaded)
    assert torch.equal(loaded(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_packed_checkpoint_equals_the_dense_model(model: Any, tmp_path: Any) -> None:
    pair = pair_of(model)
    loaded = auto_class(model.config.model_type).from_pretrained(pair.save(tmp_path), dtype=torch.float32).eval()
    set_execution(loaded, "dense")
    assert torch.equal(logits(loaded), logits(pair.dense))


def test_streaming_equals_memory(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    streamed = load_model(str(tmp_path), device="cpu", dtype="float32", stream=True)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    with streamed.running():
        assert torch.equal(logits(streamed.model), logits(model))


def test_nearly_all_linear_parameters_are_covered(model: Any) -> None:
    assert 0.9 <= coverage(model, family_of(model.config)) <= 1


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


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "chatglm", "gpt_neox", None])
def test_other_families_are_refused_with_the_list(model_type: str | None) -> None:
    with pytest.raises(
        UserError, match=f"model_type {model_type!r} is not supported.*OPT.*Llama.*Qwen3.*Mixtral.*MiniCPM.*LLaVA"
    ) as caught:
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


def test_configs_that_a_family_does_not_hold_are_refused() -> None:
    with pytest.raises(UserError, match="num_experts 8"):
        family_of(AutoConfig.for_model("minicpm", **MINICPM, num_experts=8))
    with pytest.raises(UserError, match=r"language model 'opt' is not supported.*llama"):
        family_of(llava(OPTConfig(**OPT)))
