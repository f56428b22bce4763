"""Where a LLaVA is quantized: every tensor that Linears of its blocks and its projector read, and their weights.

Patch embedding, norms, embeddings and lm_head are no sites. Neither are blocks of the vision tower behind the layer
whose states the projector reads (`vision_feature_layer`, -2 in LLaVA): their output reaches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mico.adapters import family_of
from mico.adapters.family import Stream, linears_of, lookup
from mico.errors import UserError

VISION, PROJECTOR, TEXT = MODALITIES = ("vision", "projector", "text")
TOWER, BRIDGE = "model.vision_tower", "model.multi_modal_projector"
TOWER_BLOCKS = ("encoder.layers", "vision_model.encoder.layers")  # inside the tower, CLIP and SigLIP
TOWER_STREAMS = (
    Stream("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Stream("attn_out", ("self_attn.out_proj",)),
    Stream("mlp_in", ("mlp.fc1",)),
    Stream("mlp_out", ("mlp.fc2",)),
)


@dataclass(frozen=True)
class Site:
    """One tensor and the Linears that read it, by their names in the model: they share its quantizer.

    rows: output rows of every Linear. A token costs as many multiplications here as there are weights.
    """

    name: str
    modality: str
    linears: tuple[str, ...]
    channels: int
    rows: tuple[int, ...]

    @property
    def macs_per_token(self) -> int:
        return self.channels * sum(self.rows)

    @property
    def params(self) -> int:
        """Weights that meet this tensor, biases not counted."""
        return self.channels * sum(self.rows)


def find_sites(model: Any) -> tuple[Site, ...]:
    """The sites of a LlavaForConditionalGeneration (or LLaVA-NeXT), in the order in which tokens pass them.

    Raises UserError where the model is no LLaVA, a Linear is already quantized, or a block holds Linears that the
    table of its streams does not name.
    """
    if not hasattr(getattr(model, "model", None), "vision_tower"):
        raise UserError(f"model_type {model.config.model_type!r} has no vision tower: CM-IBQ is for LLaVA models")
    family = family_of(model.config)
    found: list[Site] = []
    for name, block in read_tower_blocks(model):
        found += _block_sites(name, block, TOWER_STREAMS, VISION)
    found += _projector_sites(lookup(model, BRIDGE))
    for index, block in lookup(model, family.blocks).named_children():
        found += _block_sites(f"{family.blocks}.{index}", block, family.streams, TEXT)
    return tuple(found)


def read_tower_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """(name, block) of the vision tower, up to the last whose states the projector reads."""
    tower = lookup(model, TOWER)
    for path in TOWER_BLOCKS:
        try:
            blocks = list(lookup(tower, path).named_children())
        except UserError:
            continue
        chosen: Any = model.config.vision_feature_layer
        layers = [chosen] if isinstance(chosen, int) else list(chosen)
        # states 0 are the embeddings, states i what block i - 1 leaves
        deepest = max(layer if layer >= 0 else len(blocks) + 1 + layer for layer in layers)
        return [(f"{TOWER}.{path}.{index}", block) for index, block in blocks[:deepest]]
    raise UserError(
        f"{TOWER} is a {type(tower).__name__} without {' or '.join(TOWER_BLOCKS)}: CLIP or SigLIP is needed"
    )


def _block_sites(name: str, block: nn.Module, streams: tuple[Stream, ...], modality: str) -> list[Site]:
    made = []
    for stream in streams:
        linears = linears_of(block, stream)
        made.append(_site(f"{name}.{stream.name}", modality, {f"{name}.{path}": m for path, m in linears.items()}))
    listed = {linear for site in made for linear in site.linears}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.{path}" not in listed:
            raise UserError(f"'{name}.{path}' is a Linear that no stream of {modality} blocks names: not supported")
    return made


def _projector_sites(projector: nn.Module) -> list[Site]:
    """Every Linear of the projector reads a tensor of its own."""
    named = [(f"{BRIDGE}.{path}", module) for path, module in projector.named_modules()]
    linears = {name: module for name, module in named if isinstance(module, nn.Linear)}
    if not linears:
        raise UserError(f"{BRIDGE} holds no Linear: the model is already quantized?")
    return [_site(name, PROJECTOR, {name: linear}) for name, linear in linears.items()]


def _site(name: str, modality: str, linears: dict[str, nn.Linear]) -> Site:
    rows = tuple(linear.out_features for linear in linears.values())
    return Site(name, modality, tuple(linears), next(iter(linears.values())).in_features, rows)
