"""What shapes cannot take is told before any text or weight is read, by compress and mi-group, and by plan alike."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import mico
import mico.calibration as calibration
import mico.plan as verb
from mico import cli
from mico.errors import UserError
from mico.preflight import check_coverage
from tests.test_plan import STILL
from tests.tiny import save_model

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    (dict(pattern="3:5", blocksize=125), r"--pattern 3:5: the model's input widths \[40, 72\] are not multiples of 5"),
    (dict(n_groups=41), "--n-groups 41: more groups than channels, the narrowest stream has 40"),
    (dict(mi_method="knn"), "--mi-method knn: 72 channels exceed 41"),
    (dict(mi_method="copula", nsamples=3, seqlen=20), "--mi-method copula: needs at least 64 sampled rows, got 60"),
    (dict(profile="gguf"), "--group-size 32: does not divide an input of 40 channels"),
    (dict(embed_bits=4, n_groups=2, seqlen=65), "--seqlen 65: must be from 2"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), hidden_size=40, intermediate_size=72)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text may be read, and 72 channels are many."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr(calibration, "load_text", read)
    monkeypatch.setattr(mico.preflight, "KNN_CHANNELS", 41)


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_compress_refuses_before_the_text_is_read(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mico.compress(str(model), **options)


@pytest.mark.parametrize(("options", "message"), REFUSED[1:4])
def test_mi_group_refuses_the_same(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mico.mi_group(str(model), **options)


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_plan_refuses_the_same(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mico.plan(str(model), eval="none", **options)


def test_plan_takes_the_options_of_compress_but_those_of_its_stages() -> None:
    def options(verb: Any) -> set[str]:
        return set(inspect.signature(verb).parameters)

    own = {"statistics", "groups", "strict", "tensorboard", "wandb"}  # what does not change what a compression takes
    assert options(mico.compress) - options(mico.plan) == own
    assert options(cli.compress) - options(cli.plan) == own | {"push_to_hub", "private"}


def test_an_execution_that_is_not_known_comes_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICO_EXECUTION", "warp")
    for asked in (mico.compress, mico.plan):
        with pytest.raises(UserError, match="warp"):
            asked(str(model))


def test_plan_tells_the_share_of_each_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "measure", lambda *_: STILL)
    report = mico.plan(str(model), device="cpu,cpu", eval="none")
    assert report["processes"] == 2 and "in each of 2 processes" in verb.section(report).lines[1]
    assert report["free"]["host"] < mico.plan(str(model), device="cpu", eval="none")["free"]["host"] * 0.7


def test_plan_refuses_a_small_share(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "measure", lambda *_: STILL)
    monkeypatch.setattr(mico.preflight, "COVERAGE", 1.1)
    with pytest.raises(UserError, match="pass --allow-partial"):
        mico.plan(str(model), eval="none")
    assert mico.plan(str(model), eval="none", allow_partial=True)["parameters"]


def test_a_small_share_needs_a_word() -> None:
    check_coverage(0.9, "m", allow_partial=False)
    check_coverage(0.1, "m", allow_partial=True)
    with pytest.raises(UserError, match=r"model m: 89\.0% of its Linear parameters would be compressed, below 90%"):
        check_coverage(0.89, "m", allow_partial=False)
