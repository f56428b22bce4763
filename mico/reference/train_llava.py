"""Train tiny-llava, the shipped vision-language model, on grids of digits (`pipelines/train_llava.sh` calls this).

Vision tower and projector first learn to give digits and cells the embeddings of their names. Then the whole model
answers, first about a single digit, and about more whenever it is right often enough; until it is right about all 36 it
is told where to look, which it finds out too slowly by itself. Killed, it goes on from its last checkpoint.
`python -m mico.reference.train_llava --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mico.reference.grids import BACKGROUNDS, CELLS, KINDS, PATCH, SIDE, ask, draw, examples, name
from mico.reference.tiny_llava import (
    IMAGE,
    Batch,
    answer_logits,
    build_model,
    build_processor,
    image_features,
    make_batch,
    to_pixels,
)
from mico.visual_tokens.capture import turned

DIGITS = "0123456789"
WARMUP_STEPS, WEIGHT_DECAY, CLIP = 100, 0.05, 1.0
PHOTOS = 0.3  # share of the training pictures with a photograph behind the digits
SHORTS = 0.25  # share of the questions that ask for a word or a phrase as the suites do
BATCHES = {1: (32, 2), 2: (24, 4), 3: (20, 6)}  # pictures a step, and questions a picture, for so many cells
BATCH = (16, 8)  # for more cells
STAGES = (1, 2, 3, CELLS)  # rows and columns of cells that a picture shows
# Right digits, of the answers of the last steps, after which more cells are shown.
ENOUGH, WINDOW = 0.8, 25
VISION_STEPS, VISION_BATCH, VISION_PEAK = 600, 32, 2e-3
HINT, HINT_LAYER = 0.3, 2  # weight of being told where to look, until enough of all cells is right, and in which layer
KEPT = 250  # steps between two checkpoints
CHECK = 400  # test pictures


@dataclass(frozen=True)
class Recipe:
    steps: int = 2_800
    peak: float = 1e-3  # learning rate of AdamW: embeddings, vision tower, projector
    muon: float = 3e-3  # of Muon: matrices of the language model
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the highest learning rate: linear warm-up, flat for half of the steps, then linear to 1 %."""
        down = (self.steps - step) / max(1, self.steps / 2)
        return min(1.0, (step + 1) / WARMUP_STEPS, 0.01 + 0.99 * down)


# --- what is learned -----------------------------------------------------------------------------------------------


def training_batch(recipe: Recipe, step: int, cells: int, tokenizer: Any) -> Batch:
    """The same for the same step, whatever came before: a resumed training sees what it would have seen."""
    rng = np.random.default_rng([recipe.seed, step])
    count, questions = BATCHES.get(cells, BATCH)
    digits, pictures = draw(rng, "train", _backgrounds(rng, count, PHOTOS * (cells == CELLS)), cells)
    asked = []
    for one in digits:
        drawn = ask(rng, one, BATCH[1], cells)
        asked.append([drawn[index] for index in rng.permutation(len(drawn))[:questions]])
    return make_batch(pictures, asked, rng.random((count, questions)) < SHORTS, tokenizer)


def _backgrounds(rng: np.random.Generator, count: int, share: float) -> list[str]:
    return ["photo" if chance < share else "plain" for chance in rng.random(count)]


