"""`mico bench`: what it counts, what it compares, what it says. No assertion on time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mico
from mico import cli
from mico.bench import generate, random_ids, section, weight_memory
from mico.checkpoint import set_execution
from mico.console import Console
from mico.errors import UserError
from mico.packed.hf import unpacked
from mico.packed.linear import PATIENCE, PackedEmbedding, PackedLinear
from tests.adapters.llava_models import TEXT, tiny_llava
from tests.packed.making import Pair, pair, pair_of

QUICK: dict[str, Any] = dict(prompt_tokens=4, new_tokens=2, repeats=2)


@pytest.fixture(scope="module")
def made() -> Pair:
    return pair(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(made: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return mico.bench(str(folder), batch_size=(1, 9), **QUICK)


def test_the_report(report: dict[str, Any], folder: Path) -> None:
    assert json.loads(json.dumps(report)) == report and report["model"] == str(folder)
    assert report["dtype"] == "bfloat16" and report["execution"] == "auto"
    assert [found["batch_size"] for found in report["batches"]] == [1, 9]
    for found in report["batches"]:
        for arm in ("dense", "packed"):
            for what in ("prefill", "decode"):
                rate = found[arm][f"{what}_tokens_per_s"]
                assert 0 < rate["min"] <= rate["median"] <= rate["max"]
            assert found[arm]["decode_GB_per_s"] > 0
    few, many = report["batches"]
    assert "dense" not in few["paths"] and set(many["paths"]) == {"dense"}
    assert sum(few["paths"].values()) == sum(many["paths"].values()) == report["linears"]["packed"]
    assert few["packed"]["weight_bytes"] != few["dense"]["weight_bytes"] == many["dense"]["weight_bytes"]
    assert many["packed"]["weight_bytes"] == pytest.approx(many["dense"]["weight_bytes"], rel=0.05)
    peak = report["peak_bytes"]
    assert peak["before"] <= peak["packed"] <= peak["both"]


def test_the_deviation_is_that_of_the_kernels(report: dict[str, Any], folder: Path) -> None:
    deviation = report["deviation"]
    assert 0 < deviation["largest"] < 0.05 * deviation["largest_logit"]
    exact = mico.bench(str(folder), execution="dense", **QUICK)
    assert exact["deviation"] == {"largest": 0.0, "largest_logit": deviation["largest_logit"]}
    assert set(exact["batches"][0]["paths"]) == {"dense"}


def test_the_table_says_it_all(report: dict[str, Any]) -> None:
    shown = section(report)
    assert len(shown.rows) == 8 and shown.columns[2:] == ("dense", "packed", "packed / dense")
    found = report["batches"][1]
    ratio = found["packed"]["weight_bytes"] / found["dense"]["weight_bytes"]
    assert shown.rows[7][:2] == ("9", "weight memory") and shown.rows[7][4] == f"×{ratio:.2f}"
    lines = "\n".join(shown.lines)
    assert "batch 9: packed Linears after decoding: 14 by dense" in lines
    assert "14 of 14 packed Linears are pruned" in lines and "neither speed nor memory" in lines
    assert "Linears that are not packed, dense on both sides: 1" in lines


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    words = ["--prompt-tokens=4", "--new-tokens=2", "--repeats=1", "--dtype=float32", f"--json={file}"]
    assert cli.main(["bench", str(folder), *words]) == 0
    assert "decode, tokens/s" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["deviation"]["largest"] == 0 and found["batches"][0]["paths"] == {"dense": 14}  # no kernel is exact


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(batch_size="1,x"), "--batch-size 1,x: whole numbers"),
        (dict(batch_size=(0,)), "whole numbers from 1"),
        (dict(prompt_tokens=0), "--prompt-tokens 0: must be at least 1"),
        (dict(new_tokens=0), "--new-tokens 0"),
        (dict(repeats=0), "--repeats 0"),
        (dict(execution="fast"), "--execution fast: choose from auto, packed, dense"),
        (dict(prompt_tokens=10**6), "the model takes"),
        (dict(dtype="int8"), "--dtype int8"),
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        mico.bench(str(folder), **QUICK | options)


def test_only_packed_models(tmp_path: Path, made: Pair) -> None:
    with pytest.raises(UserError, match="no checkpoint packed by mico"):
        mico.bench(str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint packed by mico"):
        mico.bench("tiny-llama")


def test_notes_are_silent_without_a_console(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mico.bench(str(folder), console=Console(), **QUICK)
    assert capsys.readouterr() == ("", "")


# --- what is counted ------------------------------------------------------------------------------------------------


def linears(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def test_memory_of_dense_models_is_that_of_their_tensors(made: Pair) -> None:
    model = made.dense
    memory = weight_memory(model)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    assert memory.bytes == sum(tensors.values()) and memory.file_bytes == 0
    assert memory.read_bytes == memory.bytes - model.get_input_embeddings().weight.nbytes


def test_blobs_count_unless_they_lie_in_a_file(made: Pair, folder: Path) -> None:
    blobs = sum(module.weight.nbytes for module in linears(made.packed))
    others = sum(parameter.nbytes for parameter in made.packed.parameters())
    before = weight_memory(made.packed)
    assert before.file_bytes == 0 and before.bytes >= blobs + others
    loaded = mico.load(folder, dtype=torch.bfloat16)
    mapped = weight_memory(loaded)
    if Path("/proc/self/maps").exists():
        assert mapped.file_bytes == blobs
    generate(loaded, random_ids(loaded, 1, 2), 1)
    after = weight_memory(loaded)
    kernels = sum(module.resident_bytes for module in linears(loaded))
    assert kernels > 0 and after.bytes == mapped.bytes + kernels and after.file_bytes == mapped.file_bytes


def test_a_tied_table_is_held_once_and_read_as_the_head(tmp_path: Path) -> None:
    made = pair("opt", dtype=torch.bfloat16)
    dense = weight_memory(made.dense)
    head = made.dense.get_output_embeddings().weight
    assert head is made.dense.get_input_embeddings().weight
    places = made.dense.model.decoder.embed_positions.weight.nbytes
    assert dense.bytes - dense.read_bytes == places  # the table itself is read, by the head


def test_packed_embeddings_are_no_reading(tmp_path: Path) -> None:
    loaded = mico.load(pair(embed_bits=8, dtype=torch.bfloat16).save(tmp_path / "model"), dtype=torch.bfloat16)
    table = loaded.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    generate(loaded, random_ids(loaded, 1, 2), 1)
    memory = weight_memory(loaded)
    kernels = sum(module.resident_bytes for module in linears(loaded))
    own = sum(tensor.nbytes for tensor in loaded.parameters())
    assert memory.read_bytes - kernels - own < table.weight.nbytes  # norms and rotary tables alone


def test_generation_equals_that_of_transformers(made: Pair) -> None:
    """The loop that is timed computes what `generate` does: as many steps, with the cache."""
    model = unpacked(pair().packed, torch.float32)
    ids_BP, steps = random_ids(model, 2, 5), []
    handle = model.register_forward_hook(lambda *given: steps.append(given[-1].logits[:, -1].argmax(-1)))
    generate(model, ids_BP, 3)
    handle.remove()
    expected = model.generate(
        ids_BP, max_new_tokens=4, min_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids_BP)
    )
    assert torch.equal(torch.stack(steps, 1), expected[:, 5:])


def test_executions_are_set_for_the_whole_model(folder: Path) -> None:
    loaded = mico.load(folder, dtype=torch.bfloat16)
    set_execution(loaded, "packed")
    for _ in range(PATIENCE + 1):
        generate(loaded, random_ids(loaded, 1, 20), 0)
    assert {module.kind for module in linears(loaded)} <= {"bytes", "4-bit digits"}


# --- execution lean, experts, models that see -----------------------------------------------------------------------


def test_lean_execution_reads_the_blobs_and_makes_dense_weights(made: Pair, folder: Path) -> None:
    report = mico.bench(str(folder), execution="lean", **QUICK)
    found = report["batches"][0]
    assert found["paths"] == {"unpacked": 14} and "14 unpacked for each call" in "\n".join(section(report).lines)
    loaded = mico.load(folder, dtype=torch.bfloat16, execution="lean")
    before = weight_memory(loaded)
    generate(loaded, random_ids(loaded, 1, 2), 1)
    after = weight_memory(loaded)
    sizes = [2 * module.out_features * module.in_features for module in linears(loaded)]
    blobs = sum(module.weight.nbytes for module in linears(loaded))
    assert after.read_bytes - before.read_bytes == sum(sizes) + blobs
    assert after.file_bytes == 0 and after.bytes - before.bytes == max(sizes) + before.file_bytes
    assert found["packed"]["weight_bytes"] == after.bytes
    speed = found["packed"]["decode_tokens_per_s"]["median"]
    assert found["packed"]["decode_GB_per_s"] == pytest.approx(speed * after.read_bytes / 1e9)


def test_linears_that_were_never_called_are_told(report: dict[str, Any]) -> None:
    few = report["batches"][0] | {"paths": {"not called": 3, "dense": 2}}
    assert "after decoding: 2 by dense, 3 not called" in "\n".join(section(report | {"batches": [few]}).lines)


def test_models_that_see_are_measured_on_text(tmp_path: Path) -> None:
    folder = pair_of(tiny_llava(), dtype=torch.bfloat16).save(tmp_path / "model")
    report = mico.bench(str(folder), **QUICK)
    assert report["linears"]["packed"] == 14 and report["deviation"]["largest"] > 0
    with pytest.raises(UserError, match=f"the model takes {TEXT['max_position_embeddings']}"):
        mico.bench(str(folder), **QUICK | dict(prompt_tokens=TEXT["max_position_embeddings"]))


@pytest.mark.parametrize("wrong", ["x", -1, [5]])
def test_a_length_that_is_no_number_is_one_line(folder: Path, tmp_path: Path, wrong: object) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=wrong)))
    with pytest.raises(UserError, match=r"config\.json"):
        mico.bench(str(broken), **QUICK)
