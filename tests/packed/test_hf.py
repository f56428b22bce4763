"""Packed checkpoints through transformers: what it does with any model it does with a packed one, to the bit."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mico.loading import quiet
from mico.packed.blob import encode
from mico.packed.hf import SHIPPED, MicoConfig, MicoQuantizer
from mico.packed.linear import PackedEmbedding, PackedLinear
from tests.packed.making import KINDS, Pair, logits, pair
from tests.tiny import random_model

MODELS = {
    "llama-untied": dict(arch="llama", kind="mico"),
    "llama-tied": dict(arch="llama", kind="grouped", tie_word_embeddings=True),
    "llama-tied-8": dict(arch="llama", kind="pattern", embed_bits=8, tie_word_embeddings=True),
    "llama-untied-4": dict(arch="llama", kind="ternary", embed_bits=4),
    "opt-tied": dict(arch="opt", kind="mico"),
    "opt-tied-4": dict(arch="opt", kind="pruned", embed_bits=4),
    "opt-untied-8": dict(arch="opt", kind="grouped", embed_bits=8, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Pair, Path]]:
    root = tmp_path_factory.mktemp("packed")
    pairs = {name: pair(**options) for name, options in MODELS.items()}  # type: ignore[arg-type]
    return {name: (each, each.save(root / name)) for name, each in pairs.items()}


@pytest.fixture(params=MODELS)
def case(made, request: pytest.FixtureRequest) -> tuple[Pair, Path]:
    return made[request.param]


@pytest.fixture
def folder(made, tmp_path: Path) -> Path:
    """One that a test may break."""
    return Path(shutil.copytree(made["llama-tied-8"][1], tmp_path / "model"))


def load(folder: Path, **options: Any) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (PackedLinear, PackedEmbedding))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- exact ----------------------------------------------------------------------------------------------------------


def test_packed_modules_stand_where_weights_were_packed_and_logits_are_equal(case) -> None:
    both, folder = case
    model = load(folder)
    tied = {"lm_head"} if model.config.tie_word_embeddings and any("embed" in name for name in both.weights) else set()
    assert packed_names(model) == set(both.weights) | tied
    assert not any(isinstance(module, nn.Linear) for block in blocks_of(model) for module in block.modules())
    assert torch.equal(logits(model), logits(both.dense)) and torch.equal(logits(both.packed), logits(both.dense))
    assert type(model).__name__ == type(both.dense).__name__ and isinstance(model, type(both.dense))


def blocks_of(model: Any) -> nn.ModuleList:
    return getattr(model.model, "layers", None) or model.model.decoder.layers


def test_saving_again_gives_the_same_bytes_in_every_file(case, tmp_path: Path) -> None:
    both, folder = case
    load(folder).save_pretrained(tmp_path / "again")
    again, first = files_of(tmp_path / "again"), files_of(folder)
    assert {"config.json", "model.safetensors", SHIPPED} <= set(again)
    assert {name for name, content in again.items() if content != first[name]} == set()
    assert all("tokenizer" in name for name in set(first) - set(again))
    both.packed.save_pretrained(tmp_path / "memory")
    assert files_of(tmp_path / "memory") == again, "as is the model packed in memory"
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(third), logits(load(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_hold_packed_weights_and_nothing_twice(kind: str, tmp_path: Path) -> None:
    both = pair(kind=kind, embed_bits=8, tie_word_embeddings=True)
    both.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    packed = {key.removesuffix(".weight") for key, value in stored.items() if value.dtype == torch.uint8}
    assert packed == set(both.weights) and all(stored[f"{name}.weight"].ndim == 1 for name in packed)
    assert not any("lm_head" in key or "label" in key for key in stored)
    leaders = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    flagged = {name for name in packed if stored[f"{name}.weight"][3] & 64}  # labels that another Linear holds
    followers = {name for name in packed if "layers" in name and not name.endswith(tuple(leaders))}
    assert flagged == (followers if kind in ("mico", "ternary") else set())


def test_a_model_in_several_files(made, tmp_path: Path) -> None:
    both, _ = made["llama-untied"]
    both.packed.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = load(tmp_path)
    assert packed_names(model) == set(both.weights)
    assert torch.equal(logits(model), logits(both.dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
def test_dtype_arguments_mean_what_they_mean_for_a_dense_model(case, dtype, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MICO_EXECUTION", "dense")
    both, folder = case
    both.dense.save_pretrained(tmp_path)
    dense, model = load(tmp_path, dtype=dtype), load(folder, dtype=dtype)
    assert torch.equal(logits(model), logits(dense)) and logits(model).dtype == model.dtype == dense.dtype
    assert all(each.weight.dtype == torch.uint8 for each in model.modules() if isinstance(each, PackedLinear))
    assert torch.equal(logits(load(folder).to(model.dtype)), logits(load(tmp_path).to(model.dtype)))
    monkeypatch.setenv("MICO_EXECUTION", "packed")  # kernels sum in another order
    found = logits(load(folder, dtype=dtype)).float()
    assert torch.allclose(found, logits(dense).float(), rtol=0, atol=0.05 * float(found.abs().max()))


def test_head_and_embedding_stay_tied(made) -> None:
    for name in ("llama-tied", "opt-tied", "llama-tied-8", "opt-tied-4"):
        model = load(made[name][1])
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight.data_ptr() == embedding.weight.data_ptr(), name
        moved = model.to(torch.bfloat16)
        assert moved.get_output_embeddings().weight.data_ptr() == moved.get_input_embeddings().weight.data_ptr(), name


# --- what people do with models -------------------------------------------------------------------------------------


def test_copies_and_pickles_are_equal(case, tmp_path: Path) -> None:
    _, folder = case
    model = load(folder)
    expected = logits(model)
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    third = torch.load(tmp_path / "model.pt", weights_only=False)
    for found in (other, third):
        assert type(found) is type(model) and torch.equal(logits(found), expected)
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for found in (other, third):
        head, embedding = found.get_output_embeddings().weight, found.get_input_embeddings().weight
        assert (head.data_ptr() == embedding.data_ptr()) == tied
    third.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_generate_with_a_cache_as_without_and_as_the_dense_model(case) -> None:
    both, folder = case
    model, prompt = load(folder), torch.tensor([[5, 17, 31, 8]])
    options: Any = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        found = model.generate(prompt, use_cache=True, **options)
        assert torch.equal(found, model.generate(prompt, use_cache=False, **options))
        assert torch.equal(found, both.dense.generate(prompt, use_cache=True, **options))
    assert found.shape == (1, 16)


def test_pipeline(made) -> None:
    both, folder = made["llama-untied"]
    options: Any = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = pipeline("text-generation", model=str(folder))("one and two", **options)
    expected = pipeline("text-generation", model=both.dense, tokenizer=tokenizer)("one and two", **options)
    assert found == expected


def test_the_base_model(case) -> None:
    both, folder = case
    with quiet():
        base = AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 17, 31, 8]])
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, both.dense.model(ids).last_hidden_state)
    assert not any("layers" in name and isinstance(module, nn.Linear) for name, module in base.named_modules())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(case, device_map) -> None:
    pytest.importorskip("accelerate")
    both, folder = case
    assert torch.equal(logits(load(folder, device_map=device_map)), logits(both.dense))


def test_a_model_partly_on_disk(made, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    both, folder = made["llama-untied"]
    split = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    split |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(folder, device_map=split, offload_folder=tmp_path)
    assert model.model.layers[1].input_layernorm.weight.is_meta, "what is not packed was left on disk"
    assert torch.equal(logits(model), logits(both.dense))


def test_dequantize_gives_the_dense_model(case, tmp_path: Path) -> None:
    both, folder = case
    model = load(folder)
    dense = model.dequantize()
    assert packed_names(dense) == set() and type(dense) is type(both.dense)
    assert torch.equal(logits(dense), logits(both.dense))
    head, embedding = dense.get_output_embeddings().weight, dense.get_input_embeddings().weight
    assert (head is embedding) == bool(both.dense.config.tie_word_embeddings)
    dense.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(config) and not (tmp_path / SHIPPED).exists()
    assert torch.equal(logits(load(tmp_path)), logits(both.dense))


def test_training_is_refused_by_transformers(made) -> None:
    model = load(made["llama-untied"][1])
    assert not model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    linear = model.model.layers[0].mlp.gate_proj
    assert [name for name, parameter in linear.named_parameters() if parameter.requires_grad] == []


# --- faults ---------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


DOWN = "model.layers.1.mlp.down_proj"


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{DOWN}.weight"]


def _flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"][0] ^= 1


def _newer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"][2] += 1


def _shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()


def _bare(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:20].clone()


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "is not in the checkpoint: its weight files are incomplete"),
        (_flip, "no packed weight: it starts with"),
        (_newer, "packed weight of version 2; this code reads 1"),
        (_shape, "packed 64 x 32, the model has 32 x 64"),
        (_bare, "packed weight of 20 bytes: too few for 32 x 64 weights"),
    ],
)
def test_a_damaged_weight_is_named_when_it_is_loaded(folder: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(edit(folder, change))
    assert DOWN in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_nothing_is_made_up_for_a_missing_tensor(made, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(made["llama-untied-4"][1], tmp_path / "model"))
    with pytest.raises(ValueError, match=f"{key} is not in the checkpoint"):
        load(edit(folder, lambda tensors: tensors.pop(key)))


def test_a_new_head_may_be_made(made) -> None:
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(made["llama-untied"][1], num_labels=3)
    assert model.score.weight.shape[0] == 3 and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_weight_that_ends_early_is_told_when_it_is_used(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"packed weight of [\d,]+ bytes ends before byte"):
        logits(load(edit(folder, _cut)))


def test_labels_that_are_nowhere_are_named(tmp_path: Path) -> None:
    folder = pair(kind="mico").save(tmp_path)

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.0.mlp.{}_proj.weight".format
        tensors[key("gate")], tensors[key("up")] = tensors[key("up")].clone(), tensors[key("gate")].clone()

    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj.*labels lie with another Linear"):
        load(edit(folder, swap))


def test_another_layout_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mico layout 2, this code reads 1: update it"):
        load(folder)


def test_a_packed_weight_for_a_norm_is_refused(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors[f"{DOWN}.weight"].clone()

    with pytest.raises(ValueError, match=r"model\.norm: a packed weight for a LlamaRMSNorm; Linears and Embeddings"):
        load(edit(folder, change))


def test_a_model_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="a packed model is loaded from its safetensors files, give its folder"):
        MicoQuantizer(MicoConfig()).preprocess_model(random_model("llama"))


def test_leaders() -> None:
    config = MicoConfig(streams=[["self_attn.q_proj", "self_attn.k_proj"], ["mlp.gate_proj", "mlp.up_proj"]])
    assert config.leader("model.layers.3.self_attn.k_proj") == "model.layers.3.self_attn.q_proj"
    assert config.leader("model.layers.3.self_attn.q_proj") == "model.layers.3.self_attn.q_proj"
    assert config.leader("layers.11.mlp.up_proj") == "layers.11.mlp.gate_proj"
    assert config.leader("lm_head") == "lm_head"
    assert MicoConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_another_state_brings_its_channel_labels(made) -> None:
    both, folder = made["llama-untied"]
    model, dense, state = load(folder), copy.deepcopy(both.dense), {}
    logits(model)
    order = torch.randperm(both.dense.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for place, path in enumerate(("q_proj", "k_proj", "v_proj")):
        name = f"model.layers.0.self_attn.{path}"
        old = both.weights[name]
        assert old.keep_RC is not None and not torch.equal(old.label_C[order], old.label_C)
        new = replace(
            old, label_C=old.label_C[order], codes_RC=old.codes_RC[:, order], keep_RC=old.keep_RC[:, order]
        )  # fmt: skip
        state[f"{name}.weight"] = encode(new, borrow_labels=place > 0)
        dense.get_submodule(name).weight.data = new.dequantize()
    model.load_state_dict(model.state_dict() | state)
    assert torch.equal(logits(model), logits(dense)) and not torch.equal(logits(dense), logits(both.dense))


def test_packed_embeddings_keep_their_size(made) -> None:
    for name in ("llama-tied-8", "opt-untied-8"):
        model = load(made[name][1])
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(9\): .* are packed .* compress it again"):
            model.resize_token_embeddings(9)
        assert model.resize_token_embeddings() is model.get_input_embeddings()
    model = load(made["llama-untied"][1])
    rows = model.config.vocab_size + 3
    assert model.resize_token_embeddings(rows).num_embeddings == rows and logits(model).shape[-1] == rows
