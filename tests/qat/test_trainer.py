"""The optimizer's groups, and distillation against a plain computation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mico.adapters import family_of
from mico.errors import UserError
from mico.qat.corpus import TokenWindows
from mico.qat.modules import qat_modules, quantize_linears
from mico.qat.recipe import Recipe, bits_of
from mico.qat.trainer import Distillation, QATTrainer
from tests.tiny import random_model


class Teacher(nn.Module):
    def __init__(self, logits_BTV: torch.Tensor) -> None:
        super().__init__()
        self.logits_BTV = nn.Parameter(logits_BTV)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits_BTV)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distillation_mixes_both_losses(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student_BTV = torch.randn(2, 5, 7, generator=generator).requires_grad_()
    taught_BTV = torch.randn(2, 5, 7, generator=generator)
    labels_BT = torch.randint(7, (2, 5), generator=generator)
    loss = Distillation(Teacher(taught_BTV), share)(SimpleNamespace(logits=student_BTV), labels_BT, 20)
    entropy = apart = 0.0
    for b in range(2):
        for t in range(4):
            p, q = (x[b, t].detach().double().softmax(0) for x in (taught_BTV, student_BTV))
            entropy -= q[labels_BT[b, t + 1]].log().item()
            apart += (p * (p / q).log()).sum().item()
    assert loss.item() == pytest.approx(((1 - share) * entropy + share * apart) / 20, rel=1e-5)
    loss.backward()
    assert student_BTV.grad is not None and student_BTV.grad[:, -1].abs().sum() == 0
    plain = Distillation(Teacher(taught_BTV), share)(SimpleNamespace(logits=student_BTV.detach()), labels_BT)
    assert plain.item() == pytest.approx(entropy / 8, rel=1e-5)  # evaluation: cross-entropy alone


def test_steps_have_a_rate_of_their_own_and_no_decay(tmp_path: Path) -> None:
    model = random_model("llama")
    quantize_linears(model, family_of(model.config), 2, 16, "mse", {})
    recipe = Recipe(w_bits=2, learning_rate=1e-3, weight_decay=0.1, max_steps=1)
    trainer = QATTrainer(
        model=model.requires_grad_(True), args=recipe.arguments(tmp_path, True, True), scale_learning_rate=7e-3,
        train_dataset=TokenWindows(torch.zeros(4, 8, dtype=torch.long)),
    )  # fmt: skip
    weights, others, steps = trainer.create_optimizer().param_groups
    modules = qat_modules(model).values()
    assert {id(p) for p in steps["params"]} == {id(module.weight_scale) for module in modules}
    assert {id(module.weight) for module in modules} <= {id(p) for p in weights["params"]}
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 0.1)
    assert (steps["lr"], steps["weight_decay"]) == (7e-3, 0.0) and others["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in (weights, others, steps)) == len(list(model.parameters()))


def test_what_is_not_trained_is_held_in_what_is_multiplied_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # of DeepSpeed
    assert (Recipe().precision, Recipe(bf16=True).precision) == ("float32", "bfloat16")
    for cast in (dict(enabled=False, dtype="bfloat16"), dict(enabled=True, dtype="float16"), None):
        (tmp_path / "zero.json").write_text(json.dumps(dict(torch_autocast=cast)))
        assert Recipe(deepspeed=str(tmp_path / "zero.json")).precision == "float32"


def test_recipe_defaults_are_those_of_the_paper_by_width() -> None:
    assert [Recipe(w_bits=bits_of(text)).rate for text in ("1", "1.58", "2", "3", "4")] == [2e-5] * 3 + [1e-5] * 2
    assert Recipe(learning_rate=1e-4).scale_rate == 1e-4
    assert bits_of("1.58") == 1.58 and bits_of("3") == 3


@pytest.mark.parametrize("offload", ["", "_offload"])
@pytest.mark.parametrize("stage", [2, 3])
def test_shipped_deepspeed_configurations_are_read_and_filled(
    stage: int, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    file = Path(__file__).parents[2] / "pipelines" / "deepspeed" / f"zero{stage}{offload}.json"
    config = HfDeepSpeedConfig(str(file))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # of DeepSpeed
    recipe = Recipe(deepspeed=str(file))
    assert recipe.precision == "bfloat16" and recipe.weights_apart == (stage == 3)
    assert config.is_zero3() == (stage == 3) and config.get_value("zero_optimization.stage") == stage
    assert config.is_false("bf16.enabled")  # masters stay float32
    assert config.is_true("torch_autocast.enabled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(w_bits=5), "--w-bits 5: choose from 1, 1.58, 2, 3, 4"),
        (dict(init="random"), "--init random: choose from mse, paper"),
        (dict(max_steps=0), "--max-steps 0: must be at least 1"),
        (dict(learning_rate=-1.0), "--learning-rate -1.0: must be above 0"),
        (dict(kd_weight=1.5), "--kd-weight 1.5: must be from 0 to 1"),
        (dict(deepspeed="nowhere.json"), "--deepspeed nowhere.json: no such file"),
        (dict(lr_scheduler_type="sine"), "--lr-scheduler-type sine: choose from cosine, linear"),
        (dict(warmup_steps=-1.0), "--warmup-steps -1.0: must be 0 or more"),
        (dict(fsdp="full_shard quickly"), "--fsdp quickly: choose from full_shard"),
        (dict(report_to="mlflow"), "--report-to mlflow: choose from tensorboard, wandb, none"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as told:
        Recipe(**options)  # type: ignore[arg-type]
    assert str(told.value).startswith(message)


def test_a_width_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"--w-bits two: choose from 1, 1\.58, 2, 3, 4"):
        bits_of("two")
