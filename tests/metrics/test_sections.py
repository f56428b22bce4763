"""What the terminal shows of an evaluation: every figure of the result, and nothing that was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from mico.metrics.sections import evaluation_sections
from mico.tables import NOTHING, Section


def text(perplexity: float, **more: Any) -> dict[str, Any]:
    known = dict(tokens=2_048, windows=16, seqlen=128, bos=True, origin="a file", protocol="gptq", shortfall=0)
    return dict(perplexity=perplexity) | known | more


@pytest.fixture
def result() -> dict[str, Any]:
    near, far = dict(kl_divergence=0.01234, top1_agreement=0.876, kl_tokens=1_270), dict(shortfall=5)
    return {
        "model": "run", "dtype": "bfloat16", "device": "cuda", "seconds": 3.2, "notes": ["something was left out"],
        "texts": {"ptb": text(12.5, **near), "c4": text(30.0, **far)},
        "dense": {"model": "base", "perplexity": {"ptb": 10.0, "c4": 20.0}},
        "kl": {"kl_divergence": 0.01234, "top1_agreement": 0.876, "kl_tokens": 1_270},
        "tasks": {
            "quiz": {"alias": "quiz", "acc,none": 0.25, "acc_stderr,none": 0.01, "em,strict": 0.5, "sample_len": 9},
            "words": {"alias": " - words", "word_perplexity,none": 41.0, "word_perplexity_stderr,none": "N/A"},
        },
        "n-shot": {"quiz": 5}, "suites": [],
        "samples": [{"text": "ptb", "window": 3, "prompt": "one\n two", "dense": "three", "continuation": ""}],
    }  # fmt: skip


def section(result: dict[str, Any], title: str) -> Section:
    return next(found for found in evaluation_sections(result) if found.title.startswith(title))


def test_perplexities_beside_the_dense_ones(result):
    found = section(result, "Perplexity of run")
    assert found.columns == ("text", "dense", "this model", "ratio", "KL", "top-1")
    assert found.rows[0] == ("ptb", "10.00", "12.50", "×1.250", "0.0123", "87.6%")
    assert found.rows[1] == ("c4", "20.00", "30.00", "×1.500", NOTHING, NOTHING)
    assert "protocol gptq: c4 from a file" in found.lines[1] and "5 tokens short" in found.lines[1]
    assert "dense model base" in found.lines[2] and "ptb 1,270 of 2,032, c4 0 of 2,032" in found.lines[2]


def test_perplexities_alone(result):
    found = section(result | dict(dense=None, kl=None), "Perplexity")
    assert found.columns == ("text", "perplexity") and found.rows == (("ptb", "12.50"), ("c4", "30.00"))
    assert len(found.lines) == 2


def test_a_dense_model_of_which_nothing_could_be_kept(result):
    assert "no KL" in section(result | dict(kl=None), "Perplexity").lines[-1]


def test_every_metric_of_a_task_has_a_row(result):
    assert section(result, "Tasks").rows == (
        ("quiz", "5", "acc", "0.2500", "±0.0100"),
        ("quiz", "5", "em (strict)", "0.5000", NOTHING),
        (" - words", NOTHING, "word_perplexity", "41.0000", NOTHING),
    )


def test_samples_and_notes(result):
    found = section(result, "Samples")
    assert found.columns == ("text, window: prompt", "dense", "this model")
    assert found.rows == (("ptb 3: one two", "three", "(nothing)"),)
    assert section(result, "Measured").lines == ("note: something was left out", "bfloat16 on cuda, 3.2 s")


def test_what_was_not_measured_has_no_section(result):
    bare = result | dict(texts={}, tasks={}, samples=[], dense=None, kl=None, notes=[])
    assert [found.title for found in evaluation_sections(bare)] == ["Measured"]
