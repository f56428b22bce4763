"""`import mico` makes transformers load packed checkpoints, without making anyone wait for transformers.

The plugin itself (mico/packed/hf.py) needs torch and transformers, which take seconds to import. So it is imported
right after transformers' own table of quantizers, whenever that is.
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

TABLE = "transformers.quantizers.auto"
PLUGIN = "mico.packed.hf"


class _AfterImport(MetaPathFinder, Loader):
    """Finds one module as everybody else does, and imports the plugin once that module has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
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
        import_module(PLUGIN)


def register_when_needed() -> None:
    """Register the plugin now if transformers knows its quantizers already, else as soon as it does."""
    if TABLE in sys.modules:
        import_module(PLUGIN)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def load(folder: str | Path, *, execution: str | None = None, **options: Any) -> Any:
    """The model of a packed checkpoint, or of the run folder that holds one, ready for inference.

    execution: 'auto', 'packed' or 'dense' (mico/packed/linear.py); `options` go to from_pretrained, for example
    dtype=torch.bfloat16, device_map="auto". Raises UserError when the folder holds no packed model or is damaged.
    """
    from transformers import AutoModelForCausalLM

    from mico.checkpoint import set_execution, verify_checkpoint
    from mico.errors import UserError
    from mico.files import read_json
    from mico.loading.names import model_in
    from mico.loading.safety import is_packed

    found = model_in(folder)
    if not (found / "config.json").is_file() or not is_packed(read_json(found / "config.json")):
        raise UserError(f"{folder}: no checkpoint packed by mico: give a run folder of mico compress, or its model/")
    verify_checkpoint(found)
    model = AutoModelForCausalLM.from_pretrained(found, **options)
    set_execution(model, execution)
    return model.eval()
