"""Verb: training at few bits or with few visual tokens; a model in, a trained model out, measured (mico finetune)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mico.callable import callable_module
from mico.console import Console
from mico.files import atomic_json, check_writable, read_json
from mico.metrics.perplexity import parse_texts
from mico.qat.cmibq_job import Bottleneck
from mico.qat.job import Job, Request, own_randomness
from mico.qat.paretoq_job import ParetoQ
from mico.qat.sparsevlm_job import SparseVLM
from mico.runs import REPORT, TRAINING, RunFolder
from mico.runs import fingerprint as digest
from mico.settings import choose
from mico.stages import results_root
from mico.tables import Section, size_text

callable_module(__name__)
METHODS: dict[str, type[Job]] = {"paretoq": ParetoQ, "sparsevlm": SparseVLM, "cmibq": Bottleneck}


def finetune(
    model: str,
    *,
    method: str = "paretoq",
    train_file: str | None = None,
    image_folder: str | None = None,
    eval_file: str | None = None,
    eval_share: float = 0.05,
    seqlen: int | None = None,
    teacher: str | None = None,
    eval: str | Sequence[str] | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    save: str | None = None,
    json: str | None = None,
    console: Console | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Train `model` and write it; return the report that also lies in the run folder.

    method 'paretoq' writes it packed at few bits. model: a dense model, or a run of mico compress, whose pruned weights
    then stay zero. train_file: JSONL rows with 'text', or a text file; None: the embedded documentation. training: the
    fields of Recipe (mico/qat/recipe.py).
    method 'sparsevlm' trains a LLaVA for pruned visual tokens on image-text data and writes it dense. train_file,
    image_folder: as `load_image_text` takes them, or 'grids'. training: the fields of Pruned
    (mico/qat/sparsevlm_job.py).
    method 'cmibq' quantizes weights and activations of a LLaVA at learned widths, in two stages, on the same data.
    model: the dense one, or (stage=2) the run folder of stage 1. training: `stage`, fields of Shaping or Aligning
    (mico/qat/cmibq/recipe.py).
    A killed run goes on from its last checkpoint with the same command. Started by torchrun or accelerate, the
    processes share the work; the report of all but the first is empty. Raises UserError for what the user can mend.
    """
    console = console or Console()
    choose("--method", method, tuple(METHODS))
    choose("--device", device, ("auto", "cpu", "cuda"))
    if json is not None:
        check_writable("--json", json)
    texts = None if eval is None else parse_texts(eval if isinstance(eval, str) else ",".join(eval))
    request = Request(
        model=model, method=method, train_file=train_file, image_folder=image_folder, eval_file=eval_file,
        eval_share=eval_share, seqlen=seqlen,
        teacher=teacher, eval=texts, data_dir=data_dir, device=device, offline=offline,
        trust_remote_code=trust_remote_code, console=console,
    )  # fmt: skip
    with console.stage("total"), own_randomness():
        job = METHODS[method](request, training)
        folder = Path(save) if save else results_root() / f"{job.label}-{digest(job.identity)[:8]}"
        if os.environ.get("RANK", "0") != "0":
            if RunFolder.view(folder, job.identity) is None:  # else the first process has nothing to share
                job.follow(folder)
            return {}
        with RunFolder.open(folder, job.identity) as run:
            if run.completed:
                console.note(f"finetune: {run.path} is finished and whole, reusing it")
                report = read_json(run.path / REPORT)
            else:
                for name in run.damaged:
                    console.note(f"{run.path / name} is missing or damaged: written again from the last checkpoint")
                report = job.lead(run)
                console.note(_left(run.path / TRAINING))
    if json:
        atomic_json(json, METHODS[method].figures(report))
    return report


def sections(report: dict[str, Any]) -> list[Section]:
    """What a report says, for the terminal."""
    return METHODS[report["settings"]["method"]].told(report)


def _left(folder: Path) -> str:
    kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"finetune: {folder} holds {size_text(kept)} of checkpoints and logs, which the model no longer needs"
