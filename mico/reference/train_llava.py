"""Train tiny-llava, the shipped vision-language model, on grids of digits (`pipelines/train_llava.sh` calls this).

The questions of a picture are trained in one sequence, each of which sees the picture and itself only (a block mask,
with positions that start again), so that 8 questions cost one picture. Vision tower and projector first learn to give
digits and cells the embeddings of their names. Then the whole model answers, first about a single digit, and about
more whenever it is right often enough: with 36 digits from the start it does not find out where to look. Killed, it
goes on from its last checkpoint. `python -m mico.reference.train_llava --help`.
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

from mico.reference.grids import (
    BACKGROUNDS,
    CELLS,
    KINDS,
    PATCH,
    SHORT,
    SIDE,
    GridQuestion,
    ask,
    draw,
    examples,
    name,
)

VOCABULARY, TOKENS = 512, (SIDE // PATCH) ** 2
UNKNOWN, END, IMAGE, PADDING = "<unk>", "</s>", "<image>", "<pad>"
BEFORE, AFTER = "USER: ", " ASSISTANT:"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} ASSISTANT:"
    "{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
)
DIGITS = "0123456789"
MEAN = DEVIATION = 0.5  # of a pixel, in 0..1
WARMUP_STEPS, WEIGHT_DECAY, CLIP = 100, 0.05, 1.0
PHOTOS = 0.3  # share of the training pictures with a photograph behind the digits
SHORTS = 0.25  # share of the questions that ask for a word or a phrase as the suites do
BATCHES = {1: (32, 2), 2: (24, 4), 3: (20, 6)}  # pictures a step, and questions a picture, for so many cells
BATCH = (16, 8)  # for more cells
# Right digits, of the answers of the last steps, after which a row and a column of cells are added.
ENOUGH, WINDOW = 0.8, 25
VISION_STEPS, VISION_BATCH, VISION_PEAK = 600, 32, 2e-3
KEPT = 250  # steps between two checkpoints
CHECK = 400  # test pictures


@dataclass(frozen=True)
class Recipe:
    steps: int = 3_000
    peak: float = 1e-3  # learning rate of AdamW: embeddings, vision tower, projector
    muon: float = 3e-3  # of Muon: matrices of the language model
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the highest learning rate: linear warm-up, flat for half of the steps, then linear to 1 %."""
        down = (self.steps - step) / max(1, self.steps / 2)
        return min(1.0, (step + 1) / WARMUP_STEPS, 0.01 + 0.99 * down)


# --- model ----------------------------------------------------------------------------------------------------------


