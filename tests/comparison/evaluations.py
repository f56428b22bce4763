"""What `mico eval --suite` would leave of a model, made up of figures alone."""

from __future__ import annotations

from typing import Any

FIGURES: dict[str, Any] = {
    "pope": lambda score: dict(f1=score, accuracy=score, yes_ratio=0.5, splits={}),
    "mme": lambda score: dict(perception=score, cognition=100.0, unpaired=0, categories={}),
    "gqa": lambda score: dict(accuracy=score, types={}),
}


def asked(
    suite: str = "pope", score: float = 0.8, retain: int | None = None, version: str = "2.0", **changes: Any
) -> dict[str, Any]:
    """One record of results.json; what is left of 144 visual tokens costs in proportion."""
    left = 1.0 if retain is None else retain / 144
    tokens = None if retain is None else dict(retain=retain, method="sparsevlm", version=version, adaptive=False)
    record = dict(
        suite=suite, questions=40, of=40, limit=None, tokens=tokens, figures=FIGURES[suite](score), seconds=20 * left,
        latency=0.5 * left, new_tokens=2.0, visual_tokens=144.0, prompt_tokens=160.0, equal_tokens=144 * left,
        processed_tokens=150 * left, kv_bytes=1_000_000 * left, prefill_flops=2e9 * left, without_rater=0.0, reused=0,
        cut=0, batch_size=8, batch_halvings=0, peak_device_bytes=None, answers="a.jsonl", data=f"digest of {suite}",
    )  # fmt: skip
    return record | changes


def results(*suites: dict[str, Any], model: str = "models/tiny", fingerprint: str = "f" * 64, **own: Any) -> Any:
    """results.json of a model."""
    facts = dict(
        model=model, source=model, family="LLaVA", fingerprint=fingerprint, dtype="float32", device="cpu", seconds=1.0,
        base_model=None, true_bits=None, texts={}, dense=None, samples=[], notes=[], suites=list(suites),
    )  # fmt: skip
    return {"results": {}, "mico": facts | own}


def packed(*suites: dict[str, Any], bits: float = 3.0, **own: Any) -> Any:
    """The same of a model that was compressed from `tiny`."""
    facts = dict(model=f"runs/tiny-{bits:g}", fingerprint=f"{bits:g}" * 32, base_model="hub/tiny", true_bits=bits)
    return results(*suites, **facts | own)
