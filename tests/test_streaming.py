"""A model whose blocks are read when needed computes the same bits as one in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import mico
from mico.adapters.family import lookup
from mico.console import Console
from mico.data import token_batches
from mico.errors import UserError
from mico.files import sha256_file
from mico.loading import LoadedModel, load_model
from mico.loading import model as loading
from mico.loading.streaming import BlockStore
from mico.walk import walk
from tests.tiny import VOCABULARY, save_model
from tests.workspace import Workspace, workspace

IDS = torch.arange(3 * 24).view(3, 24) % VOCABULARY


def on_meta(loaded: LoadedModel) -> list[bool]:
    blocks = lookup(loaded.model, loaded.family.blocks)
    return [all(parameter.is_meta for parameter in block.parameters()) for block in blocks.children()]


@pytest.fixture(scope="module", params=["llama", "opt", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def streamed(folder: Path) -> LoadedModel:
    return load_model(str(folder), stream=True)


def test_blocks_are_absent_until_they_are_asked_for(streamed: LoadedModel) -> None:
    assert on_meta(streamed) == [True, True]
    with streamed.part(1) as block:
        assert on_meta(streamed) == [True, False] and block is lookup(streamed.model, f"{streamed.family.blocks}.1")
    assert on_meta(streamed) == [True, True]
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    with streamed.part(None):
        absent = [name for name, parameter in streamed.model.named_parameters() if parameter.is_meta]
        assert all(name.startswith(streamed.family.blocks) for name in absent)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_a_block_is_given_back_after_an_error(streamed: LoadedModel) -> None:
    with pytest.raises(ZeroDivisionError), streamed.part(0):
        raise ZeroDivisionError
    assert on_meta(streamed) == [True, True]


@torch.no_grad()
def test_forward_equals_that_of_the_model_in_memory(streamed: LoadedModel, folder: Path) -> None:
    expected = load_model(str(folder)).model(IDS, use_cache=False).logits
    for _ in range(2):
        with streamed.running():
            assert torch.equal(streamed.model(IDS, use_cache=False).logits, expected)
        assert on_meta(streamed) == [True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in streamed.model.modules())


def test_the_walk_sees_the_same_activations(streamed: LoadedModel, folder: Path) -> None:
    whole, seen = load_model(str(folder)), []
    for loaded in (streamed, whole):
        batches = token_batches(IDS, 2)
        inputs = []
        for block in walk(loaded.model, loaded.family, batches, paired=True, resident=loaded.part):
            moments = {name: block.measure_paired(name).total.gram_CC.clone() for name in block.streams}
            inputs.append(moments)
        seen.append(inputs)
    assert len(seen[0]) == 2
    for mine, theirs in zip(*seen, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_values_put_in_after_filling_are_those_that_compute(streamed: LoadedModel) -> None:
    assert streamed.store is not None
    streamed.store.changed = lambda index, block: [parameter.zero_() for parameter in block.parameters()]
    with streamed.part(0) as block:
        assert all(bool((parameter == 0).all()) for parameter in block.parameters())


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_damage_is_named_when_the_block_is_read(damage: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        tensors["spare"] = tensors.pop(key)  # the number of parameters stays that of the config
    else:
        tensors[key][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(tmp_path), stream=True)
    with loaded.part(0):
        pass
    with pytest.raises(UserError, match=r"layers\.1.*up_proj"), loaded.part(1):
        pass


def test_streaming_is_chosen_when_memory_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(str(folder)).store is None
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    assert load_model(str(folder)).store is not None
    assert load_model(str(folder), stream=False).store is None


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    "options", [dict(arm="mi"), dict(arm="original"), dict(method="mico", grouping="importance", embed_bits=8)]
)
def test_compress_gives_the_same_bytes(
    options: dict, space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[list[str]] = []
    filled: list[int | None] = []
    fill = BlockStore.fill
    monkeypatch.setattr(BlockStore, "fill", lambda store, index: filled.append(index) or fill(store, index))
    for stream in (False, True):
        assert not filled  # by the run that does not stream
        monkeypatch.setenv("MICO_RESULTS", str(tmp_path / str(stream)))
        console = Console()
        report = mico.compress(
            str(space.model), eval="wikitext2", save=str(tmp_path / f"run-{stream}"), stream=stream,
            console=console, **options, **space.options,
        )  # fmt: skip
        kept = "its blocks on disk, each read when it is needed" if stream else "all of it in memory"
        assert f"model on cpu in float32, {kept}" in console.notes
        files = sorted((Path(report["folder"]) / "model").glob("*.safetensors"))
        digests.append([sha256_file(file) for file in files])
        digests[-1].append(str(report["compressed"]["wikitext2"]["perplexity"]))
    assert digests[0] == digests[1]
    assert {0, 1, None} <= set(filled)


@pytest.mark.parametrize(("packed", "remedy"), [(False, "use --stream"), (True, "use another --device")])
@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: you tried"), torch.OutOfMemoryError("CUDA")])
def test_a_model_that_memory_cannot_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, packed: bool, remedy: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(loading, "auto_class", lambda _: LlamaForCausalLM)
    monkeypatch.setattr(loading, "_check_size", lambda *_: None)
    with pytest.raises(UserError, match=f"does not fit into the memory of cpu: {remedy}$"):
        load_model(str(folder), packed=packed)
