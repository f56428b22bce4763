"""A tiny LLaVA with random weights, and pictures with questions for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from mico.qat.cmibq.settings import Settings
from mico.qat.cmibq.sites import find_sites
from mico.qat.cmibq.start import observe
from mico.qat.cmibq.wrap import CMIBQ, wrap
from tests.adapters.llava_models import PATCHES, tiny_llava

IMAGE = 79


def dense() -> Any:
    """Three vision blocks, the last of which the projector does not see; two text blocks."""
    return tiny_llava(80, IMAGE)


def batch(seed: int = 0, count: int = 4) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(2, IMAGE, (count, 9), generator=make)
    ids_BT = torch.cat([text_BT[:, :2], torch.full((count, PATCHES), IMAGE), text_BT[:, 2:]], 1)
    labels_BT = ids_BT.masked_fill(torch.arange(ids_BT.shape[1]) < 9, -100)
    return dict(input_ids=ids_BT, pixel_values=torch.randn(count, 3, 8, 8, generator=make), labels=labels_BT)


@cache
def _started() -> dict[str, torch.Tensor]:
    """The state of the model right after calibration, which is searched for once."""
    model = dense()
    wrap(model, settings(), observe(model, find_sites(model), [batch(9), batch(10)]))
    return model.state_dict()


def settings(**options: Any) -> Settings:
    """Few columns a group of weights, so that there are several."""
    return Settings(**dict(weight_group=16, ib_tokens=4) | options)


def made(trained: bool = True, **options: Any) -> tuple[Any, CMIBQ]:
    """The model with learned widths right after calibration, in training mode."""
    model = dense().requires_grad_(trained)
    cmibq = wrap(model, settings(**options), None)
    kept = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in _started().items() if name in kept})
    model.train(trained)
    return model, cmibq


def step(model: Any, optimizer: torch.optim.Optimizer, progress: float, seed: int) -> tuple[float, dict[str, float]]:
    """One step of stage 1: (loss of the task, metrics)."""
    output = model(**batch(seed))
    (output.loss + sum(model.cmibq.penalty().values())).backward()
    metrics = model.cmibq.metrics()
    optimizer.step()
    optimizer.zero_grad()
    model.cmibq.advance(progress)
    return float(output.loss.detach()), metrics
