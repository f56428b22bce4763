"""Finished runs made up of figures alone, as mico compress would report them."""

from __future__ import annotations

import copy
from typing import Any

from mico.comparison import Run

GROUPING = {
    "original": None,
    "enhanced": dict(n_groups="auto", kind="importance", mi_method="gaussian", cluster="spectral"),
    "mi": dict(n_groups="auto", kind="mi", mi_method="gaussian", cluster="spectral"),
}
ENVIRONMENT = dict(python="3.11.7", torch="2.13.0", transformers="5.23.0", mico="0.1.0", platform="Linux", threads=1)


def score(perplexity: float, **changes: Any) -> dict[str, Any]:
    """One perplexity and how it was measured."""
    way = dict(tokens=1024, windows=8, seqlen=128, bos=False, origin="a test", sha256="ab" * 32, protocol="sparsegpt")
    return dict(perplexity=perplexity) | way | dict(shortfall=0, batch_size=8, batch_halvings=0) | changes


def made(
    arm: str = "mi",
    seed: int = 0,
    perplexity: float = 40.0,
    *,
    model: str = "tiny",
    fingerprint: str = "f" * 64,
    true_bits: float = 3.13,
    folder: str | None = None,
    evaluation: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    grouping: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A run of an arm; `changes` are fields of its report."""
    chosen = copy.deepcopy(GROUPING[arm])
    if grouping:
        assert chosen is not None
        chosen |= grouping
    method = "mico" if arm == "mi" else "sparsegpt"
    report: dict[str, Any] = dict(
        model=model, arm=arm, calibration="docs: 2,048 tokens", fallbacks=[], groups=[], layers=[],
        environment=dict(ENVIRONMENT), protocol="sparsegpt",
        settings=dict(
            method=method, sparsity=0.5, pattern=None, wbits=4, target_avg_bits=None, grouping=chosen, group_size=None,
            allocation="rate", percdamp=0.01, blocksize=128, embed_bits=16, profile=None,
        ) | (settings or {}),
        identity=dict(
            model=fingerprint, text="docs", tokens_sha256=f"{seed:064d}", nsamples=16, seqlen=128, seed=seed,
            batch_size=8, dtype="float32", device="cpu",
        ) | (identity or {}),
        dense=dict(docs=score(30.0)), compressed=dict(docs=score(perplexity)),
        size=dict(
            true_bits=true_bits, nominal_bits=4.0, sparsity=0.5, packed_bytes=1000 + seed, bytes=1100,
            weights=9, share_compressed=0.7, dense_bytes=4000,
        ),
        seconds={
            "load": 0.5, "mutual information": 1.0, "clustering": 2.0, "groups": 3.5, "compress": 4.0, "total": 9.0,
        },
        reused_seconds={}, resumed_blocks=0, environment_changes=[], peak_host_bytes=7_000_000, peak_device_bytes=0,
        processes=[dict(rank=0, device="cpu", peak_host_bytes=7_000_000, solving_seconds=1.5, share=1.0)],
    )  # fmt: skip
    return Run(folder or f"runs/{arm}-{seed}", report | changes, evaluation)


def three_arms(seeds: int = 3) -> list[Run]:
    """The field's ablation with figures that vary by seed."""
    base = dict(original=46.0, enhanced=46.2, mi=42.7)
    wobble = (0.31, -0.22, 0.05, 0.4, -0.1)
    return [
        made(arm, seed, base[arm] + wobble[seed] + 0.03 * index * seed)
        for seed in range(seeds)
        for index, arm in enumerate(base)
    ]
