"""What backward passes measure, against a plain computation."""

from __future__ import annotations

import pytest
import torch

from mico.qat.cmibq.importance import DECAY, Meter, normalized
from mico.qat.cmibq.levels import BITS, runs
from mico.qat.cmibq.quantizer import Choice, Quantizer


def quantizer(groups: int = 3, channels: int = 8) -> Quantizer:
    make = torch.Generator().manual_seed(0)
    scale_MGK = 3 / 2.0 ** torch.tensor(BITS).expand(1, groups, -1) * (1 + torch.rand(1, groups, 1, generator=make))
    made = Quantizer(scale_MGK, torch.zeros_like(scale_MGK), runs(channels, groups), torch.ones(groups, len(BITS)))
    return made.train()


@pytest.mark.parametrize("soft", [True, False])
def test_importance_and_distortion_are_squared_effects_by_first_order(soft: bool) -> None:
    made = quantizer()
    share_GK = torch.full((3, len(BITS)), 1 / len(BITS), requires_grad=True)
    made.choice = Choice(share_GK, torch.tensor([0, 2, 4]), soft)
    make = torch.Generator().manual_seed(1)
    importance_G, distortion_GK = torch.zeros(3, dtype=torch.float64), torch.zeros(3, len(BITS), dtype=torch.float64)
    for _ in range(2):
        x_NC = torch.randn(10, 8, generator=make)
        g_NC = torch.randn(10, 8, generator=make)
        made(x_NC.requires_grad_()).backward(g_NC)
        for group in range(3):
            here = (made.label_C == group).nonzero()[:, 0].tolist()
            effects = [(x_NC[n, c].item() * g_NC[n, c].item()) ** 2 for n in range(10) for c in here]
            importance_G[group] += sum(effects) / len(effects) / 2
            for k, bits in enumerate(BITS):
                scale, half = made.log_scale[0, group, k].exp().item(), (2**bits - 1) / 2
                for n in range(10):
                    for c in here:
                        x = x_NC[n, c].item()
                        q = min(max(round(x / scale - 0.5) + 0.5, -half), half)
                        distortion_GK[group, k] += (g_NC[n, c].item() * (scale * q - x)) ** 2 / 2
    torch.testing.assert_close(made.meter.importance_G.double(), importance_G, rtol=1e-5, atol=0)
    torch.testing.assert_close(made.meter.distortion_GK.double(), distortion_GK, rtol=1e-4, atol=1e-6)
    assert not made.meter.importance_G.requires_grad and int(made.meter.batches) == 2
    made.meter.reset()
    assert made.meter.importance_G.sum() == 0 == made.meter.batches


def test_averages_begin_even_and_then_forget() -> None:
    meter = Meter(torch.zeros(4, dtype=torch.int64), 1, 2)
    values = [float(i) for i in range(1, 101)]
    kept = 0.0
    for i, value in enumerate(values, 1):
        meter(torch.full((3, 4), value**0.5), torch.ones(3, 4), torch.full((1, 2), value))
        share = max(1 / i, 1 - DECAY)
        kept += share * (value - kept)
    assert meter.importance_G.item() == pytest.approx(kept, rel=1e-4)
    assert meter.distortion_GK.tolist()[0] == pytest.approx([kept] * 2, rel=1e-4)
    assert 50 < kept < 75  # neither the mean of all, nor the last


def test_evaluation_measures_nothing() -> None:
    made = quantizer().eval()
    made.choice = Choice(None, torch.tensor([0, 2, 4]))
    made(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert int(made.meter.batches) == 0


def test_importance_is_relative_to_its_modality() -> None:
    importance_I = torch.tensor([1.0, 3.0, 1000.0, 0.0, 0.0])
    found_I = normalized(importance_I, torch.tensor([0, 0, 1, 2, 2]))
    assert found_I.tolist() == pytest.approx([0.5, 1.5, 1.0, 1.0, 1.0])
