"""Every refusal of the loader with its message, on a tiny checkpoint, without network."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mico import loading
from mico.adapters import family_of
from mico.errors import UserError
from mico.loading.safety import check_folder, tensor_shapes

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def hub_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer OPT saved in two bfloat16 shards, with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="25KB")
    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 40)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The message of the UserError that a call raises, which is one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# --- what loads ----------------------------------------------------------------------------------------------------


def test_a_model_is_ready_to_be_measured(folder: Path) -> None:
    state = torch.get_rng_state()
    loaded = loading.load_model(str(folder), device="cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert (loaded.family.name, loaded.seqlen, loaded.dtype, loaded.device.type) == ("OPT", 64, torch.float32, "cpu")
    assert loaded.name == loaded.source == str(folder) and loaded.folder == folder
    assert loaded.fingerprint == loading.fingerprint(folder)
    model = loaded.model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config.use_cache is False and model.config._attn_implementation == "sdpa"
    stored = {key: value for shard in shards(folder) for key, value in load_file(shard).items()}
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[key].float())
    assert model(input_ids=loaded.tokenizer("w1 w2 w3", return_tensors="pt").input_ids).logits.isfinite().all()


def test_dtype_and_seqlen_are_taken(folder: Path) -> None:
    loaded = loading.load_model(str(folder), device="cpu", dtype="bfloat16", seqlen=8)
    assert (loaded.dtype, loaded.seqlen) == (torch.bfloat16, 8)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_choose_an_attention_kernel_from_the_hub(folder: Path, key: str) -> None:
    edit(folder / "config.json", lambda c: c.update({key: "kernels-community/flash-attn2"}))
    assert loading.load_model(str(folder), device="cpu").model.config._attn_implementation == "sdpa"


def test_nothing_is_printed_and_settings_are_put_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    edit(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(extra=shards(folder)[0].name)
    )
    tensors = load_file(shards(folder)[0])
    save_file({**tensors, "extra": torch.zeros(2)}, shards(folder)[0], {"format": "pt"})  # draws transformers' report
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment,method-assign]
    transformers_logging.add_handler(handler)
    try:
        loading.load_model(str(folder), device="cpu")
        quietly, captured = len(records), capfd.readouterr()
        AutoModelForCausalLM.from_pretrained(folder)
    finally:
        transformers_logging.remove_handler(handler)
    assert captured.out == captured.err == "" and quietly == 0
    assert records and "Loading weights" in capfd.readouterr().err  # what transformers says by itself
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_architecture_and_coverage(folder: Path) -> None:
    loaded = loading.load_model(str(folder), device="cpu")
    facts = loading.describe(loaded.model, loaded.family)
    assert facts == dict(
        family="OPT", layers=2, hidden=32, heads=4, kv_heads=4, ffn=48, vocabulary=40, tied_head=True, coverage=1.0,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
    )  # fmt: skip
    assert loading.coverage(loaded.model, loaded.family) == 1.0
    loaded.model.side = torch.nn.Linear(10, 10)
    inside = sum(p.numel() for m in loaded.model.model.decoder.layers.modules() if isinstance(m, torch.nn.Linear)
                 for p in m.parameters())  # fmt: skip
    assert loading.coverage(loaded.model, loaded.family) == pytest.approx(inside / (inside + 110))


def test_grouped_queries_and_an_untied_head_are_described() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    facts = loading.describe(model, family_of(config))
    assert (facts["kv_heads"], facts["ffn"], facts["tied_head"]) == (2, 48, False)


# --- names ---------------------------------------------------------------------------------------------------------


def test_aliases() -> None:
    assert loading.resolve("vicuna-7b") == "lmsys/vicuna-7b-v1.5"
    assert loading.resolve("OPT-66B") == "facebook/opt-66b"
    assert loading.resolve("org/name") == "org/name"
    wanted = "llama2-13b llama3-8b mistral-7b yi-34b qwen2-7b qwen2.5-7b qwen3-8b opt-125m opt-350m vicuna-13b"
    assert set(wanted.split()) <= set(loading.ALIASES)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub) for name, hub in loading.ALIASES.items() if "tiny" not in name)


def test_reference_models_are_known_by_name_and_by_path(tmp_path: Path) -> None:
    path = loading.resolve("tiny-opt")
    assert Path(path).parts[-3:] == ("mico", "reference", "tiny-opt")
    assert loading.is_reference("tiny-opt") and loading.is_reference("tiny-llama") and loading.is_reference(path)
    assert not loading.is_reference("opt-125m") and not loading.is_reference(str(tmp_path))


def test_unknown_names(tmp_path: Path) -> None:
    message = refusal(loading.load_config, "tiny-lama")
    assert "unknown model 'tiny-lama' (did you mean tiny-llama" in message and "`mico models`" in message
    assert "no such folder" in refusal(loading.load_config, str(tmp_path / "absent"))
    assert "no such folder" in refusal(loading.load_config, "./absent")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(loading.load_config, str(tmp_path / "file"))


def test_a_missing_reference_model_is_an_installation_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mico.loading import names

    monkeypatch.setattr(names, "REFERENCE_DIR", tmp_path)
    monkeypatch.setitem(names.ALIASES, "tiny-opt", str(tmp_path / "tiny-opt"))
    assert "missing from this installation" in refusal(loading.load_config, "tiny-opt")


# --- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(original: Path, tmp_path: Path) -> Path:
    """A hub cache that holds org/tiny: links into blobs, as the client lays it out."""
    return fill_cache(original, tmp_path / "hub" / "models--org--tiny", "main", "a" * 40, lambda path: True)


def fill_cache(original: Path, repo: Path, ref: str, commit: str, wanted: Callable[[Path], bool]) -> Path:
    snapshot = repo / "snapshots" / commit
    for path in (snapshot, repo / "blobs", (repo / "refs" / ref).parent):
        path.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    for path in filter(wanted, original.iterdir()):
        shutil.copy(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_a_cached_hub_model_loads_without_network(cached: Path) -> None:
    loaded = loading.load_model("org/tiny", device="cpu", offline=True)
    assert loaded.source == f"org/tiny@{'a' * 12}" and loaded.folder == cached


def test_a_link_from_the_cache_to_elsewhere_is_refused(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (cached / "config.json").unlink()
    (cached / "config.json").symlink_to(tmp_path / "secret")
    assert "config.json leads out of the model's folder" in refusal(loading.load_config, "org/tiny")


def test_pickle_repositories_load_from_the_conversion_bots_pull_request(original: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--tiny"
    fill_cache(original, repo, "main", "a" * 40, lambda path: "safetensors" not in path.name)
    assert "org/tiny has no safetensors weights; pickle files" in refusal(loading.load_model, "org/tiny")
    assert loading.load_config("org/tiny").model_type == "opt"
    fill_cache(original, repo, "refs/pr/7", "b" * 40, lambda path: True)
    assert loading.load_model("org/tiny", device="cpu").source == f"org/tiny@{'b' * 12}"


def test_online_only_the_bots_own_pull_requests_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[Any] = []

    def discussions(repo: str, **filters: Any) -> Iterator[Any]:
        asked.append((repo, filters["author"], filters["discussion_status"]))
        return iter(())

    def snapshot(repo: str, **options: Any) -> str:
        assert not any(re.match(pattern, "pytorch_model.bin") for pattern in options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "get_repo_discussions", discussions)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert "has no safetensors weights" in refusal(loading.local_folder, "org/tiny")
    assert asked == [("org/tiny", "SFconvertbot", "open")]


def bare(kind: type[Exception]) -> Exception:
    """An exception without the HTTP response that its constructor wants (the client's http library changes)."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    "error, offline, message",
    [
        (errors.LocalEntryNotFoundError("x"), True, "the hub is off (--offline or HF_HUB_OFFLINE)"),
        (errors.LocalEntryNotFoundError("x"), False, "the hub cannot be reached: check the network"),
        (bare(errors.RepositoryNotFoundError), False, "no repository org/tiny on the hub"),
        (bare(errors.GatedRepoError), False, "org/tiny is gated"),
        (OSError("disk quota exceeded\nmore"), False, "could not be read from the hub (disk quota exceeded)"),
    ],
)
def test_hub_failures(error: Exception, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        assert options["local_files_only"] == offline
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert message in refusal(loading.load_config, "org/tiny", offline=offline)


def test_an_uncached_model_offline() -> None:
    assert "facebook/opt-125m is not whole in the hub cache" in refusal(loading.load_config, "opt-125m", offline=True)


# --- config and tokenizer ------------------------------------------------------------------------------------------

CONFIG_MISTAKES: list[tuple[Edit, str]] = [
    (lambda c: c.update(model_type="bloom"), "model_type 'bloom' is not supported: the families are OPT"),
    (lambda c: c.update(model_type="gpt_neox", auto_map={"A": "b.C"}), "model_type 'gpt_neox' is not supported"),
    (lambda c: c.update(model_type="a\nb"), r"model_type 'a\nb' is not supported"),
    (lambda c: c.pop("model_type"), "model_type None is not supported"),
    (lambda c: c.update(auto_map={"AutoConfig": "evil.Config"}), "'auto_map' asks to run the model's own code"),
    (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "already quantized"),
    (lambda c: c.update(transformers_weights="../x.safetensors"), "'transformers_weights'"),
    (lambda c: c.update(configuration_files=["config.1.0.0.json"]), "'configuration_files'"),
    (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    (lambda c: c.update(num_hidden_layers="two"), "num_hidden_layers 'two'"),
    (lambda c: c.update(num_labels=10**9), "num_labels 1000000000"),
    (lambda c: c.update(hidden_size="wide"), "describes no valid model"),
]


@pytest.mark.parametrize("change, message", CONFIG_MISTAKES)
def test_config_mistakes_are_found_before_the_weights(folder: Path, change: Edit, message: str) -> None:
    for shard in shards(folder):
        shard.write_bytes(b"not opened")
    edit(folder / "config.json", change)
    assert message in refusal(loading.load_config, str(folder))
    assert message in refusal(loading.load_model, str(folder), device="cpu")


def test_remote_code_of_a_tokenizer_is_refused_and_never_runs(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.T", None]}))
    assert "tokenizer_config.json: 'auto_map'" in refusal(loading.load_tokenizer, str(folder))
    assert not (tmp_path / "ran").exists()


def test_missing_and_broken_config(folder: Path) -> None:
    for content, message in [
        ("{", "is not valid JSON"),
        ("[]", "a JSON object is expected"),
        ("[" * 10**5, "not valid"),
    ]:
        (folder / "config.json").write_text(content)
        assert message in refusal(loading.load_config, str(folder))
    with (folder / "config.json").open("wb") as stream:
        stream.truncate(2**40)  # sparse: read whole it would fill the memory
    assert "not a plausible JSON file" in refusal(loading.load_config, str(folder))
    (folder / "config.json").unlink()
    assert "config.json does not exist" in refusal(loading.load_config, str(folder))


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "PEFT adapter" in refusal(loading.load_model, str(folder))


def test_missing_and_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be read" in refusal(loading.load_tokenizer, str(folder))
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer: one of tokenizer.json" in refusal(loading.load_tokenizer, str(folder))


@pytest.mark.parametrize("seqlen", [-1, 1, 65, 4096])
def test_a_wrong_seqlen(folder: Path, seqlen: int) -> None:
    config = loading.load_config(str(folder))
    assert f"--seqlen {seqlen}: must be from 2 to the model's maximum, 64" in refusal(
        loading.context_length, config, seqlen
    )
    config.max_position_embeddings = 32768
    assert (loading.context_length(config), loading.context_length(config, 4096)) == (2048, 4096)


def test_a_wrong_device_or_dtype(folder: Path) -> None:
    assert "--device cuda:99" in refusal(loading.load_model, str(folder), device="cuda:99")
    assert "--device gpu" in refusal(loading.load_model, str(folder), device="gpu")
    assert "--dtype int3: choose from auto, float32" in refusal(loading.load_model, str(folder), dtype="int3")


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/etc/passwd", "../tiny/model.safetensors", "sub/model.safetensors", "x.bin", 3])
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, target: Any) -> None:
    key = "model.decoder.layers.0.fc1.weight"
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({key: target}))
    message = refusal(loading.load_model, str(folder))
    assert f"'{key}' names {target!r}: only a file of the same folder" in message


def test_an_index_without_its_entries(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert "entries 'metadata' and 'weight_map' are expected" in refusal(loading.load_model, str(folder))


def test_links_out_of_the_folder_are_refused(folder: Path, original: Path) -> None:
    shard = shards(folder)[0]
    shard.unlink()
    shard.symlink_to(original / shard.name)
    assert f"{shard.name} leads out of the model's folder" in refusal(loading.load_config, str(folder))
    shard.unlink()
    shutil.copy(original / shard.name, folder / "inside")
    shard.symlink_to("inside")
    assert loading.load_model(str(folder), device="cpu").seqlen == 64


def test_missing_shards_and_tensors_are_named(folder: Path) -> None:
    shard = shards(folder)[1]
    tensors = load_file(shard)
    key = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != key}, shard, {"format": "pt"})
    message = refusal(loading.load_model, str(folder))
    assert shard.name in message and f"{key} listed in model.safetensors.index.json" in message
    shard.unlink()
    assert f"{shard.name} does not exist" in refusal(loading.load_model, str(folder))


