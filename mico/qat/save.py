"""What a trained model leaves: packed weights, checked after they were read back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mico.adapters import auto_class
from mico.adapters.family import Family
from mico.checkpoint import exactly, save_packed, set_execution
from mico.loading import LoadedModel, copy_processor, quiet
from mico.packed.quantized import QuantizedWeight, label_bits
from mico.qat.linear import QATLinear
from mico.qat.modules import put_module, qat_modules
from mico.runs import RunFolder
from mico.solve import weight_record


@torch.no_grad()
def round_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what is not packed (embeddings, norms, biases) to the dtype it is stored in; values stay float32."""
    inside = {id(p) for module in qat_modules(model).values() for p in (module.weight, module.weight_scale)}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Float32 logits on the CPU."""
    model.eval()
    return model(input_ids=ids_BT.to(model.device), use_cache=False).logits.float().cpu()


def save_trained(
    loaded: LoadedModel, run: RunFolder, name: str, dtype: torch.dtype, probe_BT: torch.Tensor
) -> tuple[Any, list[dict[str, Any]], int]:
    """Write the packed model into the folder `name` of a run and read it back.

    Its logits on `probe_BT` must equal those of the training modules bit for bit (RuntimeError otherwise). The model
    of `loaded` is used up. Returns the model read back, a record a Linear, and the bytes outside the packed Linears.
    """
    model, family = loaded.model.to("cpu"), loaded.family
    round_rest(model, dtype)
    expected = logits(model, probe_BT)
    trained = qat_modules(model)
    records = [_record(path, module, family, dtype) for path, module in trained.items()]
    for path, module in trained.items():
        put_module(model, path, _bare(module))

    def weights(index: int) -> dict[str, QuantizedWeight]:
        inside = f"{family.blocks}.{index}."
        return {path: module.to_quantized() for path, module in trained.items() if path.startswith(inside)}

    with run.publish() as staging, quiet():
        (staging / name).mkdir()
        model.config.get_text_config().use_cache = True
        rest = save_packed(staging / name, model, family, {}, weights, dtype)
        loaded.tokenizer.save_pretrained(staging / name)
        copy_processor(loaded.folder, staging / name)
    folder = run.path / name
    with quiet():
        written = auto_class(model.config.model_type).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    set_execution(written, "dense")
    difference = float((logits(written, probe_BT) - expected).abs().max())
    if difference != 0:
        raise RuntimeError(f"{folder}: logits differ from those of the trained model by {difference:g}")
    written.config.get_text_config().use_cache = False
    return written, records, rest


def _bare(module: nn.Linear) -> nn.Linear:
    """A Linear that holds the bias alone: its weight is written from the packed form."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.bias = module.bias
    return linear


def _record(name: str, module: QATLinear, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """What report.json tells of a Linear; nothing is known of its output's error."""
    block, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
    stream = next(row.name for row in family.streams if path in row.linears)
    quantized = module.to_quantized()
    bias = 0 if module.bias is None else 8 * exactly(module.bias.detach(), dtype).nbytes
    record = weight_record(int(block), stream, name, quantized, label_bits(quantized.label_C), bias)
    return record | dict(error=None, fallbacks=[])
