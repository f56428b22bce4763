"""A tiny LLaVA with learned widths: what it computes, keeps, packs and tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mico.errors import UserError
from mico.packed.blob import decode, encode
from mico.packed.linear import PackedLinear
from mico.qat.cmibq.levels import BITS
from mico.qat.cmibq.settings import Settings
from mico.qat.cmibq.wrap import (
    CMIBQ,
    bit_map,
    parameter_groups,
    quant_linears,
    quantized_weights,
    wrap,
)  # fmt: skip
from mico.qat.modules import put_module
from tests.qat.cmibq.making import batch, dense, made, settings, step


def logits(model: Any, seed: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(seed)).logits


def mixed(cmibq: CMIBQ) -> None:
    """All widths there are, chosen for good."""
    for kind in cmibq.kinds:
        kind.fix(torch.arange(len(kind.chosen_I)) * 7 % len(BITS))


def test_weights_keep_their_names_and_more_bits_come_nearer_to_the_dense_model() -> None:
    model, cmibq = made(trained=False)
    plain = dense()
    state = model.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), key
    errors = []
    for k in range(len(BITS)):
        for kind in cmibq.kinds:
            kind.fix(torch.full_like(kind.chosen_I, k))
        # on a batch of the calibration: others have values beyond what so few samples show
        errors.append(((logits(model, 9) - logits(plain, 9)).norm() / logits(plain, 9).norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.06 and errors[0] > 0.5


def test_a_tensor_is_quantized_once_for_all_its_readers() -> None:
    model, cmibq = made(trained=False)
    calls = []
    for quantizer in cmibq.inputs:
        quantizer.register_forward_hook(lambda module, args, output: calls.append(module))
    logits(model)
    assert len(calls) == len(cmibq.sites) == 18 and len(set(calls)) == 18
    assert all(reader._held is None for reader in cmibq.readers)  # nothing outlives the forward pass


@pytest.mark.parametrize("hard", [False, True])
def test_evaluation_takes_one_width_a_group_whether_or_not_bits_are_chosen(hard: bool) -> None:
    model, cmibq = made(trained=False)
    if hard:
        mixed(cmibq)
    cmibq.distribute()
    seen: list[tuple[Any, torch.Tensor]] = []
    for quantizer in [*cmibq.inputs, *cmibq.weights.quantizers]:
        quantizer.register_forward_hook(lambda module, args, output: seen.append((module, output)))
    logits(model)
    assert len(seen) == len(cmibq.inputs) + len(cmibq.weights.quantizers)
    for quantizer, output in seen:
        assert not quantizer.choice.soft
        for group, k in enumerate(quantizer.choice.chosen_G.tolist()):
            values = output[:, quantizer.label_C == group]
            most = max(len(row.unique()) for row in values) if quantizer.stored else len(values.unique())
            assert most <= 2 ** BITS[k]


def test_packed_weights_and_static_grids_compute_what_was_trained_bit_for_bit() -> None:
    model, cmibq = made(trained=False)
    mixed(cmibq)
    expected, weights = logits(model), quantized_weights(model)
    assert {len(weight.bits_G) for weight in weights.values()} == {1, 2, 4, 6}
    for name, module in quant_linears(model).items():
        assert torch.equal(weights[name].dequantize(), module.quantized())
        stored = decode(encode(weights[name]))
        assert torch.equal(stored.dequantize(), module.quantized()) and stored.bits_G == weights[name].bits_G
    bare = dense()
    for name, weight in weights.items():
        put_module(bare, name, _packed(bare.get_submodule(name), weight))
    without = logits(bare)
    for grid in cmibq.activation_grids().values():
        for name in grid.linears:
            bare.get_submodule(name).input_grid = grid.encoded()
    assert torch.equal(logits(bare), expected) and not torch.equal(without, expected)


def _packed(linear: nn.Linear, weight: Any) -> PackedLinear:
    blob = encode(weight)
    made = PackedLinear(linear.in_features, linear.out_features, len(blob), linear.bias)
    made.weight = blob
    made.execution = "dense"
    return made


def test_the_knapsack_meets_both_targets_on_what_training_measured() -> None:
    model, cmibq = made(target_bits_act=3.5, target_bits_weight=4.5)
    with pytest.raises(ValueError, match="no backward pass has measured"):
        cmibq.harden()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0))
    step(model, optimizer, 0.9, 0)
    with cmibq.measuring():
        model(**batch(1)).loss.backward()
    cmibq.harden()
    found = bit_map(model)
    assert 3.48 <= found["averages"]["activations"] <= 3.5 + 1e-5
    assert 4.48 <= found["averages"]["weights"] <= 4.5 + 1e-5
    total = spent = 0.0
    for name, weight in quantized_weights(model).items():
        parts = weight.stored_bits()
        spent, total = spent + parts["codes"], total + weight.codes_RC.numel()
        assert list(weight.bits_G) == next(s["weights"][name] for s in found["sites"] if name in s["weights"])
    assert spent / total == pytest.approx(found["averages"]["weights"], abs=1e-5)  # what is stored, not what is said
    assert cmibq.fixed
    model.zero_grad(set_to_none=True)
    output = model(**batch(1))
    assert set(cmibq.penalty()) == {"rate"}
    output.loss.backward()  # weights and steps still learn
    assert all(linear.weight.grad is not None for linear in quant_linears(model).values())
    assert all(p.grad is None for kind in cmibq.kinds for p in kind.allocator.parameters())


def test_stage_two_starts_from_the_state_of_stage_one() -> None:
    model, cmibq = made(trained=False)
    mixed(cmibq)
    cmibq.advance(1.0)
    other = dense()
    again = wrap(other, settings(), None)
    other.load_state_dict(model.state_dict())
    assert again.fixed and again.progress == 1.0 and again.turn == 1
    assert torch.equal(logits(other), logits(model)) and bit_map(other) == bit_map(model)


def test_low_rank_adapters_learn_on_chosen_widths_and_merge_into_the_weights() -> None:
    """As in stage 2; peft's own forward passes the model's hooks by."""
    from peft import LoraConfig, get_peft_model

    model, cmibq = made(trained=False)
    mixed(cmibq)
    fresh = dense()
    wrap(fresh, settings(), None)
    fresh.load_state_dict(model.state_dict())
    options: Any = dict(r=2, target_modules=r".*(language_model.*_proj|linear_[12])", task_type="CAUSAL_LM")
    adapted = get_peft_model(fresh, LoraConfig(**options)).train()
    output = adapted(**batch(0))
    (output.loss + sum(fresh.cmibq.penalty().values())).backward()
    learned = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len([name for name in learned if "lora_B" in name]) == 16
    assert not [name for name in learned if name.endswith("base_layer.weight")]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter += 0.1 if "lora_B" in name else 0
    merged = adapted.merge_and_unload()
    before, after = (quant_linears(part) for part in (model, merged))
    changed = {name for name in before if not torch.equal(before[name].weight, after[name].weight)}
    assert before.keys() == after.keys() and len(changed) == 16
    assert bit_map(merged)["averages"] == bit_map(model)["averages"]
    for name, weight in quantized_weights(merged).items():
        assert torch.equal(weight.dequantize(), after[name].quantized())


def test_what_checkpointing_computes_again_is_not_kept() -> None:
    model, cmibq = made()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    loss = model(**batch(0)).loss
    loss = loss + cmibq.penalty()["rate"]
    kept = [reader.tapped_BTC for reader in cmibq.readers]
    assert all(x_BTC is not None and x_BTC.untyped_storage().nbytes() == x_BTC.nbytes for x_BTC in kept)  # no views
    loss.backward()
    assert all(reader.tapped_BTC is x_BTC for reader, x_BTC in zip(cmibq.readers, kept, strict=True))
    model(**batch(0))
    assert all(reader.tapped_BTC is not x_BTC for reader, x_BTC in zip(cmibq.readers, kept, strict=True))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model, cmibq = made()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        cmibq.progress = 0.1
        output = model(**batch(0))
        (output.loss + sum(cmibq.penalty().values())).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 100
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class Own(torch.autograd.Function):
    """As ZeRO-3 gives a module its input: a tensor of its own, which tells when a backward pass has reached it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, reached: list[str], name: str) -> torch.Tensor:
        ctx.tell = reached.append, name
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        tell, name = ctx.tell
        tell(name)
        return gradients[0], None, None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_readers_with_tensors_of_their_own_share_what_is_quantized(checkpointing: bool) -> None:
    found, reached = [], list[str]()
    for apart in (False, True):
        model, cmibq = made()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        linears = quant_linears(model)
        if apart:
            for name, linear in linears.items():
                linear.register_forward_pre_hook(lambda _, args, name=name: Own.apply(args[0], reached, name))
        cmibq.progress = 0.1
        output = model(**batch(0))
        (output.loss + sum(cmibq.penalty().values())).backward()
        meters = {name: x.clone() for name, x in model.state_dict().items() if ".meter." in name}
        found.append(({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, meters))
    first = {name for name in linears if name.startswith("model.vision_tower") and ".layers.0.self_attn." in name}
    assert {*linears} - first <= {*reached} and len(reached) == len({*reached})  # pixels need no gradient
    for before, after in zip(*found, strict=True):
        assert before.keys() == after.keys() and len(before) > 30
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_every_trained_parameter_is_in_one_group_with_its_rate() -> None:
    model, cmibq = made()
    groups = {group["name"]: group for group in parameter_groups(model, 2e-5, 1e-2, 1e-3, weight_decay=0.1)}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert {name: group["lr"] for name, group in groups.items()} == dict(
        matrices=2e-5, vectors=2e-5, theta=1e-2, steps=1e-3
    )
    assert {name for name, group in groups.items() if group["weight_decay"]} == {"matrices"}
    steps = {id(p) for p in groups["steps"]["params"]}
    assert all(id(linear.weight_quantizer.log_scale) in steps for linear in quant_linears(model).values())
    assert {id(cmibq.activations.allocator.residual), id(cmibq.weights.allocator.residual)} <= {
        id(p) for p in groups["theta"]["params"]
    }


def test_metrics_have_their_names_and_the_rate_warms_up() -> None:
    model, cmibq = made()
    model(**batch(0))
    assert cmibq.penalty()["rate"] == 0  # progress 0
    cmibq.progress = 0.1
    assert cmibq.penalty()["rate"].item() == pytest.approx(0.5e-2 * cmibq.rate().item())
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0))
    _, metrics = step(model, optimizer, 0.1, 0)
    for name in ("vision_avg_bits", "projector_avg_bits", "llm_avg_bits", "llm_weight_avg_bits", "act_theta_grad_norm"):
        assert metrics[f"quantization/{name}"] > 0
    plain, bare = made(use_ib=False)
    plain(**batch(0))
    assert set(bare.penalty()) == {"act_bits", "weight_bits"} and not len(bare.priors)


def test_a_target_that_cannot_be_met_is_refused_before_the_training() -> None:
    _, cmibq = made(trained=False, use_importance=False, target_bits_act=4.5)
    cmibq.activations.begin(False)
    cmibq.activations.cost_I[0] = 1e9  # one group is nearly all: 4 bits or 5
    with pytest.raises(UserError, match=r"--target-bits-act 4\.5: no choice"):
        cmibq.activations.begin(False)


def test_without_importance_widths_follow_relative_errors() -> None:
    _, cmibq = made(trained=False, use_importance=False)
    cmibq.harden()
    assert cmibq.fixed and torch.all(cmibq.activations.allocator.features_I6[:, 0] == 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("target_bits_act", 1.5), ("target_bits_weight", 9), ("num_groups", 0), ("hard_share", 1.2), ("ib_weight", -1)],
)
def test_settings_are_checked_at_the_door(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}"):
        Settings(**{option: value})
