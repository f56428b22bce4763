"""The GPTQ folder: its numbers against loops over single bits, its layouts, what its library makes of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mico.console import Console
from mico.errors import UserError
from mico.exports import folder
from mico.exports import gptq as exporter
from mico.exports.gptq import LIBRARIES, export_gptq
from mico.exports.source import Exported, PackedSource
from tests.exports.sources import packed_source, rounded

CASES: dict[str, tuple[dict[str, Any], tuple[int, int, bool, str]]] = {
    "4 bits": (dict(bits=(4,)), (4, 32, True, "gptq")),
    "3 bits over words, pruned": (dict(bits=(3,), sparsity=0.5), (3, 32, True, "gptq")),
    "2 bits, opt": (dict(arch="opt", bits=(2,)), (2, 32, True, "gptq")),
    "mixed: the widest": (dict(bits=(4, 5, 3)), (8, 32, True, "gptq")),
    "zero points": (dict(kind="minmax", bits=(4,)), (4, 32, False, "gptq")),
    "zero points of 8 bits, rows": (dict(kind="minmax", bits=(8,), size=None), (8, -1, False, "gptq")),
    "half levels": (dict(kind="symmetric", bits=(3,), size=None, sparsity=0.5), (4, -1, True, "gptq")),
}


def export(source: PackedSource, out: Path) -> tuple[Exported, dict[str, Any]]:
    found = export_gptq(source, out, Console())
    assert found.target == "gptq" and sorted(found.files) == sorted(path.name for path in out.iterdir())
    return found, json.loads((out / "config.json").read_text())["quantization_config"]


def number(words: np.ndarray, index: int, bits: int) -> int:
    """Number `index` of a sequence of 32-bit words, read bit by bit."""
    found = 0
    for place in range(bits):
        word, shift = divmod(index * bits + place, 32)
        found |= (int(words[word]) >> shift & 1) << place
    return found


def naive_value(stored: dict[str, np.ndarray], row: int, channel: int, bits: int, offset: int) -> float:
    group = int(stored["g_idx"][channel])
    code = number(stored["qweight"][:, row].view(np.uint32), channel, bits)
    zero = number(stored["qzeros"][group].view(np.uint32), row, bits) + offset
    return float(stored["scales"][group, row]) * (code - zero)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_there(case, tmp_path):
    options, (bits, size, symmetric, kind) = CASES[case]
    source = packed_source(**options)
    found, config = export(source, tmp_path)
    assert found.exact and found.max_error == 0
    assert (config["bits"], config["group_size"], config["sym"], config["checkpoint_format"]) == (
        bits, size, symmetric, kind,
    )  # fmt: skip
    assert config["quant_method"] == "gptq" and config["desc_act"] is False and config["lm_head"] is False
    tensors = load_file(tmp_path / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, weight in source.weights.items():
        stored = {part: tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")}
        rows, channels = weight.codes_RC.shape
        assert stored["qweight"].shape == (channels * bits // 32, rows) and stored["scales"].dtype == np.float16
        expected_RC = weight.dequantize()
        for _ in range(20):
            row, channel = int(rng.integers(rows)), int(rng.integers(channels))
            assert naive_value(stored, row, channel, bits, 1) == float(expected_RC[row, channel])
    assert set(source.others) <= set(tensors)


def test_a_zero_point_of_zero_needs_the_second_format(tmp_path):
    """The first format stores zero - 1, which codes that start at zero do not have."""
    source = packed_source(kind="minmax")
    positive = {name: rounded(weight.dequantize().abs(), "minmax") for name, weight in source.weights.items()}
    source = type(source)(source.folder, source.config, source.tokenizer, source.family, positive, source.others)
    found, config = export(source, tmp_path)
    assert config["checkpoint_format"] == "gptq_v2" and found.max_error == 0
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(int(value.abs().max()) == 0 for key, value in tensors.items() if key.endswith("qzeros"))


def test_shards_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SHARD", "20KB")
    found, _ = export(packed_source(), tmp_path)
    assert found.exact and sum(name.endswith(".safetensors") for name in found.files) > 2


def test_widened_linears_are_counted(tmp_path):
    notes = export(packed_source(bits=(4, 5)), tmp_path)[0].notes
    assert any(note.startswith("14 Linears lie in wider codes than their own") for note in notes)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="symmetric"), "q_proj: its products of row and group scales are not exact in float16"),
        (dict(changes=dict(num_key_value_heads=1)), r"k_proj: its shape is \(16, 64\).*multiples of 32 are needed"),
        (dict(size=16), "groups of 16 channels do not divide into 32, 64 or 128"),
    ],
)
def test_what_is_not_exact_is_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        export(packed_source(**options), tmp_path)
    assert str(caught.value).startswith("--to gptq") and "\n" not in str(caught.value)
    assert "--to dense" in str(caught.value) and not list(tmp_path.iterdir())


def test_a_wrong_file_is_noticed(tmp_path, monkeypatch):
    right = exporter.packed_tensors

    def wrong(name: str, *rest: Any) -> dict[str, torch.Tensor]:
        found = right(name, *rest)
        found[f"{name}.qweight"][0, 0] ^= 1
        return found

    monkeypatch.setattr(exporter, "packed_tensors", wrong)
    with pytest.raises(RuntimeError, match=r"model\.layers\..* differs by .* when it is unpacked"):
        export(packed_source(), tmp_path)


def test_the_last_note_says_what_checked_the_files(tmp_path):
    notes = export(packed_source(), tmp_path)[0].notes
    if all(find_spec(package) for package in LIBRARIES):
        assert "14 Linears differ by at most 0" in notes[-1]
    else:
        assert "not loaded, since its libraries are not installed: pip install gptqmodel optimum" in notes[-1]
