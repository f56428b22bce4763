"""What one run is compared by: the options it was made with, and the figures that came out, all plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mico.costs import costs
from mico.files import fingerprint

FINGERPRINT_DIGITS = 8
VERSIONS = ("mico", "torch", "transformers")  # other versions may compute something else: runs of them make other arms
MEASURED_BY = ("protocol", "seqlen", "tokens", "windows", "bos", "sha256", "tokens_sha256")  # of one perplexity
TEXT_FIGURES = {"perplexity": "perplexity", "kl_divergence": "kl", "top1_agreement": "top1"}


@dataclass(frozen=True)
class Run:
    """One finished run. evaluation: what `mico eval` of its folder wrote, where it did."""

    folder: str
    report: dict[str, Any]
    evaluation: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        return int(self.report["identity"]["seed"])

    @property
    def name(self) -> str:
        """The arm it was asked to be, else its method."""
        return str(self.report["arm"] or self.report["settings"]["method"])


# --- options --------------------------------------------------------------------------------------------------------


def options(run: Run) -> dict[str, Any]:
    """Everything that may change the figures, except the seed, under the names of the options.

    What the seed decides (which tokens of the text are the calibration) is left out too, and so is the name of the
    arm: two runs of the same settings are the same.
    """
    report = run.report
    settings = dict(report["settings"])
    grouping = settings.pop("grouping") or {}
    settings["pattern"] = ":".join(map(str, settings["pattern"])) if settings["pattern"] else None
    identity = {name: value for name, value in report["identity"].items() if name not in ("seed", "tokens_sha256")}
    settings.pop("seed", None)
    fingerprint = identity.pop("model", report["model"])  # a training does not tell one
    identity["calib"] = identity.pop("text", report["calibration"])
    return (
        dict(model=report["model"], model_fingerprint=fingerprint)
        | settings
        | {"grouping": grouping.get("kind")}
        | _grouping_options(grouping)
        | identity
        | {f"version of {name}": report["environment"].get(name) for name in VERSIONS}
    )


def _grouping_options(grouping: dict[str, Any]) -> dict[str, Any]:
    """The rest of a grouping's fields; estimator and clustering matter to grouping by MI alone."""
    by_mi = grouping.get("kind") == "mi"
    fields = dict(n_groups=True, mi_method=by_mi, cluster=by_mi)
    return {name: grouping.get(name) if relevant else None for name, relevant in fields.items()}


