"""What `mico compress` leaves in RUN/model: true sizes, equal logits, a manifest that sees damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import mico
from mico import cli
from mico.checkpoint import INDEX, MANIFEST, ShardWriter, exactly, set_execution, verify_checkpoint, write_manifest
from mico.errors import UserError
from mico.files import sha256_file
from mico.loading import load_model, quiet
from mico.packed.blob import HEADER_BYTES, Header, decode
from mico.packed.linear import PackedLinear
from mico.runs import RunFolder
from tests.packed.making import logits, pair
from tests.tiny import save_model
from tests.workspace import Workspace, workspace

CASES: dict[str, dict[str, Any]] = {
    "mixed-8": dict(sparsity=0.5, wbits=4, embed_bits=8),
    "pattern-4": dict(pattern="2:4", wbits=4, embed_bits=4, method="sparsegpt"),
    "pruned": dict(sparsity=0.5, wbits=16, method="wanda"),
    "opt-mixed-4": dict(sparsity=0.5, wbits=4, embed_bits=4),
    "opt-dense": dict(sparsity=0.0, wbits=3, method="gptq", group_size=16),
}
SECTIONS = 5  # parts of a blob besides those of the groups


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def runs(space: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("checkpoint"), {}
    opt = save_model(root / "opt", "opt", tie_word_embeddings=False, max_position_embeddings=128)
    for name, options in CASES.items():
        model = opt if name.startswith("opt") else space.model
        found[name] = root / name
        mico.compress(str(model), eval="wikitext2", save=str(root / name), **space.options, **options)
    return found


@pytest.fixture(params=CASES)
def run(runs: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return runs[request.param]


def stored(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


# --- what compress writes -------------------------------------------------------------------------------------------


def test_the_files_are_as_large_as_the_report_says(run: Path) -> None:
    report, tensors = report_of(run), stored(run)
    linears = {line["layer"]: tensors.pop(f"{line['layer']}.weight") for line in report["layers"]}
    told = report["size"]["stored_bits"]
    weights = told - sum(line["stored"]["bias"] for line in report["layers"])
    slack = sum(8 * (HEADER_BYTES + SECTIONS + 2 * Header.of(blob).groups) for blob in linears.values())
    bits = 8 * sum(len(blob) for blob in linears.values())
    assert weights < bits <= weights + slack
    assert report["size"]["true_bits"] == pytest.approx(told / sum(line["weights"] for line in report["layers"]))
    biases = sum(tensors.pop(f"{name}.bias").nbytes for name in linears if f"{name}.bias" in tensors)
    rest = sum(tensor.nbytes for tensor in tensors.values())
    assert report["size"]["packed_bytes"] == told // 8 + rest
    file = run / "model" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # of safetensors
    assert report["size"]["bytes"] == file.stat().st_size == header + bits // 8 + biases + rest
    assert header / len(stored(run)) < 130, "bytes a tensor, as docs/packed.md says"


def test_every_linear_holds_what_the_run_solved(run: Path) -> None:
    tensors, model = stored(run), mico.load(run)
    report = report_of(run)
    for index in range(2):
        for path, solved in _blocks(run, index).items():
            name = next(line["layer"] for line in report["layers"] if line["layer"].endswith(f".{index}.{path}"))
            found = model.get_submodule(name).quantized()
            assert torch.equal(found.dequantize(), solved.dequantize()), name
            head = Header.of(tensors[f"{name}.weight"])
            assert (head.rows, head.channels) == tuple(solved.codes_RC.shape)
            assert (found.keep_RC is None) == (solved.keep_RC is None) and found.pattern == solved.pattern


def _blocks(run: Path, index: int) -> dict[str, Any]:
    arguments = json.loads((run / "manifest.json").read_text())["arguments"]
    viewed = RunFolder.view(run, arguments)
    assert viewed is not None
    return viewed.read_block(index)[0]


def test_logits_are_those_of_the_dense_values(run: Path) -> None:
    with quiet():
        packed = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
        dense = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).dequantize()
    assert not [one for one in dense.modules() if isinstance(one, PackedLinear)]
    assert torch.equal(logits(packed), logits(dense))
    loaded = load_model(str(run / "model"), packed=True, seqlen=32)
    assert torch.equal(logits(loaded.model), logits(dense))


def test_tables_are_packed_when_asked_for(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        tensors, bits = stored(run), CASES[name].get("embed_bits", 16)
        ends = [key for key in tensors if "embed_tokens" in key or key.startswith("lm_head")]
        assert ends and {tensors[key].dtype == torch.uint8 for key in ends} == {bits != 16}
        for key in ends if bits != 16 else []:
            assert set(decode(tensors[key]).bits_G) == {bits}
        assert ("lm_head.weight" in tensors) != mico.load(run).config.tie_word_embeddings


def test_biases_are_kept(runs: dict[str, Path]) -> None:
    tensors = stored(runs["opt-dense"])
    model = mico.load(runs["opt-dense"])
    assert "model.decoder.layers.0.fc1.bias" in tensors
    assert torch.equal(model.model.decoder.layers[0].fc1.bias, tensors["model.decoder.layers.0.fc1.bias"])


def test_saving_again_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    with quiet():
        AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (run / "model" / file.name).read_bytes(), file.name


def test_eval_measures_what_the_report_says(run: Path, space: Workspace) -> None:
    found = mico.evaluate(str(run), data_dir=str(space.texts))["perplexity"]["wikitext2"]
    assert found == pytest.approx(report_of(run)["compressed"]["wikitext2"]["perplexity"], rel=1e-6)


def test_a_packed_model_is_not_compressed_again(run: Path, space: Workspace) -> None:
    with pytest.raises(UserError, match="the checkpoint is already quantized: start from the dense model"):
        mico.compress(str(run / "model"), **space.options)


# --- the manifest ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["mixed-8"], tmp_path / "run"))


def test_the_manifest_names_the_weight_files(copied: Path) -> None:
    manifest, report = json.loads((copied / "model" / MANIFEST).read_text()), report_of(copied)
    file = copied / "model" / "model.safetensors"
    assert (manifest["format"], manifest["version"]) == ("mico-packed", 1)
    assert manifest["files"] == {file.name: dict(bytes=file.stat().st_size, sha256=sha256_file(file))}
    assert manifest["base_model"] == report["model"] and manifest["settings"] == report["settings"]
    for figure in ("true_bits", "nominal_bits", "sparsity", "stored_bits"):
        assert manifest[figure] == report["size"][figure]
    verify_checkpoint(copied / "model")


def test_a_flipped_byte_is_named_and_the_exit_code_is_2(
    copied: Path, space: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    assert cli.main(["eval", str(copied), f"--data-dir={space.texts}"]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors is damaged: its sha256 is not that of mico_manifest.json" in " ".join(error.split())
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        verify_checkpoint(file.parent)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist, mico_manifest\.json lists it"):
        verify_checkpoint(file.parent)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "'files' is a list, not an object"),
        ({"model.safetensors": 3}, "'model.safetensors' is without bytes and sha256"),
        ({"model.safetensors": {"bytes": 3}}, "'model.safetensors' is without bytes and sha256"),
    ],
)
def test_a_broken_manifest_is_one_line(tmp_path: Path, files: Any, said: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(dict(files=files)))
    with pytest.raises(UserError, match=f"{MANIFEST}: .*{said}: restore it or compress again"):
        verify_checkpoint(tmp_path)


def test_a_folder_without_manifest_passes(copied: Path, tmp_path: Path) -> None:
    (copied / "model" / MANIFEST).unlink()
    verify_checkpoint(copied / "model")
    assert mico.load(copied) is not None


def test_only_weight_files_are_listed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "other.txt"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, dict(fact=1))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["a.safetensors", "b.safetensors"] and manifest["fact"] == 1


# --- parts ----------------------------------------------------------------------------------------------------------


def test_a_tensor_gets_smaller_only_where_that_loses_nothing() -> None:
    halves = torch.randn(50, generator=torch.Generator().manual_seed(0)).half()
    brains = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16() * 1e20
    full = torch.tensor([0.1, 1e30])
    assert exactly(halves.float(), torch.bfloat16).dtype == torch.float16
    assert exactly(brains.float(), torch.bfloat16).dtype == torch.bfloat16
    assert exactly(halves.float(), torch.float32).dtype == torch.float32
    for tensor in (halves.float(), brains.float(), full):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(exactly(tensor, dtype).float(), tensor)
    assert exactly(full, torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize("limit", [1, 100, 250, 10**6])
def test_files_of_at_most_a_limit(tmp_path: Path, limit: int) -> None:
    tensors = {f"layer.{place}": torch.full((place * 10,), place, dtype=torch.uint8) for place in range(1, 9)}
    writer = ShardWriter(tmp_path, limit)
    for key, tensor in tensors.items():
        writer.add(key, tensor)
    assert writer.bytes == 360 and not list(tmp_path.glob("*.safetensors")), "named only when all are there"
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {file.name: load_file(file) for file in files}
    assert all(sum(t.nbytes for t in part.values()) <= limit or len(part) == 1 for part in found.values())
    if limit == 10**6:
        assert list(found) == ["model.safetensors"] and not (tmp_path / INDEX).exists()
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index == dict(
            metadata=dict(total_size=360), weight_map={key: name for name, part in found.items() for key in part}
        )
        assert list(found) == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    joined = {key: tensor for part in found.values() for key, tensor in part.items()}
    assert set(joined) == set(tensors) and all(torch.equal(joined[key], tensors[key]) for key in tensors)
    assert {path.name for path in tmp_path.iterdir()} <= {file.name for file in files} | {INDEX}


def test_a_stream_whose_linears_disagree_on_labels_is_a_fault(tmp_path: Path) -> None:
    both = pair(kind="mico")
    weights = both.weights | {"model.layers.0.self_attn.k_proj": both.weights["model.layers.1.self_attn.k_proj"]}
    broken = type(both)(both.dense, both.packed, weights, both.dtype)
    with pytest.raises(AssertionError, match=r"layers\.0\.self_attn\.k_proj"):
        broken.save(tmp_path)


def test_execution_is_set_on_every_packed_linear() -> None:
    model = pair(kind="grouped", embed_bits=8).packed
    linears = [one for one in model.modules() if isinstance(one, PackedLinear)]
    for execution in ("packed", "dense", "auto"):
        set_execution(model, execution)
        assert {one.execution for one in linears} == {execution}
    set_execution(model, None)
    assert {one.execution for one in linears} == {"auto"}
    set_execution(nn.Linear(2, 2), "packed")  # has none
    with pytest.raises(UserError, match="execution quick: choose from auto, packed, dense"):
        set_execution(model, "quick")
