"""tiny-llava: its model, its processor, and questions of a picture packed into one sequence for training.

Each question sees the picture and itself only (a block mask, with positions that start again), so that 8 questions
cost one picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mico.reference.grids import PATCH, SHORT, SIDE, GridQuestion, ask, draw, patches

VOCABULARY, TOKENS = 512, (SIDE // PATCH) ** 2
UNKNOWN, END, IMAGE, PADDING = "<unk>", "</s>", "<image>", "<pad>"
BEFORE, AFTER = "USER: ", " ASSISTANT:"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} ASSISTANT:"
    "{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
)
MEAN = DEVIATION = 0.5  # of a pixel, in 0..1


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

    mask_BLL is added to the attention scores; labels_BL is the token to be predicted at each place, or -100;
    shown_QV are the visual tokens that each of the batch's questions is about.
    """

    pixels: torch.Tensor
    ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    mask_BLL: torch.Tensor
    labels_BL: torch.Tensor
    shown_QV: torch.Tensor


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
    shown = torch.zeros(len(answers), TOKENS, dtype=torch.bool)
    for row, question in zip(shown, (q for questions in asked for q in questions), strict=True):
        row[sorted(patches(question.cells))] = True
    seen = (same | (segments_BL[:, None, :] == 0)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return Batch(to_pixels(pictures), ids_BL, positions_BL, mask, labels_BL, shown)


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
