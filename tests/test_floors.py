"""Imports only point down (docs/architecture.md). Freezes the floors, and what one file may grow to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the roof to the basement; a room is one top-level file or folder of mico/
    ("cli", {"__init__", "__main__", "cli", "exits", "options", "training_options", "vision_options"}),
    (
        "verbs",
        {"bench", "calibrate", "mi_group", "compress", "evaluate", "export", "finetune", "import_llava", "plan"}
        | {"report"},
    ),
    (
        "middle",
        {"walk", "loading", "methods", "metrics", "qat", "files", "runs", "stages", "solve", "reference"}
        | {"console", "tables", "summary", "costs", "callable", "card", "checkpoint", "exports", "forecast", "plugin"}
        | {"team", "follow", "ends", "comparison", "activations", "preflight", "pages"}
        | {"push", "tracking", "calibration", "visual_tokens"},
    ),
    ("ground", {"adapters", "channels", "packed", "data", "image_text"}),
    ("basement", {"errors", "profiles", "settings"}),
)
STRANGERS = {"verbs", "ground"}  # rooms of these floors never import one another
LONGEST_FILE = 450
FLOOR_OF = {room: level for level, (_, rooms) in enumerate(FLOORS) for room in rooms}
PATHS = sorted((ROOT / "mico").rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in PATHS}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Line and name of every module of mico that a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, node.module) if node.module else above)
            names = [full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        for name in names:
            if name in MODULES and MODULES[name] != path:
                yield node.lineno, name


def verdict(importer: str, target: str) -> str | None:
    """Why `importer` must not import `target`, or None when it may."""
    here, there = FLOOR_OF.get(room(importer)), FLOOR_OF.get(room(target))
    if here is None or there is None:
        return "one of the two stands on no floor"
    if there < here:
        return f"{FLOORS[here][0]} imports upwards from {FLOORS[there][0]}"
    if here == there and room(importer) != room(target) and FLOORS[here][0] in STRANGERS:
        return f"two rooms of {FLOORS[here][0]} meet"
    return None


def test_every_module_stands_on_a_floor() -> None:
    homeless = sorted({str(path.relative_to(ROOT)) for path in PATHS if room(dotted(path)) not in FLOOR_OF})
    assert not homeless, f"put these into FLOORS of {__file__} and into docs/architecture.md: {homeless}"


def test_imports_only_point_down() -> None:
    found = [(path, line, target) for path in PATHS for line, target in imported(path)]
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {target}: {reason}"
        for path, line, target in found
        if (reason := verdict(dotted(path), target))
    ]
    assert found and not broken, "\n".join(broken)


@pytest.mark.parametrize("name_of", [str, room], ids=["files", "rooms"])
def test_no_import_circle(name_of) -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        targets = {name_of(target) for _, target in imported(path)}
        graph.setdefault(name_of(module), set()).update(targets - {name_of(module)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("mico.cli", "mico.compress", True),
        ("mico.compress", "mico.walk", True),
        ("mico.walk", "mico.errors", True),
        ("mico.adapters.llama", "mico.adapters.family", True),
        ("mico.compress", "mico.calibrate", False),
        ("mico.channels.grouping", "mico.packed.quantized", False),
        ("mico.walk", "mico.compress", False),
        ("mico.walk", "mico", False),
        ("mico.errors", "mico.data", False),
    ],
)
def test_the_rule_itself(importer: str, target: str, allowed: bool) -> None:
    assert (verdict(importer, target) is None) is allowed


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("import mico.packed.quantized", "mico.packed.quantized"),
        ("from mico import data", "mico.data"),
        ("from mico.data import load_text", "mico.data"),
        ("from mico import __version__", "mico"),
        ("from ..packed import quantized", "mico.packed.quantized"),
        ("from .family import Stream", "mico.adapters.family"),
        ("def f():\n    from mico.data import load_text", "mico.data"),
    ],
)
def test_every_form_of_import_is_seen(statement: str, target: str) -> None:
    assert [name for _, name in imported(ROOT / "mico" / "adapters" / "probe.py", statement)] == [target]


def test_no_file_outgrows_a_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in PATHS}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
