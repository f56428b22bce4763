"""The folder with LLaVA-1.5's shapes: its processor makes what the model expects, and mico loads both."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.make_llava import KNOWN, VOCABULARY, make_llava
from mico.image_text import Sample, encode
from mico.loading import load_model, load_processor
from tests.pictures import picture


@torch.no_grad()
def test_a_narrow_llava_has_the_processor_and_the_visual_tokens_of_the_real_one(tmp_path: Path) -> None:
    nbytes = make_llava(
        tmp_path / "llava", layers=1, vision_layers=2, hidden=32, ffn=48, heads=2, vision_hidden=16, vision_ffn=24,
        vision_heads=2,
    )  # fmt: skip
    loaded, processor = load_model(str(tmp_path / "llava")), load_processor(tmp_path / "llava")
    assert nbytes == 2 * sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.model.config.text_config.vocab_size == VOCABULARY
    made = encode(Sample((("What is it?", "A number."),), picture(0, 500, 400), "here"), processor, labels=True)
    assert int((made["input_ids"] == KNOWN).sum()) == 576 and made["pixel_values"].shape == (1, 3, 336, 336)
    said = processor.tokenizer.decode(made["labels"][made["labels"] >= 0])
    assert said.replace(" ", "") == f"Anumber.{processor.tokenizer.eos_token}"
    assert torch.isfinite(loaded.model(**{k: made[k] for k in ("input_ids", "pixel_values")}).logits).all()
