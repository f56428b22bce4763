"""What forecasts need to know of a model: the shapes of its Linears and what lies beside them; no weight is read.

Suffixes: R output rows, C input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mico.adapters import auto_class, family_of
from mico.adapters.family import Family, linears_of, lookup
from mico.errors import UserError
from mico.loading import coverage
from mico.loading.headers import Stored
from mico.loading.safety import reason, some
from mico.loading.silence import quiet
from mico.packed.experts import unfuse


@dataclass(frozen=True)
class StreamShape:
    """One stream of one block. rows: of each of its Linears; tokens: share of all tokens that it sees (experts)."""

    name: str
    channels: int
    rows: tuple[int, ...]
    tokens: float = 1.0
    expert: int | None = None

    @property
    def weights(self) -> int:
        return self.channels * sum(self.rows)


@dataclass(frozen=True)
class Outline:
    """Shapes of a model. blocks: the streams of every block; block_parameters: all parameters of every block.

    tables: (rows, channels) of the embedding, and of the head unless they are one; ends: parameters outside the
    blocks; tensors: that a checkpoint holds; stored_bytes: of the weight files; hidden: width between blocks; dtype: of
    the checkpoint; coverage: share of the Linear parameters that gets compressed.
    """

    family: Family
    blocks: tuple[tuple[StreamShape, ...], ...]
    block_parameters: tuple[int, ...]
    tensors: int
    tables: tuple[tuple[int, int], ...]
    ends: int
    hidden: int
    vocabulary: int
    stored_bytes: int
    dtype: torch.dtype
    coverage: float

    @property
    def parameters(self) -> int:
        return self.ends + sum(self.block_parameters)

    @property
    def linear_weights(self) -> int:
        return sum(stream.weights for block in self.blocks for stream in block)

    @property
    def widest(self) -> tuple[StreamShape, ...]:
        """The streams of the block with most parameters, which sets the peaks."""
        return self.blocks[max(range(len(self.blocks)), key=lambda index: self.block_parameters[index])]


def outline(config: Any, stored: dict[str, Stored], source: str) -> Outline:
    """Build the model without memory and read its shapes. Raises UserError where the files hold less than it needs."""
    model = _on_meta(config, source)
    unfuse(model)
    family, text = family_of(config), config.get_text_config()
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(tensor.count for tensor in stored.values())
    if needed > held:
        absent = sorted(name for name, _ in model.named_parameters() if name not in stored)
        what = f"missing: {some(absent)}" if absent else "the shapes differ"
        raise UserError(f"{source}: config.json describes {needed:,} parameters, the weights hold {held:,}; {what}")
    blocks = list(lookup(model, family.blocks).children())
    shares = _expert_share(text)
    shapes = [_streams(block, family, shares) for block in blocks]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    ends = {
        id(end.weight): tuple(end.weight.shape)
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
        if end
    }
    return Outline(
        family, tuple(shapes), tuple(sizes), sum(1 for _ in model.parameters()), tuple(ends.values()),
        needed - sum(sizes), text.hidden_size, text.vocab_size, sum(tensor.nbytes for tensor in stored.values()),
        config.dtype or torch.float32, coverage(model, family),
    )  # fmt: skip


def _on_meta(config: Any, source: str) -> Any:
    try:
        with quiet(), torch.device("meta"):
            model: Any = auto_class(config.model_type).from_config(config, attn_implementation="sdpa")
    except Exception as error:  # a config can be wrong in any way
        raise UserError(f"{source}: config.json describes no valid model: {reason(error)}") from error
    model.tie_weights()
    return model


def _expert_share(config: Any) -> float:
    """Mean share of the tokens that an expert sees."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    return min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)


def _streams(block: Any, family: Family, share: float) -> tuple[StreamShape, ...]:
    found = []
    for row in family.streams:
        linears = list(linears_of(block, row).values())
        rows = tuple(linear.out_features for linear in linears)
        expert = row.expert is not None
        found.append(StreamShape(row.name, linears[0].in_features, rows, share if expert else 1.0, row.expert))
    return tuple(found)
