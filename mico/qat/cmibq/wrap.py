"""A LLaVA whose Linears quantize what they read and what they hold, with widths that are learned.

`wrap` puts a QuantLinear in the place of every Linear of a site, and a CMIBQ beside the model's own parts as
`model.cmibq`. A forward pass of the model first asks it for the widths. `*.weight` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mico.packed.quantized import QuantizedWeight, equal_runs
from mico.qat.cmibq.allocator import GroupFacts
from mico.qat.cmibq.bits import temperature
from mico.qat.cmibq.importance import Meter, average_over_ranks, share_first
from mico.qat.cmibq.levels import BITS, runs
from mico.qat.cmibq.quantizer import Quantizer, QuantLinear, SharedInput
from mico.qat.cmibq.rate import LogisticPrior, rate
from mico.qat.cmibq.settings import Settings
from mico.qat.cmibq.sites import MODALITIES, Site, find_sites
from mico.qat.cmibq.start import Seen, activation_steps, weight_steps
from mico.qat.cmibq.static import ActivationGrid
from mico.qat.cmibq.widths import Widths
from mico.qat.modules import Mask, put_module

LOGGED = dict(zip(MODALITIES, ("vision", "projector", "llm"), strict=True))
Masks = Mapping[str, Mask]
WARM = 0.2  # part of the training over which the weight of the rate rises to its full


class CMIBQ(nn.Module):
    """All that is learned beside the weights, but for the weights' own steps, which lie with them.

    inputs: the quantizers of what the sites read. Once an optimizer step: `advance`. Its `state_dict` holds all that a
    training goes on from, and the widths once they are chosen.
    """

    state: torch.Tensor

    def __init__(self, settings: Settings, sites: Sequence[Site], inputs: Sequence[Quantizer]) -> None:
        super().__init__()
        self.settings, self.sites = settings, tuple(sites)
        self.inputs = nn.ModuleList(inputs)
        self.readers = tuple(
            SharedInput(quantizer, len(site.linears), settings.ib_tokens if settings.use_ib else 0)
            for quantizer, site in zip(inputs, sites, strict=True)
        )
        self.priors = nn.ModuleList()
        self.activations: Widths
        self.weights: Widths
        self.register_buffer("state", torch.zeros(2, dtype=torch.float64))  # progress, steps
        self.progress, self.turn = 0.0, 0
        self.register_load_state_dict_post_hook(lambda module, keys: module._resume())

    def _resume(self) -> None:
        self.progress, self.turn = float(self.state[0]), int(self.state[1])
        if self.fixed:  # what calls the model past its hooks (peft) finds its widths
            self.distribute()

    @property
    def kinds(self) -> tuple[Widths, Widths]:
        return self.activations, self.weights

    @property
    def fixed(self) -> bool:
        """Whether all widths are chosen for good."""
        return all(kind.fixed for kind in self.kinds)

    @property
    def learned(self) -> float:
        """Part of the steps in which widths are learned that is done; at 1 they are to be chosen for good."""
        steps = 1 - self.settings.settled_share
        return 1.0 if self.progress >= steps * (1 - 1e-9) else self.progress / steps

    @property
    def temperature(self) -> float:
        return temperature(self.learned, self.settings.hard_share)

    @property
    def soft(self) -> bool:
        """Whether widths are mixed now: while training, before one a group is taken. Evaluation never mixes."""
        return self.training and self.learned < 1 - self.settings.hard_share

    def distribute(self) -> None:
        """Before every forward pass of the model (a hook does it): which widths it takes."""
        for kind in self.kinds:
            kind.distribute(self.temperature, self.soft)
        self.open_taps()

    def open_taps(self) -> None:
        """Before a forward pass: what it reads may be kept, what the last one kept is free."""
        for reader in self.readers:
            reader.turn, reader.tapped_BTC, reader.open = self.turn, None, True

    def penalty(self) -> dict[str, torch.Tensor]:
        """What is added to the task's loss after a forward pass, by name, weights included: `act_bits` and
        `weight_bits` while widths are learned, `rate` with the information bottleneck."""
        terms = {
            name: kind.price(kind.average())
            for name, kind in zip(("act_bits", "weight_bits"), self.kinds, strict=True)
            if not kind.fixed
        }
        if self.settings.use_ib:
            warmth = 1.0 if self.fixed else min(1.0, self.progress / WARM)
            terms["rate"] = self.settings.ib_weight * warmth * self.rate()
        return terms

    def rate(self) -> torch.Tensor:
        """Bits a value under the priors, sites weighted by their MACs, over what the last forward pass kept."""
        share_S = self.site_macs()
        total = torch.zeros((), device=share_S.device)
        for number, (reader, prior) in enumerate(zip(self.readers, self.priors, strict=True)):
            x_BTC, reader.open = reader.tapped_BTC, False
            assert x_BTC is not None, f"{self.sites[number].name}: the forward pass did not reach this site"
            generator = torch.Generator(x_BTC.device).manual_seed((self.settings.seed + 1) * 2**40 + self.turn)
            total = total + share_S[number] * rate(x_BTC, self.inputs[number].step_size(), prior, generator)  # type: ignore
        return total

    def unmoved(self) -> torch.Tensor:
        """0, with a gradient of 0 for what learned widths that are chosen by now."""
        done = [kind.allocator().sum() * 0 for kind in self.kinds if kind.fixed]
        return torch.stack(done).sum() if done else torch.zeros((), device=self.state.device)

    def site_macs(self) -> torch.Tensor:
        """Share of every site in all multiplications, (sites,)."""
        parts = self.activations.cost_I.split([len(quantizer.error_GK) for quantizer in self.inputs])  # type: ignore
        macs_S = torch.stack([part.sum() for part in parts])
        return macs_S / macs_S.sum()

    @torch.no_grad()
    def advance(self, progress: float) -> None:
        """After every optimizer step, in all processes: prices rise, features follow importance, time goes on.

        progress: part of stage 1 that is done, 0 to 1.
        """
        if not self.fixed:
            average_over_ranks([quantizer.meter for kind in self.kinds for quantizer in kind.quantizers])
            for kind in self.kinds:
                kind.price.rise(kind.average())
                kind.refresh(self.settings.use_importance)
        self.progress, self.turn = progress, self.turn + 1
        self.state.copy_(torch.tensor([self.progress, self.turn], dtype=torch.float64))

    @contextmanager
    def measuring(self) -> Iterator[list[Meter]]:
        """Inside, backward passes (no steps) are measured afresh and count alike: what `harden` is to go by."""
        meters = [quantizer.meter for kind in self.kinds for quantizer in kind.quantizers]
        for meter in meters:
            meter.reset()
            meter.even = True
        yield meters
        for meter in meters:
            meter.even, meter.counts = False, True

    def harden(self) -> None:
        """Choose all widths for good by the exact knapsack. Raises UserError where a target cannot be met."""
        average_over_ranks([quantizer.meter for kind in self.kinds for quantizer in kind.quantizers])
        for kind in self.kinds:
            kind.harden(self.settings.use_importance, self.settings.preference)
        share_first(kind.chosen_I for kind in self.kinds)

    def metrics(self) -> dict[str, float]:
        """What is logged of the last forward and backward pass: average widths by modality, prices, temperature, and
        the norms of the gradients of the logits."""
        found = {"quantization/temperature": self.temperature}
        for kind, infix, short in ((self.activations, "", "act"), (self.weights, "weight_", "weight")):
            found |= {f"quantization/{LOGGED[name]}_{infix}avg_bits": value for name, value in kind.averages().items()}
            found[f"quantization/{short}_avg_bits"] = float(kind.average().detach())
            found[f"quantization/{short}_lambda"] = float(kind.price.value)
            gradients = [parameter.grad for parameter in kind.allocator.parameters() if parameter.grad is not None]
            if gradients:
                found[f"quantization/{short}_theta_grad_norm"] = float(nn.utils.get_total_norm(gradients))
        return found

    def activation_grids(self) -> dict[str, ActivationGrid]:
        """The grid of every site by its name, once widths are chosen (mico/qat/cmibq/static.py applies them)."""
        assert self.fixed, "harden first"
        return {site.name: _grid(site, quantizer) for site, quantizer in zip(self.sites, self.inputs, strict=True)}  # type: ignore


@torch.no_grad()
def _grid(site: Site, quantizer: Quantizer) -> ActivationGrid:
    assert quantizer.choice is not None
    steps = quantizer.steps().only(quantizer.choice.chosen_G)
    assert steps.zero_MGK is not None
    bits_G = tuple(BITS[k] for k in quantizer.choice.chosen_G.tolist())
    scale_G, zero_G = (tuple(part[0, :, 0].tolist()) for part in (steps.scale_MGK, steps.zero_MGK))
    return ActivationGrid(site.linears, site.channels, bits_G, scale_G, zero_G)


# --- a model --------------------------------------------------------------------------------------------------------


def wrap(model: Any, settings: Settings, seen: Mapping[str, Seen] | None, masks: Masks | None = None) -> CMIBQ:
    """Quantize a dense LLaVA in place; returns what is now `model.cmibq`.

    seen: of `start.observe`; None where a state dict is loaded next, as all steps then only have the right shapes.
    masks: weights that stay pruned, by the names of their Linears. Raises UserError where the model has no such sites.
    """
    masks = masks or {}
    sites = find_sites(model)
    inputs = [_input_quantizer(site, settings, seen) for site in sites]
    made = CMIBQ(settings, sites, [quantizer.to(model.device) for quantizer in inputs])
    weights: list[Quantizer] = []
    for site, reader in zip(sites, made.readers, strict=True):
        for name in site.linears:
            linear: Any = model.get_submodule(name)
            mask = masks.get(name)
            weights.append(_weight_quantizer(linear.weight, settings, seen is not None, mask))
            put_module(model, name, QuantLinear.of(linear, weights[-1], reader, mask))
    _add_widths(made, model, weights, seen)
    if settings.use_ib:
        for site in sites:
            rows_TC = torch.zeros(2, site.channels) if seen is None else seen[site.name].rows_TC
            made.priors.append(LogisticPrior(rows_TC.mean(0), rows_TC.std(0, unbiased=False)))
    model.cmibq = made.to(model.device).train(model.training)
    model.register_forward_pre_hook(_distribute)
    made.distribute()
    return made


def _distribute(model: Any, args: Any) -> None:
    model.cmibq.distribute()


def _input_quantizer(site: Site, settings: Settings, seen: Mapping[str, Seen] | None) -> Quantizer:
    label_C = runs(site.channels, settings.num_groups)
    if seen is None:
        blank_GK = torch.ones(int(label_C.max()) + 1, len(BITS))
        return Quantizer(blank_GK[None], blank_GK[None], label_C, blank_GK)
    scale_GK, zero_GK, error_GK = activation_steps(seen[site.name].extended_TC, label_C)
    return Quantizer(scale_GK[None], zero_GK[None], label_C, error_GK)


def _weight_quantizer(weight_RC: torch.Tensor, settings: Settings, search: bool, mask: Mask | None) -> Quantizer:
    """Runs of columns as the packed form stores them for nothing, each with a width that all rows share."""
    rows, channels = weight_RC.shape
    label_C = equal_runs(channels, -(-channels // settings.weight_group)).to(weight_RC.device)
    groups = int(label_C.max()) + 1
    if search:
        scale_RGK, error_GK = weight_steps(weight_RC, label_C, None if mask is None else mask.keep_RC)
    else:
        scale_RGK, error_GK = (weight_RC.new_ones(*shape, dtype=torch.float32) for shape in
                               ((rows, groups, len(BITS)), (groups, len(BITS))))  # fmt: skip
    return Quantizer(scale_RGK, None, label_C, error_GK, stored=True)


def _add_widths(made: CMIBQ, model: Any, weights: Sequence[Quantizer], seen: Mapping[str, Seen] | None) -> None:
    """The two allocators, with what is known of the groups."""
    of_inputs, of_weights, place = [], [], 0
    for site, quantizer in zip(made.sites, made.inputs, strict=True):
        known = None if seen is None else seen[site.name]
        tokens = 1.0 if known is None else known.tokens
        rows_TC = torch.zeros(1, site.channels) if known is None else known.rows_TC
        of_inputs.append(_facts(rows_TC, quantizer.label_C.cpu(), sum(site.rows), tokens, site.modality))  # type: ignore
        for name in site.linears:
            linear = model.get_submodule(name)
            of_weights.append(_weight_facts(linear, weights[place].label_C, tokens, site.modality))
            place += 1
    act, weight = (_joined(parts) for parts in (of_inputs, of_weights))
    settings = made.settings
    made.activations = Widths("--target-bits-act", list(made.inputs), act, act.macs_I, settings.target_bits_act)  # type: ignore
    made.weights = Widths("--target-bits-weight", weights, weight, weight.params_I, settings.target_bits_weight)
    for kind in made.kinds:
        kind.refresh(settings.use_importance)


def _facts(values_NC: torch.Tensor, label_C: torch.Tensor, rows: int, tokens: float, modality: str) -> GroupFacts:
    """Facts of the groups of one tensor, on the CPU. rows: output rows that every channel meets."""
    groups = int(label_C.max()) + 1
    parts = [values_NC[:, label_C == g].float() for g in range(groups)]
    variance_G = torch.stack([part.var(unbiased=False) for part in parts]).cpu()
    peak_G = torch.stack([part.abs().amax() for part in parts]).cpu() / variance_G.sqrt().clamp_min(1e-12)
    params_G = torch.bincount(label_C, minlength=groups).cpu().float() * rows
    modality_G = torch.full((groups,), MODALITIES.index(modality))
    return GroupFacts(variance_G, peak_G, params_G, params_G * tokens, modality_G)


def _weight_facts(linear: QuantLinear, label_C: torch.Tensor, tokens: float, modality: str) -> GroupFacts:
    """Facts of the groups of a weight; pruned ones do not count."""
    weight_RC = linear.weight.detach()
    facts = _facts(weight_RC, label_C, len(weight_RC), tokens, modality)
    if linear.keep_RC is None:
        return facts
    kept_C = linear.keep_RC.sum(0).cpu().float()
    return replace(facts, params_I=torch.zeros_like(facts.params_I).index_add_(0, label_C.cpu(), kept_C))


def _joined(parts: Sequence[GroupFacts]) -> GroupFacts:
    return GroupFacts(*(torch.cat([getattr(part, name) for part in parts]) for name in GroupFacts.__dataclass_fields__))


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The QuantLinears of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The packed form of every weight of a site by its Linear's name, once widths are chosen."""
    return {name: module.quantized_weight() for name, module in quant_linears(model).items()}


