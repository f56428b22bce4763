"""What a reader of a comparison has to know before its numbers are believed; one line each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mico.comparison.arms import Arm
from mico.comparison.measures import Labels, scores
from mico.files import differences

EQUAL_BITS = 0.005  # arms whose true bits differ by more, relative, are not compared at equal size


def notices(arms: Sequence[Arm], records: list[dict[str, Any]], base: str, texts: Labels) -> list[str]:
    """Lines on everything that makes the arms differ in more than their options, or their runs in more than the seed.

    records: the arms as plain values, in the same order; base: the name of the baseline.
    """
    return [
        *_bits(records, base),
        *_texts(texts),
        *_divergence(arms, texts),
        *_evaluations(arms),
        *_models(arms),
        *_calibration(arms),
        *_seeds(arms),
        *_missing(records),
        *_wrecked(records),
        *_environments(arms),
        *_resumed(arms),
        *_fallbacks(arms),
    ]


def _bits(records: list[dict[str, Any]], base: str) -> Iterator[str]:
    true_bits = {record["name"]: record["size"]["true_bits"]["mean"] for record in records}
    off = {name: bits / true_bits[base] - 1 for name, bits in true_bits.items()}
    far = [f"{name} {true_bits[name]:.3f} ({off[name]:+.1%})" for name in off if abs(off[name]) > EQUAL_BITS]
    if far:
        yield (
            f"not at equal true bits: {'; '.join(far)} against {base} {true_bits[base]:.3f}; "
            f"up to {EQUAL_BITS:.1%} would count as equal"
        )


def _texts(texts: Labels) -> Iterator[str]:
    names = [name for name, _ in texts]
    for name in dict.fromkeys(names):
        labels = [label for (one, _), label in texts.items() if one == name]
        if len(labels) > 1:
            yield f"{name} was not measured in one way, each has a column of its own: {', '.join(labels)}"


def _divergence(arms: Sequence[Arm], texts: Labels) -> Iterator[str]:
    """KL is taken over as many tokens as there was room for."""
    over: dict[str, set[int]] = {}
    for run in (run for arm in arms for run in arm.runs):
        for key, score in scores(run).items():
            if "kl_tokens" in score:
                over.setdefault(texts[key], set()).add(score["kl_tokens"])
    for text, counts in over.items():
        if len(counts) > 1:
            told = ", ".join(f"{count:,}" for count in sorted(counts))
            yield f"the KL divergence of {text} is not over the same tokens: {told}"


def _evaluations(arms: Sequence[Arm]) -> Iterator[str]:
    """What `mico eval` found depends a little on the precision that it ran in, and KL on the dense model."""
    blocks = [(run.evaluation or {}).get("mico", {}) for arm in arms for run in arm.runs]
    for name in ("dtype", "device"):
        values = sorted({str(block[name]) for block in blocks if name in block})
        if len(values) > 1:
            yield f"mico eval did not measure all runs with one {name}: {', '.join(values)}"
    dense = [block["dense"] for block in blocks if isinstance(block.get("dense"), dict)]
    bases = {one.get("fingerprint"): str(one.get("model")) for one in dense}
    if len(bases) > 1 and len({arm.options["model"] for arm in arms}) == 1:
        yield f"mico eval did not compare all runs with one dense model: {', '.join(sorted(bases.values()))}"


def _models(arms: Sequence[Arm]) -> Iterator[str]:
    models = list(dict.fromkeys(arm.options["model"] for arm in arms))
    if len(models) > 1:
        yield f"the arms are of different models: {', '.join(models)}"


def _calibration(arms: Sequence[Arm]) -> Iterator[str]:
    """One seed draws the same calibration tokens for every arm, unless their texts or models differ."""
    tokens: dict[int, set[str | None]] = {}
    for arm in arms:
        for run in arm.runs:
            tokens.setdefault(run.seed, set()).add(run.report["identity"].get("tokens_sha256"))
    apart = [str(seed) for seed, found in sorted(tokens.items()) if len(found) > 1]
    if apart:
        yield f"seed {', '.join(apart)}: the runs were not calibrated on the same tokens, pairs share the number alone"


def _seeds(arms: Sequence[Arm]) -> Iterator[str]:
    for arm in arms:
        for seed, again in arm.by_seed.items():
            if len(again) > 1:
                folders = ", ".join(run.folder for run in again)
                yield f"{arm.name}: seed {seed} is there {len(again)} times ({folders}): their mean counts as one"
    if len({tuple(arm.by_seed) for arm in arms}) > 1:
        seeds = "; ".join(f"{arm.name} {', '.join(map(str, arm.by_seed))}" for arm in arms)
        yield f"the arms do not have the same seeds: {seeds}"


def _missing(records: list[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        for kind in ("texts", "tasks"):
            for name, figures in record[kind].items():
                for figure, found in figures.items():
                    if found["n"] < record["n"] and not figure.endswith(" stderr"):
                        yield f"{record['name']}: {figure} of {name} from {found['n']} of {record['n']} seeds"


def _wrecked(records: list[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        for name, figures in record["texts"].items():
            if not all(map(math.isfinite, figures["perplexity"]["values"])):
                yield f"{record['name']}: the perplexity of {name} is not finite"


def _fallbacks(arms: Sequence[Arm]) -> Iterator[str]:
    for arm in arms:
        what = Counter(fallback["what"] for run in arm.runs for fallback in run.report["fallbacks"])
        if what:
            most, count = what.most_common(1)[0]
            share = "all" if count == what.total() else f"{count} of them"
            runs = _counted(len(arm.runs), "run")
            yield f"{arm.name}: {_counted(what.total(), 'fallback')} in {runs}, {share}: {most}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _environments(arms: Sequence[Arm]) -> Iterator[str]:
    first = arms[0].runs[0]
    changes: dict[str, None] = {}
    for run in (run for arm in arms for run in arm.runs):
        for line in differences(first.report["environment"], run.report["environment"]):
            changes[line.partition(":")[0]] = None
    if changes:
        yield f"the runs were not made in one environment: they differ in {', '.join(changes)} (report.json of each)"


def _resumed(arms: Sequence[Arm]) -> Iterator[str]:
    for run in (run for arm in arms for run in arm.runs):
        if blocks := run.report.get("resumed_blocks", 0):
            yield f"{run.folder}: resumed after {_counted(blocks, 'block')}, its times are those of the last start"
        if changed := run.report.get("environment_changes"):
            yield f"{run.folder}: resumed in another environment ({'; '.join(changed)})"
