"""What the public code of this idea gets wrong: each check fails when its fault is put back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mico.qat.cmibq import losses, quantizer, widths, wrap
from mico.qat.cmibq.losses import Alignment, pooled, text_keys
from mico.qat.cmibq.wrap import CMIBQ, parameter_groups
from tests.qat.cmibq.making import IMAGE, batch, dense, made, step

Patch = pytest.MonkeyPatch


def bits_get_a_gradient_and_move() -> None:
    """In both phases of stage 1, from the task alone, and towards their target with its price."""
    for progress in (0.1, 0.9):
        model, cmibq = made(target_bits_act=3.0, target_bits_weight=3.0)
        cmibq.progress = progress
        model(**batch(0)).loss.backward()
        for kind in cmibq.kinds:
            gradient_IK = kind.allocator.residual.grad
            assert gradient_IK is not None and (gradient_IK.abs().sum(1) > 0).float().mean() > 0.9
        model.zero_grad()
        optimizer = torch.optim.SGD([dict(params=g["params"], lr=100 * g["lr"]) for g in parameter_groups(model, 0.0)])
        metrics = [step(model, optimizer, progress, seed)[1] for seed in range(4)]
        if progress < 0.5:
            for kind in ("act", "weight"):
                assert metrics[-1][f"quantization/{kind}_avg_bits"] < metrics[0][f"quantization/{kind}_avg_bits"] - 0.1


def temperatures_move() -> None:
    """That of the widths and that of the alignment loss."""
    model, cmibq = made()
    model(**batch(0))
    before = cmibq.temperature
    cmibq.advance(0.35)
    assert cmibq.temperature < before
    cmibq.distribute()
    first = cmibq.activations.quantizers[0].choice
    cmibq.activations.allocator.residual.data[:, 0] = 1.0
    shares = []
    for progress in (0.0, 0.6):
        cmibq.progress = progress
        cmibq.distribute()
        choice = cmibq.activations.quantizers[0].choice
        assert choice is not None and choice.share_GK is not None and choice is not first
        shares.append(choice.share_GK[0, 0].item())
    assert shares[1] > 2 * shares[0]
    module, seen = Alignment(4, 4), []
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(3):
        found = module(torch.eye(4), torch.eye(4), torch.arange(4))
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(found.temperature.item())
    assert len(set(seen)) == 3


def projector_is_applied_once() -> None:
    """What the language model reads, and what is aligned, is the projector's output for the tower's states."""
    model, _ = made(trained=False)
    calls: list[torch.Tensor] = []
    projector = model.model.multi_modal_projector
    handle = projector.linear_1.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    output = model(**batch(0), output_hidden_states=True)
    handle.remove()
    assert len(calls) == 1 and calls[0].shape[-1] == 16  # states of the tower, not of the language model
    once = projector(calls[0]).reshape(-1, 64)
    assert torch.equal(output.image_hidden_states.reshape(-1, 64), once)
    assert torch.equal(output.hidden_states[0][batch(0)["input_ids"] == IMAGE], once)


def align(model: Any, teacher: Any, module: Alignment, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of stage 2, put together as a training does."""
    ids_BT = given["input_ids"]
    questions_BT = (ids_BT != IMAGE) & (given["labels"] == -100)
    with torch.no_grad():
        states_BTD = teacher(**given, output_hidden_states=True).hidden_states[-1]
    tokens = model(**given).image_hidden_states
    vision_BD = tokens.reshape(len(ids_BT), -1, tokens.shape[-1]).mean(1)
    return module(vision_BD, pooled(states_BTD, questions_BT), text_keys(ids_BT, questions_BT)).loss


def text_reaches_the_alignment_loss() -> None:
    """Another question gives another loss, and both the text head and the projector learn."""
    model, _ = made()
    module, teacher = Alignment(64, 64), dense()
    given = batch(0)
    loss = align(model, teacher, module, given)
    loss.backward()
    for parameter in (module.text_head.weight, module.vision_head.weight):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    weight = model.model.multi_modal_projector.linear_2.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    changed = given | dict(input_ids=given["input_ids"].clone())
    changed["input_ids"][0, 0] = 77
    assert align(model, teacher, module, changed).item() != pytest.approx(loss.item(), abs=1e-6)


