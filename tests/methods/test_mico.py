"""The mico method against explicit activations in float64: ridge regression, brute force, held-out error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mico.channels.meters import PairedMoments, SecondMoments
from mico.channels.plan import ChannelGroups, LayerPlan
from mico.errors import UserError
from mico.methods import METHODS, Layer, LayerResult, StreamProblem
from mico.methods.mico import UNJUDGED_SHRINKAGE, _moments, _target_step
from mico.methods.sweep import factorize

ROWS, CHANNELS, BATCH = 12, 24, 80
DENSE = LayerPlan(ChannelGroups.single(CHANNELS), (16,))


def activations(
    batches: int, seed: int = 0, drift: float = 0.4, mean: float = 0.5, channels: int = CHANNELS, tokens: int = BATCH
) -> list[tuple[Tensor, Tensor]]:
    """(x̂, x) of every batch: correlated inputs with a mean; x̂ = x plus an error that follows x, plus noise.

    The error is what an earlier compressed layer leaves behind: a function of the same token, so that later
    weights can make good for part of it.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mix, leak = draw(channels, channels) / channels**0.5, draw(channels, channels) / channels**0.5
    found = []
    for _ in range(batches):
        x = draw(tokens, channels) @ (mix + 0.2) + mean
        x_hat = x + drift * (x @ leak + 0.2 * draw(tokens, channels))
        found.append((x_hat.float(), x.float()))
    return found


def gathered(batches: list[tuple[Tensor, Tensor]]) -> PairedMoments:
    paired = PairedMoments(batches[0][0].shape[1])
    for x_hat, x in batches:
        paired.add(x_hat, x)
    return paired


def weights(seed: int = 1, rows: int = ROWS, channels: int = CHANNELS) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) / channels**0.5


def problem(
    batches: list[tuple[Tensor, Tensor]],
    plan: LayerPlan = DENSE,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    percdamp: float = 0.01,
) -> StreamProblem:
    paired = gathered(batches)
    layer = Layer("one", weights() if weight is None else weight, bias, plan)
    return StreamProblem((layer,), paired.total, paired, percdamp, 128)


