"""What tests of models that see need: a tiny LLaVA with its processor, pictures, image-text files in both forms."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from tests.adapters.llava_models import tiny_llava
from tests.tiny import CONTEXT, VOCABULARY, train_tokenizer

IMAGE = VOCABULARY  # id of the image token, behind what the tokenizer knows
TEMPLATE = (
    "{% for message in messages %}{{ '[U] ' if message['role'] == 'user' else '[A] ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"
)


def llava_folder(folder: Path, **processor: Any) -> Path:
    """A tiny random LLaVA that sees pictures of 2 x 2 patches, with tokenizer and processor."""
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.model_max_length = 2 * CONTEXT
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    tiny_llava(vocabulary=VOCABULARY + 4, image=IMAGE).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=dict(height=8, width=8))
    settings = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    LlavaProcessor(images, tokenizer, **settings | processor).save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    """A smooth random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def instruct(folder: Path, count: int = 12) -> Path:
    """A LLaVA-Instruct file: every third row without a picture, every fourth with two questions."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        said = [("human", "<image>\nWhat is it?"), ("gpt", f"A document of {number}.")]
        if number % 4 == 0:
            said += [("human", "And then?"), ("gpt", "Its end.")]
        row: dict[str, Any] = dict(id=str(number))
        if number % 3:
            (folder / "images" / f"{number}.png").write_bytes(encoded(picture(number)))
            row["image"] = f"{number}.png"
        else:
            said[0] = ("human", "What are one and two?")
        rows.append(row | dict(conversations=[{"from": who, "value": text} for who, text in said]))
    file = folder / "pairs.json"
    file.write_text(json.dumps(rows))
    return file


def archive(file: Path, count: int = 6, **parts: bytes) -> Path:
    """A webdataset archive of captioned pictures; parts: files added to the first sample, by suffix."""
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            sample = dict(jpg=encoded(picture(number), "jpeg"), txt=f"Another document, {number}.".encode())
            for suffix, content in (sample | (parts if number == 0 else {})).items():
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return file
