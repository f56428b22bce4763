"""Export to GGUF, the one-file format of llama.cpp: weights, hyperparameters and the tokenizer.

A Linear goes into the narrowest block container (gguf_blocks.py) that holds its grid exactly. Where none does, it is
written as float16 and named with the reason and the error. The file is read back and compared before success is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mico.console import Console
from mico.errors import UserError
from mico.exports.gguf_architecture import (
    Architecture,
    architecture_of,
    check_bias,
    describe,
    rope_factors,
    row_order,
)
from mico.exports.gguf_blocks import PRUNED, Container, fit, pack
from mico.exports.gguf_tokenizer import Vocabulary, vocabulary
from mico.exports.source import Exported, PackedSource

FILE = "model.gguf"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = ".rotary_emb.inv_freq"  # in old checkpoints, computed by llama.cpp itself
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. kind: name of its gguf type; key: where its values come from in the source.

    container: set when `kind` is a block container; order_R: row of the source for every row of the file;
    reason, remedy: why no container is exact and which grid would be; error: largest change of a value by rounding.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    kind: str
    container: Container | None = None
    order_R: torch.Tensor | None = None
    reason: str = ""
    remedy: str = ""
    error: float = 0.0


def export_gguf(source: PackedSource, out: Path, console: Console) -> Exported:
    """Write `model.gguf` into `out` and compare what the gguf library reads from it with the native dequantization.

    Raises UserError before anything is written when llama.cpp has no place for the model or its tokenizer, and
    RuntimeError naming the tensor when the file does not hold what it should.
    """
    gguf = _library()
    arch = architecture_of(source.config)
    vocab = vocabulary(source.tokenizer, source.config.vocab_size)
    entries = _entries(gguf, source, arch, console)
    notes = _write(gguf, source, arch, vocab, entries, out / FILE, console)
    _verify(gguf, source, entries, out / FILE, console)
    lossy = [entry for entry in entries if entry.error]
    kinds = ", ".join(f"{count} {kind}" for kind, count in _counts(entries).items())
    checked = f"{FILE}: {len(entries)} tensors ({kinds}) read back with gguf and equal to what was packed"
    return Exported(
        target="gguf",
        files=(FILE,),
        exact=not lossy,
        max_error=max((entry.error for entry in entries), default=0.0),
        notes=(*_unpacked(entries), *notes, *vocab.notes, checked),
    )


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("--to gguf needs the gguf package: pip install gguf") from error
    return gguf


# --- what goes where -------------------------------------------------------------------------------------------------


def _entries(gguf: Any, source: PackedSource, arch: Architecture, console: Console) -> list[Entry]:
    """Every tensor of the file in the order of the source. Raises UserError naming one without a place in llama.cpp."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.name], source.config.num_hidden_layers)
    keys = list(_keys(source))
    entries: list[Entry] = []
    places = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in keys}
    for key, place in places.items():
        check_bias(arch, key)
        if place is None:
            raise UserError(f"tensor '{key}' has no place in llama.cpp's {arch.name.lower()}: export with --to dense")
    with console.bar("grids", len(keys)) as advance:
        for key in keys:
            entries.append(_entry(source, key, places[key], row_order(arch, source.config, key)))
            advance(key)
    if (factors := rope_factors(source.config)) is not None:
        entries.append(Entry(ROPE_FACTORS, "", tuple(factors.shape), "F32"))
    return entries


def _entry(source: PackedSource, key: str, name: str, order_R: torch.Tensor | None) -> Entry:
    """Where one tensor goes: the narrowest exact container for codes, else the narrowest type for its numbers."""
    weight = source.weights.get(key.removesuffix(".weight"))
    found = PRUNED if weight is None else fit(weight)
    if weight is not None and found.container is not None:
        return Entry(name, key, tuple(weight.codes_RC.shape), found.container.name, found.container, order_R)
    values = _values(source, key)
    kind, error = _float_kind(values, rounded=bool(found.reason))
    return Entry(name, key, tuple(values.shape), kind, None, order_R, found.reason, found.remedy, error)


def _keys(source: PackedSource) -> Iterator[str]:
    """Tensors by their key in the dense checkpoint; a head that is the embedding is stored once."""
    for module in source.weights:
        yield f"{module}.weight"
    for key in source.others:
        if not key.endswith(DERIVED) and not (key == "lm_head.weight" and source.config.tie_word_embeddings):
            yield key


def _values(source: PackedSource, key: str) -> torch.Tensor:
    """Float32 values of one tensor, in the order of the source."""
    if not key:
        factors = rope_factors(source.config)
        assert factors is not None
        return factors
    weight = source.weights.get(key.removesuffix(".weight"))
    return (source.others[key] if weight is None else weight.dequantize()).float().cpu()


