"""Profiles: the groups they choose, and a compression that keeps to one."""

from __future__ import annotations

import pytest
import torch

import mico
from mico.errors import UserError
from mico.exports.source import read_packed
from mico.profiles import PROFILES
from tests.workspace import Workspace, workspace


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    "name, channels, wanted, size",
    [
        ("vllm", 4096, None, 128),
        ("vllm", 4096, 32, 32),
        ("vllm", 96, None, 96),  # the default does not divide it: one scale a row
        ("vllm", 96, 32, 32),
        ("gguf", 96, None, 32),
    ],
)
def test_group_sizes(name, channels, wanted, size):
    assert PROFILES[name].group_size(channels, wanted) == size


@pytest.mark.parametrize(
    "name, channels, wanted, message",
    [
        ("vllm", 96, 64, "--group-size 64: does not divide an input of 96 channels: choose 32, or leave"),
        ("vllm", 48, 32, "--group-size 32: does not divide an input of 48 channels: no size of this profile does"),
        ("gguf", 48, None, "--group-size 32: does not divide an input of 48 channels: no size of this profile does"),
    ],
)
def test_group_sizes_that_are_refused(name, channels, wanted, message):
    with pytest.raises(UserError) as caught:
        PROFILES[name].group_size(channels, wanted)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def compressed(space: Workspace, name: str, **options) -> tuple[dict, dict]:
    """Report and packed weights of a run."""
    folder = space.root / name
    statistics = str(space.root / "profile-statistics")
    report = mico.compress(
        str(space.model), eval="wikitext2", save=str(folder), statistics=statistics, **space.options | options
    )
    return report, dict(read_packed(folder).weights)


def check_grid(weights: dict, size: int) -> None:
    """Whole multiples of scales that both 16-bit dtypes hold, in equal consecutive groups."""
    for weight in weights.values():
        channels = weight.codes_RC.shape[1]
        assert torch.equal(weight.label_C.cpu(), torch.arange(channels) // size)
        scale_RG = weight.row_scale_RG.float()
        assert weight.group_scale_G is None and torch.equal(scale_RG.bfloat16().float(), scale_RG)
        level_RC = weight.dequantize() / scale_RG.repeat_interleave(size, 1)
        assert torch.equal(level_RC, level_RC.round())


def test_vllm_mixes_widths_across_joined_linears_only(space):
    report, weights = compressed(space, "vllm-run", profile="vllm", group_size=32, target_avg_bits=4.4)
    check_grid(weights, 32)
    widths: dict[tuple[int, str], set] = {}
    for line in report["layers"]:
        widths.setdefault((line["block"], line["stream"]), set()).update(line["bits"])
    assert all(len(found) == 1 for found in widths.values()) and len(set().union(*widths.values())) > 1
    assert 4.0 <= report["size"]["nominal_bits"] <= 4.4 + 1e-9
    assert not report["fallbacks"] and report["size"]["sparsity"] == 0


def test_gguf_keeps_to_its_widths_and_prunes_exactly(space):
    options = dict(profile="gguf", method="sparsegpt", target_avg_bits=5.5, pattern="2:4")
    report, weights = compressed(space, "gguf-run", **options)
    check_grid(weights, 32)
    assert {bits for line in report["layers"] for bits in line["bits"]} <= {4, 5, 8}
    assert report["size"]["sparsity"] == 0.5 and report["size"]["nominal_bits"] <= 5.5 + 1e-9
    assert all(bool((weight.dequantize() == 0).float().mean() >= 0.5) for weight in weights.values())


def test_a_group_size_that_does_not_divide_is_refused_before_any_work(space):
    with pytest.raises(UserError, match="--group-size 64: does not divide an input of 96 channels"):
        compressed(space, "refused-run", profile="vllm", group_size=64)
    assert not (space.root / "refused-run").exists()
