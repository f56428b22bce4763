"""What a model is calibrated with: windows of text, or image-text pairs, which put visual tokens into its blocks."""

from __future__ import annotations

import hashlib
from typing import Any

from mico.console import Console
from mico.data import TEXTS, Windows, calibration_windows, load_text
from mico.errors import UserError
from mico.image_text import ImageTextSource, Pairs, Sample, is_image_text, load_image_text, pairs
from mico.loading import is_reference, load_processor, quiet
from mico.metrics.perplexity import default_calibration
from mico.settings import Source

GRIDS = "grids"  # embedded image-text pairs: pictures of grids of digits, with questions


def sees(config: Any) -> bool:
    """Whether a model takes pictures."""
    return hasattr(config, "vision_config")


def calibration_name(source: Source, config: Any) -> str:
    """The data to calibrate on: what is named, else the pairs that come with mico for a shipped model that sees."""
    found = source.calib or default_calibration(is_reference(source.model), source.data_dir, source.data_file)
    return GRIDS if source.calib is None and found == "docs" and sees(config) else found


def holds_pictures(source: Source, name: str) -> bool:
    """Whether the calibration data of this name has pictures; --data-file is always a text."""
    return source.data_file is None and name not in TEXTS and (name == GRIDS or is_image_text(name))


def check_calibration(source: Source, config: Any) -> None:
    """Raise UserError for data that a model cannot take, or towers that it could not calibrate; nothing is read."""
    name = calibration_name(source, config)
    pictures = holds_pictures(source, name)
    if pictures and not sees(config):
        raise UserError(f"--calib {name} holds pictures, model_type {config.model_type!r} sees none: give a text")
    if not pictures and name not in TEXTS and source.data_file is None:
        raise UserError(
            f"unknown text '{name}': choose from {', '.join(TEXTS)}, or pass --data-file; for a model that sees {GRIDS}"
            " or image-text data (.json, .jsonl, .tar, a folder of .tar)"
        )
    if source.image_folder is not None and not pictures:
        raise UserError(f"--image-folder {source.image_folder}: --calib {name} is a text: give image-text data")
    if not pictures and source.towers:
        raise UserError(
            f"--compress-{source.towers[0]} needs pictures to calibrate on, --calib {name} is a text: "
            f"give image-text data or {GRIDS}"
        )


def calibration(source: Source, config: Any, tokenizer: Any, seqlen: int, console: Console) -> Windows | Pairs:
    """The windows or pairs of `source`, read and cut. Raises UserError when they are missing, too few or malformed."""
    check_calibration(source, config)
    name = calibration_name(source, config)
    if not holds_pictures(source, name):
        text = load_text(
            name, "train", data_dir=source.data_dir, data_file=source.data_file, offline=source.offline
        )  # fmt: skip
        return calibration_windows(text, tokenizer, source.nsamples, seqlen, source.seed)
    data = _grids(source.nsamples, source.seed) if name == GRIDS else load_image_text(name, source.image_folder)
    hub = dict(offline=source.offline, trust_remote_code=source.trust_remote_code)
    processor = load_processor(source.model, **hub, tell=console.note)
    with quiet():
        return pairs(data, processor, source.nsamples, seqlen, source.seed)


def _grids(count: int, seed: int) -> ImageTextSource:
    """A question about each of `count` embedded pictures, of all kinds in turn."""
    from mico.reference.grids import examples

    samples, digest = [], hashlib.sha256()
    for number, example in enumerate(examples("train", count, seed)):
        question = example.questions[number % len(example.questions)]
        samples.append(Sample(((question.text, question.answer),), example.image, f"{GRIDS}, picture {number}"))
        digest.update(f"\0{question.text}\0{question.answer}\0".encode() + example.image.tobytes())
    return ImageTextSource(GRIDS, tuple(samples), f"mico's own pictures of digits, seed {seed}", digest.hexdigest())
