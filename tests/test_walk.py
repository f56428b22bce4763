"""The block loop against hooks on the whole model: whatever a block is shown is what it really gets."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from mico.adapters import family_of
from mico.adapters.family import Family, lookup, waves
from mico.channels.meters import SecondMoments
from mico.data import token_batches
from mico.errors import UserError
from mico.packed.experts import unfuse
from mico.packed.quantized import QuantizedWeight
from mico.walk import Block, walk

VOCABULARY, TOKENS, WINDOWS, BATCH = 80, 20, 5, 2  # the last batch is smaller
SHARED: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32
)
LLAMA: dict[str, Any] = SHARED | dict(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False)
OPT: dict[str, Any] = SHARED | dict(ffn_dim=48, word_embed_proj_dim=32)
CONFIGS: dict[str, Any] = {
    "opt": lambda: OPTConfig(**OPT),  # with its dropout of 0.1, which must not run
    "opt-350m": lambda: OPTConfig(**OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "llama": lambda: LlamaConfig(**LLAMA),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=6),
    "qwen2-mixed": lambda: Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**LLAMA | dict(num_hidden_layers=2), head_dim=16),
}  # fmt: skip


def build(name: str) -> Any:
    """A model with random weights, biases and norms; the global generator is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(1))


class Rows:
    """A meter that keeps what it is shown."""

    def __init__(self, channels: int) -> None:
        self.channels, self.batches = channels, []

    def add(self, x_TC: Tensor) -> None:
        assert x_TC.shape[1] == self.channels and not x_TC.requires_grad
        self.batches.append(x_TC.clone())


