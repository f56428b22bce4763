"""What is checked before transformers opens a model folder, which follows whatever path a weight index names.

Weights are read from safetensors only. Here too: the fingerprint of a folder, which needs no model either.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

from mico.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_JSON_LIMIT = 64 * 2**20  # bytes of a config or an index
HEADER_LIMIT = 32 * 2**20  # bytes of a safetensors header: about 100 a tensor
_FULL_HASH_LIMIT = 2 * 2**30  # bytes of weights that a fingerprint reads whole
_CHUNKS, _CHUNK = 64, 2**20  # what it reads of each file of a larger model, besides the header
_SIZE_LIMITS = {"num_hidden_layers": 10_000, "num_labels": 10_000}  # lists of that length are made on reading a config
_REFUSED_KEYS = {
    "quantization_config": "the checkpoint is already quantized: start from the dense model it was made from",
    "transformers_weights": "it redirects the weights to another file: remove the entry",
    "configuration_files": "it redirects the config to another file: remove the entry",
}
PACKED_METHOD = "mico"  # quant_method of the checkpoints that mico packs (mico/packed/hf.py)
PACKED_CODE = "modeling_mico."
PICKLE_REMEDY = (
    "pickle files (.bin, .pt, .pth) can run code and are not opened: "
    "convert them where you trust them, with transformers' from_pretrained(...).save_pretrained(FOLDER)"
)


def is_packed(config: dict[str, Any]) -> bool:
    """Whether the content of a config.json is that of a checkpoint packed by mico."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == PACKED_METHOD


def check_folder(folder: Path, packed: bool = False) -> dict[str, Any]:
    """Check the links and the config of a model folder and return the config's content.

    packed: accept a checkpoint packed by mico too. Raises UserError naming the link that leads out, the missing or
    broken file, or the entry that is refused.
    """
    for path in folder.iterdir():
        if path.is_symlink():
            _check_inside(folder, path)
    config = _read_json(folder / "config.json", "give the folder of a Hugging Face model")
    for key, why in _REFUSED_KEYS.items():
        if config.get(key) and not (packed and is_packed(config)):
            raise UserError(f"{folder / 'config.json'}: '{key}': {why}")
    for key, limit in _SIZE_LIMITS.items():
        value = config.get(key, 1)
        if not isinstance(value, int) or not 1 <= value <= limit:
            raise UserError(f"{folder / 'config.json'}: {key} {value!r:.40}: must be a whole number from 1 to {limit}")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: adapter_config.json makes this a PEFT adapter: merge it into its base model first")
    return config


def check_remote_code(folder: Path, ships_code: bool = False) -> None:
    """Raise UserError when the config or the tokenizer of a folder asks to run code that comes with the model.

    The code inside a packed checkpoint is for machines without mico and is not run here; nor is that of a family
    that comes with code (`ships_code`) but needs none.
    """
    for file in ("tokenizer_config.json",) if ships_code else ("config.json", "tokenizer_config.json"):
        content = _read_json(folder / file, "") if (folder / file).exists() else {}
        wanted = content.get("auto_map")
        if wanted and not isinstance(wanted, dict):
            kind = type(wanted).__name__
            raise UserError(f"{folder / file}: 'auto_map' is a {kind}, not an object: fetch the model again")
        if wanted and not (is_packed(content) and all(str(code).startswith(PACKED_CODE) for code in wanted.values())):
            raise UserError(f"{folder / file}: 'auto_map' asks to run the model's own code: pass --trust-remote-code")


def _check_inside(folder: Path, path: Path) -> None:
    """Raise UserError unless `path` stays in `folder`, or in the blobs of the hub cache that the folder belongs to."""
    target, allowed = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise UserError(f"{path} leads out of the model's folder, to {target}: copy the file into it")


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: {missing}")
    if path.stat().st_size > _JSON_LIMIT:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes: not a plausible JSON file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({reason(error)}): fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def weight_map(folder: Path) -> dict[str, list[str]]:
    """The weight files of a folder and the tensors each must hold (none listed for a single file).

    Raises UserError for pickle-only folders and for an index whose entries leave the folder or are missing.
    """
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: []}
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: neither {WEIGHTS} nor {INDEX} is here; {PICKLE_REMEDY}")
    index = _read_json(folder / INDEX, "")
    entries = index.get("weight_map")
    if not isinstance(entries, dict) or not entries or not isinstance(index.get("metadata"), dict):
        raise UserError(f"{folder / INDEX}: entries 'metadata' and 'weight_map' are expected: fetch it again")
    files: dict[str, list[str]] = {}
    for tensor, file in entries.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(
                f"{folder / INDEX}: {tensor!r:.80} names {file!r:.80}: only a file of the same folder is opened"
            )
        files.setdefault(file, []).append(tensor)
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a folder, from the headers of its weight files.

    Raises UserError naming the file that is missing, truncated or corrupt, or lacks a tensor of the index.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file, expected in sorted(weight_map(folder).items()):
        found = _header_shapes(folder / file)
        absent = sorted(set(expected) - set(found))
        if absent:
            raise UserError(f"{folder / file}: {some(absent)} listed in {INDEX} but not in the file: fetch it again")
        shapes.update(found)
    return shapes


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} does not exist: the model's weights are incomplete, fetch it again")
    _check_inside(path.parent, path)
    with path.open("rb") as stream:
        prefix = stream.read(8)
    size = path.stat().st_size
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(HEADER_LIMIT, size - 8):
        raise UserError(f"{path} is truncated or corrupt: {size:,} bytes, header of {length:,}: fetch it again")
    try:
        with safe_open(path, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or corrupt ({reason(error)}): fetch it again") from None


def fingerprint(path: str | Path) -> str:
    """sha256 over config.json and the weight files of a folder, without loading the model.

    All bytes of models under 2 GiB; of larger ones the size, header and 64 evenly spaced MiB of every file.
    """
    folder = Path(path)
    files = sorted(weight_map(folder))
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    whole = sum((folder / file).stat().st_size for file in files) < _FULL_HASH_LIMIT
    for file in files:
        size = (folder / file).stat().st_size
        digest.update(f"\0{file}\0{size}\0".encode())
        with (folder / file).open("rb") as stream:
            for offset, length in [(0, size)] if whole else _samples(stream.read(8), size):
                stream.seek(offset)
                while length > 0 and (chunk := stream.read(min(length, _CHUNK))):
                    digest.update(chunk)
                    length -= len(chunk)
    return digest.hexdigest()


def _samples(prefix: bytes, size: int) -> list[tuple[int, int]]:
    header = 8 + struct.unpack("<Q", prefix)[0]
    return [(0, header)] + [
        (header + i * max(0, size - header - _CHUNK) // (_CHUNKS - 1), _CHUNK) for i in range(_CHUNKS)
    ]


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def reason(error: BaseException) -> str:
    """The first line of an exception, at most 160 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
