"""modeling_mico.py: the same code as mico's, alone; and what it does where mico is not installed."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import check_imports, get_imports

from mico.packed import bundle
from mico.packed.experts import unfuse
from mico.packed.hf import SHIPPED, shipped_source
from tests.packed.making import logits, pair, pair_of
from tests.tiny import random_model

SCRIPT = """
import importlib.util, sys
from pathlib import Path
assert importlib.util.find_spec("mico") is None and importlib.util.find_spec("triton") is None
import torch
from transformers import AutoModelForCausalLM
*folders, out = map(Path, sys.argv[1:])
for folder in folders:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused:", str(error).splitlines()[0])
    else:
        sys.exit("a packed checkpoint was loaded without the code for it")
with torch.no_grad():
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        ids = torch.arange(12).view(2, -1) * 13 % model.config.vocab_size
        torch.save(model(input_ids=ids, use_cache=False).logits, out / f"{folder.name}.pt")
        model.save_pretrained(out / folder.name)
assert "mico" not in sys.modules
"""


def environment_without(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Environment variables of a Python (to be started with -S) that sees every installed package but these.

    Links, not a copy; path files, which lead to packages installed in editable form, have no effect in it.
    """
    for place in sys.path:
        if Path(place).name not in ("site-packages", "dist-packages") or not Path(place).is_dir():
            continue
        for entry in Path(place).iterdir():
            package = entry.name.split(".")[0].split("-")[0]
            if package not in names and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "MICO_"))}
    return kept | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """(pairs, their folders, what a process without mico wrote, what it printed)."""
    root = tmp_path_factory.mktemp("elsewhere")
    routed = random_model("mixtral")
    unfuse(routed)
    pairs = pair("llama", "mico", 8, tie_word_embeddings=True), pair("opt", "ternary", 4), pair_of(routed)
    folders = [each.save(root / f"model-{number}") for number, each in enumerate(pairs)]
    for name in ("packages", "out"):
        (root / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, *map(str, folders), str(root / "out")],
        env=environment_without(("mico", "triton"), root / "packages"),
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return pairs, folders, root / "out", done.stdout


def test_without_mico_a_load_fails_and_remote_code_gives_the_same_bits(elsewhere) -> None:
    pairs, folders, out, printed = elsewhere
    assert printed.count("refused:") == len(pairs)
    for each, folder in zip(pairs, folders, strict=True):
        assert torch.equal(torch.load(out / f"{folder.name}.pt"), logits(each.dense))


def test_without_mico_saving_again_gives_the_same_bytes(elsewhere) -> None:
    _, folders, out, _ = elsewhere
    for folder in folders:
        again = {file.name: file.read_bytes() for file in (out / folder.name).iterdir()}
        assert {"config.json", "model.safetensors", SHIPPED} <= set(again)
        assert [name for name, content in again.items() if content != (folder / name).read_bytes()] == []


def test_it_asks_for_torch_and_transformers_alone(tmp_path: Path) -> None:
    file = tmp_path / SHIPPED
    file.write_text(bundle.bundle())
    wanted = set(get_imports(file))
    assert wanted <= {"torch", "transformers", *sys.stdlib_module_names}, "transformers refuses a file for the rest"
    assert check_imports(file) == [], "it is a single file"


def test_everything_that_the_files_define_is_in_it_once() -> None:
    def defined(source: str) -> list[str]:
        return [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]

    text = bundle.bundle()
    compile(text, SHIPPED, "exec")
    parts = [name for file in bundle.FILES for name in defined((bundle.ROOM / f"{file}.py").read_text())]
    assert defined(text) == parts and len(set(parts)) == len(parts)
    assert len(text.splitlines()) > 500 and bundle.bundle() == text


def test_the_files_can_be_joined() -> None:
    """They import from one another at their tops, by the names that things have, and only from those before them; a
    constant of one is not one of another."""
    seen: list[str] = []
    constants: dict[str, str] = {}
    for name in bundle.FILES:
        tree = ast.parse((bundle.ROOM / f"{name}.py").read_text())
        ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and bundle._ours(node)]
        assert all(node in tree.body and not any(alias.asname for alias in node.names) for node in ours), name
        assert {node.module for node in ours} <= {"__future__", *(f"mico.packed.{earlier}" for earlier in seen)}, name
        for node in tree.body:
            found = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in [each for part in found if part for each in ast.walk(part) if isinstance(each, ast.Name)]:
                assert constants.setdefault(target.id, name) == name, f"{target.id}: {constants[target.id]} and {name}"
        seen.append(name)


def test_it_is_found_again_by_itself(tmp_path: Path) -> None:
    """A model loaded by the shipped file ships that very file, wherever mico is by then."""
    file = tmp_path / SHIPPED
    file.write_text(bundle.bundle() + "# mark\n")
    spec = importlib.util.spec_from_file_location("shipped_for_a_test", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        assert module.shipped_source() == file.read_text() and shipped_source() == bundle.bundle()
        assert (
            module.LlamaForCausalLM.__name__ == "LlamaForCausalLM" and module.LlamaForCausalLM.__module__ == spec.name
        )
        with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
            _ = module.Nonsense
    finally:
        del sys.modules[spec.name]
