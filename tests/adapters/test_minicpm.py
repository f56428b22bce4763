"""MiniCPM: its formula against Llama's with the scales folded in, its config on disk, and the way through mico."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mico
from mico import loading
from mico.errors import UserError
from tests.tiny import VOCABULARY, train_tokenizer
from tests.workspace import make_texts

SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
SCALES: dict[str, Any] = dict(scale_emb=12, scale_depth=1.4, dim_model_base=256)


def build(**changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("minicpm", **SHAPE | SCALES | changes)).eval()


def saved(folder: Path, **changes: Any) -> Path:
    """A folder as the hub has it: with the name of code that must not run, and nothing but the original fields."""
    build(**changes).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["residual_multiplier"], config["head_dim"]
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    return folder


# --- the formula ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_equals_llama_with_the_scales_folded_in(tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    folded = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= 256 / 64
    state["model.embed_tokens.weight"] *= 12
    for key in state:
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            state[key] *= 1.4 / math.sqrt(2)
    folded.load_state_dict(state)
    ids = torch.randint(VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(input_ids=ids).logits, folded(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("longest", [64, 128])
def test_long_rope_scales_by_the_two_lengths_alone(longest: int) -> None:
    """The original ignores `factor`; the short factors serve up to the first length, the long ones beyond."""
    short, long = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
    rope = dict(
        rope_type="longrope", factor=32.0, short_factor=short, long_factor=long, original_max_position_embeddings=64
    )
    model = build(max_position_embeddings=longest, rope_scaling=rope)
    scale = math.sqrt(1 + math.log(longest / 64) / math.log(64))
    for tokens, factors in ((64, short), (65, long)):
        positions = torch.arange(tokens)
        base_I = 10000 ** (-torch.arange(8) / 8)
        angle_TI = positions[:, None] * base_I / torch.tensor(factors)
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
        assert torch.allclose(cos[0, :, :8], angle_TI.cos() * scale, atol=1e-5)
        assert torch.allclose(sin[0, :, 8:], angle_TI.sin() * scale, atol=1e-5)


# --- the config -----------------------------------------------------------------------------------------------------


def test_the_original_fields_go_around_and_the_defaults_are_the_originals(tmp_path: Path) -> None:
    folder = saved(tmp_path / "first")
    config = loading.load_config(str(folder))
    assert (config.embedding_multiplier, config.logits_scaling, config.attention_multiplier) == (12, 0.25, 0.25)
    assert config.residual_multiplier == 1.4 / math.sqrt(2)
    config.save_pretrained(tmp_path / "second")
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert SCALES.items() <= written.items() and written["model_type"] == "minicpm"
    assert not {"auto_map", "embedding_multiplier", "logits_scaling", "attention_multiplier"} & set(written)
    again = AutoConfig.from_pretrained(tmp_path / "second")
    assert again.to_diff_dict() == config.to_diff_dict()
    plain = AutoConfig.for_model("minicpm")
    assert plain.tie_word_embeddings and (plain.scale_emb, plain.scale_depth, plain.dim_model_base) == (1, 1, 1)


def test_a_model_cut_to_fewer_layers_keeps_its_residual_multiplier(tmp_path: Path) -> None:
    model = build(num_hidden_layers=4)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(cut.model.layers) == 1 and cut.config.residual_multiplier == 1.4 / math.sqrt(4)
    ids = torch.arange(20)[None]
    assert torch.equal(cut(input_ids=ids).logits, model(input_ids=ids).logits)


# --- the code beside the weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
def test_the_code_of_a_checkpoint_is_neither_needed_nor_run(tmp_path: Path, trust: bool) -> None:
    folder = saved(tmp_path)
    loaded = loading.load_model(str(folder), device="cpu", trust_remote_code=trust)
    assert type(loaded.model).__module__ == "mico.adapters.minicpm_model" and loaded.family.name == "MiniCPM"


def test_the_code_of_a_tokenizer_is_still_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(auto_map={"AutoTokenizer": ["evil.T", None]})))
    with pytest.raises(UserError, match=r"tokenizer_config.json: 'auto_map'"):
        loading.load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    "imports",
    [
        "import mico, transformers.modeling_layers; from transformers import AutoModelForCausalLM, AutoConfig",
        "from transformers import AutoModelForCausalLM, AutoConfig; import mico, importlib; importlib.reload(mico)",
    ],
)
def test_transformers_knows_it_in_whatever_order_things_are_imported(imports: str) -> None:
    code = f"""{imports}
config = AutoConfig.for_model("minicpm", **{dict(SHAPE, hidden_size=8)!r})
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "MiniCPMForCausalLM"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- the whole way --------------------------------------------------------------------------------------------------


def test_from_calibration_to_a_loaded_packed_model(tmp_path: Path) -> None:
    model, texts = saved(tmp_path / "tiny"), make_texts(tmp_path / "texts")
    options: dict[str, Any] = dict(calib="wikitext2", data_dir=str(texts), nsamples=8, batch_size=2)
    steps = dict(statistics=str(tmp_path / "statistics"))
    assert mico.calibrate(str(model), save=steps["statistics"], **options)["streams"]
    mico.mi_group(str(model), save=str(tmp_path / "groups"), **steps, **options)
    run = tmp_path / "run"
    report = mico.compress(
        str(model), save=str(run), groups=str(tmp_path / "groups"), eval="wikitext2", sparsity=0.25, wbits=6,
        **steps, **options,
    )  # fmt: skip
    assert report["architecture"]["family"] == "MiniCPM" and report["architecture"]["coverage"] == 1
    score = report["compressed"]["wikitext2"]["perplexity"]
    assert mico.evaluate(str(run), data_dir=str(texts))["perplexity"]["wikitext2"] == pytest.approx(score, rel=1e-6)

    written = json.loads((run / "model" / "config.json").read_text())
    assert "auto_map" not in written and SCALES.items() <= written.items()
    assert not (run / "model" / "modeling_mico.py").exists()
    assert "trust_remote_code" not in (run / "model" / "README.md").read_text()
    packed = mico.load(run, execution="dense", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    ids = torch.arange(60)[None] * 7 % VOCABULARY
    assert torch.allclose(packed(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)
    packed.save_pretrained(tmp_path / "again")
    again = mico.load(tmp_path / "again", execution="dense", dtype=torch.float32)
    assert torch.equal(packed(input_ids=ids).logits, again(input_ids=ids).logits)

    out = tmp_path / "dense"
    mico.export(str(run), to="dense", save=str(out), dtype="float32")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits, packed(input_ids=ids).logits)

    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, run / "model"], capture_output=True, text=True, timeout=300)
    assert done.returncode and "minicpm" in done.stderr  # without mico nothing pretends to be the model
