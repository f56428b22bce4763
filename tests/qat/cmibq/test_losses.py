"""InfoNCE against a loop over pairs, and two processes against one."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mico.qat.cmibq.importance import Meter, average_over_ranks
from mico.qat.cmibq.losses import LARGEST, Alignment, keys, pooled, text_keys
from mico.qat.cmibq.wrap import wrap
from tests.qat.cmibq.making import dense, settings


def pairs(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, texts, keys of texts (1 and 4 are the same), keys of pictures (0 and 2 are)."""
    make = torch.Generator().manual_seed(0)
    vision_BD, text_BD = torch.randn(count, 10, generator=make), torch.randn(count, 7, generator=make)
    text_key_B, image_key_B = torch.arange(count), torch.arange(100, 100 + count)
    text_key_B[4], image_key_B[2] = text_key_B[1], image_key_B[0]
    return vision_BD, text_BD, text_key_B, image_key_B


def by_loop(module: Alignment, vision_BD: torch.Tensor, text_BD: torch.Tensor, same: set[tuple[int, int]]) -> dict:
    """Loss and accuracies; `same`: pairs (i, j) that are no negatives of one another."""
    v, t = (
        head.weight.detach().double() @ values.double().T
        for head, values in ((module.vision_head, vision_BD), (module.text_head, text_BD))
    )
    v, t = (values - values.mean(1, keepdim=True) for values in (v, t))
    v, t = (values / values.norm(dim=0) for values in (v, t))
    scale, count = math.exp(module.logit_scale.item()), len(vision_BD)
    logits = [[scale * float(v[:, i] @ t[:, j]) for j in range(count)] for i in range(count)]
    loss, right = 0.0, [0, 0]
    for i in range(count):
        for direction in (0, 1):
            row = {
                j: logits[i][j] if direction == 0 else logits[j][i]
                for j in range(count)
                if j == i or not ({(i, j), (j, i)} & same)
            }
            loss += (math.log(sum(math.exp(x) for x in row.values())) - row[i]) / (2 * count)
            right[direction] += max(row, key=lambda j: row[j]) == i
    return dict(loss=loss, acc_v2t=right[0] / count, acc_t2v=right[1] / count)


@pytest.mark.parametrize(("images", "same"), [(False, {(1, 4)}), (True, {(1, 4), (0, 2)})])
def test_loss_and_accuracies_equal_a_loop(images: bool, same: set[tuple[int, int]]) -> None:
    vision_BD, text_BD, text_key_B, image_key_B = pairs()
    module = Alignment(10, 7)
    found = module(vision_BD, text_BD, text_key_B, image_key_B if images else None)
    wanted = by_loop(module, vision_BD, text_BD, same)
    assert {name: getattr(found, name).item() for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found.temperature.item() == pytest.approx(0.07)


def test_what_all_pictures_share_hides_no_difference() -> None:
    vision_BD, text_BD, text_key_B, _ = pairs()
    module = Alignment(10, 7)
    plain = module(vision_BD, text_BD, text_key_B).loss
    torch.testing.assert_close(module(vision_BD + 100, text_BD - 50, text_key_B).loss, plain, rtol=1e-3, atol=0)


def test_equal_texts_are_never_negatives() -> None:
    """Moving the duplicate's text away changes nothing for the pair that shares it."""
    vision_BD, text_BD, text_key_B, _ = pairs()
    module = Alignment(10, 7)
    vision_BD.requires_grad_()
    everything = torch.zeros(6, dtype=torch.int64)  # all texts equal: no negatives are left
    found = module(vision_BD, text_BD, everything)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(0, abs=1e-6) and vision_BD.grad is not None
    assert vision_BD.grad.abs().max() < 1e-6 and torch.isfinite(vision_BD.grad).all()
    assert module(vision_BD, text_BD, text_key_B).loss > 1


def test_text_reaches_the_loss_and_only_its_head_learns_from_it() -> None:
    vision_BD, text_BD, text_key_B, _ = pairs()
    module = Alignment(10, 7)
    text_BD.requires_grad_(), vision_BD.requires_grad_()
    loss = module(vision_BD, text_BD, text_key_B).loss
    loss.backward()
    assert text_BD.grad is None and vision_BD.grad is not None and vision_BD.grad.abs().sum() > 0
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert module(vision_BD, text_BD.flip(0), text_key_B).loss != loss


def test_temperature_moves_and_stays_in_its_range() -> None:
    vision_BD, text_BD, text_key_B, _ = pairs()
    module = Alignment(10, 7)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    seen = []
    for _ in range(60):
        optimizer.zero_grad()
        found = module(vision_BD, text_BD, text_key_B)
        found.loss.backward()
        optimizer.step()
        seen.append(found.temperature.item())
    assert (seen[1] != seen[0] and max(seen) > 0.0701) or min(seen) < 0.0699
    assert found.acc_v2t == found.acc_t2v == 1 and found.loss < 0.1
    module.logit_scale.data.fill_(9.0)
    assert module(vision_BD, text_BD, text_key_B).temperature.item() == pytest.approx(1 / 100, rel=1e-4)
    assert module.logit_scale.item() == pytest.approx(LARGEST)


def test_pooling_takes_the_named_tokens_alone() -> None:
    states_BTD = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    expected = torch.stack([(states_BTD[0, 1] + states_BTD[0, 2]) / 2, states_BTD[1, 4]])
    torch.testing.assert_close(pooled(states_BTD, mask_BT), expected)
    with pytest.raises(ValueError, match="row 1 of the batch has no token"):
        pooled(states_BTD, torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]))


