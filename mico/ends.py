"""Embedding and output head at few bits: what the blocks are then calibrated with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mico.loading import LoadedModel
from mico.packed.quantized import QuantizedWeight
from mico.packed.table import quantize_table


def quantize_ends(loaded: LoadedModel, bits: int) -> dict[str, QuantizedWeight]:
    """Embedding and head by module name, their values put in place; nothing at 16 bits."""
    model = loaded.model
    found: dict[str, QuantizedWeight] = {}
    if bits == 16:
        return found
    names = {id(module): name for name, module in model.named_modules()}
    with loaded.part(None):
        ends = {id(end.weight): end for end in (model.get_output_embeddings(), model.get_input_embeddings())}
        for module in ends.values():  # tied, they are one: the embedding, which comes last
            found[names[id(module)]] = quantize_table(module.weight, bits)
        put_ends(model, found)
    if loaded.store is not None:  # a part is dense again when it is read again
        loaded.store.changed = lambda index, part: put_ends(part, found) if index is None else None
    return found


@torch.no_grad()
def put_ends(model: nn.Module, tables: dict[str, QuantizedWeight]) -> None:
    """Put the values of quantized tables in place."""
    for name, table in tables.items():
        weight: Any = model.get_submodule(name).weight
        weight.copy_(table.dequantize(weight.dtype))
