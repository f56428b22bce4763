"""The GGUF file: what stands in it, value by value; and, where llama.cpp is installed, what it computes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mico.adapters import family_of
from mico.console import Console
from mico.errors import UserError
from mico.exports import gguf as exporter
from mico.exports.gguf import FILE, export_gguf
from mico.exports.source import Exported, PackedSource
from mico.packed.grid import integer_grid, minmax_grid, quantize, symmetric_grid
from mico.packed.quantized import QuantizedWeight
from tests.exports.test_gguf_tokenizer import sentencepiece
from tests.tiny import CONTEXT, VOCABULARY, numbered, random_model, train_tokenizer

gguf = pytest.importorskip("gguf")
WIDE = dict(hidden_size=64, intermediate_size=96)  # heads of 16 channels, inputs in whole blocks of 32


def rounded(weight_RC: torch.Tensor, kind: str = "minmax", bits: int = 4, groups: int = 1) -> QuantizedWeight:
    """Rounded to the nearest level of one of the grids that occur."""
    weight_RC = weight_RC.detach().float()
    label_C, bits_G = torch.arange(weight_RC.shape[1]) * groups // weight_RC.shape[1], (bits,) * groups
    one_RC = torch.ones_like(weight_RC)
    if kind == "minmax":
        grid = minmax_grid(weight_RC, label_C, bits_G)
    else:
        grid = {"symmetric": symmetric_grid, "integer": integer_grid}[kind](weight_RC, one_RC, label_C, bits_G)
    scale_RC, zero_RC = grid.scale_RG[:, label_C], grid.zero_point_RG[:, label_C]
    return grid.quantized(quantize(weight_RC, scale_RC, zero_RC, torch.tensor(2.0**bits - 1)), None, None)


def packed_source(model: Any = None, tokenizer: Any = None, dtype=torch.bfloat16, **grid: Any) -> PackedSource:
    """Every Linear of the blocks rounded to a grid, everything else in `dtype`."""
    model = random_model("llama", **WIDE) if model is None else model
    weights, others = {}, {}
    for key, value in model.state_dict().items():
        if key.endswith("_proj.weight"):
            weights[key.removesuffix(".weight")] = rounded(value, **grid)
        elif not (key == "lm_head.weight" and model.config.tie_word_embeddings):
            others[key] = value.to(dtype)
    found = train_tokenizer() if tokenizer is None else tokenizer
    return PackedSource(Path("tiny-4bit"), model.config, found, family_of(model.config), weights, others)


def with_weight(source: PackedSource, name: str, weight: QuantizedWeight) -> PackedSource:
    return replace(source, weights={**source.weights, name: weight})


def write(source: PackedSource, folder: Path) -> tuple[Exported, Any]:
    found = export_gguf(source, folder, Console())
    assert found.target == "gguf" and found.files == (FILE,) and [path.name for path in folder.iterdir()] == [FILE]
    return found, gguf.GGUFReader(folder / FILE)


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader: Any) -> dict[str, tuple[str, np.ndarray]]:
    """Type and float32 values of every tensor."""
    return {t.name: (t.tensor_type.name, gguf.dequantize(np.array(t.data), t.tensor_type)) for t in reader.tensors}


def interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i + j of a head in the file is row i + j * d/2 of the head in transformers."""
    width = len(values) // heads
    rows = [h * width + i + j * width // 2 for h in range(heads) for i in range(width // 2) for j in range(2)]
    return torch.stack([values[row] for row in rows])


@pytest.mark.parametrize(
    "grid, kinds",
    [
        (dict(kind="minmax"), {"Q4_0", "Q5_0"}),
        (dict(kind="symmetric"), {"Q5_0"}),
        (dict(kind="symmetric", bits=3), {"Q4_0"}),
        (dict(kind="symmetric", bits=6), {"Q8_0"}),
        (dict(kind="integer", groups=1), {"Q4_0"}),
        (dict(kind="integer", bits=8), {"Q8_0"}),
    ],
)
def test_every_weight_is_in_the_file(tmp_path, grid, kinds):
    source = packed_source(**grid)
    found, reader = write(source, tmp_path)
    stored = tensors(reader)
    assert found.exact and found.max_error == 0 and len(stored) == len(source.weights) + len(source.others)
    names = dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output", gate_proj="ffn_gate")
    names |= dict(up_proj="ffn_up", down_proj="ffn_down")
    heads = dict(q_proj=4, k_proj=2)
    for module, weight in source.weights.items():
        layer, last = module.split(".")[2], module.split(".")[-1]
        kind, values = stored[f"blk.{layer}.{names[last]}.weight"]
        native = weight.dequantize()
        assert kind in kinds
        assert torch.equal(torch.from_numpy(values), interleaved(native, heads[last]) if last in heads else native)
    for key, name in (("model.norm", "output_norm"), ("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        kind, values = stored[f"{name}.weight"]
        assert torch.equal(torch.from_numpy(values), source.others[f"{key}.weight"].float())
        assert kind == ("F32" if "norm" in name else "BF16" if kind == "BF16" else "F16")


def test_hyperparameters_and_tokenizer(tmp_path):
    source = packed_source(tokenizer=train_tokenizer(bos=True))
    stored = fields(write(source, tmp_path)[1])
    config = source.config
    expected = {
        "general.architecture": "llama", "general.name": "tiny-4bit", "llama.block_count": 2,
        "llama.context_length": CONTEXT, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16,
        "llama.attention.value_length": 16, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY, "general.quantization_version": 2,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: stored[key] for key in expected} == expected
    assert stored["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert stored["tokenizer.ggml.tokens"] == source.tokenizer.convert_ids_to_tokens(range(VOCABULARY))
    assert len(stored["tokenizer.ggml.merges"]) == VOCABULARY - 258
    assert len(stored["tokenizer.ggml.token_type"]) == VOCABULARY


def test_what_is_not_exact_is_named_with_its_error(tmp_path):
    source = packed_source()
    weight_RC = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    factored = rounded(weight_RC, "symmetric", groups=3)
    found, reader = write(with_weight(source, "model.layers.1.mlp.down_proj", factored), tmp_path)
    native = factored.dequantize()
    kind, values = tensors(reader)["blk.1.ffn_down.weight"]
    assert kind == "F16" and torch.equal(torch.from_numpy(values), native.half().float())
    assert not found.exact and found.max_error == float((native.half().float() - native).abs().max()) > 0
    assert "model.layers.1.mlp.down_proj" in found.notes[0] and "product of row scale" in found.notes[0]
    assert "--to dense" in found.notes[0] and f"{found.max_error:.2g}" in found.notes[0]
    assert "down_proj" not in "".join(found.notes[1:]) and "0.mlp" not in found.notes[0]


def test_a_grid_in_no_block_may_still_be_exact(tmp_path):
    ragged = random_model("llama", hidden_size=64, intermediate_size=80)
    powers = packed_source(ragged)
    weights = {
        name: replace(weight, row_scale_RG=torch.full_like(weight.row_scale_RG, 0.125))
        for name, weight in powers.weights.items()
    }
    found, reader = write(replace(powers, weights=weights), tmp_path)
    assert found.exact and tensors(reader)["blk.0.ffn_down.weight"][0] == "F16"
    assert "80 channels" in found.notes[0] and "exact" in found.notes[0] and "--to dense" not in found.notes[0]
    assert all(f"model.layers.{layer}.mlp.down_proj" in found.notes[0] for layer in (0, 1))


@pytest.mark.parametrize(
    "values, kind",
    [
        (torch.tensor([1.0, 0.5]), "F16"),
        (torch.tensor([1.0, 2.0**-40]).bfloat16(), "BF16"),
        (torch.tensor([1e6, 1.0]).bfloat16(), "BF16"),
        (torch.tensor([1.0, 1 + 2.0**-20]), "F32"),
    ],
)
def test_pruned_weights_keep_their_numbers(tmp_path, values, kind):
    source, name = packed_source(), "model.layers.0.mlp.up_proj"
    keep_RC = torch.arange(64).expand(96, -1) % 2 == 0
    value_RC = values.repeat(96, 32) * keep_RC
    none = torch.zeros(0, 1, dtype=torch.float16)
    pruned = QuantizedWeight(value_RC, none, None, None, (16,), torch.zeros(64, dtype=torch.int64), keep_RC)
    value_RC[0, :2] = values
    found, reader = write(with_weight(source, name, pruned), tmp_path)
    stored = tensors(reader)["blk.0.ffn_up.weight"]
    assert found.exact and stored[0] == kind and torch.equal(torch.from_numpy(stored[1]), value_RC.float())


@pytest.mark.parametrize("packed", [False, True])
def test_a_tied_head_is_stored_once(tmp_path, packed):
    model = random_model("llama", **WIDE, tie_word_embeddings=True)
    source = packed_source(model)
    if packed:
        embedding = rounded(model.model.embed_tokens.weight, "integer", bits=8, groups=2)
        others = {key: value for key, value in source.others.items() if "embed" not in key}
        source = replace(with_weight(source, "model.embed_tokens", embedding), others=others)
    stored = tensors(write(source, tmp_path)[1])
    assert "output.weight" not in stored and (stored["token_embd.weight"][0] == "Q8_0") is packed


def test_biases_follow_their_rows(tmp_path):
    model = random_model("llama", **WIDE, attention_bias=True)
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    source = packed_source(model)
    stored = tensors(write(source, tmp_path)[1])
    bias_R = source.others["model.layers.1.self_attn.k_proj.bias"].float()
    assert torch.equal(torch.from_numpy(stored["blk.1.attn_k.bias"][1]), interleaved(bias_R, 2))


def small(model_type: str, **changes: Any) -> Any:
    """A random model of another type, as `random_model` makes a Llama."""
    base: dict[str, Any] = dict(
        vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=None, initializer_range=0.3,
        sliding_window=None, head_dim=16,
    )  # fmt: skip
    config = AutoConfig.for_model(model_type, **base | WIDE | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama3": ("llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=16))),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", dict(sliding_window=32)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_written(tmp_path, name):
    model_type, changes = MODELS[name]
    found, reader = write(packed_source(small(model_type, **changes)), tmp_path)
    stored = fields(reader)
    assert stored["general.architecture"] == ("llama" if model_type == "mistral" else model_type)
    assert any("sliding window" in note for note in found.notes) is (name == "mistral-window")
    assert ("rope_freqs.weight" in tensors(reader)) is (name == "llama3")
    assert stored.get("llama.rope.scaling.factor") == (4.0 if name == "llama-linear" else None)


@pytest.mark.parametrize(
    "model, why",
    [
        (random_model("opt"), "'opt' has no architecture in llama.cpp"),
        (random_model("llama", **WIDE, hidden_act="gelu"), "hidden_act is 'gelu'"),
        (small("llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope_type 'dynamic'"),
        (small("qwen3", attention_bias=True), "model.layers.0.self_attn.o_proj.bias has no place"),
        (small("qwen2", head_dim=32), "4 heads of 32 are not hidden_size 64"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(tmp_path, model, why):
    source = packed_source(model)
    with pytest.raises(UserError, match="--to dense") as caught:
        export_gguf(source, tmp_path, Console())
    assert why in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_tensor_without_a_place_is_refused(tmp_path):
    source = packed_source()
    strange = replace(source, others={**source.others, "model.extra.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"tensor 'model.extra.weight' has no place"):
        export_gguf(strange, tmp_path, Console())
    derived = {**source.others, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    assert len(tensors(write(replace(source, others=derived), tmp_path)[1])) == len(source.weights) + len(source.others)


def test_damage_is_noticed(tmp_path, monkeypatch):
    def damaged(weight, container):
        packed = pack(weight, container)
        if len(packed) == 96:  # gate and up
            packed[-1, -1] ^= 64
        return packed

    pack = exporter.pack
    monkeypatch.setattr(exporter, "pack", damaged)
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.(gate|up)_proj\.weight.*differs"):
        export_gguf(packed_source(), tmp_path, Console())


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        export_gguf(packed_source(), tmp_path, Console())


def llama_of(folder: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(folder / FILE), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=1)


def logit_error(source: PackedSource, model: Any, folder: Path) -> float:
    """Relative difference of llama.cpp's logits from those of transformers with the native values."""
    write(source, folder)
    llama = llama_of(folder)
    state = {f"{key}.weight": weight.dequantize() for key, weight in source.weights.items()} | dict(source.others)
    model.load_state_dict(state, strict=False)
    ids_T = torch.randint(VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))
    llama.eval(ids_T.tolist())
    with torch.no_grad():
        expected_TV = model(ids_T[None]).logits[0]
    return float((torch.from_numpy(llama.scores[:48]) - expected_TV).norm() / expected_TV.norm())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mistral-window"])
def test_llama_cpp_computes_the_same_logits(tmp_path, name):
    """In float32 but for the cache, which is float16; a wrong row order or rotation is off by 100 %."""
    model = small(MODELS[name][0], **MODELS[name][1])
    source = packed_source(model, dtype=torch.float32)
    source = replace(source, weights={}, others=dict(model.state_dict()))
    assert logit_error(source, model, tmp_path) < 5e-3


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_llama_cpp_decodes_the_same_weights(tmp_path, bits):
    """To what its rounding of activations to 8 bits leaves. The lowest level of every container occurs."""
    model = small("llama", initializer_range=0.1)
    source = packed_source(model, dtype=torch.float32, kind="integer", bits=bits)
    assert all(bool((weight.codes_RC == 0).any()) for weight in source.weights.values())
    assert logit_error(source, model, tmp_path) < 0.03


@pytest.mark.parametrize(
    "tokenizer", [train_tokenizer(), train_tokenizer(bos=True), sentencepiece(), sentencepiece("never")]
)
def test_llama_cpp_reads_the_same_tokens(tmp_path, tokenizer):
    write(packed_source(random_model("llama", **WIDE), tokenizer), tmp_path)
    llama = llama_of(tmp_path)
    texts = ["abab ab  a b\n", " a", "Ünïcödé — 你好 🎉\r\n\t x²½ don't IT'S 12345", " ".join(numbered(9).documents)]
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text