def test_keys_tell_texts_apart_wherever_they_stand() -> None:
    ids_BT = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0], [5, 6, 8, 0, 0], [5, 6, 0, 0, 0]])
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    first, second, third, fourth = text_keys(ids_BT, mask_BT).tolist()
    assert first == second and len({first, third, fourth}) == 3
    assert torch.equal(keys([b"a", b"b", b"a"]), keys([b"a", b"b", b"a"]))


# --- two processes --------------------------------------------------------------------------------------------------


class Towers(torch.nn.Module):
    """What makes the two sides, with a loss over them, as DistributedDataParallel wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(4, 10, bias=False)
        torch.nn.init.normal_(self.body.weight, generator=torch.Generator().manual_seed(7))
        self.align = Alignment(10, 7)

    def forward(self, x: torch.Tensor, text: torch.Tensor, text_key: torch.Tensor, image_key: torch.Tensor) -> tuple:
        return self.align(self.body(x), text, text_key, image_key)


def inputs() -> tuple[torch.Tensor, ...]:
    _, text_BD, text_key_B, image_key_B = pairs()
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), text_BD, text_key_B, image_key_B


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(Towers())
    here = slice(0, 2) if rank == 0 else slice(2, 6)  # batches of different sizes; the equal texts lie in both
    found = model(*(part[here] for part in inputs()))
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    meters = [Meter(torch.zeros(3, dtype=torch.int64), 1, 2) for _ in range(2)]
    for number, meter in enumerate(meters):
        meter(torch.full((2, 3), rank + 1.0), torch.ones(2, 3), torch.full((1, 2), number + 10.0 * rank))
    average_over_ranks(meters)
    model_of_rank = dense()
    cmibq = wrap(model_of_rank, settings(use_importance=False), None)
    for kind in cmibq.kinds:
        for quantizer in kind.quantizers:
            quantizer.error_GK.uniform_(generator=torch.Generator().manual_seed(rank))
    cmibq.harden()
    torch.save([kind.chosen_I for kind in cmibq.kinds], f"{folder}/{rank}-widths.pt")
    measured = torch.stack([torch.cat([m.importance_G, m.distortion_GK[0]]) for m in meters])
    torch.save((tuple(found), gradients, measured), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one_with_both_batches(tmp_path: Path) -> None:
    single = Towers()
    wanted = single(*inputs())
    wanted.loss.backward()
    processes.spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found, gradients, measured = torch.load(tmp_path / f"{rank}.pt")
        assert measured.tolist() == [[2.5, 5.0, 5.0], [2.5, 6.0, 6.0]]  # means over both
        torch.testing.assert_close(found, tuple(part.detach() for part in wanted), rtol=1e-5, atol=1e-6)
        chosen = [torch.load(tmp_path / f"{rank}-widths.pt") for rank in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*chosen, strict=True))  # though errors were not the same
        for name, parameter in single.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
