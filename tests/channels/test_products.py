"""Products by oneDNN are those of torch.nn.functional.linear; on machines without it both are the same call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mico.channels import products
from mico.channels.meters import add_gram
from mico.channels.products import FEWEST_STEPS, FastLinears, linear

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32 rounding of sums of hundreds of products."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 70, 192), (210, 192)])
def test_large_products_are_exact_to_rounding(shape, bias):
    x, weight_RC, bias_R = random(*shape), random(130, 192), random(130) if bias else None
    assert x.numel() * len(weight_RC) >= FEWEST_STEPS
    found = linear(x, weight_RC, bias_R)
    assert found.shape == (*shape[:-1], 130)
    agree(found, F.linear(x.double(), weight_RC.double(), None if bias_R is None else bias_R.double()))


def test_strided_operands():
    x_TC, weight_RC = random(300, 256)[:, :200], random(256, 130).T[:, :200]
    agree(linear(x_TC, weight_RC), x_TC.double() @ weight_RC.double().T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_small_products_go_the_plain_way(dtype):
    x_TC, weight_RC = random(400, 128).to(dtype), random(128, 128).to(dtype)
    assert torch.equal(linear(x_TC, weight_RC), F.linear(x_TC, weight_RC))
    x_TC, weight_RC = random(5, 7), random(3, 7)
    assert torch.equal(linear(x_TC, weight_RC), F.linear(x_TC, weight_RC))


def test_fast_linears_reach_modules_and_leave_nothing_behind(monkeypatch):
    module, x_BTC = torch.nn.Linear(192, 130), random(2, 120, 192)
    calls = []
    monkeypatch.setattr(products, "linear", lambda *args: calls.append(len(args)) or linear(*args))
    with torch.no_grad(), FastLinears():
        found = module(x_BTC)
        assert torch.equal(F.linear(x_BTC, weight=module.weight), x_BTC @ module.weight.T)  # keywords: the plain way
    assert len(calls) == 1
    agree(found, module.double()(x_BTC.double()).detach())
    assert len(calls) == 1


@pytest.mark.parametrize("channels", [40, 256, 300, 600])
def test_gram_is_symmetric_and_complete(channels):
    x_TC = random(70, channels)
    found_CC = torch.zeros(x_TC.shape[1], x_TC.shape[1])
    add_gram(x_TC, found_CC)
    assert torch.equal(found_CC, found_CC.T)
    agree(found_CC, x_TC.double().T @ x_TC.double())
