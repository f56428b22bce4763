"""Train the reference models that ship with mico (`pipelines/train_reference.sh` calls this module).

AdamW, cosine schedule with warm-up, bf16 autocast, windows of 512 tokens in a shuffled order; a GPU when
there is one. Killed, it goes on from the last checkpoint. `python -m mico.reference.train --help`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from mico.data import EVALUATION_SPLIT, TEXTS, DataError, embedded_corpus, evaluation_windows, load_text

SEQLEN, BATCH, VOCABULARY = 512, 16, 4096
EXPERTS, EXPERTS_PER_TOKEN, AUXILIARY = 8, 2, 0.02  # of Mixtral; the last weighs the loss that balances them
WARMUP_STEPS, PEAK_LR, WEIGHT_DECAY, CLIP = 100, 4e-3, 0.1, 1.0
# How often one epoch repeats a text: the evaluation domains are small, the general corpora large.
REPEATS = {"docs": 1, "wikitext2": 3, "ptb": 3, "c4": 3}
SIZES = {
    "micro": dict(hidden=128, layers=2, heads=4),
    "tiny": dict(hidden=128, layers=6, heads=4),
    "small": dict(hidden=256, layers=8, heads=8),
}


@dataclass(frozen=True)
class Recipe:
    arch: str
    size: str
    tokens: int
    seed: int
    data: str  # sha256 of the texts
    batch: int = BATCH

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (SEQLEN * self.batch))


def build_model(arch: str, size: str) -> Any:
    """Return an untrained causal LM: `llama` (GQA, RMSNorm, tied head), `mixtral` (the same with experts) or `opt`
    (biases, learned positions)."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

    s = SIZES[size]
    shared: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=s["hidden"], num_hidden_layers=s["layers"], bos_token_id=None
    )
    shared |= dict(num_attention_heads=s["heads"], max_position_embeddings=SEQLEN, eos_token_id=1, pad_token_id=None)
    if arch == "llama":
        grouped: dict[str, Any] = dict(num_key_value_heads=s["heads"] // 2, intermediate_size=3 * s["hidden"])
        return LlamaForCausalLM(LlamaConfig(**shared, **grouped, tie_word_embeddings=True))
    if arch == "mixtral":
        experts: dict[str, Any] = dict(num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS_PER_TOKEN)
        experts |= dict(num_key_value_heads=s["heads"] // 2, intermediate_size=s["hidden"])
        return MixtralForCausalLM(MixtralConfig(**shared, **experts, tie_word_embeddings=True))
    extra: dict[str, Any] = dict(
        ffn_dim=4 * s["hidden"], word_embed_proj_dim=s["hidden"], dropout=0.0, attention_dropout=0.0
    )
    return OPTForCausalLM(OPTConfig(**shared, **extra))


def training_texts(data_dir: Path) -> dict[str, str]:
    """Texts by name, never a test file: embedded docs (training share), wikitext2, ptb, c4, corpora/*.jsonl."""
    sources = {name: load_text(name, "train", data_dir=data_dir) for name in TEXTS if name != "docs"}
    sources["docs"] = embedded_corpus("train")
    texts = {
        name: s.joiner.join(s.documents) if name != "c4" else "</s>".join(s.documents) for name, s in sources.items()
    }
    for path in sorted((data_dir / "corpora").glob("*.jsonl")):
        source = load_text(path.name, "train", data_file=path)
        texts[path.stem] = "</s>".join(source.documents)
    return texts


def train_tokenizer(texts: dict[str, str]) -> Any:
    """A byte-level BPE of 4,096 entries, `<unk>` 0 and `</s>` 1, no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = (line for name, text in texts.items() for _ in range(REPEATS.get(name, 1)) for line in text.split("\n"))
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=SEQLEN
    )


def epoch_windows(streams: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    """All windows (N, T) of one epoch, each text cut at a fresh phase per repeat, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    cut = []
    for name, ids in streams.items():
        for _ in range(REPEATS.get(name, 1)):
            phase = int(torch.randint(0, SEQLEN, (1,), generator=generator))
            count = (len(ids) - phase) // SEQLEN
            cut.append(ids[phase : phase + count * SEQLEN].view(count, SEQLEN))
    windows = torch.cat(cut)
    return windows[torch.randperm(len(windows), generator=generator)]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(recipe: Recipe, streams: dict[str, torch.Tensor], work: Path, device: torch.device) -> Any:
    """Train to `recipe.tokens`, checkpointing to work/checkpoint.pt; resume from it when it is there."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.arch, recipe.size).to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)

    routed: dict[str, Any] = dict(output_router_logits=True) if recipe.arch == "mixtral" else {}

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            out = model(input_ids=ids, use_cache=False, **routed)
        loss = functional.cross_entropy(out.logits[:, :-1].reshape(-1, VOCABULARY).float(), ids[:, 1:].reshape(-1))
        return loss + AUXILIARY * out.aux_loss if routed else loss  # tokens are spread over the experts

    compiled: Any = loss_of
    if routed:
        print("experts are chosen anew at every token: training without torch.compile", flush=True)
    elif device.type == "cuda" or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        compiled = torch.compile(loss_of)
    else:
        print("no C++ compiler: training without torch.compile, at half the speed", flush=True)
    checkpoint, step, window, epoch = work / "checkpoint.pt", 0, 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, window, epoch = state["step"], state["window"], state["epoch"]
        print(f"resumed at step {step} of {recipe.steps}", flush=True)
    windows = epoch_windows(streams, recipe.seed + epoch)
    started, first, running = time.monotonic(), step, 0.0
    while step < recipe.steps:
        if window + recipe.batch > len(windows):
            epoch, window = epoch + 1, 0
            windows = epoch_windows(streams, recipe.seed + epoch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps)
        loss = compiled(windows[window : window + recipe.batch].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        step, window, running = step + 1, window + recipe.batch, running + loss.item()
        if step % 50 == 0:
            rate = (step - first) * SEQLEN * recipe.batch / (time.monotonic() - started)
            left = (recipe.steps - step) * SEQLEN * recipe.batch / rate / 60
            print(
                f"step {step}/{recipe.steps} loss {running / 50:.4f} {rate:,.0f} tok/s {left:.0f} min left", flush=True
            )
            running = 0.0
        if step % 200 == 0 or step == recipe.steps:
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, window=window, epoch=epoch
            )
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return model


@torch.no_grad()
def perplexity(model: Any, ids_NT: torch.Tensor) -> float:
    """exp of the mean cross-entropy over the T - 1 targets of every window, in fp32."""
    total = 0.0
    for ids in ids_NT.split(8):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()
        targets = ids[:, 1:].to(model.device)
        total += functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return math.exp(total / ids_NT[:, 1:].numel())


def evaluate_all(model: Any, tokenizer: Any, data_dir: Path) -> dict[str, float]:
    """Perplexity on every evaluation text that `data_dir` holds, and on the embedded documentation."""
    found = {}
    for name in TEXTS:
        try:
            source = load_text(name, EVALUATION_SPLIT[name], data_dir=data_dir)
        except DataError as error:
            print(f"not evaluated on {name}: {error}")
            continue
        found[name] = round(perplexity(model, evaluation_windows(source, tokenizer, SEQLEN).ids_NT), 2)
    return found


def model_card(recipe: Recipe, counts: dict[str, int], perplexities: dict[str, float], parameters: int) -> str:
    rows = "\n".join(f"| {n} | {c:,} | {REPEATS.get(n, 1)} |" for n, c in counts.items())
    scores = "\n".join(f"| {n} | {p:.2f} |" for n, p in perplexities.items())
    return f"""# {recipe.size}-{recipe.arch}

A reference model of mico: {parameters:,} parameters ({recipe.arch}, {SIZES[recipe.size]}), trained for
{recipe.steps * SEQLEN * recipe.batch:,} tokens ({recipe.steps:,} steps of {recipe.batch} x {SEQLEN}, AdamW, peak
learning rate {PEAK_LR}, cosine, bf16 autocast, seed {recipe.seed}) so that the damage of compression shows. It is an
instrument for measuring compression, not a model to talk to.

Reproduce: `pipelines/train_reference.sh DATA_DIR`. Training data, tokens in one pass and repeats per epoch
(`docs` is the training share of the documentation every Python carries; no test split was read):

| text | tokens | repeats |
|---|---|---|
{rows}

Perplexity, fp32, windows of {SEQLEN} without overlap (SparseGPT protocol; local copies of the texts):

| text | perplexity |
|---|---|
{scores}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=("llama", "opt", "mixtral"), required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--tokens", type=int, default=36_000_000)
    parser.add_argument("--batch", type=int, default=BATCH, help="windows a step")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer of 4,096 entries; none: train one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoint and tokenizer while training")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    args = parser.parse_args()
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    texts = training_texts(args.data_dir)
    data = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in texts.items()).encode()).hexdigest()
    recipe = Recipe(args.arch, args.size, args.tokens, args.seed, data, args.batch)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe_file = args.work / "recipe.json"
    if recipe_file.exists() and json.loads(recipe_file.read_text()) != asdict(recipe):
        raise SystemExit(f"{recipe_file} is of another recipe or other texts: give another --work folder or remove it")
    recipe_file.write_text(json.dumps(asdict(recipe)))

    tokenizer = train_tokenizer(texts) if args.tokenizer is None else AutoTokenizer.from_pretrained(args.tokenizer)
    streams = {n: tokenizer(t, return_tensors="pt", add_special_tokens=False).input_ids[0] for n, t in texts.items()}
    print({name: len(ids) for name, ids in streams.items()}, flush=True)
    model = train(recipe, streams, args.work, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = args.out / "tokenizer_config.json"  # a class name that older versions of transformers know, too
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    perplexities = evaluate_all(model.float(), tokenizer, args.data_dir)
    print(perplexities)
    counts = {name: len(ids) for name, ids in streams.items()}
    card = model_card(recipe, counts, perplexities, sum(p.numel() for p in model.parameters()))
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
