"""The t-test against the formula by hand in numpy, its distribution against numerical integration, and no fake p."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from mico.comparison.paired import paired_test, statistic

PERPLEXITY = st.floats(2.0, 500.0)
PAIRS = st.dictionaries(st.integers(0, 50), st.tuples(PERPLEXITY, PERPLEXITY), min_size=2, max_size=8)


def tail(t: float, df: int) -> float:
    """Two-sided p of Student's t by integrating its density from the gamma function."""
    density = lambda x: (1 + x * x / df) ** (-(df + 1) / 2)  # noqa: E731
    scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    x = np.linspace(0, abs(t), 400_001)
    y = density(x)
    inside = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()) * scale
    return 1 - 2 * inside


def test_mean_and_sample_deviation() -> None:
    found = statistic({2: 4.0, 0: 1.0, 1: 1.0})
    assert found["mean"] == 2.0 and found["sd"] == math.sqrt(((1 - 2) ** 2 * 2 + (4 - 2) ** 2) / 2)
    assert (found["seeds"], found["values"], found["n"]) == ([0, 1, 2], [1.0, 1.0, 4.0], 3)
    assert statistic({7: 5.0}) == dict(mean=5.0, sd=None, n=1, seeds=[7], values=[5.0])
    assert statistic({0: math.inf, 1: 2.0})["sd"] is None


@pytest.mark.parametrize("log", [True, False])
def test_the_test_by_hand(log: bool) -> None:
    a, b = {0: 42.5, 1: 42.9, 2: 42.66, 5: 1.0}, {2: 46.1, 1: 46.6, 0: 45.97, 9: 3.0}
    found = paired_test(a, b, log)
    x, y = np.array([a[i] for i in (0, 1, 2)]), np.array([b[i] for i in (0, 1, 2)])
    d = np.log(x) - np.log(y) if log else x - y
    error = d.std(ddof=1) / math.sqrt(3)
    assert found["seeds"] == [0, 1, 2] and found["n"] == 3 and found["df"] == 2 and found["reason"] is None
    assert found["difference"] == pytest.approx(x.mean() - y.mean())
    assert found["effect"] == pytest.approx(d.mean()) and found["t"] == pytest.approx(d.mean() / error)
    assert found["p"] == pytest.approx(tail(found["t"], 2), rel=1e-4)
    quantile = 4.302652729911275  # of 0.975 with 2 degrees of freedom, from a printed table
    assert found["ci_low"] == pytest.approx(d.mean() - quantile * error)
    assert found["ci_high"] == pytest.approx(d.mean() + quantile * error)
    if log:
        assert found["ratio"] == pytest.approx(math.exp(d.mean()))
        assert found["ratio_low"] == pytest.approx(math.exp(found["ci_low"]))
        assert found["ratio_high"] == pytest.approx(math.exp(found["ci_high"]))
    else:
        assert found["ratio"] is found["ratio_low"] is found["ratio_high"] is None


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_it_is_the_one_sample_test_of_the_differences(pairs: dict[int, tuple[float, float]]) -> None:
    a, b = ({seed: pair[side] for seed, pair in pairs.items()} for side in (0, 1))
    d = [math.log(x) - math.log(y) for x, y in pairs.values()]
    assume(max(d) - min(d) > 1e-6)
    found, swapped = paired_test(a, b, True), paired_test(b, a, True)
    expected = ttest_1samp(d, 0.0)
    assert found["t"] == pytest.approx(expected.statistic, rel=1e-6, abs=1e-9)
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found["ci_low"] <= found["effect"] <= found["ci_high"]
    assert (found["ci_low"] > 0 or found["ci_high"] < 0) == (found["p"] < 0.05) or abs(found["p"] - 0.05) < 1e-9
    assert swapped["t"] == pytest.approx(-found["t"]) and swapped["p"] == pytest.approx(found["p"])
    assert swapped["ratio"] == pytest.approx(1 / found["ratio"])


@pytest.mark.parametrize(
    "a, b, reason",
    [
        ({0: 2.0}, {1: 2.0}, "no seed in common"),
        ({0: 2.0, 2: 3.0}, {0: 4.0, 3: 1.0}, "one seed in common, two are needed"),
        ({0: 2.0, 1: math.inf}, {0: 4.0, 1: 3.0}, "a value is not finite"),
        ({0: 2.0, 1: 0.0}, {0: 4.0, 1: 3.0}, "a value is not positive"),
        ({0: 2.0, 1: 2.0}, {0: 4.0, 1: 4.0}, "the difference is the same for every seed"),
        ({0: 2.0, 1: 4.0}, {0: 2.2, 1: 4.4}, "the difference is the same for every seed"),
        ({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}, "the difference is the same for every seed"),
    ],
)
def test_without_a_test_there_is_no_p(a: dict[int, float], b: dict[int, float], reason: str) -> None:
    found = paired_test(a, b, log=True)
    assert found["reason"] == reason
    assert found["t"] is found["p"] is found["ci_low"] is found["ci_high"] is found["ratio_low"] is None


def test_one_pair_still_has_a_difference() -> None:
    found = paired_test({0: 2.0}, {0: 4.0}, log=True)
    assert (found["difference"], found["ratio"]) == (-2.0, pytest.approx(0.5))
