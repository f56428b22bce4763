"""Verb: a LLaVA checkpoint in its authors' format in, the same model in the format of transformers out.

The authors' folder has Llama's names, the projector as `mm_projector.0` and `.2`, and most often no vision tower: its
weights come from the CLIP model that the config names. Tensors are renamed, none is changed; the vocabulary gets the
tokens <image> and <pad> and is padded to a multiple of 64, with rows that are the mean of the others.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mico.adapters.llava import TEXT_TYPES
from mico.callable import callable_module
from mico.console import Console
from mico.errors import UserError
from mico.files import TEMPORARY, atomic_json, make_durable, read_json, sync_folder, writing
from mico.loading.names import IMAGE_FILES, local_folder
from mico.loading.safety import check_folder, some, tensor_shapes, weight_map
from mico.tables import Section, size_text

callable_module(__name__)
CLIP = "openai/clip-vit-large-patch14-336"  # the tower of LLaVA-1.5 and 1.6: transformers' LlavaConfig has its shape
PADDED = 64  # the vocabulary's size is a multiple of this
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # buffers that older versions of transformers stored
_TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_RENAMED = (  # the first that matches; the names are those that transformers writes
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"model\.image_newline$", "image_newline"),
    (r"(model\.(?:layers|embed_tokens|norm)\.)", r"language_model.\1"),
    (r"lm_head\.", "language_model.lm_head."),
)
_TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window", "hidden_act", "head_dim",
    "initializer_range", "attention_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip


def import_llava(
    source: str, target: str, *, vision_tower: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Convert the folder `source` (LlavaLlamaForCausalLM, LlavaMistralForCausalLM) into the new folder `target`.

    vision_tower: the folder of the CLIP model, needed where the checkpoint has no vision tower of its own.
    Weights are read from safetensors, or from .bin files with torch's reader that builds tensors alone.
    Returns folder, model_type, files and bytes. Raises UserError before anything is written when the source is of
    another kind, or a part of it is missing.
    """
    console = console or Console()
    folder, out = Path(source).expanduser(), Path(target).expanduser()
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already: delete it or choose another")
    original = check_folder(folder)
    files = _weight_files(folder)
    tower = Path(local_folder(vision_tower, offline=True)) if vision_tower else None
    tokenizer = _tokenizer(folder)
    config = _config(folder, original, tower, tokenizer)
    staging = out.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{out.name}"
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    try:
        with console.stage("convert"):
            _write_weights(staging, files, tower, config.get_text_config().vocab_size)
            config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            _write_processor(staging, config, tower)
            _check(staging, config, source)
        with writing(out):
            make_durable(staging, [path for path in staging.iterdir() if path.is_file()])
            if out.exists():
                out.rmdir()
            os.replace(staging, out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return dict(folder=str(out), model_type=config.model_type, files=sizes, bytes=sum(sizes.values()))


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of the original; pickles of tensors where there is nothing else."""
    if any(folder.glob("*.safetensors")):
        return [folder / name for name in sorted(weight_map(folder))]
    found = sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise UserError(f"{folder}: neither safetensors nor pytorch_model*.bin files are here")
    return found


# --- config and tokenizer -------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> Any:
    """The original tokenizer with <image> and, where it has no padding, <pad>."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizer formats fail in many ways
        raise UserError(
            f"{folder}: the tokenizer cannot be read: {str(error).strip().splitlines()[0][:160]}"
        ) from error
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def _config(folder: Path, original: dict[str, Any], tower: Path | None, tokenizer: Any) -> Any:
    """The config of transformers for the original one. Raises UserError naming the field that it cannot express."""
    from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

    where = folder / "config.json"
    kind = str(original.get("model_type"))
    if "mm_vision_tower" not in original or kind not in TEXT_TYPES:
        raise UserError(
            f"{where}: model_type {kind!r} is no original LLaVA checkpoint: expected mm_vision_tower and one of "
            f"{', '.join(TEXT_TYPES)}"
        )
    if original.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise UserError(
            f"{where}: mm_projector_type {original.get('mm_projector_type')!r}: transformers has mlp2x_gelu alone"
        )
    strategies = {"patch": "default", "cls_patch": "full"}
    selected = original.get("mm_vision_select_feature", "patch")
    if selected not in strategies:
        raise UserError(f"{where}: mm_vision_select_feature {selected!r}: expected one of {', '.join(strategies)}")
    image, pad = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    vocabulary = -(-max(original["vocab_size"], image + 1, pad + 1) // PADDED) * PADDED
    fields = {name: original[name] for name in _TEXT_FIELDS if original.get(name) is not None}
    text = AutoConfig.for_model(TEXT_TYPES[kind], vocab_size=vocabulary, pad_token_id=pad, **fields)
    vision = _vision_config(where, original, tower)
    tokens = (vision.image_size // vision.patch_size) ** 2 + (selected == "cls_patch")
    shared = dict(
        text_config=text, vision_config=vision, image_token_index=image, image_seq_length=tokens,
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategies[selected], dtype=original.get("torch_dtype"),
        tie_word_embeddings=bool(original.get("tie_word_embeddings", False)),
    )  # fmt: skip
    if str(original.get("mm_patch_merge_type", "flat")).startswith("spatial"):
        made: Any = LlavaNextConfig(**shared, image_grid_pinpoints=original["image_grid_pinpoints"])
    else:
        made = LlavaConfig(**shared)
    made.architectures = [f"{type(made).__name__.removesuffix('Config')}ForConditionalGeneration"]
    return made


def _vision_config(where: Path, original: dict[str, Any], tower: Path | None) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    if tower is None:
        if str(original["mm_vision_tower"]).rstrip("/").endswith(CLIP.split("/")[1]):
            return LlavaConfig().vision_config
        raise UserError(f"{where}: mm_vision_tower {original['mm_vision_tower']!r}: give its folder as --vision-tower")
    found = read_json(tower / "config.json", "fetch the model again")
    found = found.get("vision_config") or found
    if found.get("model_type", "clip_vision_model") not in ("clip", "clip_vision_model"):
        raise UserError(f"--vision-tower {tower}: model_type {found['model_type']!r}: a CLIP model is expected")
    return CLIPVisionConfig(**{name: value for name, value in found.items() if name != "model_type"})


# --- weights --------------------------------------------------------------------------------------------------------


def _renamed(key: str) -> str | None:
    """The name of a tensor in transformers; None for what is computed there. Raises UserError for an unknown one."""
    if key.endswith(_COMPUTED):
        return None
    for pattern, name in _RENAMED:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    raise UserError(f"tensor {key!r:.100}: not of a LLaVA checkpoint")


def _tensors(file: Path) -> Mapping[str, Any]:
    import torch
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # anything but tensors is refused by torch with types of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file} cannot be read as tensors alone ({reason}): fetch it again") from error


def _converted(files: list[Path], tower: Path | None, vocabulary: int) -> Iterator[tuple[str, Any]]:
    """The tensors by their new names, file after file; the vision tower last where it has files of its own."""
    seen = False
    for file in files:
        for key, tensor in _tensors(file).items():
            name = _renamed(key)
            if name is not None:
                seen |= name.startswith("vision_tower.")
                yield name, _padded(tensor, vocabulary) if name in _TABLES else tensor
    if seen:
        return
    if tower is None:
        raise UserError(
            f"{files[0].parent}: no vision tower in the weights: give the folder of {CLIP} as --vision-tower"
        )
    for shard in sorted(weight_map(tower)):
        for key, tensor in _tensors(tower / shard).items():
            if key.startswith("vision_model.") and not key.endswith(_COMPUTED):
                yield f"vision_tower.{key}", tensor


def _padded(table_VC: Any, vocabulary: int) -> Any:
    """The table with as many rows as the vocabulary; new ones are the mean of the others."""
    import torch

    missing = vocabulary - len(table_VC)
    mean_C = table_VC.float().mean(0).to(table_VC.dtype)
    return torch.cat([table_VC, mean_C.expand(missing, -1)]) if missing > 0 else table_VC


def _write_weights(staging: Path, files: list[Path], tower: Path | None, vocabulary: int) -> None:
    from mico.checkpoint import ShardWriter

    writer = ShardWriter(staging)
    for name, tensor in _converted(files, tower, vocabulary):
        writer.add(name, tensor)
    writer.finish()


def _check(staging: Path, config: Any, source: str) -> None:
    """Raise UserError naming tensors that the config describes and the weights lack, or that have another shape."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    from mico.adapters import auto_class

    with torch.device("meta"):
        model = auto_class(config.model_type).from_config(config)
    steps: list[Any] = get_model_conversion_mapping(model)
    found = {rename_source_key(key, steps, [])[0]: shape for key, shape in tensor_shapes(staging).items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if absent := sorted(set(wanted) - set(found)):
        raise UserError(f"{source}: weights missing: {some(absent)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(f"{source}: '{name}' has shape {found[name]}, config.json describes {shape}")


def _write_processor(staging: Path, config: Any, tower: Path | None) -> None:
    """What prepares images and prompts: as the tower says, else as CLIP does at the size of the config."""
    vision, following = config.vision_config, config.model_type == "llava_next"
    images = tower / IMAGE_FILES[0] if tower else None
    described: dict[str, Any] = json.loads(images.read_text()) if images and images.is_file() else {}
    size = vision.image_size
    plain = dict(
        do_resize=True, size={"shortest_edge": size}, resample=3, do_center_crop=True,
        crop_size=dict(height=size, width=size), do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        do_convert_rgb=True,
    )  # fmt: skip
    described = plain | described
    described["image_processor_type"] = "LlavaNextImageProcessor" if following else "CLIPImageProcessor"
    described.pop("feature_extractor_type", None)
    if following:
        described["image_grid_pinpoints"] = config.image_grid_pinpoints
    name = "LlavaNextProcessor" if following else "LlavaProcessor"
    atomic_json(staging / IMAGE_FILES[0], described | dict(processor_class=name))
    strategy = config.vision_feature_select_strategy
    atomic_json(
        staging / IMAGE_FILES[1],
        dict(
            processor_class=name, image_token="<image>", patch_size=vision.patch_size,
            vision_feature_select_strategy=strategy, num_additional_image_tokens=1,
        ),
    )  # fmt: skip


def section(result: dict[str, Any]) -> Section:
    """What `mico import-llava` shows."""
    rows = (("folder", result["folder"]), ("model_type", result["model_type"]), ("size", size_text(result["bytes"])))
    return Section("LLaVA in the format of transformers", ("", ""), rows, ())
