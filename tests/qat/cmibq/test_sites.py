"""Sites of a LLaVA: the right Linears, once each, by what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig

from mico.errors import UserError
from mico.qat.cmibq.sites import find_sites
from tests.adapters.test_families import build, inputs_of
from tests.qat.cmibq.making import batch, dense


def test_every_linear_of_blocks_and_projector_is_in_one_site_but_for_blocks_nobody_reads() -> None:
    model = dense()
    listed = [name for site in find_sites(model) for name in site.linears]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unread = {name for name in linears if name.startswith("model.vision_tower.encoder.layers.2.")}
    assert len(unread) == 6 and len(listed) == len(set(listed))
    assert set(listed) == linears - unread - {"lm_head"}


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 3), (-2, 2), ([-3, 1], 1), (2, 2)])
def test_blocks_that_are_sites_are_those_whose_output_counts(layer: Any, blocks: int) -> None:
    model = dense()
    if isinstance(layer, list):
        wide = nn.Linear(32, 64)
        model.model.multi_modal_projector.linear_1 = wide.requires_grad_(False)
    model.config.vision_feature_layer = layer
    sites = find_sites(model)
    assert len([site for site in sites if site.modality == "vision"]) == 4 * blocks
    before = model(**batch()).logits
    for index, block in enumerate(model.model.vision_tower.encoder.layers):
        saved = block.mlp.fc1.weight.clone()
        block.mlp.fc1.weight += 1
        assert torch.equal(before, model(**batch()).logits) == (index >= blocks)
        block.mlp.fc1.weight.copy_(saved)


def test_linears_of_a_site_read_one_tensor_and_sites_read_different_ones() -> None:
    model = dense()
    sites = find_sites(model)
    with inputs_of({name: model.get_submodule(name) for site in sites for name in site.linears}) as seen:
        model(**batch())
    firsts = [seen[site.linears[0]] for site in sites]
    for site, first in zip(sites, firsts, strict=True):
        assert all(seen[name] is first for name in site.linears)
        assert first.shape[-1] == site.channels
    assert len({id(tensor) for tensor in firsts}) == len(sites)


def test_sizes_and_modalities() -> None:
    model = dense()
    sites = find_sites(model)
    for site in sites:
        weights = [model.get_submodule(name).weight for name in site.linears]
        assert site.params == site.macs_per_token == sum(weight.numel() for weight in weights)
        assert site.rows == tuple(len(weight) for weight in weights)
    assert [site.modality for site in sites] == ["vision"] * 8 + ["projector"] * 2 + ["text"] * 8


def test_what_is_no_llava_or_already_quantized_is_refused() -> None:
    with pytest.raises(UserError, match="model_type 'llama' has no vision tower"):
        find_sites(build("llama"))
    model = dense()
    model.model.language_model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(UserError, match=r"'mlp\.up_proj' is a Identity"):
        find_sites(model)
    model = dense()
    model.model.language_model.layers[0].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.extra' is a Linear that no stream of text blocks names"):
        find_sites(model)
    model = dense()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(UserError, match=r"vision_tower is a Identity without encoder\.layers"):
        find_sites(model)


def test_llava_next_has_the_same_sites() -> None:
    assert isinstance(build("llava").config, LlavaConfig) and CLIPVisionConfig
    assert len(find_sites(build("llava-next-mistral"))) == len(find_sites(build("llava"))) == 4 + 2 + 8
