"""What several test files need: a small real tokenizer, random models of it, a text of any length."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mico.data import TextSource

VOCABULARY, CONTEXT = 300, 64
CORPUS = ["A document of numbers says that one and two are three.", "Another document, and then its end.", "Ünïcödé —"]


def train_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with `bos` it puts <s> (id 0) in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = dict(bos_token="<s>") if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_max_length=CONTEXT, **names)


def random_model(arch: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """An untrained `llama`, `mixtral` or `opt` in eval mode; the global random state is as before."""
    shared = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    shared |= dict(max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if arch == "llama":
            extra = dict(num_key_value_heads=2, intermediate_size=64, initializer_range=0.3)
            return LlamaForCausalLM(LlamaConfig(**shared | extra | changes)).eval()
        if arch == "mixtral":
            extra = dict(num_key_value_heads=2, intermediate_size=48, initializer_range=0.3)
            extra |= dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
            return MixtralForCausalLM(MixtralConfig(**shared | extra | changes)).eval()
        extra = dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)
        return OPTForCausalLM(OPTConfig(**shared | extra | changes)).eval()


def source(documents: list[str], name: str = "docs", joiner: str = "\n\n") -> TextSource:
    return TextSource(name, "test", tuple(documents), joiner, "a test", "0" * 64)


def numbered(count: int) -> TextSource:
    """A text in which no stretch of a few tokens repeats."""
    return source([f"Document number {i} says {i * i} and then {i * 7919 % 1000}." for i in range(count)], joiner=" ")


def save_model(folder: Path, arch: str = "llama", **changes: object) -> Path:
    """A model folder as the hub holds it: config, safetensors, tokenizer."""
    random_model(arch, **changes).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder
