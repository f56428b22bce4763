"""Every refusal at the door, what the arms set, and what contradicts what."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mico.errors import UserError
from mico.settings import (
    ARMS,
    CLUSTERINGS,
    DEFAULT_SPARSITY,
    GROUPINGS,
    METHOD_NAMES,
    MI_METHODS,
    Compression,
    Grouping,
    Source,
    compression_of,
    parse_pattern,
    record,
)

UNSET: dict[str, Any] = dict(
    sparsity=None, pattern=None, wbits=4, target_avg_bits=None, n_groups="auto", use_mi_grouping=None, grouping=None,
    mi_method="gaussian", cluster="spectral", method=None, arm=None, allocation=None, group_size=None, percdamp=0.01,
    blocksize=128, profile=None, embed_bits=16,
)  # fmt: skip
NAN = float("nan")


def resolved(**given: Any) -> Compression:
    return compression_of(**UNSET | given)


def refused(message: str, make: Any, *args: Any, **given: Any) -> None:
    """One line that holds `message`."""
    with pytest.raises(UserError) as caught:
        make(*args, **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(nsamples=0), "--nsamples 0: must be at least 1"),
        (dict(seqlen=-1), "--seqlen -1: must be at least 1"),
        (dict(batch_size=0), "--batch-size 0: must be at least 1"),
        (dict(dtype="int8"), "--dtype int8: choose from auto, float32, bfloat16, float16"),
    ],
)
def test_sources_that_are_refused(given, message):
    refused(message, Source, "tiny-llama", **given)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(n_groups=0), "--n-groups 0: give a whole number"),
        (dict(n_groups=-3), "--n-groups -3: give a whole number"),
        (dict(n_groups=2.5), "--n-groups 2.5: give a whole number"),
        (dict(n_groups="many"), "--n-groups many: give a whole number of at least 1, or auto"),
        (dict(mi_method="exact"), "--mi-method exact: choose from " + ", ".join(MI_METHODS)),
        (dict(cluster="dbscan"), "--cluster dbscan: choose from " + ", ".join(CLUSTERINGS)),
        (dict(kind="size"), "--grouping size: choose from " + ", ".join(GROUPINGS)),
    ],
)
def test_groupings_that_are_refused(given, message):
    refused(message, Grouping, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(method="awq"), "--method awq: choose from " + ", ".join(METHOD_NAMES)),
        (dict(allocation="equal"), "--allocation equal: choose from rate, thresholds"),
        (dict(sparsity=1.5), "--sparsity 1.5: must be at least 0 and below 1"),
        (dict(sparsity=1.0), "--sparsity 1.0: must be"),
        (dict(sparsity=-0.1), "--sparsity -0.1: must be"),
        (dict(sparsity=NAN), "--sparsity nan: must be"),
        (dict(wbits=0), "--wbits 0: choose 2 to 8, or 16"),
        (dict(wbits=1), "--wbits 1: choose 2 to 8, or 16"),
        (dict(wbits=9), "--wbits 9: choose 2 to 8, or 16"),
        (dict(wbits=3.5), "--wbits 3.5: choose 2 to 8, or 16"),
        (dict(target_avg_bits=1.9, grouping=Grouping()), "--target-avg-bits 1.9: must be from 2 to 8"),
        (dict(target_avg_bits=8.1, grouping=Grouping()), "--target-avg-bits 8.1: must be from 2 to 8"),
        (dict(target_avg_bits=NAN, grouping=Grouping()), "--target-avg-bits nan: must be from 2 to 8"),
        (dict(target_avg_bits=3.0, wbits=4), "--target-avg-bits 3.0 needs channel groups"),
        (dict(target_avg_bits=3.0, wbits=16), "--target-avg-bits 3.0 contradicts --wbits 16"),
        (dict(group_size=0), "--group-size 0: must be at least 1"),
        (dict(group_size=64, grouping=Grouping()), "--group-size 64 and channel groups exclude each other"),
        (dict(method="gptq", sparsity=0.5), "--method gptq does not prune"),
        (dict(method="gptq", pattern=(2, 4)), "--method gptq does not prune"),
        (dict(profile="onnx", wbits=4), "--profile onnx: choose from vllm, gguf"),
        (dict(profile="vllm", wbits=16), "--wbits 16: --profile vllm holds 2, 3, 4, 5, 6, 7 or 8 bits"),
        (dict(profile="vllm", wbits=16, target_avg_bits=4.0), "--wbits 16: --profile vllm holds"),
        (dict(profile="gguf", wbits=6), "--wbits 6: --profile gguf holds 4, 5 or 8 bits"),
        (dict(profile="gguf", wbits=4, target_avg_bits=3.5), "--target-avg-bits 3.5: --profile gguf holds 4 to 8 bits"),
        (dict(profile="gguf", wbits=4, group_size=64), "--group-size 64: --profile gguf has 32 channels"),
        (dict(profile="vllm", wbits=4, group_size=48), "--group-size 48: --profile vllm has 128, 64 or 32 channels"),
        (dict(percdamp=0.0), "--percdamp 0.0: must be above 0"),
        (dict(percdamp=-0.01), "--percdamp -0.01: must be above 0"),
        (dict(percdamp=NAN), "--percdamp nan: must be above 0"),
        (dict(percdamp=float("inf")), "--percdamp inf: must be above 0 and finite"),
        (dict(blocksize=0), "--blocksize 0: must be at least 1"),
        (dict(blocksize=30, pattern=(2, 4)), "--blocksize 30: must be a multiple of the pattern's 4"),
    ],
)
def test_compressions_that_are_refused(given, message):
    refused(message, Compression, **given)


@pytest.mark.parametrize("text, expected", [(None, None), ("2:4", (2, 4)), ("1:2", (1, 2)), ("31:32", (31, 32))])
def test_patterns(text, expected):
    assert parse_pattern(text) == expected


@pytest.mark.parametrize("text", ["2", "4:2", "2:2", "0:4", "2:64", "a:b", "2:4:8", "-1:4", " 2:4", ""])
def test_patterns_that_are_refused(text):
    refused(f"--pattern {text}: expected n:m", parse_pattern, text)


def test_the_default_is_mico_with_mi_groups_at_half_the_weights():
    assert resolved() == Compression("mico", DEFAULT_SPARSITY, None, 4, None, Grouping("auto", "mi"), None, "rate")


@pytest.mark.parametrize(
    "arm, method, kind, allocation",
    [
        ("original", "sparsegpt", None, "rate"),
        ("enhanced", "sparsegpt", "importance", "thresholds"),
        ("mi", "mico", "mi", "rate"),
    ],
)
def test_what_the_arms_set(arm, method, kind, allocation):
    found = resolved(arm=arm, n_groups=6, mi_method="knn", cluster="kmeans")
    grouping = None if kind is None else Grouping(6, kind, "knn", "kmeans")
    assert found == Compression(method, DEFAULT_SPARSITY, None, 4, None, grouping, None, allocation)
    same = resolved(arm=arm, method=method, grouping=kind, allocation=allocation)
    assert (same.method, same.allocation) == (method, allocation)  # saying it again is no contradiction


def test_every_arm_is_covered_above():
    assert set(ARMS) == {"original", "enhanced", "mi"}


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(arm="best"), "--arm best: choose from original, enhanced, mi"),
        (dict(arm="original", method="mico"), "--method mico contradicts --arm original (sparsegpt)"),
        (dict(arm="original", use_mi_grouping=True), "--use-mi-grouping True contradicts --arm original"),
        (dict(arm="original", grouping="mi"), "contradicts --grouping mi"),
        (dict(arm="enhanced", method="gptq"), "--method gptq contradicts --arm enhanced (sparsegpt)"),
        (dict(arm="enhanced", grouping="mi"), "--grouping mi contradicts --arm enhanced (importance)"),
        (dict(arm="enhanced", allocation="rate"), "--allocation rate contradicts --arm enhanced (thresholds)"),
        (dict(arm="enhanced", use_mi_grouping=False), "--no-mi-grouping contradicts --grouping importance"),
        (dict(arm="mi", grouping="random"), "--grouping random contradicts --arm mi (mi)"),
        (dict(arm="mi", allocation="thresholds"), "--allocation thresholds contradicts --arm mi (rate)"),
        (dict(arm="mi", use_mi_grouping=False), "--no-mi-grouping contradicts --grouping mi"),
        (dict(arm="mi", group_size=64), "--group-size 64 and channel groups exclude each other"),
        (dict(use_mi_grouping=False, grouping="alpha"), "--no-mi-grouping contradicts --grouping alpha"),
        (dict(use_mi_grouping=True, group_size=64), "--group-size 64 and channel groups exclude each other"),
        (dict(method="gptq", grouping="mi"), "--method gptq has no channel groups"),
        (dict(method="wanda", use_mi_grouping=True), "--method wanda has no channel groups"),
        (dict(method="rtn", grouping="range"), "--method rtn has no channel groups"),
        (dict(method="gptq", sparsity=0.5), "--method gptq does not prune"),
        (dict(method="gptq", pattern="2:4"), "--method gptq does not prune"),
        (dict(pattern="2:4", sparsity=0.6), "--sparsity 0.6 contradicts --pattern 2:4"),
        (dict(pattern="4"), "--pattern 4: expected n:m"),
        (dict(target_avg_bits=3.0, use_mi_grouping=False), "--target-avg-bits 3.0 needs channel groups"),
        (dict(target_avg_bits=3.0, group_size=64), "--target-avg-bits 3.0 needs channel groups"),
        (dict(target_avg_bits=3.0, method="rtn"), "--target-avg-bits 3.0 needs channel groups"),
        (dict(target_avg_bits=3.0, method="sparsegpt"), "with --use-mi-grouping"),
        (dict(target_avg_bits=3.0, wbits=16), "--target-avg-bits 3.0 contradicts --wbits 16"),
        (dict(sparsity=1.5), "--sparsity 1.5"),
        (dict(n_groups=0), "--n-groups 0"),
        (dict(cluster="dbscan"), "--cluster dbscan"),
    ],
)
def test_contradictions(given, message):
    refused(message, resolved, **given)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_each_methods_own_defaults(method):
    found = resolved(method=method)
    assert found.sparsity == (0.0 if method in ("gptq", "rtn") else DEFAULT_SPARSITY)
    assert (found.grouping is not None) == (method == "mico")
    assert found.allocation == "rate" and found.wbits == 4
    assert resolved(method=method, sparsity=0.0).sparsity == 0.0


@pytest.mark.parametrize(
    "pattern, sparsity",
    [("2:4", None), ("2:4", 0.5), ("2:4", 0.0), ("7:10", 0.3), ("1:3", 0.667), ("2:3", 0.33)],
)
def test_a_pattern_stands_for_its_sparsity(pattern, sparsity):
    """Also when 1 - n/m is not a short decimal, or not one in binary (1 - 7/10 != 0.3)."""
    found = resolved(pattern=pattern, sparsity=sparsity, blocksize=120)
    assert found.pattern == parse_pattern(pattern) and found.sparsity == 0.0


def test_groups_are_left_out_where_they_have_no_use():
    assert resolved(wbits=16).grouping is None
    assert resolved(use_mi_grouping=False).grouping is None
    assert resolved(group_size=64).grouping is None and resolved(group_size=64).group_size == 64
    assert resolved(method="sparsegpt", use_mi_grouping=True).grouping == Grouping("auto", "mi")
    assert resolved(method="sparsegpt", grouping="alpha", n_groups=3).grouping == Grouping(3, "alpha")


def test_records_are_plain_json_and_frozen():
    settings = resolved(pattern="2:4", target_avg_bits=3.0)
    plain = record(settings)
    assert json.loads(json.dumps(plain))["grouping"]["kind"] == "mi"
    assert plain["target_avg_bits"] == 3.0 and set(plain) == {f.name for f in dataclasses.fields(Compression)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.wbits = 3


@pytest.mark.parametrize("method", ["mico", "sparsegpt", "gptq", "wanda", "rtn"])
def test_a_profile_settles_groups_and_does_not_prune_unasked(method):
    found = resolved(profile="vllm", method=method, target_avg_bits=4.5)
    assert (found.profile, found.method, found.grouping, found.sparsity) == ("vllm", method, None, 0.0)
    assert found.allocates and not resolved(profile="vllm", method=method).allocates
    assert resolved(profile="gguf").method == "mico" and resolved(profile="vllm", sparsity=0.5).sparsity == 0.5


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(profile="best"), "--profile best: choose from vllm, gguf"),
        (dict(profile="vllm", arm="mi"), "--arm contradicts --profile vllm, whose groups are consecutive channels"),
        (dict(profile="vllm", use_mi_grouping=True), "--use-mi-grouping contradicts --profile vllm"),
        (dict(profile="gguf", grouping="random"), "--grouping contradicts --profile gguf"),
        (dict(profile="gguf", n_groups=4), "--n-groups contradicts --profile gguf"),
        (dict(profile="gguf", mi_method="knn"), "--mi-method contradicts --profile gguf"),
        (dict(profile="gguf", cluster="kmeans"), "--cluster contradicts --profile gguf"),
        (dict(profile="vllm", allocation="thresholds"), "--allocation thresholds contradicts --profile vllm (rate)"),
    ],
)
def test_what_contradicts_a_profile(given, message):
    refused(message, resolved, **given)