def halves(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Explicit float64 (X̂, X) of the fitting batches and (X̂, X) of the held-out ones, every fourth; rows = tokens."""
    kept = [b for i, b in enumerate(batches) if i % 4 != 3]
    held = [b for i, b in enumerate(batches) if i % 4 == 3] or [(torch.zeros(0, CHANNELS),) * 2]
    return tuple(torch.cat([b[i] for b in part]).double() for part in (kept, held) for i in (0, 1))  # type: ignore


def ridge(weight: Tensor, x_hat: Tensor, x: Tensor, percdamp: float, centred: bool = False) -> Tensor:
    """argmin over V of ‖W X - V X̂‖² + λ ‖V - W‖² by least squares on the stacked system; no moment is formed."""
    weight = weight.double()
    if centred:
        x_hat, x = x_hat - x_hat.mean(0), x - x.mean(0)
    lamda = percdamp * float(x_hat.square().sum(0).mean())
    identity = lamda**0.5 * torch.eye(x_hat.shape[1], dtype=torch.float64)
    left, right = torch.cat([x_hat, identity]), torch.cat([x @ weight.T, identity @ weight.T])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def only(results) -> LayerResult:
    (result,) = results
    return result


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("percdamp", [0.001, 0.01, 1.0])
def test_the_target_is_the_ridge_solution(centred, percdamp):
    batches = activations(6)
    x_hat, x = (torch.cat([b[i] for b in batches]).double() for i in (0, 1))
    weight, own = weights().double(), SecondMoments(x_hat.sum(0), x_hat.T @ x_hat, len(x_hat))
    hessian, drift = _moments(own, x.T @ x_hat, x.sum(0), centred)
    step = _target_step(weight, drift, factorize(hessian, percdamp))
    expected = ridge(weight, x_hat, x, percdamp, centred)
    assert (expected - weight).norm() > 0.05 * weight.norm()
    torch.testing.assert_close(weight + step, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bias", [None, torch.ones(ROWS)])
def test_unpruned_and_unquantized_the_weight_is_the_shrunk_target(bias):
    """Through the whole method; what is stored is rounded to float16."""
    batches = activations(8)
    result = only(METHODS["mico"](problem(batches, bias=bias)))
    x_hat, x = (torch.cat([b[i] for b in batches]).double() for i in (0, 1))
    target = ridge(weights(), x_hat, x, 0.01, centred=bias is not None)
    expected = weights() + result.facts["shrinkage"] * (target - weights())
    torch.testing.assert_close(result.quantized.dequantize().double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("tokens, drift", [(BATCH, 0.4), (12, 0.4), (16, 1.0), (200, 0.1)])
def test_shrinkage_is_the_best_step_on_held_out_tokens(tokens, drift, centred):
    batches = activations(8, seed=2, tokens=tokens, drift=drift)
    bias = torch.zeros(ROWS) if centred else None
    found = only(METHODS["mico"](problem(batches, bias=bias))).facts["shrinkage"]
    fit_hat, fit, held_hat, held = halves(batches)
    step = ridge(weights(), fit_hat, fit, 0.01, centred) - weights()
    if centred:
        held_hat, held = held_hat - held_hat.mean(0), held - held.mean(0)
    gap = (held - held_hat) @ weights().double().T
    errors = [float((gap - a * held_hat @ step.T).square().sum()) for a in torch.linspace(0, 1, 1001).tolist()]
    best = errors.index(min(errors)) / 1000
    assert found == pytest.approx(best, abs=2e-3)
    assert 0 < found <= 1


def test_a_target_that_does_not_generalise_is_not_trusted():
    """The drift of the held-out batch runs the other way: the best step there is none."""
    batches = activations(4, seed=3)
    batches[3] = (batches[3][1] - (batches[3][0] - batches[3][1]), batches[3][1])
    assert only(METHODS["mico"](problem(batches))).facts["shrinkage"] == 0.0


@pytest.mark.parametrize("bias", [None, torch.ones(ROWS)])
def test_without_drift_the_target_is_the_weight_itself(bias):
    batches = [(x, x) for _, x in activations(8)]
    result = only(METHODS["mico"](problem(batches, bias=bias)))
    assert torch.equal(result.quantized.dequantize(), weights().half().float())
    plan = LayerPlan(ChannelGroups.single(CHANNELS), (4,), factored=True)
    drifted, plain = (only(METHODS[m](problem(batches, plan))) for m in ("mico", "sparsegpt"))
    assert torch.equal(drifted.quantized.dequantize(), plain.quantized.dequantize())  # same grid, same sweep
    plan = LayerPlan(ChannelGroups.single(CHANNELS), (4,), 0.5, None, True)
    drifted, plain = (only(METHODS[m](problem(batches, plan))) for m in ("mico", "sparsegpt"))
    assert drifted.facts["error"] <= plain.facts["error"] * 1.001


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bits", [3, 16])
def test_the_corrected_bias_makes_the_mean_output_exact(sparsity, bits):
    batches, bias = activations(6, seed=4), torch.linspace(-2, 2, ROWS)
    plan = LayerPlan(ChannelGroups.single(CHANNELS), (bits,), sparsity, None, bits != 16)
    result = only(METHODS["mico"](problem(batches, plan, bias=bias)))
    x_hat, x = (torch.cat([b[i] for b in batches]).double() for i in (0, 1))
    dense_mean_R = (x @ weights().double().T + bias.double()).mean(0)
    value = result.quantized.dequantize().double()
    assert (value - weights()).norm() > 0.01
    mean_R, exact_R = (x_hat @ value.T).mean(0), dense_mean_R - (x_hat @ value.T).mean(0)
    assert torch.equal(result.bias_R, result.bias_R.half().float()), "a bias is counted, and so stored, in 16 bits"
    torch.testing.assert_close(mean_R + result.bias_R.double(), dense_mean_R, rtol=0, atol=1.1e-3)
    torch.testing.assert_close(result.bias_R.double(), exact_R, rtol=6e-4, atol=2e-6)
    assert result.bias_R.dtype == bias.dtype and not torch.allclose(result.bias_R, bias, atol=1e-3)
    assert only(METHODS["mico"](problem(batches, plan))).bias_R is None


@pytest.mark.parametrize("count, judged", [(1, False), (3, False), (4, True)])
def test_without_a_held_out_batch_the_fallback_is_named(count, judged):
    result = only(METHODS["mico"](problem(activations(count))))
    assert bool(result.fallbacks) is not judged
    if not judged:
        assert result.facts["shrinkage"] == UNJUDGED_SHRINKAGE
        assert "held-out" in result.fallbacks[0] and str(UNJUDGED_SHRINKAGE) in result.fallbacks[0]


CASES = {
    "50% + 4 bit": dict(sparsity=0.5, bits=(4,)),
    "2:4 + 4 bit": dict(pattern=(2, 4), bits=(4,)),
    "3 bit": dict(bits=(3,)),
    "50%, mixed groups": dict(sparsity=0.5, bits=(3, 5, 4)),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_held_out_error_is_below_sparsegpt_when_inputs_drift(case, with_bias):
    """Error of the compressed layer's outputs on its own inputs against the dense outputs, on unseen tokens."""
    options, channels = dict(CASES[case]), 48
    everything = activations(20, seed=5, channels=channels, tokens=96)
    batches, unseen = everything[:12], everything[12:]
    bits = options.pop("bits")
    groups = ChannelGroups(torch.arange(channels) * 5 % len(bits))
    plan = LayerPlan(groups, bits, options.get("sparsity", 0.0), options.get("pattern"), True)
    weight, bias = weights(6, 32, channels), torch.zeros(32) if with_bias else None
    x_hat, x = (torch.cat([b[i] for b in unseen]) for i in (0, 1))
    error, sizes = {}, {}
    for method in ("mico", "sparsegpt"):
        result = only(METHODS[method](problem(batches, plan, weight, bias)))
        out = x_hat @ result.quantized.dequantize().T + (result.bias_R if result.bias_R is not None else 0)
        error[method] = float((out - x @ weight.T).square().sum())
        sizes[method] = result.quantized.stored_bits() | dict(kept=int(result.quantized.kept_G().sum()))
    assert error["mico"] < 0.9 * error["sparsegpt"]
    assert sizes["mico"]["kept"] == sizes["sparsegpt"]["kept"]
    codes = abs(sizes["mico"].pop("codes") - sizes["sparsegpt"].pop("codes"))  # survivors may sit in other groups
    assert sizes["mico"] == sizes["sparsegpt"] and codes <= 0.05 * 4 * weight.numel()


def test_linears_of_a_stream_are_judged_each_alone():
    """Two Linears in one problem come out as each does in a problem of its own."""
    batches = activations(8, seed=7)
    plan = LayerPlan(ChannelGroups.single(CHANNELS), (4,), 0.5, None, True)
    paired = gathered(batches)
    layers = (Layer("a", weights(1), None, plan), Layer("b", weights(2, 7), None, plan))
    together = METHODS["mico"](StreamProblem(layers, paired.total, paired, 0.01, 128))
    for layer, found in zip(layers, together, strict=True):
        alone = only(METHODS["mico"](StreamProblem((layer,), paired.total, paired, 0.01, 128)))
        assert found.facts["shrinkage"] == pytest.approx(alone.facts["shrinkage"], rel=1e-5)
        assert (found.quantized.codes_RC != alone.quantized.codes_RC).float().mean() < 0.01
        torch.testing.assert_close(found.quantized.row_scale_RG, alone.quantized.row_scale_RG, rtol=2e-2, atol=0)


@pytest.mark.parametrize("bias", [None, torch.ones(ROWS)])
def test_dead_and_constant_channels_stay_finite(bias):
    """A channel that never fires, and with a bias one that is constant (its mean moves into the bias)."""
    batches = activations(8, seed=8)
    for x_hat, x in batches:
        x_hat[:, 3] = x[:, 3] = 0
        x_hat[:, 5] = x[:, 5] = 2.0
    result = only(METHODS["mico"](problem(batches, bias=bias)))
    value = result.quantized.dequantize()
    assert torch.isfinite(value).all()
    torch.testing.assert_close(value[:, 3], weights()[:, 3], rtol=1e-3, atol=1e-4)  # unpruned it keeps its weights
    x_hat, x = (torch.cat([b[i] for b in batches]).double() for i in (0, 1))
    out = x_hat @ value.double().T + (result.bias_R.double() - bias if bias is not None else 0)
    assert (out - x @ weights().double().T).square().mean() < 0.1 * (x @ weights().double().T).square().mean()


def test_the_weights_of_a_dead_channel_do_not_move_the_grid():
    batches, weight = activations(8, seed=8), weights()
    for x_hat, x in batches:
        x_hat[:, 3] = x[:, 3] = 0
    loud = weight.clone()
    loud[:, 3] = 1000.0
    plan = LayerPlan(ChannelGroups.single(CHANNELS), (4,), 0.5, None, True)
    found = [only(METHODS["mico"](problem(batches, plan, w))).quantized for w in (weight, loud)]
    assert torch.equal(found[0].row_scale_RG, found[1].row_scale_RG)
    assert torch.equal(found[0].dequantize(), found[1].dequantize())


def test_inputs_that_overflow_are_refused():
    batches = activations(4)
    batches[1][0][5, 2] = float("nan")
    with pytest.raises(UserError, match="NaN or Inf"):
        gathered(batches)
    batches = activations(4)
    batches[1][1][5, 2] = float("inf")  # of the dense model
    with pytest.raises(UserError, match="NaN or Inf"):
        gathered(batches)
