"""METHODS: who judges visual tokens, and when how many of them go. A new method is a scorer and one row.

A scorer sees the Evidence of one pruning and gives every visual token a score; the highest survive. What it returns
where `real_BV` is false does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mico.errors import UserError
from mico.visual_tokens.budgets import Schedule, before, progressive, single
from mico.visual_tokens.evidence import Evidence
from mico.visual_tokens.lookahead import looked_at
from mico.visual_tokens.scoring import best_half_of_heads, gravity, information, mean_over_raters, random_scores

AHEAD = 0.3  # more costs more and chose no better on tiny-llava

Scorer = Callable[[Evidence], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """scorer: Evidence -> scores_BV. schedule: (mean tokens, visual tokens, layers) -> Schedule, see budgets.py.

    ahead: share of the layers that the question runs ahead before it judges (lookahead.py); 0: it does not.
    needs: 'question' (there must be text behind the image), 'raters' (its tokens judge: their
    attention is what --adaptive takes the rank of), 'attention' (queries and keys of the pruning layer), 'cls'
    (attention of the vision tower). recycle: pruned tokens live on in clusters, as the schedule's `merged` says.
    compact: position ids are closed up after a pruning; otherwise tokens keep theirs.
    source: paper.
    """

    name: str
    scorer: Scorer
    schedule: Callable[[float, int, int], Schedule]
    needs: frozenset[str] = frozenset()
    ahead: float = 0.0
    recycle: bool = False
    compact: bool = False
    source: str = ""


def sparsevlm_1(evidence: Evidence) -> torch.Tensor:
    """Attention from the raters, mean over all heads."""
    rows_BR, real_BR = evidence.raters()
    return mean_over_raters(evidence.attention_to_visual(rows_BR), real_BR)


def sparsevlm_2(evidence: Evidence) -> torch.Tensor:
    """Attention from the raters over RoPE's gravity, mean over the half of the heads that looks at the image most."""
    rows_BR, real_BR = evidence.raters()
    pull_BRV = gravity(evidence.distance_to_visual(rows_BR), evidence.inverse_frequency)
    return mean_over_raters(
        best_half_of_heads(evidence.attention_to_visual(rows_BR) / pull_BRV[:, None], real_BR), real_BR
    )


def fastv(evidence: Evidence) -> torch.Tensor:
    """Attention from the last token of the question, mean over all heads."""
    return evidence.attention_to_visual(evidence.last_of_question()).mean((1, 2))


def informed(evidence: Evidence) -> torch.Tensor:
    """Where the question will look, each look weighed by what it tells: mico's own.

    A token of the question that looks at n visual tokens with probabilities p (of its attention to the image alone)
    tells sum p log(n p) nats about which of them matter: their divergence from looking everywhere alike. Attention in
    the layers ahead, times these nats, summed over layers, heads and the question's tokens.
    """
    total_BV = torch.zeros_like(evidence.real_BV, dtype=torch.float32)
    for attention_BHQV in looked_at(evidence, evidence.ahead):
        total_BV += (attention_BHQV * information(attention_BHQV, evidence.real_BV)[..., None]).sum((1, 2))
    return total_BV


def cls(evidence: Evidence) -> torch.Tensor:
    """Attention from CLS in the vision tower: knows nothing of the question."""
    assert evidence.cls_BV is not None
    return evidence.cls_BV


def chance(evidence: Evidence) -> torch.Tensor:
    """Uniform scores, drawn anew for every prompt."""
    rows = zip(evidence.original_BV, evidence.at_start, evidence.seeds, strict=True)
    return torch.stack([random_scores(original_V, total, seed) for original_V, total, seed in rows])


def oracle(evidence: Evidence) -> torch.Tensor:
    """The tokens that the caller names first, then chance."""
    if evidence.positions_of is None:
        raise UserError("method 'oracle': give `positions`, a function from the sample's index in the batch to tokens")
    scores_BV = chance(evidence)
    for sample, original_V in enumerate(evidence.original_BV):
        wanted = torch.tensor(sorted(evidence.positions_of(sample)), device=original_V.device, dtype=original_V.dtype)
        scores_BV[sample] += torch.isin(original_V, wanted)
    return scores_BV


_ASKED = frozenset({"question", "attention"})
_RATED = _ASKED | {"raters"}
_V1 = Method(
    "sparsevlm-1.0", sparsevlm_1, progressive("1.0"), _RATED, recycle=True, compact=True,
    source="SparseVLM, ICML 2025",
)  # fmt: skip
_V2 = Method("sparsevlm-2.0", sparsevlm_2, progressive("2.0"), _RATED, source="SparseVLM+")
VERSIONS = {"1.0": _V1, "2.0": _V2}  # of the method 'sparsevlm'
METHODS: dict[str, Method] = {
    "sparsevlm": _V2,
    "mico": Method("mico", informed, single, frozenset({"question"}), ahead=AHEAD, source="mico"),
    "fastv": Method("fastv", fastv, single, _ASKED, source="FastV, ECCV 2024"),
    "cls": Method("cls", cls, before, frozenset({"cls"}), source="dominant tokens of VisionZip, CVPR 2025"),
    "random": Method("random", chance, progressive("2.0")),
    "oracle": Method("oracle", oracle, progressive("2.0")),
}


def method_of(method: str | Method, version: str) -> Method:
    """The row that a name and a version stand for; a Method of your own passes. Raises UserError for unknown ones."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UserError(f"token method {method!r}: choose from {', '.join(METHODS)}")
    if version not in VERSIONS:
        raise UserError(f"SparseVLM version {version!r}: choose from {', '.join(VERSIONS)}")
    return VERSIONS[version] if method == "sparsevlm" else METHODS[method]
