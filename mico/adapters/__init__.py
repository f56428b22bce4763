"""The table of supported model families. A new family is one file and one row here."""

from __future__ import annotations

from typing import Any

from mico.adapters.family import Family
from mico.adapters.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from mico.adapters.llava import LLAVA, with_towers
from mico.adapters.minicpm import MINICPM, MINICPM3
from mico.adapters.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from mico.adapters.opt import OPT
from mico.errors import UserError

__all__ = ["FAMILIES", "auto_class", "family_of", "family_row", "with_towers"]

FAMILIES: tuple[Family, ...] = (
    OPT, LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, MINICPM, MINICPM3, LLAVA,
)  # fmt: skip


def family_row(model_type: object) -> Family:
    """The row of a config's `model_type`. Raises UserError listing the supported families."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise UserError(f"model_type {model_type!r:.60} is not supported: the families are {known}")


def family_of(config: Any) -> Family:
    """The family of a transformers config, less the modules that a model of this shape does not have.

    Raises UserError naming the model_type when no family supports it.
    """
    family = family_row(getattr(config, "model_type", None))
    return family if family.fit is None else family.fit(family, config)


def auto_class(model_type: object) -> Any:
    """The class of transformers that loads models of this type with their head."""
    import transformers

    return getattr(transformers, family_row(model_type).auto)
