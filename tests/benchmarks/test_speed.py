"""The two arms of the speed benchmark do the same work; no assertion on time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import naive_sparsegpt, speed
from benchmarks.naive_sparsegpt import Clock
from mico.channels import products
from tests.methods.naive import obs

TINY = speed.Setting(layers=2, hidden=64, ffn=160, tokens=1024, seqlen=64, batch_size=3, vocabulary=128)


def compressed(arm: str, setting: speed.Setting = TINY) -> dict[str, torch.Tensor]:
    model = setting.model()
    dense = {name: weight.clone() for name, weight in speed.compressed_weights(model).items()}
    speed.ARMS[arm](model, setting, Clock())
    found = speed.compressed_weights(model)
    assert len(found) == 7 * setting.layers
    assert all(not torch.equal(found[name], dense[name]) for name in found)
    return found


def in_block(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if name.startswith(f"{index}.")}


@pytest.mark.parametrize("plain_products", [0, 1])
def test_both_arms_give_the_same_weights(plain_products, monkeypatch):
    monkeypatch.setattr(products, "FEWEST_STEPS", 0)
    naive, mico = compressed("naive"), compressed("mico", replace(TINY, plain_products=plain_products))
    assert speed.differing(in_block(naive, 0), in_block(mico, 0)) < 5e-3  # ties, and what a tie moves in its row
    assert speed.differing(naive, mico) < 5e-2
    for weights in (naive, mico):
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        assert 0.5 <= zeros / sum(weight.numel() for weight in weights.values()) < 0.6  # code 0 adds to the mask
        assert max(len(row.unique()) for weight in weights.values() for row in weight) <= 2**speed.BITS


def test_naive_sweep_equals_the_explicit_inverse():
    generator = torch.Generator().manual_seed(3)
    x_TC = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    linear = nn.Linear(96, 24, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(24, 96, generator=generator))
    hessian = 2 * x_TC.double().T @ x_TC.double() / 2  # two windows
    labels = torch.zeros(96, dtype=torch.int64).numpy()
    expected, _ = obs(linear.weight.numpy(), hessian.numpy(), sparsity=0.5, labels=labels, bits=[4], blocksize=32)

    pruner = naive_sparsegpt.LayerPruner(linear)
    for window_BTC in x_TC.reshape(2, 1, 200, 96):
        pruner.add_batch(window_BTC)
    torch.testing.assert_close(pruner.hessian_CC.double(), hessian, rtol=1e-4, atol=1e-2)
    pruner.sweep(pruner.factor(0.01), 0.5, 4, 32)
    found = linear.weight.double()
    assert (~torch.isclose(found, torch.from_numpy(expected), rtol=1e-5, atol=0)).double().mean() < 0.02


def test_differing_counts_grid_points_and_not_rounding():
    first = {"a": torch.tensor([1.0, 2.0, 0.0, 4.0])}
    assert speed.differing(first, {"a": first["a"] * (1 + 1e-7)}) == 0
    assert speed.differing(first, {"a": torch.tensor([1.0, 2.1, 0.0, 0.0])}) == 0.5


def test_table_shows_both_arms_and_their_ratio(monkeypatch):
    monkeypatch.setattr(speed, "_in_fresh_process", speed.measure)
    console, state = Console(width=200, record=True), torch.get_rng_state()
    table = speed.compress(replace(TINY, threads=torch.get_num_threads()), 2, Console(quiet=True))
    assert torch.equal(torch.get_rng_state(), state)
    console.print(table)
    lines = console.export_text().splitlines()
    for name in ("wall time, s", "Hessians, s", "sweeps, s", "peak memory, GiB", "error of the logits, %"):
        row = next(line for line in lines if name in line)
        naive, mico, ratio = (cell.split()[0] for cell in row.split("│")[2:5])
        assert float(naive) > 0 or "Hessians" in name
        if float(naive) > 0.2:
            assert float(ratio) == pytest.approx(float(mico) / float(naive), abs=0.05)


def test_stages_add_up_to_the_processor_time():
    found = speed.measure("mico", replace(TINY, threads=torch.get_num_threads()))
    assert sum(found.stages.values()) == pytest.approx(found.cpu)
    assert found.stages["sweeps"] > 0 and found.stages["factors"] > 0 and found.peak_bytes > 2**20
    assert 0 < found.damage < 2


def test_plain_products_switches_onednn_off_for_the_run_only(monkeypatch):
    seen = []
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(speed, "walk", lambda *_: iter(seen.append(products.ONEDNN) or ()))
    for plain in (0, 1):
        speed.mico_arm(TINY.model(), replace(TINY, plain_products=plain), Clock())
    assert seen == [True, False] and products.ONEDNN