def hooked(model: Any, batch_size: int = BATCH) -> dict[tuple[int, str], list[Tensor]]:
    """Inputs of every stream of every block, batch by batch, in plain forwards of the whole model."""
    family, found, handles = family_of(model.config), {}, []
    for index, block in enumerate(lookup(model, family.blocks).children()):
        for stream in family.streams:
            rows = found.setdefault((index, stream.name), [])
            keep = lambda _, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]).clone())  # noqa: E731
            handles.append(lookup(block, stream.linears[0]).register_forward_pre_hook(keep))
    with torch.no_grad():
        for ids_BT in ids().split(batch_size):
            model(input_ids=ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def disturb(block: Block, path: str, seed: int = 0) -> None:
    """Replace a weight (and a bias where there is one) by something quite different."""
    linear = lookup(block.module, path)
    assert isinstance(linear, nn.Linear)
    generator = torch.Generator().manual_seed(seed + block.index)
    value_RC = linear.weight.detach() * (torch.rand(linear.weight.shape, generator=generator) > 0.5)
    none, label_C = torch.zeros(0, 1, dtype=torch.float16), torch.zeros(linear.in_features, dtype=torch.int64)
    bias_R = None if linear.bias is None else linear.bias.detach() + 0.1
    block.replace(path, QuantizedWeight(value_RC.half(), none, None, None, (16,), label_C), bias_R)


@torch.no_grad()
def logits_after(model: Any, family: Family, block: Block) -> list[Tensor]:
    """What the walk's inputs of a block become in it and in what follows the blocks: logits, for the last one."""
    outputs = []
    for x_BTC in block._walker.inputs:
        x_BTC = block._run(block.module, x_BTC)
        for path in family.after:
            x_BTC = lookup(model, path)(x_BTC)
        outputs.append(x_BTC)
    return outputs


@torch.no_grad()
def logits(model: Any, batch_size: int = BATCH) -> list[Tensor]:
    return [model(input_ids=ids_BT, use_cache=False).logits for ids_BT in ids().split(batch_size)]


@pytest.mark.parametrize("batch_size", [2, 8])
def test_measured_inputs_and_final_states_are_those_of_a_whole_forward(model, batch_size):
    family, expected = family_of(model.config), hooked(model, batch_size)
    for block in walk(model, family, token_batches(ids(), batch_size)):
        for name, meter in block.measure(Rows).items():
            same(meter.batches, expected.pop((block.index, name)))
        final = logits_after(model, family, block)
    assert not expected
    same(final, logits(model, batch_size))


def test_moments_are_those_of_the_hooked_inputs(model):
    expected = hooked(model)
    for block in walk(model, family_of(model.config), token_batches(ids(), BATCH)):
        for name, moments in block.measure(SecondMoments.empty).items():
            x_TC = torch.cat(expected[block.index, name]).double()
            assert moments.count == WINDOWS * TOKENS
            gram_CC = x_TC.T @ x_TC
            torch.testing.assert_close(moments.gram_CC, gram_CC, rtol=1e-5, atol=1e-5 * float(gram_CC.abs().max()))
            torch.testing.assert_close(moments.sum_C, x_TC.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measure_first", [False, True])
def test_a_block_gets_what_the_compressed_blocks_before_it_produce(model, measure_first):
    """Outputs kept from a measuring pass are not used once a weight of the block has changed."""
    family, dense = family_of(model.config), hooked(model)
    before, after = {}, {}
    for block in walk(model, family, token_batches(ids(), BATCH)):
        if measure_first:
            before |= {(block.index, name): meter.batches for name, meter in block.measure(Rows).items()}
        for linears in block.streams.values():
            for path in linears:
                disturb(block, path)
        after |= {(block.index, name): meter.batches for name, meter in block.measure(Rows).items()}
        if block.index == 0:
            disturb(block, family.streams[0].linears[0], seed=5)  # and after the last measuring pass
            after |= {(0, name): meter.batches for name, meter in block.measure(Rows).items()}
        final = logits_after(model, family, block)
    modified, first = hooked(model), family.streams[0].name
    for key, batches in after.items():
        same(batches, modified[key])
    for (index, name), batches in before.items():
        if name == first:
            same(batches, modified[index, name])  # what the first stream reads does not depend on its own block
    assert not torch.allclose(modified[1, first][0], dense[1, first][0], atol=1e-2)
    same(final, logits(model))


def test_outputs_of_a_measuring_pass_are_dropped_by_a_replacement():
    model = build("llama")
    family = family_of(model.config)
    found = {}
    for block in walk(model, family, token_batches(ids(), BATCH)):
        found |= {(block.index, n): m.batches for n, m in block.measure(Rows, streams=["attn_in"]).items()}
        block.measure(Rows)
        disturb(block, "mlp.down_proj")
    modified = hooked(model)
    for key, batches in found.items():
        same(batches, modified[key])


def test_asking_for_some_streams_stops_before_the_rest():
    model = build("llama")
    expected, calls = hooked(model), []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    blocks = walk(model, family_of(model.config), token_batches(ids(), BATCH))
    block = next(blocks)
    found = block.measure(Rows, streams=["attn_in", "attn_out"])
    assert list(found) == ["attn_in", "attn_out"] and not calls
    for name, meter in found.items():
        same(meter.batches, expected[0, name])
    next(blocks)
    assert len(calls) == 3  # once a batch, on the way out
    handle.remove()


def test_paired_moments_hold_the_dense_models_inputs_beside_the_compressed_ones(model):
    """In dependency order: streams before the measured one are already replaced, in this block too."""
    family, original = family_of(model.config), copy.deepcopy(model)
    found = {}
    for block in walk(model, family, token_batches(ids(), BATCH), paired=True):
        for name, linears in block.streams.items():
            found[block.index, name] = block.measure_paired(name)
            for path in linears:
                disturb(block, path)
    dense, modified = hooked(original), hooked(model)
    assert found.keys() == dense.keys()
    for key, paired in found.items():
        x, x_hat = (torch.cat(rows[key]).double() for rows in (dense, modified))
        limit = dict(rtol=1e-4, atol=2e-5 * float((x.T @ x_hat).abs().max()))
        assert paired.total.count == len(x)
        torch.testing.assert_close(paired.dense_sum_C, x.sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(paired.total.sum_C, x_hat.sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(paired.cross_CC, x.T @ x_hat, **limit)
        torch.testing.assert_close(paired.total.gram_CC, x_hat.T @ x_hat, **limit)
        if key != (0, family.streams[0].name):
            assert not torch.allclose(x, x_hat, atol=1e-2)


def test_the_original_model_is_changed_only_where_weights_were_replaced(model):
    family, before = family_of(model.config), copy.deepcopy(model.state_dict())
    for block in walk(model, family, token_batches(ids(), BATCH), paired=True):
        block.measure_paired("mlp_in")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = set()
    for block in walk(model, family, token_batches(ids(), BATCH)):
        path = family.streams[-1].linears[0]
        disturb(block, path)
        linear = lookup(model, block.name_of(path))
        changed |= {block.name_of(path) + ".weight"} | (
            {block.name_of(path) + ".bias"} if linear.bias is not None else set()
        )
    differ = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert differ == changed


def test_windows_shorter_than_the_text_are_really_in_force():
    """The check of the sliding window above is not empty: without the window the inputs are others."""
    model = build("mistral")
    with_window = hooked(model)[1, "attn_in"]
    model.config.sliding_window = None
    assert not torch.allclose(with_window[0], hooked(model)[1, "attn_in"][0], atol=1e-3)


@pytest.mark.parametrize("batch", [0, 2])
def test_not_a_number_is_named_with_block_stream_and_batch(batch):
    model, text = build("llama"), ids().clamp(max=VOCABULARY - 2)
    text[batch * BATCH, 3] = VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = float("nan")
    block = next(walk(model, family_of(model.config), token_batches(text, BATCH)))
    with pytest.raises(UserError, match=rf"block 0, stream attn_in, batch {batch}: .*NaN or Inf"):
        block.measure(SecondMoments.empty)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mended", [False, True])
def test_an_overflow_on_either_path_is_named(mended):
    """A weight of block 0 that overflows; `mended` puts a finite one there, so that only the dense path does."""
    model = build("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight[4] = float("inf")
    for block in walk(model, family_of(model.config), token_batches(ids(), BATCH), paired=True):
        if block.index == 1:
            with pytest.raises(UserError, match=r"block 1, stream mlp_in, batch 0: .*NaN or Inf"):
                block.measure_paired("mlp_in")
            break
        if mended:
            with torch.no_grad():
                block.module.fc2.weight[4] = 0.0
            disturb(block, "fc2")


def test_no_global_state_is_touched():
    model = build("opt")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    blocks = walk(model, family_of(model.config), token_batches(ids(), BATCH), paired=True)
    for block in blocks:
        assert torch.is_grad_enabled()  # also between the blocks, and so after an abandoned walk
        block.measure(Rows)
        block.measure_paired("attn_out")
        disturb(block, "fc1")
        assert all(not x_BTC.requires_grad for x_BTC in block._walker.inputs)
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert (states[1] == np.random.get_state()[1]).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_walk_is_the_same_twice(model):
    first, second = ([], [])
    for found in (first, second):
        for block in walk(model, family_of(model.config), token_batches(ids(), BATCH)):
            found += [m.gram_CC for m in block.measure(SecondMoments.empty).values()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fails", ["embedding", "norm", "meter"])
def test_forwards_and_hooks_are_put_back_after_an_error(fails):
    model = build("llama")
    family, expected, text = family_of(model.config), logits(model), ids()

    class Broken(Rows):
        def add(self, x_TC: Tensor) -> None:
            raise RuntimeError("full")

    def refuse(*_: Any) -> None:
        raise RuntimeError("full")

    handle = None
    if fails == "embedding":
        text[3, 3] = VOCABULARY + 5
    if fails == "norm":
        handle = model.model.norm.register_forward_pre_hook(refuse)
    with pytest.raises((IndexError, RuntimeError)):
        next(walk(model, family, token_batches(text, BATCH))).measure(Broken)
    if handle is not None:
        handle.remove()
    assert all("forward" not in vars(block) for block in model.model.layers)
    assert all(not module._forward_pre_hooks for module in model.modules())
    same(logits(model), expected)


def test_names_are_those_of_the_model():
    model = build("opt-350m")
    for block in walk(model, family_of(model.config), token_batches(ids(), BATCH)):
        for linears in block.streams.values():
            for path, linear in linears.items():
                assert model.get_submodule(block.name_of(path)) is linear


# --- experts --------------------------------------------------------------------------------------------------------

EXPERTS = 4


def routed_model() -> Any:
    """A Mixtral of four experts, two a token; the router of block 1 never chooses the last."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixtralConfig(**LLAMA, num_local_experts=EXPERTS + 1, num_experts_per_tok=2)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        left, right = torch.randn(2, 32)
        rows = torch.stack([left, -left, right, -right, torch.zeros(32)])  # two of them are always above zero
        model.model.layers[1].mlp.gate.weight.copy_(rows)
    unfuse(model)
    return model


@torch.no_grad()
def routed(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What the experts of every block get in plain forwards: (rows of all tokens, indices of the chosen experts)."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.model.layers]
    handles = [
        block.mlp.experts.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[:2]))
        for block, kept in zip(model.model.layers, found, strict=True)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return [tuple(torch.cat(parts) for parts in zip(*kept, strict=True)) for kept in found]  # type: ignore[misc]


def inner(expert: Any, x_TC: Tensor) -> Tensor:
    return nn.functional.silu(x_TC @ expert.gate_proj.weight.T) * (x_TC @ expert.up_proj.weight.T)


def test_an_expert_is_measured_on_the_tokens_it_gets_and_on_no_others():
    model = routed_model()
    expected = routed(model)
    for block in walk(model, family_of(model.config), token_batches(ids(), BATCH)):
        x_TC, index_TK = expected[block.index]
        found = block.measure(SecondMoments.empty)
        for e in range(EXPERTS + 1):
            mine_TC = x_TC[(index_TK == e).any(1)]
            assert found[f"experts.{e}.in"].count == found[f"experts.{e}.out"].count == len(mine_TC)
            limit = dict(rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found[f"experts.{e}.in"].gram_CC, (mine_TC.T @ mine_TC).double(), **limit)
            y_TC = inner(block.module.mlp.experts.experts[e], mine_TC)
            torch.testing.assert_close(found[f"experts.{e}.out"].gram_CC, (y_TC.T @ y_TC).double(), **limit)
        assert sum(found[f"experts.{e}.in"].count for e in range(EXPERTS + 1)) == 2 * WINDOWS * TOKENS
    assert found["experts.0.in"].count > 0
    assert (expected[1][1] != EXPERTS).all(), "one expert of block 1 gets no token"


def test_both_paths_of_an_expert_hold_the_same_tokens():
    """Those that the compressed model sends to it, also where the dense model sends them elsewhere."""
    model = routed_model()
    family, original, found = family_of(model.config), copy.deepcopy(model), {}
    for block in walk(model, family, token_batches(ids(), BATCH), paired=True):
        for wave in block.waves():
            found |= {(block.index, name): pair for name, pair in block.measure_wave(wave).items()}
            for stream in wave:
                for path in stream.linears:
                    disturb(block, path)
    dense, modified = routed(original), routed(model)
    assert any((d[1] != m[1]).any() for d, m in zip(dense, modified, strict=True)), "they route alike: nothing is shown"
    for index, ((x_TC, _), (hat_TC, index_TK)) in enumerate(zip(dense, modified, strict=True)):
        for e in range(EXPERTS + 1):
            mine_T = (index_TK == e).any(1)
            x, x_hat = x_TC[mine_T], hat_TC[mine_T]
            experts = [m.model.layers[index].mlp.experts.experts[e] for m in (original, model)]
            for side, a, b in (("in", x, x_hat), ("out", inner(experts[0], x), inner(experts[1], x_hat))):
                pair = found[index, f"experts.{e}.{side}"]
                assert pair.total.count == len(x) and (len(x) == 0) == (index == 1 and e == EXPERTS)
                limit = dict(rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(pair.cross_CC, (a.T @ b).double(), **limit)
                torch.testing.assert_close(pair.total.gram_CC, (b.T @ b).double(), **limit)
                torch.testing.assert_close(pair.dense_sum_C, a.sum(0).double(), **limit)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_experts_are_measured_together_as_far_as_memory_goes(monkeypatch):
    model = routed_model()
    family = family_of(model.config)
    names = [[s.name for s in wave] for wave in waves(family.streams)]
    every = range(EXPERTS + 1)
    assert names == [["attn_in"], ["attn_out"], [f"experts.{e}.in" for e in every], [f"experts.{e}.out" for e in every]]
    assert [len(wave) for wave in waves(family_of(build("llama").config).streams)] == [1, 1, 1, 1]
    block = next(walk(model, family, token_batches(ids(), BATCH), paired=True))
    assert [[s.name for s in wave] for wave in block.waves()] == names
    monkeypatch.setattr("mico.walk.MOMENTS_BYTES", 2 * 4 * 8 * 48**2)  # two streams of 48 channels, four of 32
    assert [len(wave) for wave in block.waves()] == [1, 1, 4, 1, 2, 2, 1]
    for wave in block.waves():
        together = block.measure_wave(wave)
        for name, pair in together.items():
            assert torch.equal(pair.cross_CC, block.measure_paired(name).cross_CC)