def same_model_same_name(all_options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The options with one name a model: it is the same under two names (alias, folder), another under one name."""
    names: dict[str, str] = {}
    for one in sorted(all_options, key=lambda one: (len(one["model"]), one["model"])):
        names.setdefault(one["model_fingerprint"], one["model"])
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    found = []
    for one in all_options:
        fingerprint = one["model_fingerprint"]
        name = names[fingerprint]
        one = one | dict(model=f"{name} ({fingerprint[:FINGERPRINT_DIGITS]})" if name in shared else name)
        found.append({key: value for key, value in one.items() if key != "model_fingerprint"})
    return found


def differing(all_options: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the options that do not have one value in all."""
    names = dict.fromkeys(name for one in all_options for name in one)
    return [name for name in names if len({str(one.get(name)) for one in all_options}) > 1]


# --- what was measured ----------------------------------------------------------------------------------------------

ANSWERS = "answers held out"
Way = tuple[tuple[str, Any], ...]  # how something was measured: fields and their values
Labels = dict[tuple[str, Way], str]  # (text or task, way) -> the name of its column


def text_labels(runs: Iterable[Run]) -> Labels:
    """A name for every text and way of measuring it: 'docs', or 'docs (seqlen 128)' where runs differ in the way."""
    return _labels([key for run in runs for key in scores(run)])


def task_labels(runs: Iterable[Run]) -> Labels:
    """The same for the tasks of lm-eval: version of the task, shots and documents may differ; and for ANSWERS."""
    found = [(task, _asked(run.evaluation, task)) for run in runs for task in _results(run.evaluation)]
    return _labels(found + [(ANSWERS, _held(run)) for run in runs if _answers(run)])


def _labels(found: Iterable[tuple[str, Way]]) -> Labels:
    ways: dict[str, dict[Way, None]] = {}
    for name, way in found:
        ways.setdefault(name, {})[way] = None
    labels: Labels = {}
    for name, several in ways.items():
        fields = [field for field in dict(next(iter(several))) if len({str(dict(way)[field]) for way in several}) > 1]
        for way in sorted(several, key=str):
            words = [f"{field} {str(dict(way)[field])[:12]}" for field in fields]
            labels[name, way] = f"{name} ({', '.join(words)})" if words else name
    return labels


def _measured_by(score: dict[str, Any]) -> Way:
    return tuple((field, score.get(field)) for field in MEASURED_BY)


def scores(run: Run) -> dict[tuple[str, Way], dict[str, Any]]:
    """What the run itself measured by text, and what `mico eval` added: KL, or texts and ways of its own."""
    found = {(name, _measured_by(score)): score for name, score in run.report["compressed"].items()}
    later = (run.evaluation or {}).get("mico", {}).get("texts", {})
    for name, score in later.items():
        key = name, _measured_by(score)
        found[key] = score | found.get(key, {})
    return found


def text_values(run: Run, labels: Labels) -> dict[str, dict[str, float]]:
    """{text: {perplexity, and kl and top1 where they were measured}}."""
    return {
        labels[key]: {short: score[name] for name, short in TEXT_FIGURES.items() if score.get(name) is not None}
        for key, score in scores(run).items()
    }


def dense_values(run: Run, labels: Labels) -> dict[str, float]:
    """{text: perplexity of the dense model}."""
    scores = {(name, _measured_by(score)): score["perplexity"] for name, score in run.report["dense"].items()}
    return {labels[key]: perplexity for key, perplexity in scores.items() if key in labels}


def _results(evaluation: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return (evaluation or {}).get("results") or {}


def _asked(evaluation: dict[str, Any] | None, task: str) -> Way:
    found = evaluation or {}
    samples = (found.get("n-samples") or {}).get(task)
    documents = samples.get("effective") if isinstance(samples, dict) else samples
    version, shots = ((found.get(key) or {}).get(task) for key in ("versions", "n-shot"))
    return (("version", version), ("shots", shots), ("documents", documents))


def task_values(run: Run, labels: Labels) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}, lm-eval's standard error of a metric under '<metric> stderr'."""
    found = {}
    for task, values in _results(run.evaluation).items():
        numbers = {key: value for key, value in values.items() if "," in key and _is_number(value)}
        found[labels[task, _asked(run.evaluation, task)]] = {_metric(key): value for key, value in numbers.items()}
    if known := _answers(run):
        found[labels[ANSWERS, _held(run)]] = {name: known[name] for name in ("loss", "right")}
    return found


def _answers(run: Run) -> dict[str, float] | None:
    """How well a trained model that sees knows the answers that its training held out."""
    return (run.report.get("answers") or {}).get("quantized")


def _held(run: Run) -> Way:
    known = _answers(run) or {}
    return (("answers", known.get("answers")), ("data", fingerprint([run.report["calibration"]])))


def _metric(key: str) -> str:
    """'acc,none' -> 'acc', 'acc_stderr,none' -> 'acc stderr', 'exact_match,strict' -> 'exact_match (strict)'."""
    name, _, chosen = key.partition(",")
    stem = name.removesuffix("_stderr")
    return f"{stem}{f' ({chosen})' if chosen not in ('', 'none') else ''}{' stderr' if stem != name else ''}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def size_values(run: Run) -> dict[str, float]:
    """True and nominal bits, sparsity and bytes."""
    names = ("true_bits", "nominal_bits", "sparsity", "packed_bytes", "bytes")
    return {name: run.report["size"][name] for name in names}


def cost_values(run: Run) -> dict[str, float]:
    """What is known of the costs (`summary.costs`)."""
    return {name: value for name, value in costs(run.report).items() if value is not None}


def measures(texts: Labels, tasks: Labels) -> dict[str, Callable[[Run], dict[str, Any]]]:
    """Every group of figures by its name in the JSON of an arm."""
    return {
        "texts": lambda run: text_values(run, texts),
        "tasks": lambda run: task_values(run, tasks),
        "size": size_values,
        "cost": cost_values,
    }
