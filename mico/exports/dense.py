"""Export to a dense model folder: the values of the packed model, for any program that loads the base model."""

from __future__ import annotations

from pathlib import Path

import torch

from mico.adapters import auto_class
from mico.checkpoint import set_execution
from mico.console import Console
from mico.exports.folder import SHARD, model_dtype, probe_logits
from mico.exports.source import Exported, PackedSource
from mico.loading import copy_processor, quiet
from mico.packed.experts import unfuse


def export_dense(source: PackedSource, out: Path, console: Console, dtype: torch.dtype | None = None) -> Exported:
    """Write the dense model in `dtype` (None: the checkpoint's own), read it back and compare it.

    Weights equal the native dequantization in that dtype bit for bit, and so do the logits; what rounding to 16 bits
    changes against float32 is reported. Raises RuntimeError naming the tensor that differs.
    """
    dtype = dtype or model_dtype(source)
    model = source.dense_model(dtype)
    with quiet(), console.stage("write"):
        model.save_pretrained(out, max_shard_size=SHARD)
        source.tokenizer.save_pretrained(out)
        copy_processor(source.folder, out)
    del model
    with quiet(), console.stage("check"):
        loader = auto_class(source.config.model_type)
        written = loader.from_pretrained(out, dtype=dtype, local_files_only=True).eval()
        routed = unfuse(written)
        native = loader.from_pretrained(source.folder, dtype=dtype, local_files_only=True).eval()
        set_execution(native, "dense")
        error = _largest_error(source, written, dtype)
        difference = float((probe_logits(written) - probe_logits(native)).abs().max())
    if difference != 0:
        raise RuntimeError(f"{out}: logits differ from the packed model's by {difference:g} in {dtype}")
    name = str(dtype).removeprefix("torch.")
    notes = [f"read back by transformers: weights and logits equal the packed model's in {name} bit for bit"]
    if routed:
        notes.append("logits were compared expert by expert; the fused experts of transformers round otherwise")
    if error:
        notes.append(f"{name} rounds the weights by up to {error:.3g}; --dtype float32 holds them exactly")
    files = tuple(sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()))
    return Exported("dense", files, error == 0, error, tuple(notes))


def _largest_error(source: PackedSource, written: torch.nn.Module, dtype: torch.dtype) -> float:
    """Compare every weight with the native one in `dtype`; return the largest difference from the float32 one."""
    modules, largest = dict(written.named_modules()), 0.0
    for name, weight in source.weights.items():
        exact_RC, found_RC = weight.dequantize(), modules[name].weight.detach()
        if not torch.equal(found_RC, exact_RC.to(dtype)):
            raise RuntimeError(f"{name}.weight differs from the packed weight after reading it back")
        largest = max(largest, float((found_RC.float() - exact_RC).abs().max()))
    return largest
