"""`import mico` makes transformers load packed checkpoints and MiniCPM, without making anyone wait for transformers.

What registers them needs torch or transformers, which take seconds to import. So each is imported right after the
table of transformers that it adds to, whenever that is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_MODELS = "transformers.models.auto.modeling_auto"
PLUGINS = {  # table of transformers -> what adds to it
    "transformers.quantizers.auto": "mico.packed.hf",
    "transformers.models.auto.configuration_auto": "mico.adapters.minicpm_config",
    _MODELS: "mico.adapters.minicpm_config",
}


class _AfterImport(MetaPathFinder, Loader):
    """Finds one module as everybody else does, and imports its plugin once that module has run."""

    def __init__(self, table: str) -> None:
        self.table = table

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.table:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        self._inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if self.table == "transformers.models.auto.configuration_auto" and _MODELS in sys.modules:
            return  # that table is half imported, and configs need all of it: its own turn comes
        import_module(PLUGINS[self.table])


def register_when_needed() -> None:
    """Import each plugin now if its table is there already, else as soon as it is."""
    waiting = {finder.table for finder in sys.meta_path if isinstance(finder, _AfterImport)}
    for table, plugin in PLUGINS.items():
        if table in sys.modules:
            import_module(plugin)
        elif table not in waiting:
            sys.meta_path.insert(0, _AfterImport(table))


def load(folder: str | Path, *, execution: str | None = None, **options: Any) -> Any:
    """The model of a packed checkpoint, or of the run folder that holds one, ready for inference.

    execution: 'auto', 'packed', 'dense' or 'lean' (docs/packed.md); `options` go to from_pretrained, for example
    dtype=torch.bfloat16, device_map="auto". Raises UserError when the folder holds no packed model or is damaged.
    """
    from mico.adapters import auto_class
    from mico.checkpoint import check_execution, set_execution
    from mico.loading.packed import checked_packed_folder

    check_execution(execution)
    found, config = checked_packed_folder(folder)
    model = auto_class(config.get("model_type")).from_pretrained(found, **options)
    set_execution(model, execution)
    return model.eval()