class Looks:
    """While entered: where the answers' tokens look in one layer, for a loss that tells them where."""

    def __init__(self, model: Any) -> None:
        self.language = model.model.language_model
        self.attention = self.language.layers[HINT_LAYER].self_attn
        self.made: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Looks:
        self._handles = [
            getattr(self.attention, name).register_forward_hook(
                lambda m, a, out, name=name: self.made.update({name: out})
            )
            for name in ("q_proj", "k_proj")
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def loss(self, batch: Batch, tokenizer: Any) -> torch.Tensor:
        """-log of the share of the attention to the picture that the cells asked about get, in the best two heads."""
        ids, labels = batch.ids_BL, batch.labels_BL
        image, end = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.eos_token_id
        sample_Q, place_Q = torch.nonzero((labels != -100) & (labels != end), as_tuple=True)
        visual_V = torch.nonzero(ids[0] == image)[:, 0]
        rope = self.language.rotary_emb(
            self.made["q_proj"], position_ids=batch.positions_BL.to(self.made["q_proj"].device)
        )
        queries, keys = (
            turned(self.made[name].unflatten(2, (-1, self.attention.head_dim)).transpose(1, 2), rope)
            for name in ("q_proj", "k_proj")
        )
        logits_QHV = (keys[sample_Q][:, :, visual_V] @ queries[sample_Q, :, place_Q][..., None])[..., 0]
        share_QH = (
            (logits_QHV * self.attention.scaling).softmax(-1).mul(batch.shown_QV.to(keys.device)[:, None]).sum(-1)
        )
        return -share_QH.topk(2, dim=1).values.mean(1).clamp_min(1e-6).log().mean()


# --- training -------------------------------------------------------------------------------------------------------


def train_vision(model: Any, recipe: Recipe, tokenizer: Any, steps: int = VISION_STEPS) -> None:
    """Align what the projector makes of a patch with the embeddings of its cell's digit and name."""
    device, side = model.device, SIDE // PATCH
    table = model.get_input_embeddings().weight.detach()
    cells = [name(row, column) for row in range(CELLS) for column in range(CELLS)]
    digits, names = (table[_ids(tokenizer, words)] for words in (DIGITS, cells))
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=VISION_PEAK, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    places = torch.arange(side, device=device).div(side // CELLS, rounding_mode="floor")
    places = (places[:, None] * CELLS + places).flatten().repeat(VISION_BATCH)
    for step in range(steps):
        rng = np.random.default_rng([recipe.seed, step, 1])
        drawn, pictures = draw(rng, "train", _backgrounds(rng, VISION_BATCH, PHOTOS))
        for group in optimizer.param_groups:
            group["lr"] = VISION_PEAK * min(1.0, (step + 1) / WARMUP_STEPS, 1.01 - step / steps)
        features = image_features(model, to_pixels(pictures))
        shown = features.view(VISION_BATCH, CELLS, side // CELLS, CELLS, side // CELLS, -1).mean((2, 4))
        seen, truth = (shown @ digits.T).flatten(0, 2), torch.from_numpy(drawn).flatten().to(device)
        loss = functional.cross_entropy(seen, truth)
        loss = loss + functional.cross_entropy(features @ names.T, places)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            right = (seen.argmax(-1) == truth).float().mean().item()
            print(f"vision {step + 1}/{steps} loss {loss.item():.4f} digits right {right:.3f}", flush=True)


def _ids(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """Token ids of words that are one token each."""
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    assert all(len(one) == 1 for one in ids), ids
    return [one[0] for one in ids]


def optimizers(model: Any, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the language model, AdamW for the rest; each with its highest learning rate."""
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decayed, free = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=free, weight_decay=0.0)]
    muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [(muon, recipe.muon), (torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True), recipe.peak)]


@dataclass
class Progress:
    """Where a training is: steps done, cells shown, and the shares of right digits in the last steps."""

    step: int = 0
    cells: int = 1
    shares: list[float] = field(default_factory=list)
    loss: float = 0.0
    told: bool = True  # where to look

    def add(self, loss: float, share: float) -> None:
        self.step, self.loss = self.step + 1, loss
        self.shares = [*self.shares, share][-WINDOW:]
        if len(self.shares) == WINDOW and self.right > ENOUGH and self.told:
            if self.cells == CELLS:
                self.told = False
            else:
                self.cells, self.shares = STAGES[STAGES.index(self.cells) + 1], []

    @property
    def right(self) -> float:
        return sum(self.shares) / max(1, len(self.shares))


def train(recipe: Recipe, tokenizer: Any, work: Path, device: torch.device, vision_steps: int = VISION_STEPS) -> Any:
    """Train to the end, keeping work/checkpoint.pt; go on from it when it is there."""
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer).to(device)
    steppers, progress, checkpoint = optimizers(model, recipe), Progress(), work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for (optimizer, _), kept in zip(steppers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        progress = Progress(**state["progress"])
        print(f"resumed at step {progress.step} of {recipe.steps}", flush=True)
    else:
        train_vision(model, recipe, tokenizer, vision_steps)
    started, first = time.monotonic(), progress.step
    while progress.step < recipe.steps:
        _step(model, recipe, steppers, progress, tokenizer)
        step = progress.step
        if step % 50 == 0:
            left = (recipe.steps - step) * (time.monotonic() - started) / (step - first) / 60
            print(f"step {step}/{recipe.steps} cells {progress.cells} loss {progress.loss:.4f} "
                  f"right {progress.right:.3f}, {left:.0f} min left", flush=True)  # fmt: skip
        if step % KEPT == 0 or step == recipe.steps:
            state = dict(model=model.state_dict(), progress=asdict(progress))
            state["optimizers"] = [optimizer.state_dict() for optimizer, _ in steppers]
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        if step % 1000 == 0:
            print({name: accuracies(model, tokenizer, name) for name in BACKGROUNDS}, flush=True)
    return model


def _step(model: Any, recipe: Recipe, steppers: Any, progress: Progress, tokenizer: Any) -> None:
    batch = training_batch(recipe, progress.step, progress.cells, tokenizer)
    with Looks(model) as looks:
        logits, labels = answer_logits(model, batch)
        loss = functional.cross_entropy(logits, labels)
        (loss + HINT * looks.loss(batch, tokenizer) if progress.told else loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer, highest in steppers:
        for group in optimizer.param_groups:
            group["lr"] = highest * recipe.share(progress.step)
        optimizer.step()
        optimizer.zero_grad()
    digits = torch.isin(labels, torch.tensor(_ids(tokenizer, DIGITS), device=labels.device))
    progress.add(loss.item(), (logits.argmax(-1) == labels)[digits].float().mean().item())


@torch.no_grad()
def accuracies(model: Any, tokenizer: Any, background: str, count: int = CHECK) -> dict[str, float]:
    """Shares of right answers on test pictures, overall and by kind of question."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    found = list(examples("test", count, background=background))
    for start in range(0, count, 50):
        part = found[start : start + 50]
        pictures = np.stack([np.asarray(one.image) for one in part])
        questions = [list(one.questions) for one in part]
        logits, labels = answer_logits(
            model, make_batch(pictures, questions, [[False] * len(q) for q in questions], tokenizer)
        )
        answers = labels != tokenizer.eos_token_id
        hits = (logits.argmax(-1) == labels)[answers].tolist()
        for question, hit in zip((q for qs in questions for q in qs), hits, strict=True):
            right[question.kind] += hit
            asked[question.kind] += 1
    shares = {kind: round(right[kind] / asked[kind], 4) for kind in KINDS}
    return {"all": round(right.total() / asked.total(), 4)} | shares


def model_card(recipe: Recipe, parameters: int, scores: dict[str, dict[str, float]]) -> str:
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{100 * shares[kind]:.1f} %" for kind in ("all", *KINDS)) + " |"
        for name, shares in scores.items()
    )
    return f"""# tiny-llava

A reference model of mico: a LLaVA of {parameters:,} parameters (CLIP-ViT of 2 layers, projector, Llama of 6 layers)
that reads grids of handwritten digits: pictures of 48 x 48 pixels, 144 visual tokens. It is an instrument for measuring
the damage of compression and of visual-token pruning, not a model to talk to.

Questions: `What is the digit in cell BY?` (read), `What is the larger digit of cells AV and DW?` (compare),
`Is the digit in cell CX even?` (check), in the form `USER: <image>\\n… ASSISTANT:`.

Trained for {recipe.steps:,} steps, most of them of {BATCH[0]} pictures with {BATCH[1]} questions each (Muon for the
matrices of the language model, learning rate {recipe.muon}, AdamW for the rest, {recipe.peak}; seed {recipe.seed}),
after {VISION_STEPS} steps of the vision tower alone; from one digit in a picture to 36, and told where to look until
most answers were right. Three in ten pictures have a photograph behind the digits. Digits and photographs come with
scikit-learn (`load_digits`: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0; the
photographs `china.jpg` and `flower.jpg`: CC BY). Test pictures show other digits and other parts of the photographs.
Reproduce: `bash pipelines/train_llava.sh`.

Right answers on {CHECK:,} test pictures, 8 questions each:

| background | all | read | compare | check |
|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--peak", type=float, default=Recipe.peak, help="highest learning rate of AdamW")
    parser.add_argument("--muon", type=float, default=Recipe.muon, help="highest learning rate of Muon")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--work", type=Path, required=True, help="checkpoint while training")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, peak=args.peak, muon=args.muon, seed=args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe_file = args.work / "recipe.json"
    if recipe_file.exists() and json.loads(recipe_file.read_text()) != asdict(recipe):
        raise SystemExit(f"{recipe_file} is of another recipe: give another --work folder or remove it")
    recipe_file.write_text(json.dumps(asdict(recipe)))
    processor = build_processor()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = train(recipe, processor.tokenizer, args.work, device).to(torch.bfloat16).eval()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    settings = args.out / "tokenizer_config.json"  # a class name that older versions of transformers know, too
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model = model.float()
    scores = {name: accuracies(model, processor.tokenizer, name) for name in BACKGROUNDS}
    print(scores)
    card = model_card(recipe, sum(p.numel() for p in model.parameters()), scores)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
