"""The published budgets exactly; any other by ratio, with the mean that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, PixtralVisionConfig

from mico.errors import UserError
from mico.visual_tokens.budgets import (
    before,
    check_budget,
    progressive,
    recycled,
    scaled_layers,
    single,
    target,
    tokens_of_picture,
)

PUBLISHED = {  # version: target: chosen, with the merged ones
    "1.0": {
        192: ((300, 200, 110), (309, 204, 113)),
        128: ((303, 110, 36), (312, 117, 39)),
        96: ((238, 48, 26), (249, 55, 27)),
        64: ((66, 30, 17), (82, 32, 18)),
    },
    "2.0": {
        192: ((300, 200, 118),) * 2,
        128: ((238, 108, 60),) * 2,
        96: ((246, 54, 28),) * 2,
        64: ((66, 34, 20),) * 2,
    },
}
CASES = [(version, retain) for version, rows in PUBLISHED.items() for retain in rows]


@pytest.mark.parametrize(("version", "retain"), CASES)
def test_published_budgets(version: str, retain: int) -> None:
    made = progressive(version)(float(retain), 576, 32)
    chosen, present = PUBLISHED[version][retain]
    assert made.layers == (2, 6, 15) and made.keep == chosen
    assert tuple(k + m for k, m in zip(made.keep, made.merged, strict=True)) == present
    k1, k2, k3 = present
    assert made.per_layer() == (576,) * 3 + (k1,) * 4 + (k2,) * 9 + (k3,) * 16
    assert made.equal_tokens == (2 * 576 + 4 * k1 + 9 * k2 + 17 * k3) / 32
    assert made.processed_tokens == (3 * 576 + 4 * k1 + 9 * k2 + 16 * k3) / 32


def test_tokens_really_processed_are_more_than_the_target() -> None:
    made = [progressive("1.0")(float(retain), 576, 32) for retain in (192, 128, 96, 64)]
    assert [int(one.processed_tokens) for one in made] == [206, 145, 114, 82]


@pytest.mark.parametrize(("pruned", "expected"), [(0, (0, 0)), (1, (1, 1)), (276, (83, 9)), (109, (33, 4))])
def test_recycled(pruned: int, expected: tuple[int, int]) -> None:
    assert recycled(pruned) == expected


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, [2, 6, 15]), (40, [3, 8, 19]), (6, [0, 1, 3]), (4, [0, 1, 2]), (3, [0, 1]), (2, [0])]
)
def test_layers_scale_with_the_depth(depth: int, layers: list[int]) -> None:
    assert list(scaled_layers(depth)) == layers


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(("visual", "depth"), [(576, 32), (144, 6), (2880, 32), (1000, 40), (144, 32)])
@pytest.mark.parametrize("share", [1 / 3, 2 / 9, 0.15, 1 / 9, 0.6, 0.9])
def test_other_sizes_meet_the_mean(version: str, visual: int, depth: int, share: float) -> None:
    made = progressive(version)(share * visual, visual, depth)
    assert abs(made.equal_tokens - share * visual) < 1.5
    present = (visual, *(k + m for k, m in zip(made.keep, made.merged, strict=True)))
    assert list(present) == sorted(present, reverse=True) and made.keep[-1] >= 1


def test_a_quarter_of_the_tokens_has_a_quarter_of_the_budget() -> None:
    assert progressive("2.0")(48.0, 144, 32).keep in {(75, 50, k) for k in (29, 30)}


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_all_tokens(version: str) -> None:
    made = progressive(version)(144.0, 144, 6)
    assert made.keep == (144,) * 3 and made.merged == (0,) * 3 and made.equal_tokens == 144


@pytest.mark.parametrize(("mean", "visual", "depth"), [(192.0, 576, 32), (16.0, 144, 6), (37.0, 576, 32)])
def test_one_pruning_has_the_same_mean(mean: float, visual: int, depth: int) -> None:
    once, ahead = single(mean, visual, depth), before(mean, visual, depth)
    assert len(once.layers) == 1 and abs(once.equal_tokens - mean) <= 0.5
    assert ahead.layers == (-1,) and ahead.equal_tokens == ahead.processed_tokens == mean


@pytest.mark.parametrize(
    ("make", "least"), [(progressive("1.0"), "40.0.*at least 41"), (progressive("2.0"), "36.9.*at least 37")]
)
def test_a_budget_below_the_first_layers_is_refused(make, least: str) -> None:
    with pytest.raises(UserError, match=f"retain=20 of 576 visual tokens.*{least}"):
        make(20.0, 576, 32)


def test_one_layer_cannot_be_pruned() -> None:
    with pytest.raises(UserError, match="has 1 layer"):
        single(10.0, 100, 1)


@pytest.mark.parametrize(("retain", "tokens"), [(48, 48), (500, 144), (0.25, 36), (1.0, 144), (1, 1)])
def test_target(retain: float, tokens: float) -> None:
    assert target(retain, 144) == tokens


def config(following: bool = False, **more: Any) -> Any:
    """Of 7B models: CLIP at 336 pixels in patches of 14."""
    eyes = CLIPVisionConfig(image_size=336, patch_size=14)
    return (LlavaNextConfig if following else LlavaConfig)(vision_config=eyes, text_config=LlamaConfig(), **more)


def test_tokens_of_a_picture() -> None:
    assert tokens_of_picture(config()) == 576
    assert tokens_of_picture(config(vision_feature_select_strategy="full")) == 577
    smaller = LlavaConfig(vision_config=CLIPVisionConfig(image_size=224, patch_size=14), text_config=LlamaConfig())
    assert smaller.image_seq_length == 576 and tokens_of_picture(smaller) == 256  # the field is often left as it was
    assert tokens_of_picture(config(following=True)) is None
    assert tokens_of_picture(LlavaConfig(vision_config=PixtralVisionConfig(), text_config=LlamaConfig())) is None


def test_a_budget_is_checked_by_the_config_alone() -> None:
    schedule = progressive("2.0")
    for retain in (192, 576):
        check_budget(config(), retain, schedule)
    with pytest.raises(UserError, match="--retain-tokens 577: a picture has 576 visual tokens, so none would be prun"):
        check_budget(config(), 577, schedule)
    with pytest.raises(UserError, match=r"retain=20 of 576 visual tokens.*ask for at least 37"):
        check_budget(config(), 20, schedule)
    check_budget(config(following=True), 20, schedule)