def evaluation_is_quantized() -> None:
    """Activations and weights that reach the product take few values; logits differ from the dense model's."""
    model, cmibq = made(trained=False)
    for kind in cmibq.kinds:
        kind.fix(torch.zeros_like(kind.chosen_I))  # 2 bits
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = torch.nn.functional.linear
    with Patch.context() as patch:
        seeing = SimpleNamespace(linear=lambda x, w, b: read.append((x, w)) or plain(x, w, b))
        patch.setattr(quantizer, "functional", seeing)  # of QuantLinear alone
        with torch.no_grad():
            found = model.eval()(**batch(0)).logits
    assert len(read) == sum(len(site.linears) for site in cmibq.sites)
    for x, w in read:
        assert len(x.unique()) <= 8 * 4 and max(len(row.unique()) for row in w) <= 4 * -(-w.shape[1] // 16)
    with torch.no_grad():
        exact = dense()(**batch(0)).logits
    assert (found - exact).norm() > 0.1 * exact.norm()


# --- the faults -----------------------------------------------------------------------------------------------------


def detached_shares(patch: Patch) -> None:
    plain = widths.shares
    patch.setattr(widths, "shares", lambda logits, tau: plain(logits, tau).detach())


def argmax_without_votes(patch: Patch) -> None:
    patch.setattr(quantizer, "vote", lambda y, *rest: y)


def frozen_logits(patch: Patch) -> None:
    plain = parameter_groups
    patch.setitem(
        globals(), "parameter_groups", lambda model, lr: [g for g in plain(model, lr) if g["name"] != "theta"]
    )


def constant_temperature(patch: Patch) -> None:
    patch.setattr(wrap, "temperature", lambda progress, hard_share: 2.0)


def temperature_that_nobody_reads(patch: Patch) -> None:
    plain = widths.shares
    patch.setattr(widths, "shares", lambda logits, tau: plain(logits, 2.0))


def logit_scale_outside_of_the_graph(patch: Patch) -> None:
    plain = Alignment.__init__

    def start(self: Alignment, *sizes: int) -> None:
        plain(self, *sizes)
        self.logit_scale.requires_grad_(False)

    patch.setattr(Alignment, "__init__", start)


def projected_twice(patch: Patch) -> None:
    plain = wrap.wrap

    def twice(model: Any, *rest: Any) -> CMIBQ:
        found = plain(model, *rest)
        projector = model.model.multi_modal_projector
        once = type(projector).forward
        projector.forward = lambda x: (once(projector, x) + once(projector, x)) / 2
        return found

    patch.setattr("tests.qat.cmibq.making.wrap", twice)


def text_replaced_by_a_constant(patch: Patch) -> None:
    plain = losses.pooled
    patch.setitem(globals(), "pooled", lambda states, mask: torch.ones_like(plain(states, mask)))


def quantized_in_training_alone(patch: Patch) -> None:
    plain = quantizer.Quantizer.forward

    def forward(self: quantizer.Quantizer, x_NC: torch.Tensor) -> torch.Tensor:
        return plain(self, x_NC) if self.training else x_NC

    patch.setattr(quantizer.Quantizer, "forward", forward)


def weights_alone_are_quantized(patch: Patch) -> None:
    patch.setattr(quantizer.SharedInput, "__call__", lambda self, x: x)


FAULTS: list[tuple[Callable[[], None], list[Callable[[Patch], None]]]] = [
    (bits_get_a_gradient_and_move, [detached_shares, argmax_without_votes, frozen_logits]),
    (temperatures_move, [constant_temperature, temperature_that_nobody_reads, logit_scale_outside_of_the_graph]),
    (projector_is_applied_once, [projected_twice]),
    (text_reaches_the_alignment_loss, [text_replaced_by_a_constant]),
    (evaluation_is_quantized, [quantized_in_training_alone, weights_alone_are_quantized]),
]


@pytest.mark.parametrize("check", [check for check, _ in FAULTS])
def test_it_is_right(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("check", "fault"), [(check, fault) for check, faults in FAULTS for fault in faults])
def test_a_fault_put_back_is_found(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
