"""LLaVA: the language model is compressed and the rest stays as it was, images are seen as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mico
from mico import loading
from mico.adapters import family_of
from mico.errors import UserError
from mico.loading.safety import tensor_shapes
from mico.packed.linear import PackedLinear
from tests.adapters.llava_models import TEXT, seeing, tiny_llava
from tests.tiny import VOCABULARY, train_tokenizer
from tests.workspace import make_texts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("llava")
    tiny_llava().save_pretrained(root / "tiny")
    train_tokenizer().save_pretrained(root / "tiny")
    (root / "tiny" / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    report = mico.compress(
        str(root / "tiny"), save=str(root / "run"), calib="wikitext2", data_dir=str(make_texts(root / "texts")),
        nsamples=8, batch_size=2, eval="wikitext2", sparsity=0.25, wbits=6, embed_bits=8,
        statistics=str(root / "statistics"), groups=str(root / "groups"),
    )  # fmt: skip
    return root, report


def test_text_is_enough_to_compress_the_language_model(run: tuple[Path, dict[str, Any]]) -> None:
    root, report = run
    facts, model = report["architecture"], tiny_llava()
    seers = [model.model.vision_tower, model.model.multi_modal_projector]
    assert (facts["family"], facts["hidden"], facts["layers"], facts["coverage"]) == ("LLaVA", 64, 2, 1)
    assert facts["vision"] == sum(p.numel() for module in seers for p in module.parameters())
    assert {line["layer"].partition(".layers.")[0] for line in report["layers"]} == {"model.language_model"}
    perplexity = mico.evaluate(str(root / "run"), data_dir=str(root / "texts"))["perplexity"]["wikitext2"]
    assert perplexity == pytest.approx(report["compressed"]["wikitext2"]["perplexity"], rel=1e-6)


def test_the_packed_model_is_found_by_its_own_class_and_keeps_what_sees(run: tuple[Path, dict[str, Any]]) -> None:
    folder = run[0] / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForImageTextToText": "modeling_mico.LlavaForConditionalGeneration"}
    assert "import AutoModelForImageTextToText, AutoTokenizer" in (folder / "README.md").read_text()
    assert (folder / "modeling_mico.py").is_file() and (folder / "preprocessor_config.json").is_file()
    assert set(tensor_shapes(folder)) >= {
        "language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"
    }  # fmt: skip
    packed, dense = mico.load(folder, execution="dense", dtype=torch.float32), tiny_llava()
    kinds = {name: type(module) for name, module in packed.named_modules()}
    assert all(
        issubclass(kinds[f"{family_of(dense.config).blocks}.0.{path}"], PackedLinear)
        for stream in family_of(dense.config).streams for path in stream.linears
    )  # fmt: skip
    for part in ("vision_tower", "multi_modal_projector"):
        for name, tensor in getattr(dense.model, part).state_dict().items():
            assert torch.equal(getattr(packed.model, part).state_dict()[name], tensor)


def test_saved_again_and_exported_it_sees_the_same(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    packed = mico.load(run[0] / "run", execution="dense", dtype=torch.float32)
    wanted = seeing(packed, VOCABULARY - 1)
    packed.save_pretrained(tmp_path / "again")
    again = mico.load(tmp_path / "again", execution="dense", dtype=torch.float32)
    assert torch.equal(seeing(again, VOCABULARY - 1), wanted)
    mico.export(str(run[0] / "run"), to="dense", save=str(tmp_path / "dense"), dtype="float32")
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(seeing(dense, VOCABULARY - 1), wanted)
    assert (tmp_path / "dense" / "preprocessor_config.json").is_file()
    with pytest.raises(UserError, match="--to vllm: LLaVA models see images"):
        mico.export(str(run[0] / "run"), to="vllm", save=str(tmp_path / "vllm"))


def test_widths_come_from_the_language_model() -> None:
    widths = loading.stream_widths(tiny_llava().config)
    assert widths == dict(attn_in=64, attn_out=64, mlp_in=64, mlp_out=TEXT["intermediate_size"])
