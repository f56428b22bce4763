"""Experts as Linears compute what the fused ones of transformers do, and are saved under the names of their format."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mico.adapters import family_of
from mico.checkpoint import packed_config, set_execution
from mico.loading import quiet
from mico.packed.experts import ExpertList, any_expert, fuse, fused_for_loading, is_fused, per_expert, unfuse
from mico.packed.linear import PackedLinear
from tests.packed.making import Pair, pair_of

SHAPE: dict[str, Any] = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2, initializer_range=0.3,
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=12),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SHAPE, num_experts=5, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, num_experts=5, moe_intermediate_size=24, head_dim=16),
}
STORED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w3.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.3.up_proj.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.3.up_proj.weight",
}
IDS = torch.arange(40).view(2, 20) * 7 % 80


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def load(folder: Path, **options: Any) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def save(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_list_computes_what_the_fused_experts_do(name: str) -> None:
    model = build(name)
    model.set_experts_implementation("eager")
    expected = logits(model)
    fused = model.model.layers[1].mlp.experts
    assert unfuse(model) and not unfuse(model), "a second time there is nothing to do"
    listed = model.model.layers[1].mlp.experts
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    up, rows = listed.get_submodule("3.up_proj"), fused.gate_up_proj.shape[1] // 2
    assert torch.equal(up.weight, fused.gate_up_proj[3, rows:])
    assert up.weight.untyped_storage().data_ptr() == fused.gate_up_proj.untyped_storage().data_ptr(), "no copy"


def test_a_routed_sum_by_hand() -> None:
    """Every token is the weighted sum of its own experts; an expert that nobody chose is not called."""
    model = build("mixtral")
    unfuse(model)
    experts = model.model.layers[0].mlp.experts
    make = torch.Generator().manual_seed(1)
    x_TC, weight_TK = torch.randn(9, 32, generator=make), torch.rand(9, 3, generator=make)
    index_TK = torch.stack([torch.randperm(11, generator=make)[:3] for _ in range(9)])  # never the last of twelve
    called: list[int] = []
    for number, expert in enumerate(experts.experts):
        expert.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    found = experts(x_TC, index_TK, weight_TK)
    assert called == sorted(set(index_TK.flatten().tolist()))
    for token in range(9):
        expected = torch.zeros(32)
        for place in range(3):
            expert = experts.experts[index_TK[token, place]]
            gate, up = (linear.weight @ x_TC[token] for linear in (expert.gate_proj, expert.up_proj))
            expected += weight_TK[token, place] * (expert.down_proj.weight @ (nn.functional.silu(gate) * up))
        torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loaded", [False, True])
def test_dense_models_are_saved_as_transformers_saves_them(name: str, loaded: bool, tmp_path: Path) -> None:
    model = build(name)
    plain = save(model, tmp_path / "plain")
    assert STORED[name] in load_file(plain / "model.safetensors")
    if loaded:
        model = load(plain)
    unfuse(model)
    listed = save(model, tmp_path / "listed")
    fuse(model)
    assert not any(isinstance(module, ExpertList) for module in model.modules())
    again = save(model, tmp_path / "again")
    for folder in (listed, again):
        assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert torch.equal(logits(model), logits(build(name)))


def test_copies_are_independent() -> None:
    model = build("mixtral")
    unfuse(model)
    expected, other = logits(model), copy.deepcopy(model)
    other.model.layers[0].mlp.experts.experts[2].up_proj.weight.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)


def test_weights_are_loaded_into_the_fused_form() -> None:
    model = build("qwen3_moe")
    unfuse(model)
    block, expected = model.model.layers[0], logits(model)
    kept, source = block.mlp.experts, build("qwen3_moe").model.layers[0].mlp.experts
    for _ in range(2):
        with fused_for_loading(block):
            inside = block.mlp.experts
            assert is_fused(inside) and inside.gate_up_proj.is_meta
            inside.gate_up_proj, inside.down_proj = source.gate_up_proj, source.down_proj
        assert block.mlp.experts is kept and torch.equal(logits(model), expected)


def test_other_modules_are_no_fused_experts() -> None:
    experts = build("mixtral").model.layers[0].mlp.experts
    assert is_fused(experts) and not is_fused(nn.Linear(3, 3))
    for name, value in (("has_bias", True), ("is_transposed", True), ("is_concatenated", False)):
        changed = copy.deepcopy(experts)
        setattr(changed, name, value)
        assert not is_fused(changed)


def test_conversions_of_models_without_experts_stay() -> None:
    steps = ["first", "second"]
    assert per_expert(steps) == steps


def test_numbers_of_experts() -> None:
    assert any_expert("model.layers.3.mlp.experts.12.up_proj") == ("model.layers.3.mlp.experts.*.up_proj", "12")
    assert any_expert("model.layers.3.mlp.shared_expert.up_proj")[1] is None


# --- packed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Pair, Path]]:
    found = {}
    for name in CONFIGS:
        model = build(name)
        unfuse(model)
        pair = pair_of(model)
        found[name] = pair, pair.save(tmp_path_factory.mktemp(name))
    return found


def test_packed_weights_have_the_names_of_the_base_model(name: str, packed: Any) -> None:
    stored = load_file(packed[name][1] / "model.safetensors")
    assert stored[STORED[name]].dim() == 1 and stored[STORED[name]].dtype == torch.uint8
    router = STORED[name].partition("experts")[0] + "gate.weight"
    assert stored[router].dim() == 2, "the router stays dense"
    dense = save(build(name), packed[name][1].parent / f"{name}-dense")
    assert stored.keys() == load_file(dense / "model.safetensors").keys()


def test_packed_experts_load_and_save_to_the_same_bytes(name: str, packed: Any, tmp_path: Path) -> None:
    pair, folder = packed[name]
    model = load(folder)
    assert isinstance(model.model.layers[0].mlp.experts.get_submodule("3.up_proj"), PackedLinear)
    set_execution(model, "dense")
    assert torch.equal(logits(model), logits(pair.dense)) and torch.equal(logits(pair.packed), logits(pair.dense))
    again, third = save(model, tmp_path / "again"), save(pair.packed, tmp_path / "third")
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert (third / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_dequantize_gives_the_model_of_transformers(name: str, packed: Any, tmp_path: Path) -> None:
    pair, folder = packed[name]
    dense = load(folder).dequantize()
    assert is_fused(dense.model.layers[0].mlp.experts)
    save(dense, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(config)
    plain = load(tmp_path)
    torch.testing.assert_close(logits(plain), logits(pair.dense), rtol=1e-4, atol=1e-4)
    unfuse(plain)
    assert torch.equal(logits(plain), logits(pair.dense))


def test_one_entry_stands_for_all_experts() -> None:
    config = packed_config(family_of(CONFIGS["mixtral"]()))
    assert config.streams[-1] == ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"] and len(config.streams) == 2
    assert config.leader("model.layers.3.mlp.experts.11.up_proj") == "model.layers.3.mlp.experts.11.gate_proj"
    assert config.leader("layers.3.mlp.experts.11.gate_proj") == "layers.3.mlp.experts.11.gate_proj"
    assert config.leader("layers.3.mlp.experts.11.down_proj") == "layers.3.mlp.experts.11.down_proj"


def test_an_expert_that_is_missing_is_named(packed: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed["mixtral"][1], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[STORED["mixtral"]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight is not in the checkpoint"
    ):
        load(folder)


def test_generate_with_packed_experts(packed: Any) -> None:
    pair, folder = packed["qwen2_moe"]
    model, prompt = load(folder), torch.tensor([[5, 17, 31, 8]])
    options: Any = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(prompt, **options), pair.dense.generate(prompt, **options))
