"""Processors: what old ones lack is filled in, what cannot work is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mico.errors import UserError
from mico.loading import load_processor
from tests.adapters.llava_models import PATCHES, tiny_llava
from tests.pictures import llava_folder
from tests.tiny import VOCABULARY, save_model, train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny LLaVA with the processor that its config asks for."""
    return llava_folder(tmp_path / "llava")


def inputs(processor: Any) -> Any:
    picture = Image.new("RGB", (20, 10), (200, 30, 90))
    texts = ["USER: <image>\none ASSISTANT:", "USER: <image>\none and two are three ASSISTANT:"]
    return processor(images=[picture, picture], text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_what_it_makes_fits_the_model_and_is_padded_on_the_left(folder: Path) -> None:
    notes: list[str] = []
    processor = load_processor(folder, tell=notes.append)
    made = inputs(processor)
    image = processor.image_token_id
    assert (made["input_ids"] == image).sum(1).tolist() == [PATCHES, PATCHES]
    assert made["attention_mask"][0, 0] == 0 and made["attention_mask"][:, -1].tolist() == [1, 1]
    assert notes == ["llava: the tokenizer has no padding token: '</s>' pads, masked"]
    assert torch.isfinite(tiny_llava(VOCABULARY + 4, image)(**made).logits).all()


def test_an_old_processor_is_filled_in_from_the_config(folder: Path) -> None:
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    for field in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del content[field]
    file.write_text(json.dumps(content))
    notes: list[str] = []
    processor = load_processor(folder, tell=notes.append)
    assert notes[0] == (
        "llava: the processor lacks patch_size (4), vision_feature_select_strategy (default), "
        "num_additional_image_tokens (1): taken from config.json"
    )
    assert (inputs(processor)["input_ids"] == processor.image_token_id).sum(1).tolist() == [PATCHES, PATCHES]


def test_what_cannot_work_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_type 'llama' sees no images"):
        load_processor(save_model(tmp_path / "llama"))
    train_tokenizer().save_pretrained(folder)  # it does not know <image>
    with pytest.raises(UserError, match=r"turns '<image>' into .* config.json says image_token_index"):
        load_processor(folder)
    file = folder / "processor_config.json"
    content = file.read_text()
    file.write_text('{"processor_class": "LlavaProcessor", "image_processor": 3')
    with pytest.raises(UserError, match="the processor cannot be read"):
        load_processor(folder)
    file.write_text(content)
    file.unlink()
    with pytest.raises(UserError, match=r"no processor for images: copy preprocessor_config\.json or"):
        load_processor(folder)
