"""Training under pruned visual tokens: rows, the loss against a naive one, what is trained, what is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mico.adapters import family_of
from mico.errors import UserError
from mico.image_text import UNLABELLED, Sample, collate
from mico.loading import load_processor
from mico.metrics.vision.run import Tokens
from mico.qat.answers import Answers, read_answers
from mico.qat.lora import merge_adapters, with_adapters
from mico.qat.pruned import PrunedTrainer, known_answers, with_question
from mico.qat.sparsevlm_job import Pruned
from mico.visual_tokens import enable
from tests.pictures import archive, instruct, llava_folder
from tests.pictures import picture as drawn
from tests.visual_tokens.tiny import llava, logits, numbers, picture, prompt

KEPT = Tokens(12)
SHARE = 0.3


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(llava_folder(tmp_path_factory.mktemp("llava")))


def row(question: int, answer: int, seed: int, seen: bool = True) -> dict[str, torch.Tensor]:
    ids = prompt(2, question, seed) if seen else prompt(2, question, seed, visual=0)
    words = torch.randint(3, 79, (1, answer), generator=numbers(50 + seed))
    labels = torch.cat((torch.full_like(ids, UNLABELLED), words), 1)
    return dict(input_ids=torch.cat((ids, words), 1), labels=labels) | (
        dict(pixel_values=picture(seed)) if seen else {}
    )


ROWS = [row(5, 2, 0), row(9, 4, 1), row(6, 3, 2, seen=False)]


class Rows(list):
    """Rows as `Answers` batches them."""

    @staticmethod
    def batch(rows: Any) -> dict[str, torch.Tensor]:
        return collate(rows, 0)


def adapted(model: Any, seed: int = 0) -> Any:
    """A model with adapters that have learnt something: peft starts them at 0."""
    with torch.random.fork_rng():
        made = with_adapters(model, family_of(model.config), rank=4, alpha=8, dropout=0.0, seed=seed)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=numbers(len(name)))
    return made


def trainer(model: Any, folder: Path, tokens: Tokens = KEPT, share: float = SHARE, **options: Any) -> PrunedTrainer:
    arguments = Pruned(max_steps=1, **options).arguments(folder, True, True)
    return PrunedTrainer(model=model, args=arguments, tokens=tokens, share=share, train_dataset=Rows(ROWS))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_every_answer_is_a_row_with_what_was_said_before(processor: Any) -> None:
    turns = (("What is it?", "A document."), ("And then?", "Its end."))
    answers = Answers([Sample(turns, drawn(0), "here"), Sample(turns[:1], None, "there")], processor, 128)
    rows = [answers[index] for index in range(len(answers))]
    texts = [processor.tokenizer.decode(r["labels"][r["labels"] != UNLABELLED]) for r in rows]
    assert [text.strip() for text in texts] == ["A document.</s>", "Its end.</s>", "A document.</s>"]
    said = processor.tokenizer.decode(rows[1]["input_ids"][rows[1]["labels"] == UNLABELLED])
    assert said.count("A document.") == 1 and said.rstrip().endswith("And then? ASSISTANT:")
    assert ["pixel_values" in r for r in rows] == [True, True, False] and not answers.cut
    batch = answers.batch(rows)
    longest = max(r["input_ids"].shape[1] for r in rows)
    assert batch["labels"].shape == batch["attention_mask"].shape == (3, longest) and len(batch["pixel_values"]) == 2
    assert all(
        torch.equal(batch["input_ids"][i, -r["input_ids"].shape[1] :], r["input_ids"][0]) for i, r in enumerate(rows)
    )


def test_an_answer_behind_the_limit_teaches_nothing_and_is_counted(processor: Any) -> None:
    turns = (("What is it?", "A document."), ("And then?", "Its end."))
    whole = Answers([Sample(turns, drawn(0), "here")], processor, 128)[1]
    start = int((whole["labels"] != UNLABELLED).nonzero()[0, 1])
    answers = Answers([Sample(turns, drawn(0), "here")], processor, start)
    assert bool((answers[1]["labels"] == UNLABELLED).all()) and answers.cut == {1}  # not the first answer instead
    assert answers[1]["input_ids"].shape == (1, start)
    assert bool((answers[0]["labels"] != UNLABELLED).any()) and answers.cut == {1}
    with pytest.raises(UserError, match="here: --seqlen 5 is shorter than its picture"):
        Answers([Sample(turns, drawn(0), "here")], processor, 5)[0]


def test_pictures_of_several_tiles_are_filled_up(processor: Any) -> None:
    rows = [dict(ROWS[0], pixel_values=torch.ones(1, tiles, 3, 8, 8)) for tiles in (2, 3)]
    batch = Answers([], processor, 128).batch(rows)
    assert batch["pixel_values"].shape == (2, 3, 3, 8, 8)
    assert batch["pixel_values"].flatten(2).sum(2).tolist() == [[192, 192, 0], [192] * 3]


def test_grids_are_held_out_by_their_digits(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mico.qat.answers.PICTURES", 5)
    monkeypatch.setattr("mico.qat.answers.HELD_PICTURES", 3)
    data, again = (read_answers(processor, 128, train_file="grids", seed=0) for _ in range(2))
    assert (len(data.train), len(data.held)) == (40, 24) and data.digests == again.digests
    assert data.digests != read_answers(processor, 128, train_file="grids", seed=1).digests
    assert all(isinstance(sample.picture, Image.Image) for sample in data.train.samples)
    assert "40 answers to train on, 40 of them about a picture, 24 to evaluate on" in data.describe()


def test_conversations_are_held_out_whole(processor: Any, tmp_path: Path) -> None:
    data = read_answers(processor, 128, train_file=str(instruct(tmp_path)), image_folder=str(tmp_path / "images"),
                        eval_share=0.25)  # fmt: skip
    places = [{sample.place for sample in part.samples} for part in (data.train, data.held)]
    assert [len(found) for found in places] == [9, 3] and not places[0] & places[1]
    assert len(data.train) + len(data.held) == 12 + 3  # three have two answers
    other = archive(tmp_path / "pairs.tar")
    given = read_answers(processor, 128, train_file=str(other), eval_file=str(other))
    assert len(given.train) == len(given.held) == 6


# --- loss -----------------------------------------------------------------------------------------------------------


def naive_loss(student: Any, teacher: Any, tokens: Tokens, share: float) -> float:
    """Row by row without padding, from whole logits, in float64."""
    total, count = 0.0, 0
    for one in ROWS:
        inputs = {name: x for name, x in one.items() if name != "labels"}
        length = int((one["labels"] == UNLABELLED).sum())
        asked = torch.arange(one["labels"].shape[1])[None] < length
        with enable(student, tokens.retain, tokens.method, tokens.version):
            found = logits(student, **inputs, question_mask=asked)[0].double().log_softmax(-1)
        taught = logits(teacher, **inputs)[0].double().log_softmax(-1)
        for place in range(length, one["labels"].shape[1]):
            entropy = -found[place - 1, one["labels"][0, place]]
            apart = (taught[place - 1].exp() * (taught[place - 1] - found[place - 1])).sum()
            total, count = total + float((1 - share) * entropy + share * apart), count + 1
    return total / count


@pytest.mark.parametrize(
    ("method", "version", "share"),
    [("sparsevlm", "2.0", 0.3), ("sparsevlm", "1.0", 1.0), ("fastv", "2.0", 0.0), ("cls", "2.0", 0.3)],
)
def test_the_loss_is_that_of_a_naive_computation(tmp_path: Path, method: str, version: str, share: float) -> None:
    """The teacher of the naive one is a model without adapters that nothing is pruned of."""
    tokens, model = Tokens(12, method, version), adapted(llava())
    made = trainer(model, tmp_path, tokens, share)
    model.train()
    loss = made.compute_loss(model, collate(ROWS, 0), num_items_in_batch=torch.tensor(9))
    student = adapted(llava()).get_base_model()
    expected = naive_loss(student, llava(), tokens, share)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert float(naive_loss(student, llava(), Tokens(36), share)) != pytest.approx(expected, abs=1e-3)  # pruning tells
    with torch.no_grad():
        evaluated = made.compute_loss(model, collate(ROWS, 0))
    assert float(evaluated) == pytest.approx(naive_loss(student, llava(), tokens, 0.0), abs=1e-4)
    assert model.training and made._taught_BKV is None  # left as it was; no teacher in evaluation


def test_a_batch_without_an_answer_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    model = adapted(llava())
    rows = [one | dict(labels=torch.full_like(one["labels"], UNLABELLED)) for one in ROWS]
    loss = trainer(model, tmp_path).compute_loss(model, collate(rows, 0), num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_have_gradients_and_all_of_them(tmp_path: Path, checkpointing: bool) -> None:
    model, plain = adapted(llava()), adapted(llava())
    if checkpointing:
        model.gradient_checkpointing_enable()
    for one in (model, plain):
        one.train()
        trainer(one, tmp_path).compute_loss(one, collate(ROWS, 0)).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} and len(trained) == 2 * 7 * 4
    for (name, found), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if name in trained:
            assert found.grad is not None and expected.grad is not None and float(found.grad.abs().max()) > 0
            assert torch.allclose(found.grad, expected.grad, atol=1e-6)


def test_what_the_pruned_model_generates_is_what_it_knows() -> None:
    """Training, evaluation and generation keep the same tokens: an answer written under pruning is right there."""
    model, rows = llava(), Rows()
    with enable(model, KEPT.retain) as pruning:
        for seed in range(4):
            ids, pixels = prompt(3, 5 + seed, seed), picture(seed)
            written = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, min_new_tokens=3,
                                     do_sample=False)  # fmt: skip
            labels = torch.where(torch.arange(written.shape[1]) < ids.shape[1], UNLABELLED, written)
            rows.append(dict(input_ids=written, labels=labels, pixel_values=pixels))
    assert pruning.totals.samples == 4
    found = known_answers(model, rows, 3, KEPT, lambda _: None)
    assert (found["right"], found["answers"], found["tokens"]) == (1.0, 4, 12)
    rows[0]["labels"][0, -1] = (rows[0]["labels"][0, -1] + 1) % 79
    assert known_answers(model, rows, 3, KEPT, lambda _: None)["right"] == 0.75
    dense = known_answers(model, rows, 3, None, lambda _: None)
    inputs = [{name: x for name, x in one.items() if name != "labels"} for one in rows]
    alone = [logits(model, **one)[0, -4:-1].double().log_softmax(-1) for one in inputs]
    losses = [-found[torch.arange(3), one["labels"][0, -3:]] for found, one in zip(alone, rows, strict=True)]
    assert dense["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def test_logits_are_asked_for_from_the_first_answer_on() -> None:
    inputs = with_question(collate(ROWS, 0))
    assert inputs["logits_to_keep"] == 5  # four labels in the longest answer, and the token before them
    assert torch.equal(inputs["question_mask"], inputs["labels"] == UNLABELLED)


# --- adapters -------------------------------------------------------------------------------------------------------


def test_merged_weights_answer_as_the_adapters_do() -> None:
    model, merged = adapted(llava("qwen3")), llava("qwen3")
    ids, pixels = prompt(3, 6), picture()
    before = logits(merged, input_ids=ids, pixel_values=pixels)
    assert merge_adapters(model, merged) == 4 * 7
    expected = logits(model.eval(), input_ids=ids, pixel_values=pixels)
    assert torch.allclose(logits(merged, input_ids=ids, pixel_values=pixels), expected, atol=1e-5)
    assert float((expected - before).abs().max()) > 0.1


def test_merged_weights_are_rounded_once_to_what_is_stored() -> None:
    model, merged = adapted(llava()), llava().bfloat16()
    name = "model.language_model.layers.1.mlp.up_proj"
    lora = model.get_base_model().get_submodule(name)
    weight_RC = merged.get_submodule(name).weight.float()
    expected = weight_RC + 2 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    merge_adapters(model, merged)
    assert torch.equal(merged.get_submodule(name).weight, expected.bfloat16())


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_rank=0), "--lora-rank 0: must be at least 1"),
        (dict(lora_alpha=0.0), "--lora-alpha 0.0: must be above 0"),
        (dict(lora_dropout=1.0), "--lora-dropout 1.0: must be from 0 to below 1"),
        (dict(kd_weight=-0.1), "--kd-weight -0.1: must be from 0 to 1"),
        (dict(fsdp="full_shard"), "--method sparsevlm trains adapters, a few parameters"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        Pruned(**options)
    assert str(told.value).startswith(message)


def test_a_third_of_the_visual_tokens_stays_by_default() -> None:
    assert Pruned().tokens(576).retain == 192 and Pruned().tokens(144).retain == 48
    assert Pruned(retain_tokens=20).tokens(144) == Tokens(20, "sparsevlm", "2.0", False)
    with pytest.raises(UserError, match="choose from"):
        Pruned(token_method="best").tokens(144)
