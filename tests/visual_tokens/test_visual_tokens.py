"""Pruning inside LLaVA models: equal to the dense model where nothing goes, to a naive loop where something does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mico.errors import UserError
from mico.visual_tokens import METHODS, VERSIONS, Evidence, Method, enable
from mico.visual_tokens.budgets import Schedule
from tests.visual_tokens.naive import sparsevlm
from tests.visual_tokens.tiny import VISUAL, batched, generated, llava, logits, picture, prompt

ALL = [("sparsevlm", "1.0"), *((name, "2.0") for name in METHODS)]


def some(sample: int) -> set[int]:
    return {3, 30, 31}


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.fixture(scope="module")
def following() -> Any:
    return llava(following=True, text="mistral")


@pytest.mark.parametrize(("method", "version"), ALL)
def test_keeping_all_is_the_dense_model(model: Any, method: str, version: str) -> None:
    inputs = dict(**batched(prompt(3, 6), prompt(5, 9, seed=7)), pixel_values=picture(count=2))
    dense, real = logits(model, **inputs), inputs["attention_mask"].bool()
    with enable(model, VISUAL, method, version, positions=some) as pruning:
        found = logits(model, **inputs)
    assert float((found - dense)[real].abs().max()) < 1e-5
    assert pruning.trace is not None and all(kept == [list(range(VISUAL))] * 2 for kept in pruning.trace.kept)


@pytest.mark.parametrize("text", ["llama", "qwen3"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_naive_loop_prunes_the_same(text: str, version: str) -> None:
    ids, pixels = prompt(4, 8), picture()
    with enable(llava(text), 14, version=version) as pruning:
        found = logits(pruning.model, input_ids=ids, pixel_values=pixels)
    trace = pruning.trace
    plan = trace.schedules[0]
    with torch.no_grad():
        expected, left = sparsevlm(
            llava(text, attention="eager"), ids, pixels, version, dict(zip(plan.layers, plan.keep, strict=True))
        )
    assert [one[0] for one in trace.kept] == [[i for i in kept if i >= 0] for kept in left]
    assert [one[0] for one in trace.merged] == [kept.count(-1) for kept in left]
    assert version == "2.0" or sum(map(sum, trace.merged)) > 0
    assert float((found[:, -1:] - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(("method", "version"), ALL)
def test_a_padded_batch_prunes_as_its_samples_do(model: Any, method: str, version: str) -> None:
    prompts, pixels = [prompt(3, 6), prompt(5, 12, seed=7)], picture(count=2)
    with enable(model, 14, method, version, positions=some) as pruning:
        alone, kept = [], []
        for i, ids in enumerate(prompts):
            alone.append(logits(model, input_ids=ids, pixel_values=pixels[i : i + 1]))
            kept.append([stage[0] for stage in pruning.trace.kept])
        for side in ("left", "right"):
            inputs = batched(*prompts, side=side)
            together = logits(model, **inputs, pixel_values=pixels)
            for i, expected in enumerate(alone):
                assert [stage[i] for stage in pruning.trace.kept] == kept[i]
                assert torch.allclose(together[i][inputs["attention_mask"][i].bool()], expected[0], atol=1e-4)


@pytest.mark.parametrize(("method", "version"), ALL)
def test_generation_with_a_cache_is_generation_without(model: Any, method: str, version: str) -> None:
    inputs = dict(**batched(prompt(3, 6), prompt(5, 12, seed=7)), pixel_values=picture(count=2))
    with enable(model, 14, method, version, positions=some) as pruning:
        ids, scores = generated(model, **inputs)
        trace, predicted = pruning.trace, pruning.trace.planned_kv_lengths
        again, expected = generated(model, **inputs, use_cache=False)
    assert torch.equal(ids, again) and float((scores - expected).abs().max()) < 1e-4
    assert trace.kv_lengths == predicted or (trace.kv_lengths[0], trace.kv_lengths[1:]) == (53, predicted[1:])
    assert not torch.equal(scores, generated(model, **inputs)[1]), "pruning changes something"


def test_kv_lengths_are_as_predicted(model: Any) -> None:
    ids = prompt(4, 8)
    with enable(model, 12) as pruning:
        cache = model(input_ids=ids, pixel_values=picture(), use_cache=True).past_key_values
        trace = pruning.trace
        assert trace.layers == (0, 1, 2) and [len(stage[0]) for stage in trace.kept] == [19, 13, 8]
        assert trace.planned_kv_lengths == trace.kv_lengths == [48, 31, 25, 20]
        assert [layer.keys.shape[2] for layer in cache.layers] == trace.kv_lengths
        one = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 channels, float32
        assert trace.kv_bytes == one * sum(trace.kv_lengths) and trace.dense_kv_bytes == one * 4 * 48
        step = model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[2] for layer in step.past_key_values.layers] == [49, 32, 26, 21]
    assert trace.tokens_per_layer(0) == trace.kv_lengths
    assert trace.equal_tokens(0) == (19 + 13 + 8 + 8) / 4 == 12 and trace.processed_tokens(0) == (36 + 19 + 13 + 8) / 4
    assert trace.flops(0) < trace.dense_flops(0)
    means = pruning.totals.means()
    assert means["samples"] == 1 and means["equal_tokens"] == 12 and means["visual_tokens"] == 36
    assert means["prefill_flops"] == trace.flops(0) and means["kv_bytes"] == trace.kv_bytes


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_llava_next(following: Any, version: str) -> None:
    """Two pictures of unlike shapes: 36 + 42 or 36 + 84 visual tokens, a share of each kept."""
    sizes = torch.tensor([[24, 24], [24, 48]])
    pixels = torch.stack([picture(0, 3), picture(1, 3)])
    counts = [len(f) for f in following.model.get_image_features(pixels, sizes).pooler_output]
    assert counts[0] != counts[1]
    inputs = dict(
        **batched(prompt(3, 6, visual=counts[0]), prompt(4, 9, seed=5, visual=counts[1])), pixel_values=pixels,
        image_sizes=sizes,
    )  # fmt: skip
    dense = logits(following, **inputs)
    for method in ("sparsevlm", "cls"):
        with enable(following, 1.0, method, version) as pruning:
            assert float((logits(following, **inputs) - dense)[inputs["attention_mask"].bool()].abs().max()) < 1e-5
        with enable(following, 0.25, method, version) as pruning:
            ids, scores = generated(following, **inputs)
            trace = pruning.trace
            again, expected = generated(following, **inputs, use_cache=False)
        assert torch.equal(ids, again) and float((scores - expected).abs().max()) < 1e-4
        assert [trace.equal_tokens(i) for i in (0, 1)] == pytest.approx([count / 4 for count in counts], abs=1)


def test_images_and_text_in_one_batch(model: Any) -> None:
    text = prompt(9, 4, visual=0)
    inputs = batched(prompt(3, 6), text)
    alone = logits(model, input_ids=text)
    with enable(model, 14, version="1.0") as pruning:
        found = logits(model, **inputs, pixel_values=picture())
        assert float((found[1][inputs["attention_mask"][1].bool()] - alone[0]).abs().max()) < 1e-4
        assert pruning.totals.samples == pruning.totals.text_only == 1
        assert torch.equal(logits(model, input_ids=text), alone), "text alone runs densely"
        assert pruning.totals.text_only == 2 and torch.equal(
            generated(model, input_ids=text)[0], generated(model, input_ids=text)[0]
        )


def test_one_token_is_not_all_of_them(model: Any) -> None:
    """1 == 1.0, and both have the same hash."""
    inputs = dict(input_ids=prompt(3, 6), pixel_values=picture())
    for retain, left in ((1, 1), (1.0, VISUAL), (1, 1)):
        with enable(model, retain, "cls") as pruning:
            logits(model, **inputs)
        assert len(pruning.trace.kept[0][0]) == left


def test_several_images_are_one_set(model: Any) -> None:
    ids = torch.cat((prompt(3, 4), prompt(2, 6, seed=3)), 1)
    pixels = picture(count=2)
    with enable(model, 20) as pruning:
        generated(model, input_ids=ids, pixel_values=pixels)
    kept = pruning.trace.kept[0][0]
    assert pruning.trace.at_start(0) == 2 * VISUAL and min(kept) < VISUAL <= max(kept)
    assert pruning.trace.equal_tokens(0) == pytest.approx(20, abs=1)


def test_merged_tokens_of_several_images_stand_behind_the_last(model: Any) -> None:
    ids = torch.cat((prompt(3, 4), prompt(2, 6, seed=3)), 1)
    with enable(model, 20, version="1.0") as pruning:
        a, b = generated(model, input_ids=ids, pixel_values=picture(count=2))
        c, d = generated(model, input_ids=ids, pixel_values=picture(count=2), use_cache=False)
    assert torch.equal(a, c) and float((b - d).abs().max()) < 1e-4 and sum(map(sum, pruning.trace.merged)) > 0


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_beams(model: Any, version: str) -> None:
    inputs = dict(**batched(prompt(3, 6), prompt(5, 12, seed=7)), pixel_values=picture(count=2), num_beams=3)
    for method in ("sparsevlm", "cls"):
        with enable(model, 14, method, version):
            assert torch.equal(generated(model, **inputs)[0], generated(model, **inputs, use_cache=False)[0])


def test_a_conversation_goes_on_with_its_cache(model: Any) -> None:
    ids = prompt(4, 8)
    with enable(model, 12, version="1.0") as pruning:
        first = model.generate(
            input_ids=ids, pixel_values=picture(), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        longer = torch.cat((first.sequences, prompt(5, 0, seed=9, visual=0)), 1)
        second, scores = generated(model, input_ids=longer, past_key_values=first.past_key_values)
        pruning._prompt_length = ids.shape[1]
        with torch.no_grad():
            expected = model(input_ids=torch.cat((longer, second), 1), pixel_values=picture()).logits
    assert float((expected[:, longer.shape[1] - 1 : -1] - scores).abs().max()) < 1e-4


def test_adaptive_budgets_follow_the_rank(model: Any) -> None:
    prompts = [prompt(3, 3), prompt(5, 24, seed=7)]
    inputs = dict(**batched(*prompts), pixel_values=picture(count=2))
    with enable(model, 14, adaptive=True) as pruning:
        together, trace = logits(model, **inputs), pruning.trace
        alone = logits(model, input_ids=prompts[0], pixel_values=picture(count=2)[:1])
        ids, scores = generated(model, **inputs)
        again, expected = generated(model, **inputs, use_cache=False)
    counts = [[len(kept) for kept in stage] for stage in trace.kept]
    assert any(a != b for a, b in counts) and counts != [[k, k] for k in trace.schedules[0].keep]
    assert torch.allclose(together[0][inputs["attention_mask"][0].bool()], alone[0], atol=1e-4)
    assert torch.equal(ids, again) and float((scores - expected).abs().max()) < 1e-4


def test_the_oracle_keeps_what_it_names(model: Any) -> None:
    wanted = [{1, 2, 35}, {7}]
    inputs = dict(**batched(prompt(3, 6), prompt(5, 12, seed=7)), pixel_values=picture(count=2))
    with enable(model, 12, "oracle", positions=lambda sample: wanted[sample]) as pruning:
        logits(model, **inputs)
    assert all(wanted[i] <= set(kept) for kept in (pruning.trace.kept[-1],) for i, kept in enumerate(kept))


def test_chance_depends_on_the_seed_and_the_prompt_alone(model: Any) -> None:
    def kept(seed: int, ids: torch.Tensor) -> list[int]:
        with enable(model, 12, "random", seed=seed) as pruning:
            logits(model, input_ids=ids, pixel_values=picture())
        return pruning.trace.kept[-1][0]

    assert kept(0, prompt(3, 6)) == kept(0, prompt(3, 6))
    assert len({tuple(kept(seed, prompt(3, 6, seed=other))) for seed in (0, 1) for other in (0, 5)}) == 4


def test_answers_do_not_judge(model: Any) -> None:
    """Tokens with a label are no question: whatever the answer, the same tokens survive."""
    kept = []
    with enable(model, 12) as pruning:
        for answer in ([5, 6, 7], [50, 51, 52]):
            ids = torch.cat((prompt(3, 6), torch.tensor([answer])), 1)
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100)
            out = model(input_ids=ids, pixel_values=picture(), labels=labels)
            kept.append(pruning.trace.kept)
            assert out.logits.shape[:2] == ids.shape
            expected = torch.nn.functional.cross_entropy(out.logits[0, -4:-1], torch.tensor(answer))
            assert float(out.loss) == pytest.approx(float(expected), rel=1e-5)
        mask = torch.arange(48) < 45
        model(input_ids=ids, pixel_values=picture(), question_mask=mask[None])
        assert pruning.trace.kept == kept[0] == kept[1]


@pytest.mark.parametrize("method", ["sparsevlm", "mico"])
def test_gradients_flow_through_what_is_kept(model: Any, method: str) -> None:
    ids = prompt(3, 6)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 2, -100)
    weights = [model.get_input_embeddings().weight, model.model.multi_modal_projector.linear_2.weight]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            with enable(model, 12, method, version="1.0"):
                model.train()(input_ids=ids, pixel_values=picture(), labels=labels).loss.backward()
            found.append([weight.grad.clone() for weight in weights])
        assert all(float(grad.abs().sum()) > 0 for grad in found[0])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    finally:
        model.gradient_checkpointing_disable()
        model.eval().requires_grad_(False).zero_grad()


def test_a_method_of_your_own(model: Any) -> None:
    """A scorer is a function of the Evidence, a schedule one of budget, tokens and depth."""
    seen: list[Evidence] = []

    def scorer(evidence: Evidence) -> torch.Tensor:
        seen.append(evidence)
        similar = evidence.visual_features_BVD @ evidence.question_embeddings_BQD.transpose(1, 2)
        return (
            similar.amax(2)
            + 0 * evidence.visual_hidden_BVD.sum(2)
            + 0 * evidence.question_hidden_BQD.sum((1, 2))[:, None]
        )

    def schedule(mean: float, visual: int, depth: int) -> Schedule:
        return Schedule(visual, depth, (1,), (int(mean),), (0,))

    ids = prompt(3, 6)
    with enable(model, 10, Method("own", scorer, schedule)) as pruning:
        logits(model, input_ids=ids, pixel_values=picture())
    embeds = model.get_input_embeddings()(ids)[0, -6:]
    features = model.model.get_image_features(picture()).pooler_output[0]
    best = (features @ embeds.T).amax(1).topk(10).indices
    assert pruning.trace.kept == [[sorted(best.tolist())]] and pruning.trace.layers == (1,)
    assert seen[0].layer == 1 and seen[0].original_BV.tolist() == [list(range(VISUAL))] and seen[0].heads is None
    assert seen[0].question_BQ.tolist() == [list(range(39, 45))] and seen[0].at_start == (VISUAL,)


def test_versions_are_rows_like_any_other() -> None:
    assert METHODS["sparsevlm"] is VERSIONS["2.0"] and replace(VERSIONS["1.0"], name="x").recycle


def test_scores_that_are_no_scores_are_refused(model: Any) -> None:
    inputs = dict(input_ids=prompt(3, 6), pixel_values=picture())
    for scorer, message in (
        (lambda evidence: evidence.hidden_BND, r"method 'own': scores of shape \(1, 45, 32\)"),
        (lambda evidence: evidence.real_BV / 0 * 0, "method 'own': scores behind layer 0 that are no numbers"),
    ):
        own = replace(METHODS["random"], name="own", scorer=scorer)
        with enable(model, 9, own), pytest.raises(UserError, match=message):
            logits(model, **inputs)
