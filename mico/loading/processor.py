"""The processor of a model that sees images: what turns pictures and a prompt into the model's inputs.

Processors of older checkpoints lack what newer versions of transformers ask for; it is taken from the model's config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mico.errors import UserError
from mico.loading.model import _checked_folder, _config, _runs_code
from mico.loading.names import IMAGE_FILES, model_in
from mico.loading.safety import reason
from mico.loading.silence import quiet

CLASS_TOKEN = ("clip", "clip_vision_model")  # towers that put one token of their own before the patches


def load_processor(
    name: str | Path,
    *,
    offline: bool = False,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Any:
    """The processor of a vision-language model, dense or packed (a run folder works too), padding on the left.

    tell: hears, in a line each, what the processor lacked and was taken from config.json. Raises UserError when the
    model sees no images, when the folder has no processor, or when tokenizer and config disagree on the image token.
    """
    folder = _checked_folder(str(model_in(name)), False, offline, trust_remote_code, packed=True)
    config = _config(folder, trust_remote_code)
    if not hasattr(config, "vision_config"):
        raise UserError(f"{folder}: model_type {config.model_type!r} sees no images: give a LLaVA model")
    if not any((folder / file).is_file() for file in IMAGE_FILES):
        raise UserError(
            f"{folder} has no processor for images: copy {' or '.join(IMAGE_FILES)} of the model it was made from"
        )
    processor = _read(folder, config, _runs_code(folder, trust_remote_code))
    if filled := _complete(processor, config):
        tell(f"{folder.name}: the processor lacks {', '.join(filled)}: taken from config.json")
    _check_image_token(folder, processor, config)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # what is generated, and what a cache holds, then stands at the end of every row
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
        tell(f"{folder.name}: the tokenizer has no padding token: {tokenizer.pad_token!r} pads, masked")
    return processor


def _read(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # image processor and tokenizer formats fail in many ways
        raise UserError(f"{folder}: the processor cannot be read: {reason(error)}") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise UserError(f"{folder}: the processor ({type(processor).__name__}) has no {part}: fetch it again")
    return processor


def _complete(processor: Any, config: Any) -> list[str]:
    """Fill in what tells the number of visual tokens of an image; the text of each change."""
    found = {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
        # 0 is what a processor has that never heard of it: never right for a tower with a token of its own
        "num_additional_image_tokens": int(config.vision_config.model_type in CLASS_TOKEN),
    }
    filled = []
    for field, value in found.items():
        if hasattr(processor, field) and not getattr(processor, field) and value:
            setattr(processor, field, value)
            filled.append(f"{field} ({value})")
    return filled


def _check_image_token(folder: Path, processor: Any, config: Any) -> None:
    token = processor.image_token
    ids = processor.tokenizer.encode(token, add_special_tokens=False)
    wanted = getattr(config, "image_token_id", None) or config.image_token_index
    if ids != [wanted]:
        raise UserError(
            f"{folder}: the tokenizer turns {token!r} into {ids}, config.json says image_token_index {wanted}: "
            "fetch the tokenizer that belongs to the model"
        )
