"""The benchmark of pruned visual tokens: its FLOPs are those that torch counts, its arms do what they say."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import visual_tokens
from benchmarks.visual_tokens import Arm, Setting, Watch, arms_of, dense_flops, fixed_flops, measure, ratios
from mico.errors import UserError

TINY = Setting(
    layers=4, hidden=128, ffn=160, vision_layers=2, vision_hidden=64, vision_ffn=96, side=84, before=5, behind=7,
    repeats=2, device="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    made = TINY.loaded()
    made.set_attn_implementation("eager")  # torch counts matrix products, not what is inside of a kernel
    return made


def test_flops_are_those_that_torch_counts(model):
    with FlopCounterMode(display=False) as counter:
        Watch(model, TINY).call(TINY.inputs(model))
    assert counter.get_total_flops() == pytest.approx(dense_flops(model, TINY) + fixed_flops(model), rel=2e-3)


@pytest.mark.parametrize("arm", arms_of(["1.0", "2.0", "fastv", "cls", "random"], [16]), ids=lambda arm: arm.name)
def test_flops_of_a_pruned_call_too(model, arm):
    with arm.enabled(model) as pruning, FlopCounterMode(display=False) as counter:
        Watch(model, TINY).call(TINY.inputs(model))
    means = pruning.totals.means()
    assert means["equal_tokens"] == pytest.approx(16, abs=1) and means["visual_tokens"] == 36
    assert counter.get_total_flops() == pytest.approx(means["prefill_flops"] + fixed_flops(model), rel=0.03)


def test_calls_alternate_and_leave_the_model_as_it_was(model):
    inputs = TINY.inputs(model)
    with torch.inference_mode():
        before = model(**inputs).logits
    arms, told = arms_of(["2.0", "random"], [16, 12]), []
    found = measure(model, TINY, arms, told.append)
    assert [record["arm"] for record in found] == arms and len(told) == 4 * TINY.repeats
    for record in found:
        for side in ("dense", "pruned"):
            for seconds in record["seconds"][side]:
                assert seconds["outside"] > 0 and 0 < seconds["language"] < seconds["whole"]
        assert record["means"]["samples"] == 1 and len(ratios(record, "language")) == TINY.repeats
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, before)


def test_automatic_choices_are_told():
    settled = Setting(device="cpu", threads=1).settled()
    assert (settled.device, settled.dtype, settled.threads) == ("cpu", "float32", 1)
    with pytest.raises(UserError, match="--dtype int8: choose from auto, float32"):
        Setting(dtype="int8").settled()


def test_the_ratio_is_that_of_neighbours():
    seconds = dict(dense=[dict(whole=4.0), dict(whole=9.0)], pruned=[dict(whole=2.0), dict(whole=3.0)])
    assert ratios(dict(seconds=seconds), "whole") == [2.0, 3.0]


def test_versions_and_methods_are_arms():
    assert arms_of(["1.0", "fastv"], [64, 32]) == [
        Arm("sparsevlm", "1.0", 64), Arm("sparsevlm", "1.0", 32), Arm("fastv", "2.0", 64), Arm("fastv", "2.0", 32)
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        visual_tokens.main(["--arms", "oracle"])
    with pytest.raises(UserError, match="no-such-model"):
        visual_tokens.main(["--model", "/no-such-model"])


def test_command_line(tmp_path, capsys):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items() if name != "model"]
    visual_tokens.main([*flags, "--repeats=1", "--retain=16", "--arms=2.0", f"--json={tmp_path / 'speed.json'}"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "sparsevlm 2.0" in shown and "36 visual tokens" in shown and "4 x 128" in shown
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["arms"][0]["arm"] == dict(method="sparsevlm", version="2.0", retain=16)
    assert found["setting"]["repeats"] == 1 and found["dense_flops"] > found["arms"][0]["means"]["prefill_flops"]
