"""mico: post-training compression of language models, measured in true bits.

    import mico
    report = mico.compress("tiny-llama", sparsity=0.5, wbits=4)

The verbs are the commands of the command line with the same option names; each is imported when first used.
`mico.load(FOLDER)` gives the model of a packed checkpoint; once mico is imported, AutoModelForCausalLM of transformers
does so too (mico/plugin.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mico.plugin import load, register_when_needed

if TYPE_CHECKING:
    from mico.bench import bench
    from mico.calibrate import calibrate
    from mico.compress import compress
    from mico.evaluate import evaluate
    from mico.export import export
    from mico.finetune import finetune
    from mico.import_llava import import_llava
    from mico.mi_group import mi_group
    from mico.plan import plan
    from mico.push import push
    from mico.report import report

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "bench",
    "calibrate",
    "compress",
    "evaluate",
    "export",
    "finetune",
    "import_llava",
    "load",
    "mi_group",
    "plan",
    "push",
    "report",
]

register_when_needed()


def __getattr__(name: str) -> Any:
    """Import a verb when it is asked for: its module is callable (mico/callable.py)."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'mico' has no attribute '{name}': its verbs are {', '.join(__all__[1:])}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
