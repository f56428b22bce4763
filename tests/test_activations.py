"""Hidden states in a file, and batches that do not fit: the walk shows what it would have shown anyway."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mico
import mico.activations as activations
from mico.activations import Activations, smaller, spills
from mico.adapters import family_of
from mico.channels.meters import PairedMoments
from mico.data import token_batches
from mico.errors import UserError
from mico.exits import explain
from mico.packed.experts import unfuse
from mico.team import StreamMeter
from mico.walk import Block, walk
from tests.test_walk import Rows, disturb
from tests.tiny import VOCABULARY, random_model
from tests.workspace import Workspace, workspace

WINDOWS, TOKENS = 19, 12


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


def batches(size: int) -> list[dict[str, torch.Tensor]]:
    ids_NT = torch.randint(2, VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(3))
    return token_batches(ids_NT, size)


class Scarce:
    """Blocks run out of memory over batches above `limit`, from the given call on (of all blocks together)."""

    def __init__(self, model: nn.Module, limit: int, after: int = 0, message: str | None = None) -> None:
        self.limit, self.left, self.message, self.broken = limit, after, message, 0
        for block in model.get_submodule("model.layers"):
            block.input_layernorm.register_forward_pre_hook(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scarce:
        return self  # the dense copies of blocks count too

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.left -= 1
        if len(args[0]) > self.limit and self.left < 0:
            self.broken += 1
            raise RuntimeError(self.message) if self.message else torch.OutOfMemoryError("CUDA out of memory")


Seen = namedtuple("Seen", "rows moments inputs")


def seen(model: Any, size: int, told: list[str], **options: Any) -> Seen:
    """All that a walk with replaced weights and two tracks shows."""
    unfuse(model)
    found = Seen([], [], [])
    for block in walk(model, family_of(model.config), batches(size), paired=True, tell=told.append, **options):
        for stream in list(block.streams)[:3]:
            rows = block.measure(Rows, (stream,))[stream]
            found.rows.append([x_TC for x_TC in rows.batches])
        found.moments.append(block.measure_paired("attn_in"))
        disturb(block, "self_attn.q_proj")
        if block.index == 1:
            block.measure(Rows)  # its outputs are used
        found.inputs.append([x_BTC.clone() for x_BTC in block._walker.inputs])
    return found


def same_moments(first: PairedMoments, second: PairedMoments) -> None:
    assert first.fit.count == second.fit.count and first.held.count == second.held.count
    for name in ("fit_cross_CC", "held_cross_CC", "fit_dense_sum_C", "held_dense_sum_C"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-5, atol=1e-4)


def same_lists(first: list[list[torch.Tensor]], second: list[list[torch.Tensor]]) -> None:
    assert len(first) == len(second)
    for mine, theirs in zip(first, second, strict=True):
        assert [x.shape for x in mine] == [x.shape for x in theirs]
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "message", [None, "[enforce fail] DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_halved_batches_show_what_small_ones_would(message: str | None) -> None:
    model, told = random_model("llama", num_hidden_layers=3), []
    scarce = Scarce(copy.deepcopy(model), 99)
    expected = seen(model, 2, [])
    poor = random_model("llama", num_hidden_layers=3)
    scarce = Scarce(poor, 2, message=message)
    found = seen(poor, 8, told)
    same_lists(found.rows, expected.rows)
    same_lists(found.inputs, expected.inputs)
    for mine, theirs in zip(found.moments, expected.moments, strict=True):
        same_moments(mine, theirs)
    assert scarce.broken == len(told) == 2
    assert told[0] == "block 0: out of memory on cpu, calibration batches halved to 4 windows" and "to 2" in told[1]


@pytest.mark.parametrize("after", range(0, 60, 7))
@pytest.mark.parametrize("size", [8, 7])
def test_memory_may_run_out_at_any_moment(after: int, size: int) -> None:
    """Nothing of a pass that broke is counted twice, and nothing is lost."""
    expected = seen(random_model("llama"), size, [])
    poor = random_model("llama")
    scarce = Scarce(poor, 3, after)
    found = seen(poor, size, [])
    assert scarce.broken or scarce.left >= 0
    for mine, theirs in zip([*found.rows, *found.inputs], [*expected.rows, *expected.inputs], strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), rtol=1e-5, atol=1e-6)
    for one, other in zip(found.moments, expected.moments, strict=True):
        torch.testing.assert_close(one.cross_CC, other.cross_CC, rtol=1e-5, atol=1e-4)
        assert one.total.count == other.total.count == WINDOWS * TOKENS


def test_a_window_that_does_not_fit_is_told() -> None:
    model = random_model("llama")
    Scarce(model, 0)
    with pytest.raises(UserError, match="block 0: out of memory on cpu with one calibration window: lower --seqlen"):
        seen(model, 4, [])


def test_other_errors_pass() -> None:
    model = random_model("llama")
    Scarce(model, 2, message="sizes differ")
    with pytest.raises(RuntimeError, match="sizes differ"):
        seen(model, 4, [])


def test_experts_are_counted_by_the_batches_that_were_given() -> None:
    counts = []
    for limit in (99, 1):
        model = random_model("mixtral")
        unfuse(model)
        Scarce(model, limit)
        blocks = list_of(model)
        counts.append([block.expert_rows() for block in blocks])
    assert counts[0] == counts[1]
    assert all(sum(rows) for rows in counts[0][0].values()) and {len(rows) for rows in counts[0][0].values()} == {5}


def list_of(model: Any) -> Iterator[Block]:
    return walk(model, family_of(model.config), batches(4))


def test_a_meter_of_a_share_takes_halves_of_batches() -> None:
    content_TC, rows = torch.arange(15.0)[:, None], [3, 2, 0, 4, 5, 1]
    meter = StreamMeter(1, torch.device("cpu"), rows, slice(0, None, 2))
    for start, end in ((0, 2), (2, 3), (9, 12), (12, 14)):
        meter.add(content_TC[start:end])
    assert meter.reservoir.rows_TC.flatten().tolist() == [0, 1, 2, 9, 10, 11, 12, 13]


def test_batches_go_through_powers_of_two() -> None:
    assert [smaller(n) for n in range(2, 10)] == [1, 2, 2, 4, 4, 4, 4, 8]


# --- a file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_gives_back_what_it_was_given(tmp_path: Path, dtype: torch.dtype) -> None:
    kept, plain = Activations(tmp_path), Activations()
    for size in (4, 4, 3):
        x_BTC = torch.randn(size, 5, 6).to(dtype)
        kept.append(x_BTC)
        plain.append(x_BTC)
    apart = kept.copy()
    for one in (kept, plain):
        one[1] = torch.zeros(4, 5, 6, dtype=dtype)
        one.split(2)
        one[4] = torch.ones(2, 5, 6, dtype=dtype)
    assert kept.sizes == plain.sizes == [2, 2, 2, 2, 2, 1] and kept.place(8) == 4
    assert all(torch.equal(x, y) for x, y in zip(kept, plain, strict=True))
    assert apart.sizes == [4, 4, 3] and apart[1].any()
    assert list(tmp_path.iterdir()) == []  # nothing to be left behind


def test_walks_through_a_file_are_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = seen(random_model("llama", num_hidden_layers=3), 4, [])
    monkeypatch.setattr(activations, "free_memory", lambda _: 1000)
    told: list[str] = []
    found = seen(random_model("llama", num_hidden_layers=3), 4, told, folder=tmp_path)
    for mine, theirs in zip([*found.rows, *found.inputs], [*expected.rows, *expected.inputs], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    for one, other in zip(found.moments, expected.moments, strict=True):
        assert torch.equal(one.cross_CC, other.cross_CC)
    assert told == [f"0.00 GB of hidden states would fill the memory: they go to a file in {tmp_path}"]


def test_compress_through_a_file_writes_the_same_bytes(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = space.options | dict(eval="none", arm="mi", save=str(tmp_path / "run"))
    monkeypatch.setenv("MICO_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(activations, "free_memory", lambda _: 1000)
    report = mico.compress(str(space.model), **options)
    plain = space.run / "model" / "model.safetensors"
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == plain.read_bytes()
    assert [process["batch_halvings"] for process in report["processes"]] == [0]


def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Activations(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations._Slot, "write", full)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written .No space left") as caught:
        kept.append(torch.zeros(1, 2, 3))
    assert explain(caught.value)[0] == 2


def test_half_of_the_free_memory_may_be_taken() -> None:
    assert spills(51, 100) and not spills(50, 100)
