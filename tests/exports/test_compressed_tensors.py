"""The compressed-tensors folder: what transformers loads from it, its layout, every field of its config."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mico.console import Console
from mico.errors import UserError
from mico.exports import compressed_tensors as exporter
from mico.exports import folder
from mico.exports.compressed_tensors import export_compressed_tensors, pack_words, refused_by_vllm
from mico.exports.source import Exported, PackedSource
from mico.packed.quantized import QuantizedWeight
from tests.exports.sources import SHAPE, packed_source, rounded

pytest.importorskip("compressed_tensors")


def export(source: PackedSource, out: Path) -> tuple[Exported, dict[str, Any]]:
    found = export_compressed_tensors(source, out, Console())
    assert sorted(found.files) == sorted(path.name for path in out.iterdir())
    return found, json.loads((out / "config.json").read_text())


def with_weights(source: PackedSource, changed: Mapping[str, QuantizedWeight]) -> PackedSource:
    return replace(source, weights={**source.weights, **changed})


CASES = {
    "uniform": dict(bits=(4,)),
    "mixed, pruned": dict(bits=(2, 3, 5, 8), sparsity=0.5),
    "opt": dict(arch="opt", bits=(4, 6, 7)),
    "rows of half levels": dict(kind="symmetric", bits=(4, 7), size=None, sparsity=0.5),
    "zero points": dict(kind="minmax", bits=(4,)),
    "tied": dict(changes=dict(tie_word_embeddings=True)),
    "bfloat16": dict(dtype=torch.bfloat16, bits=(4, 8)),
    "float16": dict(dtype=torch.float16, kind="minmax", bits=(3,)),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_same_model(case, tmp_path):
    source = packed_source(**CASES[case])
    found, config = export(source, tmp_path)
    assert found.exact and found.max_error == 0 and "logits by 0" in found.notes[-1]
    assert refused_by_vllm(config["quantization_config"]) == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids_BT = torch.arange(1, 40)[None]
    with torch.no_grad():
        logits, expected = model(ids_BT).logits, source.dense_model(torch.float32)(ids_BT).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path)("one and two").input_ids == source.tokenizer("one and two").input_ids
    dtype = str(CASES[case].get("dtype", torch.float32)).removeprefix("torch.")
    assert config["dtype"] == dtype
    scales = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if key.endswith("scale")}
    assert len(scales) == len(source.weights) and {str(value.dtype) for value in scales.values()} == {f"torch.{dtype}"}


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(2, 8), st.integers(0, 99))
def test_words_are_those_of_the_library(rows, channels, bits, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shape, generator = (rows, channels), torch.Generator().manual_seed(seed)
    code_RC = torch.randint(0, 2**bits, shape, generator=generator)
    expected = pack_to_int32((code_RC - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(pack_words(code_RC, bits), expected)


def test_joined_linears_share_the_widest_of_their_widths(tmp_path):
    source = packed_source(bits=(4,))
    name = "model.layers.1.self_attn.k_proj"
    wide = {name: rounded(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), bits=6)}
    found, config = export(with_weights(source, wide), tmp_path)
    groups = config["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"]: group["targets"] for group in groups}[6] == [
        r"re:model\.layers\.(?:1)\.(?:self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj)$"
    ]
    assert found.exact and "2 Linears lie in wider codes than their own, with the same values" in found.notes


def test_unquantized_linears_are_ignored_by_name(tmp_path):
    """A pruned stream that keeps its numbers, and the head; packed embeddings are rounded to the model's dtype."""
    source = packed_source(dtype=torch.bfloat16)
    name, none = "model.layers.0.mlp.down_proj", torch.zeros(0, 1, dtype=torch.float16)
    value_RC = source.weights[name].dequantize(torch.bfloat16)
    plain = QuantizedWeight(value_RC, none, None, None, (16,), torch.zeros(value_RC.shape[1], dtype=torch.int64))
    embedding = rounded(source.others["model.embed_tokens.weight"], kind="symmetric", bits=8, size=None)
    source = with_weights(source, {name: plain, "model.embed_tokens": embedding})
    others = {key: value for key, value in source.others.items() if "embed_tokens" not in key}
    found, config = export(replace(source, others=others), tmp_path)
    assert config["quantization_config"]["ignore"] == [name, "lm_head"]
    assert not found.exact and 0 < found.max_error < 0.01
    assert any(note.startswith("model.embed_tokens: has no codes here, rounded to bfloat16") for note in found.notes)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(kind="symmetric"), "its products of row and group scales are not exact in float16"),
        (dict(kind="symmetric", size=None, bits=(8,)), "need more than 8 bits around an exact zero"),
        (dict(kind="minmax", dtype=torch.bfloat16), "its scales are not exact in bfloat16"),
        (dict(size=16), "its groups of 16 channels do not divide into groups of 32, 64 or 128"),
    ],
)
def test_what_is_not_exact_is_refused_before_anything_is_written(options, reason, tmp_path):
    with pytest.raises(UserError) as caught:
        export(packed_source(**options), tmp_path)
    assert f"q_proj: {reason}" in str(caught.value) or reason in str(caught.value)
    assert str(caught.value).startswith("--to vllm cannot hold") and "--profile vllm" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_joined_linears_of_other_groups_and_nothing_to_pack_are_refused(tmp_path):
    source, name = packed_source(), "model.layers.0.self_attn.v_proj"
    weight_RC = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    message = "model.layers.0.self_attn.q_proj: vLLM joins it with model.layers.0.self_attn.v_proj"
    with pytest.raises(UserError, match=message):
        export(with_weights(source, {name: rounded(weight_RC, size=None)}), tmp_path)
    with pytest.raises(UserError, match="no Linear of this model is quantized: export it with --to dense"):
        export(replace(source, weights={}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_larger_groups_are_split_and_scales_repeated(tmp_path):
    source = packed_source(size=192, changes=dict(hidden_size=384, intermediate_size=384, num_hidden_layers=1))
    found, config = export(source, tmp_path)
    (group,) = config["quantization_config"]["config_groups"].values()
    assert found.exact and group["weights"]["group_size"] == 64


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SHARD", "20KB")
    found, _ = export(packed_source(), tmp_path)
    shards = [name for name in found.files if name.endswith(".safetensors")]
    assert found.exact and len(shards) > 2 and "model.safetensors.index.json" in found.files


def test_a_wrong_file_is_noticed(tmp_path, monkeypatch):
    """One flipped code: the check after loading names the Linear."""

    def flipped(code_RC: torch.Tensor, bits: int) -> torch.Tensor:
        words_RW = pack_words(code_RC, bits)
        words_RW[0, 0] ^= 1
        return words_RW

    monkeypatch.setattr(exporter, "pack_words", flipped)
    with pytest.raises(RuntimeError, match=r"model\.layers\..*differs by .* after loading"):
        export(packed_source(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_compared_where_embeddings_were_rounded_too(tmp_path, monkeypatch, tied):
    source = packed_source(dtype=torch.bfloat16, changes=dict(tie_word_embeddings=tied))
    embedding = rounded(source.others["model.embed_tokens.weight"], kind="symmetric", bits=8, size=None)
    source = with_weights(source, {"model.embed_tokens": embedding})
    source = replace(source, others={key: value for key, value in source.others.items() if "embed_tokens" not in key})
    found, _ = export(source, tmp_path / "right")
    assert not found.exact and found.notes[-1].endswith("from those of a model rounded alike")

    def wrong(source, out, tensors, config):
        norm_C = tensors["model.norm.weight"]
        return folder.write_folder(source, out, tensors | {"model.norm.weight": norm_C * 1.25}, config)

    monkeypatch.setattr(exporter, "write_folder", wrong)
    with pytest.raises(RuntimeError, match=r"logits differ by .* after loading"):
        export(source, tmp_path / "wrong")


def test_without_the_library_its_name_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    with pytest.raises(UserError, match="--to vllm needs the compressed-tensors package: pip install"):
        export(packed_source(), tmp_path)


ACCEPTED = {  # by vLLM's loader of whole numbers without activation quantization
    "num_bits": {2, 3, 4, 5, 6, 7, 8}, "type": {"int"}, "symmetric": {True}, "strategy": {"group", "channel"},
    "group_size": {None, 32, 64, 128}, "dynamic": {False}, "actorder": {None}, "block_structure": {None},
}  # fmt: skip


def test_every_field_of_the_config_is_one_that_vllm_accepts(tmp_path):
    """Spelled out here a second time, on purpose; and accepted by the library's own strict models."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    source = packed_source(bits=(2, 4, 8), changes=SHAPE)
    config = export(source, tmp_path)[1]["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "format", "quantization_status")} == dict(
        quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed"
    )
    assert config["kv_cache_scheme"] is None and config["global_compression_ratio"] is None
    assert config["ignore"] == ["lm_head"] and isinstance(config["version"], str)
    for group in config["config_groups"].values():
        assert set(group) == {"targets", "weights", "input_activations", "output_activations", "format"}
        assert group["input_activations"] is None and group["output_activations"] is None
        assert group["format"] == "pack-quantized"
        assert set(group["weights"]) == set(ACCEPTED)
        assert all(group["weights"][key] in values for key, values in ACCEPTED.items())
        QuantizationScheme.model_validate(group)
    assert len(QuantizationConfig.model_validate(config).config_groups) == 3


WRONG = [
    ("format: 'marlin-24' is not one of", lambda c: c.update(format="marlin-24")),
    ("quant_method: missing", lambda c: c.pop("quant_method")),
    ("sparsity_config: unknown", lambda c: c.update(sparsity_config={})),
    ("ignore: names are expected", lambda c: c.update(ignore=[0])),
    ("group_0.weights.num_bits: 9 is not one of", lambda c: weights_of(c).update(num_bits=9)),
    ("group_0.weights.symmetric: False", lambda c: weights_of(c).update(symmetric=False)),
    ("group_0.weights.symmetric: 1 is not one of", lambda c: weights_of(c).update(symmetric=1)),
    ("group_0.weights.type: 'float'", lambda c: weights_of(c).update(type="float")),
    ("group_0.weights.actorder: 'group'", lambda c: weights_of(c).update(actorder="group")),
    ("group_0.weights.group_size: 48", lambda c: weights_of(c).update(group_size=48)),
    ("group_0.weights.group_size: goes with strategy group", lambda c: weights_of(c).update(group_size=None)),
    ("group_0.weights.observer: unknown", lambda c: weights_of(c).update(observer="minmax")),
    ("group_0.targets: names or patterns", lambda c: c["config_groups"]["group_0"].update(targets=[])),
    ("group_0.input_activations: {}", lambda c: c["config_groups"]["group_0"].update(input_activations={})),
]


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(("complaint", "change"), WRONG, ids=[complaint for complaint, _ in WRONG])
def test_what_vllm_would_refuse_is_found(complaint, change):
    config = exporter.quantization_config({"m.0.p": exporter.Scheme(4, 32)}, ["lm_head"], "m", "0.20")
    assert refused_by_vllm(config) == []
    changed = copy.deepcopy(config)
    change(changed)
    assert any(found.startswith(complaint) for found in refused_by_vllm(changed))
