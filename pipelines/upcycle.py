"""Make a small Mixtral out of a small Llama, to try the path of experts on: python pipelines/upcycle.py tiny-llama OUT

Every expert is the MLP of its layer with a little noise, the routers are random (sparse upcycling, Komatsuzaki et al.
2023, arXiv:2212.05055). The weights of the chosen experts add up to one, so the model computes nearly what the Llama
does: its perplexity means something. The Llama has an embedding tied to its head and lies in one safetensors file.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mico.loading import resolve

EXPERTS, CHOSEN = 4, 2
NOISE = 0.05  # deviation added to an expert's weights, relative to that of the weights
NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # of an MLP in Llama and in an expert of Mixtral
KEPT = (
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def upcycle(source: Path, target: Path, seed: int = 0) -> None:
    """Write the folder `target`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in sorted(load_file(source / "model.safetensors").items()):
        layer, inside, rest = name.partition(".mlp.")
        if not inside:
            tensors[name] = weight
            continue
        part = NAMES[rest.removesuffix(".weight")]
        for expert in range(EXPERTS):
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * NOISE
            key = f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
            tensors[key] = (weight.float() + noise).to(weight.dtype)
        if part == "w1":
            router = torch.randn(EXPERTS, weight.shape[1], generator=generator)
            tensors[f"{layer}.block_sparse_moe.gate.weight"] = router.to(weight.dtype)
    config = json.loads((source / "config.json").read_text())
    made = {key: config[key] for key in KEPT if key in config}
    made |= dict(architectures=["MixtralForCausalLM"], model_type="mixtral", sliding_window=None)
    made |= dict(num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    target.mkdir(parents=True)
    for file in source.glob("*token*"):
        shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(made, indent=2) + "\n")
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python pipelines/upcycle.py SMALL_LLAMA FOLDER")
    upcycle(Path(resolve(sys.argv[1])), Path(sys.argv[2]))
