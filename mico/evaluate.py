"""Verb: perplexity of a model by the protocol of SparseGPT (mico eval)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mico.callable import callable_module
from mico.console import Console
from mico.data import TEXTS, Windows
from mico.errors import UserError
from mico.files import atomic_json, read_json
from mico.loading import context_length, is_reference, load_config, load_model, load_tokenizer, pick_device, resolve
from mico.metrics.perplexity import (
    PROTOCOL,
    Progress,
    default_texts,
    evaluate_texts,
    evaluation_sets,
    parse_texts,
    protocol_line,
)
from mico.summary import check_writable

callable_module(__name__)
MODEL, MANIFEST = "model", "manifest.json"  # inside a run folder


def evaluate(
    model: str,
    *,
    eval: str | Sequence[str] | None = None,
    data_dir: str | None = None,
    data_file: str | None = None,
    seqlen: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure `model`: a hub id, an alias, a local folder, or a run folder of mico (its `model/`).

    eval: names, 'wikitext2,ptb' or 'all'. None: only `data_file` when there is one, else the texts of the run
    for a run folder, else `default_texts`. A `data_file` given beside `eval` is measured too.
    Returns plain JSON values, also written to `json`: `perplexity` by text, and under `texts` what is needed
    to repeat each. Raises UserError before any weight is read when a text, the model or an option is wrong.
    """
    console = console or Console()
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    if json is not None:
        check_writable("--json", json)
    pick_device(device)
    folder = model_folder(model)
    hub = dict(offline=offline, trust_remote_code=trust_remote_code, packed=True)
    length = context_length(load_config(folder, **hub), seqlen)
    sets = evaluation_sets(
        load_tokenizer(folder, **hub),
        _chosen_texts(model, eval, data_dir, data_file),
        seqlen=length,
        data_dir=data_dir,
        data_file=data_file,
        offline=offline,
    )
    for windows in sets.values():
        console.note(f"evaluation {protocol_line(windows)}")
    with console.stage("load"):
        loaded = load_model(folder, device=device, dtype=dtype, seqlen=seqlen, **hub)  # type: ignore[arg-type]
    started = time.monotonic()
    total = sum(len(windows.ids_NT) for windows in sets.values())
    with console.stage("evaluate"), console.bar("perplexity", total) as advance:
        progress = _steps(advance, sets)
        results = evaluate_texts(loaded.model, sets, batch_size=batch_size, progress=progress)
    report = {
        "model": model,
        "source": loaded.source,
        "family": loaded.family.name,
        "fingerprint": loaded.fingerprint,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "seqlen": length,
        "protocol": PROTOCOL,
        "perplexity": {name: result["perplexity"] for name, result in results.items()},
        "texts": results,
        "seconds": round(time.monotonic() - started, 3),
    }
    if json is not None:
        atomic_json(json, report)
    return report


def model_folder(model: str) -> str:
    """The name to load: `model` itself, or the `model/` folder of a run folder.

    Raises UserError when the run folder holds no model yet.
    """
    path = Path(resolve(model)).expanduser()
    if not _is_run(path):
        return model
    if not (path / MODEL / "config.json").is_file():
        raise UserError(f"model {model}: this run folder holds no finished model/: run its mico compress again first")
    return str(path / MODEL)


def _is_run(path: Path) -> bool:
    return (path / MANIFEST).is_file() and not (path / "config.json").exists()


def _chosen_texts(
    model: str, texts: str | Sequence[str] | None, data_dir: str | None, data_file: str | None
) -> tuple[str, ...]:
    if texts is not None:
        chosen = parse_texts(texts if isinstance(texts, str) else ",".join(texts))
        if not chosen and data_file is None:
            raise UserError("--eval none: name a text to measure on, or give --data-file")
        return chosen
    if data_file is not None:
        return ()
    run = Path(model).expanduser()
    if _is_run(run):
        arguments = read_json(run / MANIFEST).get("arguments")
        measured = arguments.get("eval") if isinstance(arguments, dict) else None
        if isinstance(measured, Mapping) and measured and all(name in TEXTS for name in measured):
            return tuple(measured)
    return default_texts(is_reference(model), data_dir)


def _steps(advance: Callable[[str], None], sets: Mapping[str, Windows]) -> Progress:
    """Turn 'n windows of this text are done' into steps of one bar over all texts."""
    seen = dict.fromkeys((windows.source.name for windows in sets.values()), 0)

    def progress(name: str, done: int, count: int) -> None:
        for _ in range(done - seen[name]):
            advance(name)
        seen[name] = done

    return progress
