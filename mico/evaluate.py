"""Verb: a model measured by perplexity, distance to its dense model, tasks of lm-eval, suites and samples."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mico.callable import callable_module
from mico.checkpoint import MANIFEST as PACKED_MANIFEST
from mico.console import Console
from mico.data import TEXTS, Windows
from mico.errors import UserError
from mico.files import atomic_json, check_writable, read_json
from mico.loading import (
    LoadedModel,
    context_length,
    is_reference,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    resolve,
)
from mico.metrics.asked import Tasks, check_options, task_names
from mico.metrics.divergence import DenseReference
from mico.metrics.generation import Prompt, continuations, cut_prompts
from mico.metrics.harness import check_tasks
from mico.metrics.perplexity import (
    PROTOCOL,
    Observer,
    bar_steps,
    default_texts,
    evaluate_texts,
    evaluation_sets,
    parse_texts,
    protocol_line,
)
from mico.metrics.results import with_earlier
from mico.metrics.vision.run import asked_suites
from mico.runs import EVALUATION, MANIFEST, versions
from mico.tracking import Tracking, evaluation_figures

callable_module(__name__)
MODEL = "model"  # inside a run folder
RESULTS = "results.json"  # inside the output folder
SAME = 4000  # characters of a text that two tokenizers must cut alike
ELSEWHERE = ("tasks", "n-shot")  # of the report, at the top level of results.json


def evaluate(
    model: str,
    *,
    eval: str | Sequence[str] | None = None,
    protocol: str = PROTOCOL,
    data_dir: str | None = None,
    data_file: str | None = None,
    seqlen: int | None = None,
    batch_size: int = 8,
    dense: str | None = None,
    kl: bool | None = None,
    tasks: str | Sequence[str] | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    log_samples: bool = False,
    samples: int = 0,
    suite: str | Sequence[str] | None = None,
    vlm_data: str | None = None,
    retain_tokens: int | None = None,
    token_method: str | None = None,
    sparsevlm_version: str | None = None,
    adaptive: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    output_path: str | None = None,
    tensorboard: str | None = None,
    wandb: str | None = None,
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure `model`: a hub id, an alias, a local folder, or a run folder of mico (its `model/`).

    eval: names, 'wikitext2,ptb' or 'all'. None: no text when there are `tasks` or a `suite`, only `data_file` when
    there is one, else the texts of the run for a run folder, else `default_texts`. A `data_file` given beside `eval` is
    measured too. dense: the model to take the KL divergence to; None: the one that a run folder was made from. kl:
    False leaves it out, True refuses to go on without it. samples: how many prompts the models go on with. suite: of
    questions about images, those with files in `vlm_data`; retain_tokens and what follows: as
    `mico.visual_tokens.enable` takes them.
    Returns plain JSON values, also written to `json`, and in lm-eval's shape to results.json in `output_path` (`eval/`
    of a run folder when None): `perplexity` and `texts` by text, `dense`, `kl`, `tasks`, `suites`, `samples`, `notes`.
    Raises UserError before any weight is read when a text, a task, a suite, the model or an option is wrong.
    """
    console = console or Console()
    chosen = Tasks(task_names(tasks), include_path, num_fewshot, limit, log_samples, batch_size, offline)
    check_options(batch_size, samples, chosen, suite is not None)
    if json is not None:
        check_writable("--json", json)
    output = _output_folder(model, output_path)
    if log_samples and output is None:
        raise UserError("--log-samples needs --output-path: a folder to keep what was asked and answered in")
    pick_device(device)
    folder = model_folder(model)
    hub = dict(offline=offline, trust_remote_code=trust_remote_code, packed=True)
    length = context_length(load_config(folder, **hub), seqlen)
    suites = asked_suites(
        suite, vlm_data, limit, batch_size, folder, dict(offline=offline, trust_remote_code=trust_remote_code),
        retain_tokens=retain_tokens, token_method=token_method, sparsevlm_version=sparsevlm_version, adaptive=adaptive,
    )  # fmt: skip
    base = _base(model, folder, dense, kl)
    sets = evaluation_sets(
        load_tokenizer(folder, **hub),
        _chosen_texts(model, eval, data_dir, data_file, bool(chosen.names or suites.questions)),
        seqlen=length,
        data_dir=data_dir,
        data_file=data_file,
        offline=offline,
        protocol=protocol,
    )
    _check_texts(sets, samples, base)
    if chosen.names:
        check_tasks(chosen.names, include_path, offline=offline)
    for windows in sets.values():
        console.note(f"evaluation {protocol_line(windows)}")
    load = dict(device=device, dtype=dtype, seqlen=seqlen, **hub)
    job = _Job(console, sets, cut_prompts(sets, samples), batch_size, load)
    started = time.monotonic()
    with ExitStack() as stack:
        tracking = stack.enter_context(Tracking(tensorboard, wandb, console))
        tracking.open(f"eval-{Path(model).name}", dict(model=model, protocol=protocol, seqlen=length))
        against = job.dense(base, folder, output, stack) if base is not None and sets else None
        loaded = job.load(folder)
        report = dict(model=model, **_facts(loaded), seqlen=length, protocol=protocol)
        with loaded.running():
            report |= job.compressed(loaded, against)
            found = chosen.run(loaded, output, console)
            report["suites"] = suites.run(loaded, output, console)
        report |= {"tasks": found["results"], "n-shot": found["n-shot"], "notes": job.notes}
        report["seconds"] = round(time.monotonic() - started, 3)
        tracking.finish(evaluation_figures(report))
    if output is not None:
        own = {name: value for name, value in report.items() if name not in ELSEWHERE}
        own |= dict(environment=versions(), command=sys.argv)
        atomic_json(output / RESULTS, with_earlier(output / RESULTS, found, own, console))
        console.note(f"eval: written to {output / RESULTS}")
    if json is not None:
        atomic_json(json, report)
    return report


