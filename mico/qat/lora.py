"""LoRA on the Linears of a language model (peft), and merged into the weights as they are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mico.adapters.family import Family, linears_of, lookup
from mico.errors import UserError

ADAPTER = "default"  # peft's name of it


def with_adapters(
    model: Any, family: Family, *, rank: int, alpha: float, dropout: float, seed: int, also: Sequence[str] = (),
    kinds: Mapping[type, type] | None = None,
) -> Any:  # fmt: skip
    """A PeftModel around `model`, whose adapters alone are trained; they are float32 whatever the model is.

    Every Linear that a stream of the family names gets one, and those that `also` names by their paths in the model.
    kinds: layers derived from peft's, for kinds of Linears. Draws from torch's own generator, seeded with `seed`.
    Raises UserError where a Linear is packed or peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("LoRA needs peft, which is not installed: pip install 'mico[train]'") from None
    paths = [path for stream in family.streams for path in stream.linears]
    for _, block in lookup(model, family.blocks).named_children():
        for stream in family.streams:
            linears_of(block, stream)
    named = "|".join(map(re.escape, paths))
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none",  # type: ignore[arg-type]
        target_modules="|".join([rf"{re.escape(family.blocks)}\.\d+\.({named})", *map(re.escape, also)]),
    )  # fmt: skip
    if kinds:
        config._register_custom_module(dict(kinds))
    return get_peft_model(model, config)


@torch.no_grad()
def merge_adapters(adapted: Any, model: Any) -> int:
    """Add alpha / rank B A of every adapter to the Linear of `model` of that name; returns how many there were.

    model: the one that was adapted, loaded anew in the dtype it is stored in; each sum is rounded once.
    """
    from peft.tuners.lora import Linear

    found = 0
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, Linear):
            weight_RC = model.get_submodule(name).weight
            delta_RC = module.get_delta_weight(ADAPTER)
            weight_RC.copy_(weight_RC.float() + delta_RC.float().to(weight_RC.device))
            found += 1
    return found
