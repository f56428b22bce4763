"""Where steps start, against a search over many more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mico.qat.cmibq import start
from mico.qat.cmibq.levels import BITS, half_levels, runs
from mico.qat.cmibq.sites import find_sites
from mico.qat.cmibq.start import LEAST, activation_steps, observe, weight_steps
from tests.adapters.test_families import inputs_of
from tests.qat.cmibq.making import batch, dense


def error(values_V: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Mean squared error at steps (A,) and zeros (A,)."""
    half = (2**bits - 1) / 2
    q_AV = ((values_V / scale[:, None] - zero[:, None] - 0.5).round() + 0.5).clamp(-half, half)
    return (scale[:, None] * (q_AV + zero[:, None]) - values_V).square().mean(1)


def sources() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    normal_V = torch.randn(600, generator=make)
    outlier_V = normal_V.clone()
    outlier_V[:2] = 40.0
    return dict(
        normal=normal_V + 3, peaked=normal_V**3, half=normal_V.clamp_min(0), outlier=outlier_V, small=1e-3 * normal_V
    )


@pytest.mark.parametrize("name", sorted(sources()))
def test_activations_start_near_the_best_of_many_steps(name: str) -> None:
    values_V = sources()[name]
    scale_GK, zero_GK, error_GK = activation_steps(values_V[:, None], torch.zeros(1, dtype=torch.int64))
    spread = values_V.std()
    for k, bits in enumerate(BITS[:4]):
        own = error(values_V, scale_GK[:, k], zero_GK[:, k], bits)
        assert error_GK[0, k].item() == pytest.approx((own / values_V.var(unbiased=False)).item(), rel=1e-3)
        span_A = torch.logspace(-0.7, 1.7, 50).repeat_interleave(31) * spread  # from the lowest level to the highest
        middle_A = values_V.median() + torch.linspace(-1.5, 1.5, 31).repeat(50) * spread
        tried_A = span_A / (2**bits - 1)
        least = error(values_V, tried_A, middle_A / tried_A, bits).min()
        assert own <= 1.15 * least, (name, bits)


def test_groups_have_steps_of_their_own_and_a_constant_group_is_kept() -> None:
    rows_TC = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1.0, 100.0, 100.0])
    label_C = torch.tensor([0, 0, 1, 1])
    scale_GK, zero_GK, _ = activation_steps(rows_TC, label_C)
    assert torch.all(scale_GK[1] > 20 * scale_GK[0])
    constant_TC = torch.full((50, 2), 0.7)
    scale_GK, zero_GK, error_GK = activation_steps(constant_TC, torch.zeros(2, dtype=torch.int64))
    levels_K = scale_GK[0] * (((0.7 / scale_GK[0] - zero_GK[0] - 0.5).round() + 0.5) + zero_GK[0])
    assert torch.all(scale_GK >= LEAST) and torch.allclose(levels_K, torch.tensor(0.7), atol=1e-5)
    assert torch.isfinite(error_GK).all()


def test_weights_start_at_the_best_step_of_every_row_and_group() -> None:
    make = torch.Generator().manual_seed(2)
    weight_RC = torch.randn(5, 40, generator=make) * (0.1 + torch.rand(5, 1, generator=make))
    label_C = torch.arange(40) // 16  # the last group is shorter
    scale_RGK, error_GK = weight_steps(weight_RC, label_C)
    for k, bits in enumerate(BITS):
        half, summed_G = half_levels(torch.tensor(bits)), torch.zeros(3)
        for r in range(5):
            for g in range(3):
                values_V = weight_RC[r, label_C == g]
                tried_A = torch.linspace(0.02, 1.1, 400) * values_V.abs().max() / half
                least = error(values_V, tried_A, torch.zeros(400), bits).min()
                own = error(values_V, scale_RGK[r, g, k : k + 1], torch.zeros(1), bits)
                assert own <= (1.1 if bits <= 5 else 2) * least  # the finer the steps, the more luck the many have
                summed_G[g] += own.item() * len(values_V)
        energy_G = torch.stack([weight_RC[:, label_C == g].square().sum() for g in range(3)])
        torch.testing.assert_close(error_GK[:, k], summed_G / energy_G, rtol=1e-3, atol=1e-7)


def test_what_is_observed_is_what_the_sites_read() -> None:
    model = dense()
    sites = find_sites(model)
    seen = observe(model, sites, [batch(0), batch(1)])
    counts = dict(vision=5, projector=4, text=13)  # tokens a sample: patches and class, patches, all
    assert {site.name: seen[site.name].tokens for site in sites} == {s.name: counts[s.modality] for s in sites}
    with inputs_of({site.name: model.get_submodule(site.linears[0]) for site in sites}) as read:
        model(**batch(1))
    for site in sites:
        rows_TC = read[site.name].reshape(-1, site.channels)
        found = seen[site.name]
        assert torch.equal(found.rows_TC[-len(rows_TC) :], rows_TC)
        assert torch.equal(found.ends_2C, torch.stack([found.rows_TC.amin(0), found.rows_TC.amax(0)]))
        assert len(found.extended_TC) == len(found.rows_TC) + 2
    assert not model.training and not model.model.language_model.layers[0].mlp.up_proj._forward_pre_hooks
    with pytest.raises(ValueError, match=r"no calibration sample reaches model\.vision_tower"):
        observe(model, sites, [dict(input_ids=torch.tensor([[5, 6]]))])


def test_a_rare_large_value_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are sampled, but the ends of every channel come from all tokens."""
    monkeypatch.setattr(start, "ROWS", 16)
    model, given = dense(), batch(0, count=8)
    name = "model.language_model.layers.1.mlp_in"
    norm = model.model.language_model.layers[1].post_attention_layernorm
    rare: list[float] = []

    def shout(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output[3, 5, 7] = 500.0
        rare.append(output[3, 5, 7].item())
        return output

    norm.register_forward_hook(shout)
    seen = observe(model, find_sites(model), [given])[name]
    assert rare == [500.0] and len(seen.rows_TC) < 40 and seen.rows_TC.max() < 100 and seen.ends_2C[1, 7] == 500
    scale_GK, zero_GK, _ = activation_steps(seen.extended_TC, runs(64, 8))
    highest_K = scale_GK[0] * (zero_GK[0] + half_levels(torch.tensor(BITS)))
    assert highest_K[-1] > 400 and torch.all(scale_GK[0, -1] > 5 * scale_GK[1:, -1])