def build_processor() -> Any:
    """The LlavaProcessor: a byte-level BPE of 512 entries made of the questions, pictures of 48 x 48 pixels."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    texts = [
        BEFORE + question.text + SHORT + AFTER + f" {question.answer}"
        for _ in range(300)
        for question in ask(rng, draw(rng, "train", ["plain"])[0][0], 8)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [UNKNOWN, END, IMAGE, PADDING]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END, pad_token=PADDING, padding_side="left",
        extra_special_tokens={"image_token": IMAGE}, model_max_length=512,
    )  # fmt: skip
    side = {"shortest_edge": SIDE}
    crop = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=side, crop_size=crop, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3)
    return LlavaProcessor(
        image_processor=images, tokenizer=wrapped, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def build_model(tokenizer: Any) -> Any:
    """An untrained LlavaForConditionalGeneration: CLIP-ViT d 64 of 2 layers, projector, Llama d 96 of 6 layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, projection_dim=64,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B pictures and L tokens: the picture's prefix of P, then its questions, padded on the right.

    mask_BLL is added to the attention scores; labels_BL is the token to be predicted at each place, or -100.
    """

    pixels: torch.Tensor
    ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    mask_BLL: torch.Tensor
    labels_BL: torch.Tensor


def make_batch(pictures: Any, asked: list[list[GridQuestion]], shorts: Any, tokenizer: Any) -> Batch:
    """pictures: (B, 48, 48, 3) uint8; asked: the questions of each; shorts: which of them (B, Q) ask for a phrase."""
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    prefix = [*tokenizer(BEFORE, add_special_tokens=False).input_ids, *[image] * TOKENS]
    prompts = [
        "\n" + q.text + SHORT * bool(s) + AFTER
        for qs, ss in zip(asked, shorts, strict=True)
        for q, s in zip(qs, ss, strict=True)
    ]
    answers = [f" {q.answer}{END}" for questions in asked for q in questions]
    prompt_ids = iter(tokenizer(prompts, add_special_tokens=False).input_ids)
    answer_ids = iter(tokenizer(answers, add_special_tokens=False).input_ids)
    rows = []
    for questions in asked:
        ids, positions, segments, labels = list(prefix), [*range(len(prefix))], [0] * len(prefix), [-100] * len(prefix)
        for segment in range(1, len(questions) + 1):
            prompt, answer = next(prompt_ids), next(answer_ids)
            length = len(prompt) + len(answer)
            ids += prompt + answer
            positions += range(len(prefix), len(prefix) + length)
            segments += [segment] * length
            labels += [-100] * (len(prompt) - 1) + answer + [-100]
        rows.append((ids, positions, segments, labels))
    longest = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, 0, -1, -100)
    padded = (torch.tensor([row[i] + [fill[i]] * (longest - len(row[i])) for row in rows]) for i in range(4))
    ids_BL, positions_BL, segments_BL, labels_BL = padded
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    seen = (same | (segments_BL[:, None, :] == 0)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return Batch(to_pixels(pictures), ids_BL, positions_BL, mask, labels_BL)


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


def to_pixels(pictures: Any) -> torch.Tensor:
    """(B, 48, 48, 3) in 0..255 -> (B, 3, 48, 48) as the processor normalises it."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(MEAN).div(DEVIATION)


def image_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector makes of pictures: (B * 144, D)."""
    features = model.model.get_image_features(pixel_values=pixels.to(model.device))
    return torch.cat(tuple(getattr(features, "pooler_output", features)))  # a plain list before transformers 5.18


def answer_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (A, V) at the A places that have a label, and those labels."""
    device = model.device
    inner = model.model
    ids = batch.ids_BL.to(device)
    features = image_features(model, batch.pixels)
    embeds = inner.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features.to(embeds.dtype))
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask_BLL[:, None].to(device, embeds.dtype),
        position_ids=batch.positions_BL.to(device), use_cache=False,
    ).last_hidden_state  # fmt: skip
    labels = batch.labels_BL.to(device)
    there = labels != -100
    return model.lm_head(hidden[there]).float(), labels[there]


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
    """Where a training is: steps done, cells asked about, and the shares of right digits in the last steps."""

    step: int = 0
    cells: int = 1
    shares: list[float] = field(default_factory=list)
    loss: float = 0.0

    def add(self, loss: float, share: float) -> None:
        self.step, self.loss = self.step + 1, loss
        self.shares = [*self.shares, share][-WINDOW:]
        if len(self.shares) == WINDOW and self.cells < CELLS and self.right > ENOUGH:
            self.cells, self.shares = self.cells + 1, []

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
    logits, labels = answer_logits(model, training_batch(recipe, progress.step, progress.cells, tokenizer))
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
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
from one digit in a picture to 36, after {VISION_STEPS} steps of the vision tower alone; three in ten pictures have a
photograph behind the digits. Digits and photographs come with scikit-learn (`load_digits`: Alpaydin and Kaynak, Optical
Recognition of Handwritten Digits, UCI, CC BY 4.0; the photographs `china.jpg` and `flower.jpg`: CC BY). Test pictures
show other digits and other parts of the photographs. Reproduce: `bash pipelines/train_llava.sh`.

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
    model = model.float()
    scores = {name: accuracies(model, processor.tokenizer, name) for name in BACKGROUNDS}
    print(scores)
    card = model_card(recipe, sum(p.numel() for p in model.parameters()), scores)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
