"""Statistics over seeds: mean and sample standard deviation, and Student's paired t-test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from scipy.stats import ttest_rel

CONFIDENCE = 0.95
ROUNDING = 1e-12  # differences that vary by less than this share of themselves are equal but for rounding


def statistic(by_seed: Mapping[int, float]) -> dict[str, Any]:
    """{mean, sd, n, seeds, values} of one figure; sd with n - 1, None where n is 1 or a value is not finite."""
    values = [by_seed[seed] for seed in sorted(by_seed)]
    known = len(values) > 1 and all(map(math.isfinite, values))
    sd = statistics.stdev(values) if known else None
    return dict(mean=statistics.fmean(values), sd=sd, n=len(values), seeds=sorted(by_seed), values=values)


def paired_test(arm: Mapping[int, float], base: Mapping[int, float], log: bool) -> dict[str, Any]:
    """Two-sided t-test of the mean of arm - base over the seeds that both have (scipy.stats.ttest_rel).

    log: of the differences of natural logarithms, whose mean is that of the ratio: a perplexity is the exponential of
    a mean loss, and losses are what adds up. difference: of the plain means over these seeds. effect, ci_low, ci_high:
    the mean difference that is tested and its 95 % interval, on the scale of the test; ratio...: their exponentials.
    Where no test is possible t, p and the interval are None and `reason` says why.
    """
    seeds = sorted(set(arm) & set(base))
    a, b = [arm[seed] for seed in seeds], [base[seed] for seed in seeds]
    empty = dict.fromkeys(("difference", "effect", "ci_low", "ci_high", "ratio", "ratio_low", "ratio_high"))
    found: dict[str, Any] = dict(seeds=seeds, n=len(seeds), scale="log" if log else "plain") | empty
    found |= dict(t=None, df=None, p=None, reason=_obstacle(a, b, log))
    if not seeds or not all(map(math.isfinite, a + b)):
        return found
    found["difference"] = statistics.fmean(a) - statistics.fmean(b)
    if log and min(a + b) <= 0:
        return found
    x, y = ([math.log(value) for value in side] if log else side for side in (a, b))
    found["effect"] = statistics.fmean(one - other for one, other in zip(x, y, strict=True))
    if found["reason"] is None:
        result = ttest_rel(x, y)
        interval = result.confidence_interval(CONFIDENCE)
        found |= dict(ci_low=float(interval.low), ci_high=float(interval.high))
        found |= dict(t=float(result.statistic), df=int(result.df), p=float(result.pvalue))
    if log:
        pairs = (("ratio", "effect"), ("ratio_low", "ci_low"), ("ratio_high", "ci_high"))
        found |= {name: None if found[of] is None else math.exp(found[of]) for name, of in pairs}
    return found


def _obstacle(a: list[float], b: list[float], log: bool) -> str | None:
    """Why these pairs allow no test, or None."""
    if len(a) < 2:
        return "no seed in common" if not a else "one seed in common, two are needed"
    if not all(map(math.isfinite, a + b)):
        return "a value is not finite"
    if log and min(a + b) <= 0:
        return "a value is not positive"
    differences = [one - other for one, other in zip(a, b, strict=True)]
    if log:
        differences = [math.log(one / other) for one, other in zip(a, b, strict=True)]
    if max(differences) - min(differences) <= ROUNDING * max(map(abs, differences)):
        return "the difference is the same for every seed"
    return None
