"""Answers of runs of `mico finetune --method cmibq` to the same new questions, by arm over seeds, with p-values.

    SEEDS="0 1 2" bash pipelines/cmibq_full.sh --smoke            # makes such runs
    python -m benchmarks.learned_widths RUN RUN ... --against "uniform w4a4" [--pictures 200]

Every packed model is read from its files and asked all questions about test pictures of digits that neither training
nor the evaluation of a run has seen, 30 % of them with photographs behind the digits. nll: cross-entropy of the answer,
nats a token; right: every token of the answer is the likeliest. p: paired t-tests of the nll against an arm, over the
seeds that both arms have, and over the pictures (eight questions each, means over these seeds): the first tells whether
another training would show the same, the second whether other pictures would.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import ttest_rel

from mico.checkpoint import set_execution
from mico.files import read_json
from mico.loading import load_model, load_processor
from mico.qat.answers import Answers, grid_pairs
from mico.qat.pruned import known_answers

QUESTIONS = 8  # about a picture
Scores = dict[int, np.ndarray]  # by seed: nll and right of every picture, (pictures, 2)


def scores(model: Any, processor: Any, pictures: int, seed: int) -> np.ndarray:
    """nll a token and share of right answers of every picture, (pictures, 2)."""
    samples = grid_pairs("test", pictures, seed).samples
    found = []
    for start in range(0, len(samples), QUESTIONS):
        answers = Answers(samples[start : start + QUESTIONS], processor, 10**6)
        told = known_answers(model, answers, QUESTIONS, None, lambda line: None)
        found.append((told["loss"], told["right"]))
    return np.array(found)


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def tests(arm: Scores, other: Scores) -> str:
    """Difference of the nll, p over seeds, p over pictures; dashes without a test."""
    seeds = sorted(set(arm) & set(other))
    if arm is other or not seeds:
        return "- | - | -"
    here, there = (np.stack([scores[seed][:, 0] for seed in seeds]) for scores in (arm, other))
    by_seed = f"{ttest_rel(here.mean(1), there.mean(1)).pvalue:.3g}" if len(seeds) > 1 else "-"
    by_picture = ttest_rel(here.mean(0), there.mean(0)).pvalue
    return f"{(here - there).mean():+.4f} | {by_seed} | {by_picture:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--against", action="append", default=[], help="name of an arm to test against; several times")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=76, help="of the pictures")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    arms: dict[str, Scores] = defaultdict(dict)
    facts: dict[str, dict[str, Any]] = {}
    base, processor = "", None
    for run in given.runs:
        report = read_json(run / "report.json")
        if not base:
            base = report["quantization"]["base"]
            processor = load_processor(base, offline=True, trust_remote_code=False)
            dense = load_model(base, device="cpu", dtype="float32", stream=False).model
            arms["dense"] = {-1: scores(dense, processor, given.pictures, given.seed)}
        name, seed = report["arm"], report["identity"]["seed"]
        facts[name] = report["quantization"]["averages"] | dict(true=report["size"]["true_bits"])
        model = load_model(str(run / "model"), device="cpu", dtype="float32", packed=True, stream=False).model
        set_execution(model, "dense")
        arms[name][seed] = scores(model, processor, given.pictures, given.seed)
        print(f"{run}: {name}, seed {seed}: nll {arms[name][seed][:, 0].mean():.4f}", flush=True)
    if lost := [name for name in given.against if name not in arms]:
        parser.error(f"--against {lost[0]}: the runs have {', '.join(arms)}")
    columns = "".join(f" nll less that of {name} | p, seeds | p, pictures |" for name in given.against)
    print(f"\n| arm | activations | weights | true bits | seeds | nll | right, % |{columns}")
    print("|" + "---|" * (7 + 3 * len(given.against)))
    for name, found in arms.items():
        bits = facts.get(name)
        shown = " | ".join("16" if bits is None else f"{bits[key]:.3f}" for key in ("activations", "weights", "true"))
        nll = spread([float(table[:, 0].mean()) for table in found.values()], 4)
        right = spread([100 * float(table[:, 1].mean()) for table in found.values()], 1)
        more = "".join(f" {tests(found, arms[other])} |" for other in given.against)
        print(f"| {name} | {shown} | {len(found)} | {nll} | {right} |{more}")


if __name__ == "__main__":
    main()
