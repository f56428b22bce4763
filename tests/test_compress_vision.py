"""Compression on image-text pairs: visual tokens in the statistics, vision tower and projector compressed too."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import mico
from mico.activations import Carrier
from mico.adapters import family_of, with_towers
from mico.adapters.family import lookup
from mico.channels.meters import SecondMoments
from mico.console import Console
from mico.errors import UserError
from mico.image_text import load_image_text, pairs
from mico.loading import load_processor
from mico.packed.linear import PackedLinear
from mico.settings import Compression
from mico.solve import Finished, Solver
from mico.walk import walk
from tests.adapters.llava_models import TEXT, VISION, tiny_llava
from tests.adapters.test_families import build
from tests.pictures import IMAGE, archive, instruct, llava_folder, picture
from tests.test_walk import Rows, disturb, same
from tests.tiny import VOCABULARY, save_model

LAYERS = VISION["num_hidden_layers"]
BLOCKS = LAYERS + 1 + TEXT["num_hidden_layers"]  # tower, projector, language model


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    llava_folder(root / "tiny")
    instruct(root, 24)
    archive(root / "pairs.tar", 8)
    return root


def options(space: Path, **more: Any) -> dict[str, Any]:
    common = dict(calib=str(space / "pairs.json"), image_folder=str(space / "images"), nsamples=16, batch_size=2)
    small = dict(eval="none", sparsity=0.25, wbits=4, embed_bits=8, n_groups=2)
    return common | small | dict(statistics=str(space / "statistics"), groups=str(space / "groups")) | more


@pytest.fixture(scope="module")
def towers(space: Path) -> dict[str, Any]:
    return mico.compress(
        str(space / "tiny"), save=str(space / "towers"), compress_vision=True, compress_projector=True,
        **options(space),
    )  # fmt: skip


# --- the walk -------------------------------------------------------------------------------------------------------


def seeing_model() -> tuple[Any, Any]:
    model = tiny_llava(vocabulary=VOCABULARY + 4, image=IMAGE)
    return model, with_towers(family_of(model.config), model.config, vision=True, projector=True)


def batches_of(space: Path, size: int = 3, count: int = 16) -> list[dict[str, Tensor]]:
    processor = load_processor(space / "tiny")
    return pairs(load_image_text(space / "pairs.json", space / "images"), processor, count, 128, 0).batches(size)


def hooked(
    model: Any, family: Any, batches: list[dict[str, Tensor]], blocks: int = BLOCKS
) -> dict[tuple[int, str], list[Tensor]]:
    """Inputs of every stream in plain forwards of the whole model, batch by batch."""
    found, handles = {}, []
    for index in range(blocks):
        path, streams = family.place(index)
        for stream in streams:
            rows = found.setdefault((index, stream.name), [])
            keep = lambda _, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]).clone())  # noqa: E731
            handles.append(lookup(lookup(model, path), stream.linears[0]).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_the_walk_measures_what_a_whole_forward_shows_visual_tokens_included(space: Path) -> None:
    model, family = seeing_model()
    batches = batches_of(space)
    expected = hooked(model, family, batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    seen = sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch)
    assert len({batch["input_ids"].shape[1] for batch in batches}) > 1 and 0 < seen < 16
    for block in walk(model, family, batches):
        for name, meter in block.measure(Rows).items():
            same(meter.batches, expected[block.index, name])
        patches = (5 if name.startswith("vision") else 4) * seen  # those of the tower with its own token
        counts = {stream: m.count for stream, m in block.measure(SecondMoments.empty).items()}
        assert set(counts.values()) == {tokens if block.index > LAYERS else patches}
        for name in block.streams:
            del expected[block.index, name]
    assert not expected


def test_moments_do_not_depend_on_how_samples_are_batched(space: Path) -> None:
    """No sample sees a padding token: the moments of batches are those of the samples one by one."""
    model, family = seeing_model()
    found = []
    for size in (1, 5):
        blocks = walk(model, family, batches_of(space, size))
        found.append([block.measure(SecondMoments.empty) for block in blocks])
    for alone, together in zip(*found, strict=True):
        for name, moments in alone.items():
            assert moments.count == together[name].count
            wanted = together[name].gram_CC
            torch.testing.assert_close(moments.gram_CC, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_blocks_see_through_what_is_compressed_beside_the_dense_path(space: Path) -> None:
    model, family = seeing_model()
    dense, batches = copy.deepcopy(model), batches_of(space)
    found = {}
    for block in walk(model, family, batches, paired=True):
        for name, linears in block.streams.items():
            found[block.index, name] = block.measure_paired(name)
            for path in linears:
                disturb(block, path)
    before, after = hooked(dense, family, batches), hooked(model, family, batches)
    assert found.keys() == before.keys()
    for key, moments in found.items():
        x_TC, dense_TC = torch.cat(after[key]).double(), torch.cat(before[key]).double()
        for got, wanted in (
            (moments.total.gram_CC, x_TC.T @ x_TC), (moments.cross_CC, dense_TC.T @ x_TC)
        ):  # fmt: skip
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("paired", [False, True])
def test_batches_halved_on_the_way_change_nothing(space: Path, monkeypatch: pytest.MonkeyPatch, paired: bool) -> None:
    def measured() -> tuple[list[Tensor], list[str]]:
        model, family = seeing_model()
        notes: list[str] = []
        found = []
        for block in walk(model, family, batches_of(space, 4), paired=paired, tell=notes.append):
            found += [moments.gram_CC for moments in block.measure(SecondMoments.empty).values()]
            disturb(block, next(iter(block.streams[block.kinds[-1].name])))
        return found, notes

    expected, _ = measured()
    record, failed = Carrier._record, set()

    def failing(self: Carrier, batch: Any) -> Tensor:
        first = next(iter(self._blocks))
        if len(next(iter(batch.values()))) > 1 and first not in failed:
            failed.add(first)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(self, batch)

    monkeypatch.setattr(Carrier, "_record", failing)
    found, notes = measured()
    assert len(notes) == 3 and all("halved to 2 windows" in note for note in notes)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_tiles_of_llava_next_are_measured_in_the_tower_too() -> None:
    model = build("llava-next-mistral")
    family = with_towers(family_of(model.config), model.config, vision=True, projector=True)
    seen = dict(pixel_values=torch.randn(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(3)))
    seen |= dict(image_sizes=torch.tensor([[8, 16]]))  # two tiles and the whole
    with torch.no_grad():
        visual = len(model.model.get_image_features(**seen).pooler_output[0])
    batches = [seen | dict(input_ids=torch.tensor([[5, 6, *[79] * visual, 7]])), dict(input_ids=torch.tensor([[5, 6]]))]
    expected = hooked(model, family, batches, blocks=family.offset + 2)
    for block in walk(model, family, batches):
        for name, meter in block.measure(Rows).items():
            same(meter.batches, expected.pop((block.index, name)))
    assert not expected


# --- compress -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def seen_logits(model: Any, space: Path, image: Image.Image | None = None) -> Tensor:
    processor = load_processor(space / "tiny")
    text = "USER: <image>\nWhat is it? ASSISTANT: A document."
    inputs = processor(images=[image or picture(77)], text=[text], return_tensors="pt")
    return model(**inputs.to(model.dtype)).logits


def test_towers_are_packed_counted_and_read_back(space: Path, towers: dict[str, Any]) -> None:
    facts, layers = towers["architecture"], towers["layers"]
    assert facts["towers"] == "vision tower, projector" and facts["coverage"] > 0.97 and facts["vision"] == 0
    assert towers["calibration"].startswith("image-text pairs of pairs.json from")
    assert [line["block"] for line in layers] == sorted(line["block"] for line in layers)
    assert {line["block"] for line in layers} == set(range(BLOCKS))
    dense, packed = (
        tiny_llava(VOCABULARY + 4, IMAGE), mico.load(space / "towers", execution="dense", dtype=torch.float32)
    )  # fmt: skip
    kinds = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    linears = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.keys() == linears.keys() == {line["layer"] for line in layers} | {"lm_head"}
    for line in layers:
        blob, weight = kinds[line["layer"]], linears[line["layer"]].weight
        assert line["weights"] == weight.numel() and line["stored"]["bias"] % 16 == 0
        assert blob.dense(torch.float32).shape == weight.shape
        assert line["sparsity"] == pytest.approx(0.25, abs=0.01)
    size = towers["size"]
    assert size["stored_bits"] == sum(sum(line["stored"].values()) for line in layers)
    assert size["true_bits"] == size["stored_bits"] / sum(linears[line["layer"]].weight.numel() for line in layers)
    assert size["bytes"] - size["packed_bytes"] < 200 * len(packed.state_dict())  # headers
    assert (seen_logits(packed, space) - seen_logits(dense, space)).abs().max() > 0
    packed.save_pretrained(space / "again")
    load_processor(space / "towers")  # it came along
    again = mico.load(space / "again", execution="dense", dtype=torch.float32)
    assert torch.equal(seen_logits(again, space), seen_logits(packed, space))
    mico.export(str(space / "towers"), to="dense", save=str(space / "dense"), dtype="float32")
    plain = AutoModelForImageTextToText.from_pretrained(space / "dense").eval()
    assert torch.equal(seen_logits(plain, space), seen_logits(packed, space))


def test_the_report_names_what_is_seen_beside_what_is_read(space: Path, towers: dict[str, Any]) -> None:
    text = (space / "towers" / "report.md").read_text()
    assert "| block | q | k | v | out | fc1 | fc2 | linear_1 | linear_2 | o | gate | up | down |" in text
    assert "| vision_attn_in |" in text and "| projector_out |" in text and "| mlp_out |" in text
    assert "image-text pairs of pairs.json" in text and (space / "towers" / "report.html").is_file()


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(
    space: Path, towers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = dict(save=str(space / "stopped"), compress_vision=True, compress_projector=True, **options(space))
    compress, stop = Solver._compress, LAYERS + 2  # in the language model

    def stopping(self: Any, block: Any, *rest: Any) -> Any:
        if block.index == stop:
            raise KeyboardInterrupt
        return compress(self, block, *rest)

    for stop in (1, LAYERS + 2):  # noqa: B007 (read by `stopping`)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Solver, "_compress", stopping)
            mico.compress(str(space / "tiny"), **again)
    report = mico.compress(str(space / "tiny"), **again)
    assert report["resumed_blocks"] == stop
    for file in ("model.safetensors", "config.json"):
        assert (space / "stopped/model" / file).read_bytes() == (space / "towers/model" / file).read_bytes()
    with pytest.raises(UserError, match="towers"):
        mico.compress(str(space / "tiny"), **again | dict(compress_projector=False))


def test_pictures_reach_the_language_model_streamed_or_not(space: Path) -> None:
    """An archive as data, the vision tower dense: whole in memory and block by block give the same bytes."""
    more = dict(calib=str(space / "pairs.tar"), image_folder=None, nsamples=8, statistics=None, groups=None)
    for name, stream in (("whole", False), ("streamed", True)):
        report = mico.compress(
            str(space / "tiny"), save=str(space / name), stream=stream,
            **options(space, **more) | dict(method="sparsegpt", use_mi_grouping=False, n_groups="auto"),
        )  # fmt: skip
        assert "8 samples with 8 pictures" in report["calibration"] and "towers" not in report["architecture"]
        assert report["architecture"]["vision"] > 0
    weights = [(space / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "streamed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("wbits", [8, 4])
def test_it_answers_about_a_picture_at_few_bits(space: Path, wbits: int, tmp_path: Path) -> None:
    mico.compress(
        str(space / "tiny"), save=str(tmp_path / "run"), sparsity=0, wbits=wbits, method="rtn", eval="none",
        calib=str(space / "pairs.tar"), nsamples=4, compress_vision=True, compress_projector=True,
    )  # fmt: skip
    model = mico.load(tmp_path / "run", dtype=torch.float32)
    processor = load_processor(tmp_path / "run")
    inputs = processor(images=[picture(5)], text=["USER: <image>\nWhat is it? ASSISTANT:"], return_tensors="pt")
    answer = model.generate(**inputs.to(model.dtype), max_new_tokens=5, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 5
    near = (seen_logits(model, space) - seen_logits(tiny_llava(VOCABULARY + 4, IMAGE), space)).abs().mean()
    assert near < (0.05 if wbits == 8 else 0.8)


def test_the_pictures_of_digits_that_come_with_mico_calibrate_any_model_that_sees(space: Path) -> None:
    found = [
        mico.calibrate(
            str(space / "tiny"), calib="grids", nsamples=5, seed=seed, batch_size=1, save=str(space / f"grids-{name}")
        )
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert "image-text pairs of grids from mico's own pictures of digits, seed 3" in found[0]["calibration"]
    assert "20 of them visual, in 5 samples with 5 pictures" in found[0]["calibration"]
    facts = [[record["rms"] for record in one["streams"]] for one in found]
    assert facts[0] == facts[1] != facts[2]
    assert found[0]["tokens"] == found[0]["streams"][0]["rows"]


def test_halved_batches_of_the_towers_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tower has batches of its own; those of the language model are the last ones."""
    blocks = [SimpleNamespace(index=index, halvings=count) for index, count in enumerate((2, 2, 0, 1))]
    team = SimpleNamespace(size=1, rank=0, gathered=lambda own: [own])
    preparation: Any = SimpleNamespace(team=team, walk=lambda *_: iter(blocks), blocks=lambda: 4, device="cpu")
    solver = Solver(preparation, Compression(method="rtn"), None, Console())
    monkeypatch.setattr(Solver, "_compress", lambda *_: Finished({}, {}, [dict(error=0.0)]))
    assert len(solver.pass_through(None, 0)) == 4  # type: ignore[arg-type]
    assert solver.processes()[0]["batch_halvings"] == 2


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(calib="docs", image_folder=None, compress_vision=True), "--compress-vision needs pictures"),
        (dict(calib="docs"), "--image-folder .*: --calib docs is a text"),
        (dict(compress_projector=True, stream=True), "--compress-projector needs the whole model in memory"),
        (dict(calib="nowhere.json"), r"nowhere\.json cannot be read"),
        (dict(image_folder="/nowhere"), "--image-folder /nowhere is not a folder"),
        (dict(seqlen=5), "the picture reaches to token .*: --seqlen 5 is too short"),
        (dict(nsamples=25), "asks for 25 samples and .* has 24"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(
    space: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mico.compress(str(space / "tiny"), save=str(tmp_path / "run"), **options(space) | changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_models_without_eyes_are_refused(space: Path, tmp_path: Path) -> None:
    text = str(save_model(tmp_path / "llama"))
    with pytest.raises(UserError, match="holds pictures, model_type 'llama' sees none"):
        mico.compress(text, **options(space))
    with pytest.raises(UserError, match="--compress-vision needs pictures"):
        mico.compress(text, calib="docs", compress_vision=True)
    config = copy.deepcopy(seeing_model()[0].config)
    config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UserError, match="a vision tower 'siglip_vision_model' is not supported"):
        with_towers(family_of(config), config, vision=True, projector=False)
    with pytest.raises(UserError, match="--compress-vision: mico plan forecasts the language model alone"):
        mico.plan(text, calib="docs", compress_vision=True)
