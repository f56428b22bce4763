"""What `mico eval` found, as sections for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mico.metrics.vision.sections import suites_sections
from mico.summary import divergence_cells, score_line
from mico.tables import NOTHING, Section, duration_text, number, perplexity_text

Result = dict[str, Any]


def evaluation_sections(result: Result) -> list[Section]:
    """All that `evaluate` returns, in the order it is read; what was not asked for is left out."""
    found = [scores_section(result)] if result["texts"] else []
    found += [tasks_section(result)] if result["tasks"] else []
    found += suites_sections(result["model"], result["suites"]) if result["suites"] else []
    found += [samples_section(result)] if result["samples"] else []
    ends = (*(f"note: {note}" for note in result["notes"]), _cost(result))
    return [*found, Section("Measured", lines=ends)]


def _cost(result: Result) -> str:
    return f"{result['dtype']} on {result['device']}, {duration_text(result['seconds'])}"


def scores_section(result: Result) -> Section:
    """Perplexities, beside those of the dense model and the distance to it where it was measured too."""
    dense, rows = result["dense"], list[tuple[str, ...]]()
    for name, score in result["texts"].items():
        figure = score["perplexity"]
        if dense is None:
            rows.append((name, perplexity_text(figure)))
            continue
        before = dense["perplexity"][name]
        cells = (name, perplexity_text(before), perplexity_text(figure), f"×{figure / before:.3f}")
        rows.append((*cells, *divergence_cells(score)))
    compared = () if dense is None else ("dense", "this model", "ratio", "KL", "top-1")
    lines = [score_line(name, score) for name, score in result["texts"].items()]
    lines += [divergence_line(result)] if dense is not None else []
    columns = ("text", *(compared or ("perplexity",)))
    return Section(f"Perplexity of {result['model']}", columns, tuple(rows), tuple(lines))


def divergence_line(result: Result) -> str:
    """What KL and top-1 were measured over, and their means over all texts."""
    name, means = result["dense"]["model"], result["kl"]
    if means is None:
        return f"dense model {name}; no KL: there is no disk space for what it says about a single token"
    kept = [
        f"{text} {score.get('kl_tokens', 0):,} of {score['tokens'] - score['windows']:,}"
        for text, score in result["texts"].items()
    ]
    return (
        f"dense model {name}; KL(dense || this model) in nats a token, and how often both hold the same next token "
        f"likeliest, over the first predicted tokens of each text ({', '.join(kept)}); in all KL "
        f"{means['kl_divergence']:.3g}, top-1 {means['top1_agreement']:.1%}"
    )


def tasks_section(result: Result) -> Section:
    """Every metric of every task of lm-eval, with its standard error."""
    rows = []
    for task, found in result["tasks"].items():
        for metric, value, error in _metrics(found):
            shots = result["n-shot"].get(task)
            cells = (found.get("alias", task), NOTHING if shots is None else str(shots), metric)
            rows.append((*cells, _figure(value), f"±{_figure(error)}" if isinstance(error, float) else NOTHING))
    return Section(f"Tasks of {result['model']}", ("task", "shots", "metric", "value", "error"), tuple(rows))


def _metrics(found: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and standard error of what lm-eval keeps as 'acc,none' and 'acc_stderr,none'."""
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            shown = name if filtered == "none" else f"{name} ({filtered})"
            yield shown, value, found.get(f"{name}_stderr,{filtered}")


def _figure(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)


def samples_section(result: Result) -> Section:
    """What was written after each prompt, the dense model's text beside it where there is one."""
    rows = []
    for sample in result["samples"]:
        written = [sample["dense"]] if "dense" in sample else []
        prompt = f"{sample['text']} {sample['window']}: {_line(sample['prompt'])}"
        rows.append((prompt, *(_line(text) for text in (*written, sample["continuation"]))))
    both = ("dense", "this model") if result["dense"] is not None else ("written",)
    return Section(f"Samples of {result['model']}", ("text, window: prompt", *both), tuple(rows), ("Greedy decoding.",))


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
