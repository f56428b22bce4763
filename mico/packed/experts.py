"""Experts as Linears: transformers fuses those of a layer to two tensors of three dimensions, which cannot be packed.

`unfuse` replaces every fused module by an `ExpertList` of ordinary Linears, which are views of its tensors; `fuse`
puts the module of transformers back. In between the tensors have the names of the checkpoint format: one an expert.
Suffixes: T tokens, K experts chosen for a token, E experts, R rows, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

FUSED = ("gate_up_proj", "down_proj")  # (E, 2 R, C): gate above up; (E, C, R)


class Expert(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, gate_RC: torch.Tensor, up_RC: torch.Tensor, down_CR: torch.Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate_RC), _linear(up_RC), _linear(down_CR)

    def forward(self, x_TC: torch.Tensor, act_fn: Any) -> torch.Tensor:
        return self.down_proj(act_fn(self.gate_proj(x_TC)) * self.up_proj(x_TC))


def _linear(weight_RC: torch.Tensor) -> nn.Linear:
    rows, channels = weight_RC.shape
    linear = nn.Linear(channels, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_RC, requires_grad=False)
    return linear


class ExpertList(nn.Module):
    """The experts of one layer, "0", "1", ...; each computes the tokens routed to it, one expert after the other."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused_class, self.config, self.act_fn = type(fused), fused.config, fused.act_fn
        self.take(fused)

    def take(self, fused: nn.Module) -> None:
        """Make the experts views of the tensors of a fused module."""
        gate_up_ERC, down_ECR = fused.gate_up_proj.detach(), fused.down_proj.detach()  # type: ignore[operator, union-attr]
        self.num_experts = len(down_ECR)
        for index, (gate_up_RC, down_CR) in enumerate(zip(gate_up_ERC, down_ECR, strict=True)):
            gate_RC, up_RC = gate_up_RC.chunk(2)
            self.add_module(str(index), Expert(gate_RC, up_RC, down_CR))

    @property
    def experts(self) -> list[Expert]:
        return [self.get_submodule(str(index)) for index in range(self.num_experts)]  # type: ignore[misc]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (T, C), indices and weights of the chosen experts (T, K) -> (T, C)."""
        out_TC = torch.zeros_like(hidden_states)
        experts, index_KT = self.experts, top_k_index.T
        for expert in torch.unique(top_k_index).tolist():
            choice, token = torch.where(index_KT == expert)
            y_TC = experts[expert](hidden_states[token], self.act_fn) * top_k_weights[token, choice, None]
            out_TC.index_add_(0, token, y_TC.to(out_TC.dtype))
        return out_TC

    def fused(self) -> nn.Module:
        """The module of transformers: on the meta device where an expert is, else with copies of the weights."""
        with torch.device("meta"):
            fused = self.fused_class(self.config)
        gates, ups, downs = zip(
            *((expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight) for expert in self.experts),
            strict=True,
        )
        fused.gate_up_proj = nn.Parameter(torch.cat([torch.stack(gates), torch.stack(ups)], 1), requires_grad=False)
        fused.down_proj = nn.Parameter(torch.stack(downs), requires_grad=False)
        return fused.train(self.training)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one that `ExpertList` computes the same as: gate above up, no biases, nothing transposed."""
    kinds = dict(has_gate=True, is_concatenated=True, has_bias=False, is_transposed=False, has_post_expert_norm=False)
    shaped = all(
        isinstance(tensor := getattr(module, name, None), nn.Parameter) and tensor.dim() == 3 for name in FUSED
    )
    return shaped and all(getattr(module, name, None) is value for name, value in kinds.items())


def unfuse(model: Any) -> bool:
    """Replace the fused experts of a model, and return whether there were any; saved, it writes the same names."""
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for name, module in fused:
        put(model, name, ExpertList(module))
    if fused:
        known = getattr(model, "_weight_conversions", None)
        known = get_model_conversion_mapping(model, add_legacy=False) if known is None else known
        model._weight_conversions = per_expert(known)
    return bool(fused)


def fuse(model: Any) -> None:
    """Put the modules of transformers back, with copies of the weights. All Linears inside must be dense."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertList)]
    for name, module in lists:
        put(model, name, module.fused())
    if lists and hasattr(model, "_weight_conversions"):
        del model._weight_conversions  # those of transformers apply again


@contextmanager
def fused_for_loading(root: nn.Module) -> Iterator[None]:
    """Inside, experts are fused modules on the meta device, for weights to be loaded into; afterwards views of those.

    The lists themselves stay the same objects.
    """
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, ExpertList)]
    for name, module in lists:
        put(root, name, module.to("meta").fused())
    try:
        yield
    finally:
        for name, module in lists:
            module.take(root.get_submodule(name))
            put(root, name, module)


def per_expert(conversions: Sequence[Any]) -> list[Any]:
    """Conversions between the names of a checkpoint and of a model, without those that fuse experts.

    Where a checkpoint calls the Linears of an expert otherwise (w1, w3 and w2 in Mixtral), they are renamed.
    """
    found: list[Any] = []
    for step in conversions:
        targets = step._original_target_patterns if isinstance(step, WeightConverter) else []
        fused = targets[0].rpartition(".experts.")[2] if len(targets) == 1 else None
        if fused not in FUSED:
            found.append(step)
            continue
        own = ("gate_proj", "up_proj") if fused == FUSED[0] else ("down_proj",)
        for source, name in zip(step._original_source_patterns, own, strict=True):
            stored = source.removesuffix(".weight").rpartition(".")[2]
            if stored != name:
                found.append(WeightRenaming(rf"\.experts\.(\d+)\.{re.escape(stored)}\.", rf".experts.\1.{name}."))
    return found


def any_expert(path: str) -> tuple[str, str | None]:
    """The path with the number of an expert left open ("experts.*."), and the number."""
    found = re.search(r"\bexperts\.(\d+)\.", path)
    return (path, None) if found is None else (path.replace(found[0], "experts.*."), found[1])


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