def _float_kind(values: torch.Tensor, rounded: bool) -> tuple[str, float]:
    """Type for numbers, and what it changes at most: vectors in float32, matrices in 16 bits where that is exact.

    With `rounded` (grid points, which need more than 16 bits) a matrix goes to float16 even if that rounds it.
    """
    if values.ndim == 1:
        return "F32", 0.0
    half = values.half()
    error = float((half.float() - values).abs().max()) if values.numel() else 0.0
    if error == 0 or (rounded and bool(half.isfinite().all())):
        return "F16", error
    return ("BF16" if torch.equal(values.bfloat16().float(), values) else "F32"), 0.0


def _unpacked(entries: list[Entry]) -> list[str]:
    """One line a reason: which packed weights are not in a block container, and how much that rounds them."""
    by_reason: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.reason:
            by_reason.setdefault(entry.reason, []).append(entry)
    lines = []
    for reason, group in by_reason.items():
        error = max(entry.error for entry in group)
        exact = "; exact instead: --to dense" + f", or compress with {group[0].remedy}" * bool(group[0].remedy)
        how = f"rounded by at most {error:.2g}" if error else "exact"
        names = ", ".join(f"{entry.key} ({entry.error:.1e})" if entry.error else entry.key for entry in group)
        kinds = "/".join(dict.fromkeys(entry.kind for entry in group))
        lines.append(f"{len(group)} packed as {kinds}, {how}, because {reason}{exact * bool(error)}: {names}")
    return lines


def _counts(entries: list[Entry]) -> dict[str, int]:
    kinds = [entry.kind for entry in entries]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    gguf: Any,
    source: PackedSource,
    arch: Architecture,
    vocab: Vocabulary,
    entries: list[Entry],
    path: Path,
    console: Console,
) -> list[str]:
    """Write the file, one tensor in memory at a time; returns what its user must know."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch.name]])
    writer.add_name(source.folder.parent.name if source.folder.name == "model" else source.folder.name)  # of the run
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(gguf, entries))
    notes = describe(writer, source.config)
    _write_vocabulary(writer, vocab)
    types = {entry.name: gguf.GGMLQuantizationType[entry.kind] for entry in entries}
    for entry in entries:
        shape = gguf.quant_shape_to_byte_shape(entry.shape, types[entry.name])
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), types[entry.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with console.bar("packing", len(entries)) as advance:
        for entry in entries:
            writer.write_tensor_data(_bytes(source, entry).numpy())
            advance(entry.name)
    writer.close()
    return notes


def _write_vocabulary(writer: Any, vocab: Vocabulary) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    if vocab.merges is not None:
        writer.add_token_merges(vocab.merges)
    for name, index in vocab.specials.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    writer.add_add_space_prefix(vocab.space_prefix)
    if vocab.template is not None:
        writer.add_chat_template(vocab.template)


def _file_type(gguf: Any, entries: list[Entry]) -> int:
    """llama.cpp's name for the whole file: the kind that most weights have."""
    weights: dict[str, int] = {}
    for entry in entries:
        weights[entry.kind] = weights.get(entry.kind, 0) + math.prod(entry.shape)
    most = max(weights, key=lambda kind: weights[kind])
    return int(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])


def _bytes(source: PackedSource, entry: Entry) -> torch.Tensor:
    """The rows of one tensor as they lie in the file, uint8."""
    if entry.container is not None:
        rows = pack(source.weights[entry.key.removesuffix(".weight")], entry.container).cpu()
    else:
        rows = _values(source, entry.key).to(FLOATS[entry.kind]).contiguous().view(torch.uint8)
    return rows if entry.order_R is None else _reordered(rows, entry)


def _reordered(rows: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Rows of the source in the order of the file; a vector's bytes are taken value by value."""
    assert entry.order_R is not None
    return rows.reshape(entry.shape[0], -1)[entry.order_R].reshape(rows.shape)


# --- reading back ----------------------------------------------------------------------------------------------------


def _verify(gguf: Any, source: PackedSource, entries: list[Entry], path: Path, console: Console) -> None:
    """Compare what gguf reads with the native values, or with their float16 rounding where that is what was written.

    Zeros of either sign are equal. Raises RuntimeError naming the first tensor that differs.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if set(found) != {entry.name for entry in entries}:
        raise RuntimeError(f"{path.name} holds other tensors than were written: {sorted(found)[:3]} ...")
    with console.bar("reading back", len(entries)) as advance:
        for entry in entries:
            tensor = found[entry.name]
            read = torch.from_numpy(gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type).copy())
            expected = _values(source, entry.key)
            if entry.error:
                expected = expected.to(FLOATS[entry.kind]).float()
            if entry.order_R is not None:
                expected = expected[entry.order_R]
            if tensor.tensor_type.name != entry.kind or not torch.equal(read, expected):
                raise RuntimeError(f"tensor '{entry.key}' in {path.name} ({entry.kind}) differs from what was packed")
            advance(entry.name)
