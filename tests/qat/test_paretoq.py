"""The quantizers against the table of the paper written out weight by weight in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mico.packed.bits import TERNARY
from mico.packed.blob import decode, encode
from mico.qat.linear import QATLinear
from mico.qat.paretoq import WIDTHS, mse_start, paper_start, quantize

BITS = tuple(WIDTHS)


def one_weight(w: float, alpha: float, bits: float) -> tuple[float, float, float]:
    """(dequantized value, passes its gradient, term of alpha's gradient) of one weight: plain arithmetic."""
    r = w / alpha
    if bits == 1:
        sign = 1.0 if w >= 0 else -1.0
        return sign * alpha, float(abs(r) <= 1), sign
    if bits == TERNARY:
        c = round(1.5 * min(max(r, -0.99), 0.99))
        inside = abs(r) <= 0.99
        return c * alpha / 1.5, float(inside), c / 1.5 - r if inside else math.copysign(2 / 3, r)
    if bits == 2:
        c = 2 * round(2 * min(max(r, -0.99), 0.99) - 0.5) + 1
        inside = abs(r) <= 0.99
        return c * alpha / 4, float(inside), c / 4 - r if inside else math.copysign(0.75, r)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    c = min(max(round(r), low), high)
    if r < low or r > high:
        return c * alpha, 0.0, float(low if r < low else high)
    return c * alpha, 1.0, round(r) - r


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [1, 4])
def test_forward_and_gradients_equal_the_table(bits: float, groups: int) -> None:
    generator = torch.Generator().manual_seed(int(10 * bits) + groups)
    weight_RC = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    weight_RC[0, 0] = 0.0
    spread = 0.3 if bits > 2 else 1.0  # some weights lie outside the levels
    alpha_RG = (0.4 + torch.rand(5, groups, generator=generator, dtype=torch.float64)) * spread
    upstream_RC = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    weight_RC.requires_grad_(), alpha_RG.requires_grad_()
    found_RC = quantize(weight_RC, alpha_RG, bits)
    found_RC.backward(upstream_RC)

    expected_RC, of_weight_RC = torch.zeros_like(weight_RC), torch.zeros_like(weight_RC)
    of_alpha_RG = torch.zeros_like(alpha_RG)
    qp = {3: 3, 4: 7}.get(bits, 1)
    outside = 0
    for r in range(5):
        for c in range(32):
            g = c // (32 // groups)
            value, passes, term = one_weight(weight_RC[r, c].item(), alpha_RG[r, g].item(), bits)
            expected_RC[r, c] = value
            of_weight_RC[r, c] = passes * upstream_RC[r, c]
            of_alpha_RG[r, g] += upstream_RC[r, c] * term / math.sqrt(5 * 32 * qp)
            outside += passes == 0
    assert outside > 5
    torch.testing.assert_close(found_RC, expected_RC, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight_RC.grad, of_weight_RC, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha_RG.grad, of_alpha_RG, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_least_squares_start_beats_the_paper_s_on_gaussian_rows(bits: float) -> None:
    weight_RC = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    errors = [
        (quantize(weight_RC, start(weight_RC, bits, 2), bits) - weight_RC).square().mean().item()
        for start in (mse_start, paper_start)
    ]
    tried = [
        (quantize(weight_RC, torch.full((8, 2), step), bits) - weight_RC).square().view(8, 2, -1).mean(-1)
        for step in torch.linspace(0.1, 4, 800).tolist()
    ]
    least = torch.stack(tried).amin(0).mean().item()  # every group at the best of many steps
    assert errors[0] == pytest.approx(least, rel=0.003)
    assert errors[0] <= errors[1] * (1.0 + 1e-6)
    if bits in (TERNARY, 2):
        assert errors[0] < 0.6 * errors[1]


def test_a_mask_counts_only_what_it_leaves() -> None:
    weight_RC = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    keep_RC = torch.rand(4, 64, generator=torch.Generator().manual_seed(2)) > 0.5
    for bits in BITS:
        for start in (mse_start, paper_start):
            of_rest = torch.cat([start(weight_RC[r : r + 1, keep_RC[r]], bits, 1) for r in range(4)])
            torch.testing.assert_close(start(weight_RC, bits, 1, keep_RC), of_rest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_form_is_the_training_weight_bit_for_bit(bits: float, group_size: int | None, masked: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(64, 12)
    keep_RC = torch.rand(12, 64) > 0.5 if masked else None
    module = QATLinear.of(linear, bits, group_size, keep_RC=keep_RC)
    module.weight_scale.data *= 1.037  # no float16 number any more
    weight_RC = module.quantized_weight()
    quantized = module.to_quantized()
    assert torch.equal(quantized.dequantize(), weight_RC)
    assert torch.equal(decode(encode(quantized)).dequantize(), weight_RC)
    if keep_RC is not None:
        assert torch.all(weight_RC[~keep_RC] == 0) and torch.all(quantized.dequantize()[~keep_RC] == 0)


def test_masked_weights_get_no_gradient_and_tiny_steps_come_back() -> None:
    linear = nn.Linear(32, 4)
    keep_RC = torch.rand(4, 32, generator=torch.Generator().manual_seed(5)) > 0.5
    module = QATLinear.of(linear, 2, keep_RC=keep_RC)
    module(torch.randn(7, 32)).square().sum().backward()
    assert module.weight.grad is not None and torch.all(module.weight.grad[~keep_RC] == 0)
    assert module.weight_scale.grad is not None and torch.all(module.weight_scale.grad != 0)
    for sign in (1.0, -1.0):  # a step below the smallest gets the gradient that makes it larger, not the other
        module.zero_grad()
        module.weight_scale.data.fill_(-1e-3)
        (sign * module.quantized_weight() * module.weight.detach().sign()).sum().backward()
        assert module.weight_scale.grad is not None
        assert torch.all(module.weight_scale.grad == 0) if sign > 0 else torch.all(module.weight_scale.grad < 0)


def test_a_pattern_of_the_mask_is_stored_as_such() -> None:
    keep_RC = torch.tensor([True, False, False, True]).repeat(4, 8)
    modules = [QATLinear.of(nn.Linear(32, 4), 4, keep_RC=keep_RC, pattern=pattern) for pattern in (None, (2, 4))]
    quantized = [module.to_quantized() for module in modules]
    assert [one.stored_bits()["mask"] for one in quantized] == [128, 96]
    assert torch.equal(decode(encode(quantized[1])).dequantize(), modules[1].quantized_weight())


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="--group-size 48: 64 input channels"):
        QATLinear.of(nn.Linear(64, 4), 4, 48)
