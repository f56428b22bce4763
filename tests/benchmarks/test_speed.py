"""The two arms of the speed benchmark do the same work; no assertion on time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import inference, naive_sparsegpt, speed
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


# --- inference ------------------------------------------------------------------------------------------------------

STACK = inference.Stack(
    layers=2,
    hidden=64,
    ffn=96,
    vocabulary=64,
    threads=torch.get_num_threads(),
    prompt_tokens=3,
    new_tokens=2,
    repeats=1,
)


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


@pytest.mark.parametrize("name", inference.VARIANTS)
def test_layouts_round_to_the_nearest_point_of_their_grid(name):
    weight_RC = torch.randn(32, 256, generator=torch.Generator().manual_seed(4))
    quantized = inference.VARIANTS[name].make(weight_RC)
    widths = [bits for bits in quantized.bits_G for _ in range(256 // len(quantized.bits_G))]
    assert sum(widths) / len(widths) == {"3": 3, "8": 8}.get(name, 4)
    error_RC = (quantized.dequantize() - weight_RC).abs()
    scale_RG = quantized.row_scale_RG.float()
    if quantized.group_scale_G is not None:
        scale_RG = scale_RG * quantized.group_scale_G.float()
    step_RC = scale_RG[:, quantized.label_C]
    kept_RC = torch.ones_like(error_RC, dtype=torch.bool) if quantized.keep_RC is None else quantized.keep_RC
    assert bool((error_RC <= 1.1 * step_RC)[kept_RC].all())  # the ends of the grid are rounded too
    assert (error_RC <= 0.51 * step_RC)[kept_RC].float().mean() > 0.97
    assert (quantized.dequantize()[~kept_RC] == 0).all() and 0.4 < kept_RC.float().mean() <= 1
    assert (name == "masked") == (not kept_RC.all())


def test_every_layout_is_compared_with_dense():
    names = ["4", "mixed", "masked"]
    table = inference.inference(replace(STACK, layers=1), [1, 9], names, Console(quiet=True))
    found = cells(table)
    assert [row[:2] for row in found] == [[inference.VARIANTS[name].name, batch] for name in names for batch in "19"]
    for row in found:
        few = row[1] == "1"
        assert all(float(row[index].split()[0]) > 0 for index in (2, 3, 7))
        assert row[5] in (("", ">= 2.5", ">= 1.5") if few else (">= 0.95",)) and row[8] in ("", "<= 0.35")
        assert (row[10] == "7 dense") is not few and float(row[4]) >= 0
    assert [row[5] for row in found if row[1] == "1"] == [">= 2.5", ">= 1.5", ""]


def test_packed_models_come_from_disk_with_the_weights_of_their_layout(tmp_path):
    variant = inference.VARIANTS["mixed"]
    packed, seconds = inference.packed_from_disk(STACK, variant, tmp_path)
    assert seconds > 0 and (tmp_path / "model.safetensors").is_file()
    for dense, block in zip(STACK.model().model.layers, packed.model.layers, strict=True):
        expected = variant.make(dense.mlp.up_proj.weight.float()).dequantize()
        assert torch.equal(block.mlp.up_proj.dense(), expected)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_masks_are_measured_in_every_way_against_float64():
    found = cells(inference.sparse(64, STACK.threads, 1))
    assert [row[0] for row in found][:2] == ["dense, bfloat16", "dense, float32"] and len(found) == 7
    for name, milliseconds, ratio, memory, error in found:
        if milliseconds == "not implemented":
            assert name == "torch.sparse CSR, bfloat16"
            continue
        assert float(milliseconds.split()[0]) >= 0 and float(ratio) >= 0 and float(memory) > 0 and float(error) < 0.02


def test_crossover_table():
    found = cells(inference.crossover(64, STACK.threads, 1))
    assert [int(row[0]) for row in found][:3] == [1, 2, 4] and all(float(cell) >= 0 for row in found for cell in row)


def test_command_line_of_inference(capsys, monkeypatch):
    words = ["--layers=1", "--hidden=64", "--ffn=96", "--vocabulary=64", "--prompt-tokens=2", "--new-tokens=1"]
    threads = f"--threads={torch.get_num_threads()}"
    speed.main(["inference", *words, threads, "--repeats=1", "--batch=1", "--layouts=3"])
    assert "3 bits" in capsys.readouterr().out
    for wrong in (["inference", "--layouts=5"], ["--repeats=1", "inference"]):
        with pytest.raises(SystemExit):
            speed.main(wrong)