def test_weights_that_lack_what_the_config_describes(folder: Path) -> None:
    key = "model.decoder.layers.1.fc2.weight"
    single(folder, lambda tensors: tensors.pop(key))
    assert f"missing: {key}" in refusal(loading.load_model, str(folder))
    single(folder, lambda tensors: tensors.update(extra=torch.zeros(10**5)))  # enough numbers, under another name
    assert f"weights missing: {key}" in refusal(loading.load_model, str(folder), device="cpu")


def test_weights_of_another_shape(folder: Path) -> None:
    key = "model.decoder.layers.1.fc2.weight"
    single(folder, lambda tensors: tensors.update({key: tensors[key].T.contiguous()}))
    message = refusal(loading.load_model, str(folder), device="cpu")
    assert f"'{key}' has shape (48, 32), config.json describes (32, 48)" in message
    edit(folder / "config.json", lambda c: c.update(ffn_dim=10**9))  # refused before 256 GB are allocated
    assert "config.json describes" in refusal(loading.load_model, str(folder), device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    single(folder, lambda tensors: tensors["model.decoder.layers.1.fc1.bias"][5:6].fill_(value))
    assert "'model.decoder.layers.1.fc1.bias' holds NaN or inf" in refusal(
        loading.load_model, str(folder), device="cpu"
    )


def test_weights_too_large_for_the_dtype_are_named(folder: Path) -> None:
    single(folder, lambda tensors: tensors["model.decoder.layers.1.fc1.bias"].fill_(1e6))
    assert "infinite weights in torch.float16" in refusal(
        loading.load_model, str(folder), device="cpu", dtype="float16"
    )


def single(folder: Path, change: Edit) -> None:
    """Rewrite the weights as one file after a change."""
    tensors = {key: value for shard in shards(folder) for key, value in load_file(shard).items()}
    change(tensors)
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_pickle_only_folders_are_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({"weight": Payload()}, folder / "pytorch_model.bin")
    message = refusal(loading.load_model, str(folder))
    assert "pickle files (.bin, .pt, .pth) can run code" in message and "save_pretrained" in message
    assert not (tmp_path / "ran").exists()


def test_truncated_weights_are_named_at_every_offset(folder: Path) -> None:
    shard = shards(folder)[0]
    whole = shard.read_bytes()
    offsets = [0, 1, 7, 8, 9, len(whole) - 1, *(len(whole) * i // 15 for i in range(1, 15))]
    for offset in offsets:
        shard.write_bytes(whole[:offset])
        assert f"{shard.name} is truncated or corrupt" in refusal(tensor_shapes, folder)
    shard.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    assert "header of 4,611,686,018,427,387,904" in refusal(tensor_shapes, folder)


def test_mutated_headers_and_configs_give_a_clean_answer(folder: Path) -> None:
    """Whatever a byte or a value becomes: the model loads or one line says why not."""
    generator = random.Random(0)
    shard, config = shards(folder)[0], folder / "config.json"
    whole, fields = shard.read_bytes(), json.loads(config.read_text())
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        mutated = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            mutated[generator.randrange(header)] = generator.randrange(256)
        shard.write_bytes(mutated)
        refused += answers(tensor_shapes, folder)
    shard.write_bytes(whole)
    values = [-1, 0, 1, 7, 2**31, 2**62, 1.5, "x", None, [], {}, [{}], True, "a" * 10**4]
    for _ in range(60):
        config.write_text(json.dumps({**fields, generator.choice(sorted(fields)): generator.choice(values)}))
        refused += answers(loading.load_model, str(folder), device="cpu")
    assert refused > 100


def answers(call: Callable[..., Any], *args: Any, **options: Any) -> bool:
    """Whether a call is refused; any exception but a one-line UserError is a fault."""
    try:
        call(*args, **options)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


# --- fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_every_byte_and_not_the_place(folder: Path, original: Path) -> None:
    plain = loading.fingerprint(original)
    assert re.fullmatch("[0-9a-f]{64}", plain) and plain == loading.fingerprint(folder)
    shard = shards(folder)[-1]
    whole = shard.read_bytes()
    for offset in (9, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        assert loading.fingerprint(folder) != plain
    shard.write_bytes(whole)
    edit(folder / "config.json", lambda c: c.update(activation_function="gelu"))
    assert loading.fingerprint(folder) != plain


def test_a_large_model_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mico.loading import safety

    monkeypatch.setattr(safety, "_FULL_HASH_LIMIT", 0)
    monkeypatch.setattr(safety, "_CHUNK", 64)
    monkeypatch.setattr(safety, "_CHUNKS", 4)
    plain = loading.fingerprint(folder)
    assert plain == loading.fingerprint(folder)
    shard = shards(folder)[0]
    whole = shard.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    seen = []
    for offset in (header - 1, header + 10, header + 80, len(whole) - 1):
        shard.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        seen.append(loading.fingerprint(folder) != plain)
    assert seen == [True, True, False, True]  # the third lies between two samples


def test_check_folder_returns_the_config(folder: Path) -> None:
    assert check_folder(folder)["model_type"] == "opt"