def bit_map(model: Any) -> dict[str, Any]:
    """Widths of every group as plain values: averages, and by site its modality, activations and weights."""
    made: CMIBQ = model.cmibq
    packed = {name: weight.bits_G for name, weight in quantized_weights(model).items()}
    grids = made.activation_grids()
    return dict(
        averages=dict(
            activations=float(made.activations.average()), weights=float(made.weights.average()),
            activations_by_modality=made.activations.averages(), weights_by_modality=made.weights.averages(),
        ),
        sites=[
            dict(
                name=site.name, modality=site.modality, activations=list(grids[site.name].bits_G),
                weights={name: list(packed[name]) for name in site.linears},
            )
            for site in made.sites
        ],
    )  # fmt: skip


def parameter_groups(
    model: Any, lr: float, theta_lr: float = 1e-2, scale_lr: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups of all that is trained: weights (matrices decay), what decides widths, and steps and priors,
    which 2e-5 would not move."""
    theta = {id(p) for kind in model.cmibq.kinds for p in kind.allocator.parameters()}
    steps = {id(p) for q in _quantizers(model) for p in q.parameters()} | {
        id(p) for p in model.cmibq.priors.parameters()
    }
    places: dict[str, list[nn.Parameter]] = dict(matrices=[], vectors=[], theta=[], steps=[])
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "theta" if id(parameter) in theta else "steps" if id(parameter) in steps else None
            places[kind or ("matrices" if parameter.dim() > 1 else "vectors")].append(parameter)
    rates = dict(matrices=lr, vectors=lr, theta=theta_lr, steps=scale_lr)
    return [
        dict(name=name, params=found, lr=rates[name], weight_decay=weight_decay if name == "matrices" else 0.0)
        for name, found in places.items()
        if found
    ]


def _quantizers(model: Any) -> list[Quantizer]:
    return [quantizer for kind in model.cmibq.kinds for quantizer in kind.quantizers]
