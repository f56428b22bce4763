"""modeling_mico.py: the files of mico that load and run a packed checkpoint, joined to a single one.

The join is mechanical, so that there is one implementation: docstrings and bodies stay, imports between the files
go, the other imports move to the top once.
"""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

ROOM = Path(__file__).parent
FILES = (
    "bits",
    "quantized",
    "blob",
    "cpu",
    "gpu_kernel",
    "gpu",
    "inputs",
    "linear",
    "experts",
    "hf",
)  # each imports only from those before it
HEADER = '''"""Loads and runs a model compressed by mico, without mico: AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True). With mico installed (`import mico`) this file is not used. Written by mico {version};
Apache License 2.0."""

from __future__ import annotations

'''


def bundle() -> str:
    """The text of modeling_mico.py."""
    sources = [(ROOM / f"{name}.py").read_text(encoding="utf-8") for name in FILES]
    imports: dict[str, None] = {}
    bodies = []
    for name, source in zip(FILES, sources, strict=True):
        lines, tree = source.splitlines(), ast.parse(source)
        moved = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imports |= {ast.unparse(node): None for node in moved if not _ours(node)}
        gone = [*moved, tree.body[0]]  # with the docstring
        cut = {index for node in gone for index in range(node.lineno - 1, node.end_lineno or node.lineno)}
        body = "\n".join(line for index, line in enumerate(lines) if index not in cut).strip()
        bodies.append(f"# === {name} ===\n\n{body}\n")
    try:
        version = metadata.version("mico")
    except metadata.PackageNotFoundError:
        version = "from a checkout"
    ordered = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return HEADER.format(version=version) + "\n".join(ordered) + "\n\n\n" + "\n\n".join(bodies)


def _ours(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("mico.", "__future__"))