# --- what is asked for ----------------------------------------------------------------------------------------------


def _check_texts(sets: Mapping[str, Windows], samples: int, base: Base | None) -> None:
    if not sets and samples:
        raise UserError(f"--samples {samples}: prompts are cut from texts: name some with --eval")
    if not sets and base is not None and base.asked:
        raise UserError("--dense and --kl compare on texts: name some with --eval")


def model_folder(model: str) -> str:
    """The name to load: `model` itself, or the `model/` folder of a run folder.

    Raises UserError when the run folder holds no model yet.
    """
    path = Path(resolve(model)).expanduser()
    if not _is_run(path):
        return model
    if not (path / MODEL / "config.json").is_file():
        raise UserError(f"model {model}: this run folder holds no finished model/: run its command again, it goes on")
    return str(path / MODEL)


def _is_run(path: Path) -> bool:
    return (path / MANIFEST).is_file() and not (path / "config.json").exists()


def _arguments(run: Path) -> dict[str, Any]:
    arguments = read_json(run / MANIFEST).get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def _output_folder(model: str, output_path: str | None) -> Path | None:
    """Where results.json goes, made and found writable; None where nothing is to be written."""
    run = Path(resolve(model)).expanduser()
    if output_path is None and not _is_run(run):
        return None
    output = run / EVALUATION if output_path is None else Path(output_path)
    check_writable("--output-path", output / RESULTS)
    return output


def _chosen_texts(
    model: str, texts: str | Sequence[str] | None, data_dir: str | None, data_file: str | None, others: bool
) -> tuple[str, ...]:
    if texts is not None:
        chosen = parse_texts(texts if isinstance(texts, str) else ",".join(texts))
        if not chosen and data_file is None and not others:
            raise UserError("--eval none: name a text to measure on, or give --data-file, --tasks or --suite")
        return chosen
    if data_file is not None or others:
        return ()
    run = Path(model).expanduser()
    if _is_run(run):
        measured = _arguments(run).get("eval")
        if isinstance(measured, Mapping) and measured and all(name in TEXTS for name in measured):
            return tuple(measured)
    return default_texts(is_reference(model), data_dir)


# --- the dense model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The dense model to compare with. asked: the user wants it, so that going on without it is an error."""

    name: str
    asked: bool
    fingerprint: str | None = None  # where it is known what was compressed


def _base(model: str, folder: str, dense: str | None, kl: bool | None) -> Base | None:
    if kl is False:
        if dense is not None:
            raise UserError(f"--dense {dense} contradicts --no-kl: leave one of them out")
        return None
    if dense is not None:
        return Base(model_folder(dense), True)
    run, packed = Path(resolve(model)).expanduser(), Path(resolve(folder)).expanduser() / PACKED_MANIFEST
    name = mark = None
    if _is_run(run):
        name, mark = _arguments(run).get("name"), _arguments(run).get("model")
    elif packed.is_file():
        name = read_json(packed).get("base_model")
    if isinstance(name, str):
        return Base(name, bool(kl), mark)
    if kl:
        raise UserError(f"--kl: it is not known what {model} was made from: name the dense model with --dense")
    return None


