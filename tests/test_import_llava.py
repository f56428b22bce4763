"""mico import-llava: the authors' format against the model it was written from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPConfig, CLIPModel, LlavaNextConfig

import mico
from mico import loading
from mico.errors import UserError
from tests.adapters.llava_models import VISION, original, seeing, tiny_llava
from tests.tiny import VOCABULARY


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A whole CLIP model, as on the hub, whose vision half is that of `tiny_llava`."""
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
    state = {k.removeprefix("vision_model."): v for k, v in tiny_llava().model.vision_tower.state_dict().items()}
    clip.vision_model.load_state_dict(state)
    clip.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("pickled", [True, False])
def test_the_model_is_the_same_with_a_larger_vocabulary(
    tmp_path: Path, tower: Path, inside: bool, pickled: bool
) -> None:
    model = tiny_llava()
    source = original(tmp_path / "authors", str(tower), model, inside, pickled)
    result = mico.import_llava(str(source), str(tmp_path / "out"), vision_tower=str(tower))
    assert result["model_type"] == "llava" and result["bytes"] > 0
    made, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (
        image == made.config.image_token_id >= VOCABULARY
        and tokenizer.pad_token_id < made.config.text_config.vocab_size
    )
    assert made.config.text_config.vocab_size == 320 and made.config.image_seq_length == 4
    logits = seeing(made.eval(), image)
    assert torch.allclose(logits[..., :VOCABULARY], seeing(model, VOCABULARY - 1), atol=1e-5)
    head = made.lm_head.weight
    assert torch.allclose(head[VOCABULARY:], head[:VOCABULARY].mean(0).expand(320 - VOCABULARY, -1), atol=1e-6)
    assert loading.load_model(str(tmp_path / "out"), device="cpu").family.name == "LLaVA"


def test_the_next_version_keeps_its_grid_and_its_newline(tmp_path: Path, tower: Path) -> None:
    points = [[8, 16], [16, 8]]
    more = dict(mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=points, model_type="llava_llama")
    source = original(tmp_path / "authors", str(tower), tiny_llava(), True, **more)
    state = load_file(source / "model.safetensors") | {"model.image_newline": torch.arange(64.0)}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    assert mico.import_llava(str(source), str(tmp_path / "out"), vision_tower=str(tower))["model_type"] == "llava_next"
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert isinstance(made.config, LlavaNextConfig) and made.config.image_grid_pinpoints == points
    assert torch.equal(made.model.image_newline, torch.arange(64.0))


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        mico.import_llava(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mm_projector_type="linear"), "mm_projector_type 'linear'"),
        (dict(model_type="llava_mpt"), "model_type 'llava_mpt' is no original LLaVA checkpoint"),
        (dict(mm_vision_select_feature="all"), "mm_vision_select_feature 'all'"),
        (dict(intermediate_size=100), "has shape (96, 64), config.json describes (100, 64)"),
        (dict(num_hidden_layers=3), "weights missing: model.language_model.layers.2."),
    ],
)
def test_what_cannot_be_converted_leaves_nothing_behind(
    tmp_path: Path, tower: Path, changes: dict[str, Any], message: str
) -> None:
    source = original(tmp_path / "authors", str(tower), tiny_llava(), True, **changes)
    assert message in refusal(str(source), str(tmp_path / "out"), vision_tower=str(tower))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authors", "clip"]


def test_a_missing_tower_is_asked_for(tmp_path: Path) -> None:
    source = original(tmp_path / "unknown", "some/tower", tiny_llava())
    assert "mm_vision_tower 'some/tower': give its folder as --vision-tower" in refusal(source, tmp_path / "out")
    known = original(tmp_path / "known", "openai/clip-vit-large-patch14-336", tiny_llava())
    assert "no vision tower in the weights" in refusal(known, tmp_path / "out")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_does_not_run(tmp_path: Path, tower: Path) -> None:
    source = original(tmp_path / "authors", str(tower), tiny_llava(), True, pickled=True)
    torch.save({"lm_head.weight": _Evil(tmp_path / "ran")}, source / "pytorch_model.bin")
    assert "cannot be read as tensors alone" in refusal(source, tmp_path / "out", vision_tower=str(tower))
    assert not (tmp_path / "ran").exists()


def test_the_other_verbs_name_the_way(tmp_path: Path, tower: Path) -> None:
    source = original(tmp_path / "authors", str(tower), tiny_llava(), True)
    with pytest.raises(UserError, match="convert it with `mico import-llava`"):
        loading.load_config(str(source))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert "is there already" in refusal(source, out)
    assert (out / "mine.txt").read_text() == "kept"
