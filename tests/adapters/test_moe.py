"""Streams of experts, from the config alone."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mico.adapters import family_of
from mico.adapters.family import Stream, waves
from mico.errors import UserError


def test_as_many_streams_as_experts() -> None:
    family = family_of(MixtralConfig(num_local_experts=7))
    inputs = [stream for stream in family.streams if stream.name.endswith(".in")]
    assert [stream.expert for stream in inputs] == list(range(7))
    assert inputs[3].linears == ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")
    names = [stream.name for stream in family_of(Qwen2MoeConfig(num_experts=3)).streams if stream.expert is None]
    assert names == ["attn_in", "attn_out", "shared_in", "shared_out"], "all tokens pass a shared expert"


@pytest.mark.parametrize("kind", [Qwen2MoeConfig, Qwen3MoeConfig])
@pytest.mark.parametrize("setting", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_models_with_layers_of_both_kinds_are_refused(kind: Any, setting: dict[str, Any]) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(UserError, match="layers without experts are not supported") as caught:
        family_of(kind(**setting))
    assert name in str(caught.value) and str(value) in str(caught.value)


def test_a_wave_ends_where_an_expert_comes_again() -> None:
    plain, streams = Stream("x", ("a",)), [Stream(f"{e}{side}", ("b",), e) for side in "io" for e in range(2)]
    assert [[s.name for s in wave] for wave in waves([plain, plain, *streams, plain])] == [
        ["x"], ["x"], ["0i", "1i"], ["0o", "1o"], ["x"]
    ]  # fmt: skip
    assert waves([]) == []