@dataclass
class _Dense:
    """What was found of the dense model, and its logits to compare with."""

    record: dict[str, Any]
    written: list[str]
    reference: DenseReference


@dataclass
class _Job:
    """One model measured, after its dense model where there is one; never both in memory."""

    console: Console
    sets: dict[str, Windows]
    prompts: list[Prompt]
    batch_size: int
    options: dict[str, Any]  # of load_model
    notes: list[str] = field(default_factory=list)

    def load(self, folder: str, **changes: Any) -> LoadedModel:
        with self.console.stage("load"):
            return load_model(folder, **self.options | changes)

    def dense(self, base: Base, folder: str, output: Path | None, stack: ExitStack) -> _Dense | None:
        """Measure the dense model and let go of it; None, and a note, when it cannot be had and nobody asked."""
        try:
            loaded = self._load_dense(base, folder)
        except UserError as error:
            if base.asked:
                raise
            self.notes.append(f"KL to the dense model is left out ({error}); name it with --dense, or use --no-kl")
            self.console.note(self.notes[-1])
            return None
        vocabulary = loaded.model.config.get_text_config().vocab_size
        reference = stack.enter_context(DenseReference(self.sets, vocabulary, folder=output))
        with loaded.running():
            texts = self._measure(loaded, "perplexity, dense", reference.record)
            written = self._continue(loaded)
        reference.finish()
        record = dict(model=base.name, **_facts(loaded), perplexity=_perplexities(texts), texts=texts)
        del loaded
        _free()
        return _Dense(record, written, reference)

    def _load_dense(self, base: Base, folder: str) -> LoadedModel:
        offline = self.options["offline"] or not base.asked  # nobody asked for a download of many gigabytes
        hub = dict(offline=offline, packed=True, trust_remote_code=self.options["trust_remote_code"])
        sizes = [load_config(name, **hub).get_text_config().vocab_size for name in (base.name, folder)]
        tokenizers = [load_tokenizer(name, **hub) for name in (base.name, folder)]
        texts = [windows.source.joiner.join(windows.source.documents[:100])[:SAME] for windows in self.sets.values()]
        if sizes[0] != sizes[1] or any(tokenizers[0](t).input_ids != tokenizers[1](t).input_ids for t in texts):
            raise UserError(f"model {base.name}: its vocabulary or tokenizer is another than that of {folder}")
        loaded = self.load(base.name, offline=offline)
        if base.fingerprint not in (None, loaded.fingerprint):
            raise UserError(f"model {base.name}: its weights are not those that were compressed")
        return loaded

    def compressed(self, loaded: LoadedModel, against: _Dense | None) -> dict[str, Any]:
        """What is told of the model itself: perplexities, the distance to the dense one, samples."""
        texts = self._measure(loaded, "perplexity", against.reference.compare if against else None)
        kl = None
        if against:
            kl = against.reference.overall()
            for name, found in against.reference.results().items():
                texts[name] |= found
        samples = [
            dict(text=prompt.text, window=prompt.window, prompt=prompt.words(loaded.tokenizer), continuation=text)
            for prompt, text in zip(self.prompts, self._continue(loaded), strict=True)
        ]
        for sample, written in zip(samples, against.written if against else (), strict=False):
            sample["dense"] = written
        record = against.record if against else None
        return dict(perplexity=_perplexities(texts), texts=texts, dense=record, kl=kl, samples=samples)

    def _measure(self, loaded: LoadedModel, label: str, observer: Observer | None) -> dict[str, dict[str, Any]]:
        total = sum(len(windows.ids_NT) for windows in self.sets.values())
        with self.console.stage("evaluate"), self.console.bar(label, total) as advance:
            progress = bar_steps(advance)
            size = self.batch_size
            return evaluate_texts(loaded.model, self.sets, batch_size=size, progress=progress, observer=observer)

    def _continue(self, loaded: LoadedModel) -> list[str]:
        with self.console.stage("samples"):
            return continuations(loaded.model, loaded.tokenizer, self.prompts)


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    """What tells models apart; of a packed one also what it was made from, its true bits a weight, and those of its
    activations where its manifest has them."""
    packed = loaded.folder / PACKED_MANIFEST
    manifest = read_json(packed) if packed.is_file() else {}
    return dict(
        source=loaded.source, family=loaded.family.name, fingerprint=loaded.fingerprint, device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        **{name: manifest.get(name) for name in ("base_model", "true_bits", "activation_bits")},
    )  # fmt: skip


def _perplexities(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: result["perplexity"] for name, result in texts.items()}


def _free() -> None:
    """Give back the memory of a model that is no longer named: its modules refer to one another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
