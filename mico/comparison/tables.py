"""The tables of a comparison, made of the plain values of `compare` and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mico.comparison.measures import ANSWERS, differing
from mico.tables import NOTHING, Section, duration_text, number, perplexity_text, size_text

Comparison = dict[str, Any]
TIMES = {
    "mi_seconds": "MI",
    "clustering_seconds": "clustering",
    "solve_seconds": "solving",
    "total_seconds": "total",
}
SIZES = {
    "packed_bytes": "packed",
    "peak_host_bytes": "host",
    "peak_device_bytes": "GPU",
    "history_bytes": "rows",
    "moments_bytes": "moments",
}


def sections(found: Comparison) -> list[Section]:
    """What is shown of a comparison, in the order it is read."""
    return [
        _arms(found),
        *([Section("Attention", lines=tuple(found["notices"]))] if found["notices"] else []),
        *_tests(found),
        *_divergence(found),
        *_tasks(found),
        *[section for table in found["ablations"] for section in _ablation(found, table)],
        *_costs(found),
    ]


def stat_text(stat: dict[str, Any] | None, text: Callable[[float], str], n: int | None = None) -> str:
    """'46.45 ± 0.31', '2.3 ± 0.5 s', '46.45' of one seed; '(n 2)' behind it where the arm has more seeds."""
    if stat is None:
        return NOTHING
    mean = "not finite" if stat["mean"] is None else text(stat["mean"])
    if stat["sd"] is not None:
        spread, (value, _, unit) = text(stat["sd"]), mean.partition(" ")
        mean = f"{value} ± {spread}" if unit and spread.endswith(f" {unit}") else f"{mean} ± {spread}"
    return mean + (f" (n {stat['n']})" if n is not None and stat["n"] < n else "")


def _three(value: float) -> str:
    return number(value, 3)


def _four(value: float) -> str:
    return number(value, 4)


def _names(found: Comparison, kind: str) -> list[str]:
    return list(dict.fromkeys(name for arm in found["arms"] for name in arm[kind]))


def _figure(arm: dict[str, Any], text: str, figure: str = "perplexity") -> dict[str, Any] | None:
    return arm["texts"].get(text, {}).get(figure)


def _best(cells: list[dict[str, Any] | None], highest: bool = False) -> int | None:
    """The row of the best mean; None where there is nothing to compare."""
    means = {row: stat["mean"] for row, stat in enumerate(cells) if stat is not None and stat["mean"] is not None}
    if len(means) < 2:
        return None
    return (max if highest else min)(means, key=lambda row: means[row])


# --- arms -----------------------------------------------------------------------------------------------------------


def _arms(found: Comparison) -> Section:
    arms, texts = found["arms"], _names(found, "texts")
    rows, strong = [], set()
    for arm in arms:
        rows.append(
            (
                arm["name"],
                str(arm["n"]),
                *(stat_text(_figure(arm, text), perplexity_text, arm["n"]) for text in texts),
                stat_text(arm["size"]["true_bits"], _three),
            )
        )
    for column, text in enumerate(texts, 2):
        best = _best([_figure(arm, text) for arm in arms])
        strong |= {(best, column)} if best is not None else set()
    runs = sum(len(arm["folders"]) for arm in arms)
    title = f"{runs} run{'s' if runs > 1 else ''}, {len(arms)} arm{'s' if len(arms) > 1 else ''}"
    columns = ("arm", "n", *texts, "true bits")
    return Section(title, columns, tuple(rows), (*_legend(found), *_reading(found)), frozenset(strong))


def _legend(found: Comparison) -> list[str]:
    """What every arm is, and the dense models."""
    arms = found["arms"]
    apart = differing([arm["options"] for arm in arms])
    lines = []
    for arm in arms:
        chosen = ", ".join(f"{name} {arm['options'][name]}" for name in apart if arm["options"].get(name) is not None)
        seeds = f"seed{'s' if arm['n'] > 1 else ''} {', '.join(map(str, arm['seeds']))}"
        lines.append(f"{arm['name']}: {chosen + '; ' if chosen else ''}{seeds}; {', '.join(arm['folders'])}")
    for dense in found["dense"]:
        scores = ", ".join(f"{text} {perplexity_text(value)}" for text, value in dense["texts"].items())
        lines.append(f"dense {dense['model']}: {scores or 'not measured'}")
    return lines


def _reading(found: Comparison) -> list[str]:
    protocols = list(dict.fromkeys(run["protocol"] for run in found["runs"]))
    lines = [f"Perplexity by protocol {', '.join(protocols)}, the lowest of a text in bold; n: seeds."]
    if any(arm["n"] > 1 for arm in found["arms"]):
        lines.append("Mean ± sample standard deviation over the seeds; no ± for one seed.")
    return lines


# --- tests ----------------------------------------------------------------------------------------------------------


def _tests(found: Comparison) -> list[Section]:
    if not found["tests"]:
        return []
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, None] = {}
    for test in found["tests"]:
        what = test["name"] if test["kind"] == "texts" else f"{test['name']} {test['figure']}"
        rows.append((test["arm"], what, str(test["n"]), *_effect(test), _signed(test["t"], 2), p_text(test["p"])))
        if test["reason"]:
            reasons[f"{test['arm']}, {what}: no test, {test['reason']}"] = None
    logs = any(test["scale"] == "log" for test in found["tests"])
    made = sum(test["p"] is not None for test in found["tests"])
    lines = [*reasons]
    if logs:
        lines.append(
            "Perplexities are tested as logarithms (mean losses, which add up; the change is that of their ratio): "
            "difference of the plain means, change and its 95 % interval in per cent."
        )
    if len(found["tests"]) > sum(test["scale"] == "log" for test in found["tests"]):
        lines.append("Metrics of tasks are tested as they are: the change is the difference.")
    if made:
        lines.append(
            f"Two-sided, over the n seeds that both have; p of each by itself, of {made} test{'s' if made > 1 else ''}."
        )
    columns = ("arm", "of", "n", "difference", "change", "95 % interval", "t", "p")
    return [Section(f"Paired t-test against {found['baseline']}", columns, tuple(rows), tuple(lines))]


def _effect(test: dict[str, Any]) -> tuple[str, str, str]:
    """Difference of the means, the effect that is tested, its interval."""
    if test["scale"] == "log":
        low, high = _percent(test["ratio_low"]).removesuffix(" %"), _percent(test["ratio_high"])
        change, difference = _percent(test["ratio"]), _signed(test["difference"], 2)
    else:
        low, high = (_signed(test[name], 4) for name in ("ci_low", "ci_high"))
        change, difference = _signed(test["effect"], 4), _signed(test["difference"], 4)
    return difference, change, NOTHING if test["ci_low"] is None else f"{low} to {high}"


def _signed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:+.{digits}f}" if abs(value) < 1e6 else f"{value:+.3g}"


def _percent(ratio: float | None) -> str:
    """0.95 -> '-5.00 %'."""
    return NOTHING if ratio is None else f"{_signed(100 * (ratio - 1), 2)} %"


def p_text(value: float | None) -> str:
    """Four decimals, or two digits of what is smaller."""
    return NOTHING if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


# --- divergence and tasks -------------------------------------------------------------------------------------------


def _divergence(found: Comparison) -> list[Section]:
    """KL divergence and top-1 agreement with the dense model, where runs have them."""
    names = {"kl": ("KL", _four), "top1": ("top-1", _four)}
    wanted = [
        (text, figure)
        for text in _names(found, "texts")
        for figure in names
        if any(_figure(arm, text, figure) for arm in found["arms"])
    ]
    if not wanted:
        return []
    rows = [
        (arm["name"], *(stat_text(_figure(arm, text, figure), names[figure][1], arm["n"]) for text, figure in wanted))
        for arm in found["arms"]
    ]
    columns = ("arm", *(f"{text} {names[figure][0]}" for text, figure in wanted))
    lines = ("KL: divergence from the dense model, nats a token; top-1: share of tokens on which both agree.",)
    return [Section("Against the dense model", columns, tuple(rows), lines)]


def _tasks(found: Comparison) -> list[Section]:
    """Metrics of lm-eval, its standard error in brackets."""
    wanted = [
        (task, metric)
        for task in _names(found, "tasks")
        for metric in dict.fromkeys(name for arm in found["arms"] for name in arm["tasks"].get(task, {}))
        if not metric.endswith(" stderr")
    ]
    if not wanted:
        return []
    rows = [(arm["name"], *(_task_text(arm, task, metric) for task, metric in wanted)) for arm in found["arms"]]
    columns = ("arm", *(f"{task} {metric}" for task, metric in wanted))
    own = [task.startswith(ANSWERS) for task, _ in wanted]
    lines = []
    if not all(own):
        lines.append("By lm-eval; in brackets its standard error over the documents, the mean of the runs.")
    if any(own):
        lines.append("Answers held out: loss, nats a token; right: share of those whose every token is the likeliest.")
    return [Section("Tasks", columns, tuple(rows), tuple(lines))]


def _task_text(arm: dict[str, Any], task: str, metric: str) -> str:
    values = arm["tasks"].get(task, {})
    error = values.get(f"{metric} stderr")
    text = stat_text(values.get(metric), _four, arm["n"])
    return text if error is None or error["mean"] is None else f"{text} ({_four(error['mean'])})"


# --- ablations ------------------------------------------------------------------------------------------------------


def _ablation(found: Comparison, table: dict[str, Any]) -> list[Section]:
    """One option: a row a value, a column a text. Two options: a table a text, a row and a column a value."""
    arms = {arm["name"]: arm for arm in found["arms"]}
    texts, options = _names(found, "texts"), table["options"]
    if len(options) == 2:
        return [_crossed(table, text, arms) for text in texts]
    rows, strong = [], set()
    ordered = [arms[cells[0]] for cells in table["cells"]]
    for value, arm in zip(table["rows"], ordered, strict=True):
        scores = (stat_text(_figure(arm, text), perplexity_text, arm["n"]) for text in texts)
        rows.append((_value(value), *scores, stat_text(arm["size"]["true_bits"], _three), str(arm["n"])))
    for column, text in enumerate(texts, 1):
        best = _best([_figure(arm, text) for arm in ordered])
        strong |= {(best, column)} if best is not None else set()
    columns = (options[0], *texts, "true bits", "n")
    return [Section(f"Perplexity by {options[0]}", columns, tuple(rows), strong=frozenset(strong))]


def _crossed(table: dict[str, Any], text: str, arms: dict[str, dict[str, Any]]) -> Section:
    row_name, column_name = table["options"]
    rows, strong = [], set()
    stats = [[_figure(arms[name], text) if name else None for name in cells] for cells in table["cells"]]
    for value, cells, line in zip(table["rows"], table["cells"], stats, strict=True):
        texts = (
            stat_text(stat, perplexity_text, arms[name]["n"] if name else None)
            for stat, name in zip(line, cells, strict=True)
        )
        rows.append((_value(value), *texts))
    for column in range(len(table["columns"])):
        best = _best([line[column] for line in stats])
        strong |= {(best, column + 1)} if best is not None else set()
    columns = (f"{row_name} \\ {column_name}", *map(_value, table["columns"]))
    title = f"Perplexity of {text} by {row_name} and {column_name}"
    return Section(title, columns, tuple(rows), ("The lowest of every column in bold.",), frozenset(strong))


def _value(value: Any) -> str:
    return NOTHING if value is None else str(value)


# --- costs ----------------------------------------------------------------------------------------------------------


def _costs(found: Comparison) -> list[Section]:
    """Times, and memory with what is kept of the activations."""
    times, sizes, reused = [], [], []
    for arm in found["arms"]:
        cost = arm["cost"]
        times.append((arm["name"], *(_time_text(cost.get(name)) for name in TIMES)))
        known = arm["size"] | cost
        sizes.append((arm["name"], *(_size_text(known.get(name)) for name in SIZES), str(arm["fallbacks"])))
        reused += [arm["name"]] if cost["reused_seconds"]["mean"] > 0 else []
    lines = ["MI, clustering and solving are parts of the total."]
    if reused:
        lines.append(f"Stages that an earlier run had finished count as that run took them ({'; '.join(reused)}).")
    about = (
        "Packed: size of the model at true bits; host and GPU: peak memory; rows and moments: what is kept of the "
        "activations, on disk (there is no other history of them). Means over the seeds; fallbacks of all runs.",
    )
    return [
        Section("Time", ("arm", *TIMES.values()), tuple(times), tuple(lines)),
        Section("Size, memory and fallbacks", ("arm", *SIZES.values(), "fallbacks"), tuple(sizes), about),
    ]


def _time_text(stat: dict[str, Any] | None) -> str:
    """A time with its deviation, where any was spent."""
    return stat_text(stat if stat is None or stat["mean"] > 0 else stat | dict(sd=None), _seconds)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else duration_text(value)


def _size_text(stat: dict[str, Any] | None) -> str:
    return stat_text(stat if stat is None else stat | dict(sd=None), size_text)
