"""What a target refuses by its config alone, in an export and before a compression for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mico
from mico.adapters import family_of
from mico.errors import UserError
from mico.exports.targets import check_profile, check_target
from tests.adapters.llava_models import tiny_llava
from tests.tiny import random_model, save_model
from tests.workspace import make_texts


def config_of(arch: str) -> Any:
    return tiny_llava().config if arch == "llava" else random_model(arch).config


@pytest.mark.parametrize(
    ("to", "arch", "said"),
    [
        ("gguf", "opt", "model_type 'opt' has no architecture in llama.cpp"),
        ("gguf", "mixtral", "no form for the experts of Mixtral"),
        ("vllm", "mixtral", "no form for the experts of Mixtral"),
        ("gguf", "llava", "LLaVA models see images"),
        ("vllm", "llava", "LLaVA models see images"),
        ("vllm", "opt", None),
        ("vllm", "llama", None),
        ("gguf", "llama", None),
        ("dense", "llava", None),
    ],
)
def test_what_is_refused(to: str, arch: str, said: str | None) -> None:
    config = config_of(arch)
    if said is None:
        check_target(to, config, family_of(config))
        check_profile(to, config, family_of(config))
        return
    with pytest.raises(UserError, match=said):
        check_target(to, config, family_of(config))
    with pytest.raises(UserError, match=f"^--profile {to}: .*{said}.*leave --profile out$"):
        check_profile(to, config, family_of(config))


def test_compress_and_plan_refuse_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "opt", "opt", max_position_embeddings=128)
    monkeypatch.setattr("mico.stages.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    options = dict(profile="gguf", save=str(tmp_path / "run"), data_dir=str(make_texts(tmp_path / "texts")))
    text = dict(calib="wikitext2", eval="wikitext2", nsamples=2)
    for act in (lambda: mico.compress(str(model), **options, **text), lambda: mico.plan(str(model), **options)):
        with pytest.raises(UserError, match=r"--profile gguf: .*model_type 'opt' has no architecture"):
            act()
    monkeypatch.setenv("MICO_EXECUTION", "bad")
    with pytest.raises(UserError, match="MICO_EXECUTION=bad: choose from"):
        mico.compress(str(model), **options | text | dict(profile=None))
    assert not (tmp_path / "run").exists()
