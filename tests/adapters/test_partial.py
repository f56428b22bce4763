"""A family that would leave much of a model dense is refused unless that is meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import mico
from mico import stages
from mico.adapters import family_of
from mico.errors import UserError
from mico.loading import model as loading_model
from tests.workspace import make_model, make_texts


def test_less_than_nine_tenths_must_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_only(config: object) -> object:
        family = family_of(config)
        return dataclasses.replace(family, streams=family.streams[:2])

    for room in (loading_model, stages):
        monkeypatch.setattr(room, "family_of", attention_only)
    model = make_model(tmp_path / "model", layers=1)
    options = dict(
        calib="wikitext2", data_dir=str(make_texts(tmp_path / "texts")), nsamples=4, eval="wikitext2", method="rtn",
        save=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"40\.0% of its Linear parameters would be compressed, below 90%: .*partial"):
        mico.compress(str(model), **options)
    report = mico.compress(str(model), allow_partial=True, **options)
    assert report["architecture"]["coverage"] == 0.4  # 12,288 of attention beside 18,432 of the MLP
    assert {line["layer"].split(".")[3] for line in report["layers"]} == {"self_attn"}
