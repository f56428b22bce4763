"""Tokenizers in llama.cpp's terms. What llama.cpp makes of them is in test_gguf.py, where it is installed."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from mico.errors import UserError
from mico.exports.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from tests.tiny import VOCABULARY, train_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(add_prefix_space=False, use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split(expression, behavior="isolated"):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), behavior), byte_level(use_regex=False)])


def with_pre(pre, ignore_merges=False, normalizer=None):
    tokenizer = train_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre
    backend.model.ignore_merges = ignore_merges
    if normalizer is not None:
        backend.normalizer = normalizer
    return tokenizer


def sentencepiece(scheme: str | None = None, bytes_from: int = 0) -> PreTrainedTokenizerFast:
    """A small tokenizer as Llama's: pieces with ▁, bytes as a fallback; scheme None: the older way to add a space."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(bytes_from, 256))]
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "ab"), ("b", "▁a")]
    pieces = dict.fromkeys(letters + ["▁", "a", "b"] + ["".join(merge) for merge in merges])
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize(
    "pre, ignore_merges, name",
    [
        (byte_level(), False, "gpt-2"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(QWEN2), False, "qwen2"),
        (split(TEKKEN), True, "tekken"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]), False, "smollm"),
    ],
)
def test_pre_tokenizers_by_name(pre, ignore_merges, name):
    assert vocabulary(with_pre(pre, ignore_merges), VOCABULARY).pre == name


@pytest.mark.parametrize(
    "tokenizer, why",
    [
        (with_pre(byte_level(add_prefix_space=True)), "pre-tokenizer is none that is known"),
        (with_pre(byte_level(), ignore_merges=True), "ignore_merges"),
        (with_pre(split(r"\w+|\s+")), "w+"),
        (with_pre(split(QWEN2, "removed")), '"Split"'),
        (with_pre(pre_tokenizers.Whitespace()), "Whitespace"),
        (with_pre(byte_level(), normalizer=normalizers.Lowercase()), "normalizer is Lowercase"),
        (sentencepiece(bytes_from=1), "lacks some of the tokens <0x00>"),
        (PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))), "WordLevel, not BPE"),
        (PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], dropout=0.1))), "dropout"),
    ],
)
def test_what_llama_cpp_cannot_follow_is_refused(tokenizer, why):
    with pytest.raises(UserError, match=r"no exact form in llama\.cpp.*--to dense") as caught:
        vocabulary(tokenizer, VOCABULARY)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(UserError, match=f"a token {VOCABULARY - 1} and the embedding has 200 rows"):
        vocabulary(train_tokenizer(), 200)


def test_tokens_types_and_merges():
    tokenizer = train_tokenizer(bos=True)
    tokenizer.add_tokens(["mutual information"])
    found = vocabulary(tokenizer, VOCABULARY + 3)
    assert found.model == "gpt2" and found.scores is None
    assert found.tokens[:VOCABULARY] == tokenizer.convert_ids_to_tokens(range(VOCABULARY))
    assert found.tokens[VOCABULARY:] == ["mutual information", f"[PAD{VOCABULARY + 1}]", f"[PAD{VOCABULARY + 2}]"]
    expected = [CONTROL, CONTROL, *[NORMAL] * (VOCABULARY - 2), USER_DEFINED, UNUSED, UNUSED]
    assert found.types == expected
    assert found.merges is not None and all(
        left + right in found.tokens for left, right in map(str.split, found.merges)
    )
    assert len(found.merges) == VOCABULARY - 2 - 256
    assert found.specials == dict(bos=0, eos=1)


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (True, True), (False, True)])
def test_what_surrounds_a_text(bos, eos):
    tokenizer = train_tokenizer(bos=True)
    template = "<s> " * bos + "$A" + " </s>" * eos
    specials = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    found = vocabulary(tokenizer, VOCABULARY)
    assert (found.add_bos, found.add_eos) == (bos, eos)


def test_other_surroundings_are_refused():
    tokenizer = train_tokenizer(bos=True)
    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = twice
    with pytest.raises(UserError, match="surrounds a text with other tokens"):
        vocabulary(tokenizer, VOCABULARY)


def test_nfc_is_told():
    plain, nfc = with_pre(byte_level()), with_pre(byte_level(), normalizer=normalizers.NFC())
    assert vocabulary(plain, VOCABULARY).notes == []
    assert "NFC" in vocabulary(nfc, VOCABULARY).notes[0]


def test_chat_template_goes_along():
    tokenizer = train_tokenizer()
    assert vocabulary(tokenizer, VOCABULARY).template is None
    tokenizer.chat_template = "{{ messages }}"
    assert vocabulary(tokenizer, VOCABULARY).template == "{{ messages }}"


def test_sentencepiece_scores_follow_the_merges():
    found = vocabulary(sentencepiece(), 300)
    assert found.model == "llama" and found.pre == "default" and found.merges is None
    assert found.scores is not None and (found.add_bos, found.add_eos, found.space_prefix) == (True, False, True)
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["▁a"] == 0 and score["▁ab"] == -1 and score["ab"] == -2 and score["b▁a"] == -4
    kind = dict(zip(found.tokens, found.types, strict=True))
    assert kind["<unk>"] == UNKNOWN and kind["<s>"] == CONTROL and kind["<0x41>"] == BYTE and kind["▁a"] == NORMAL
    assert found.types.count(BYTE) == 256 and found.types[-1] == UNUSED


@pytest.mark.parametrize("scheme, prefix", [("always", True), ("first", True), ("never", False)])
def test_the_newer_way_to_add_a_space(scheme, prefix):
    found = vocabulary(sentencepiece(scheme), 300)
    assert found.space_prefix is prefix and bool(found.notes) is prefix


def test_sentencepiece_that_splits_at_spaces_is_refused():
    tokenizer = sentencepiece("first")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    with pytest.raises(UserError, match="not SentencePiece's"):
        vocabulary(tokenizer, 300)


def test_llama_tokenizer_of_transformers():
    pieces = sentencepiece().get_vocab()
    assert vocabulary(LlamaTokenizer(vocab=pieces, merges=[("▁", "a")]), 300).model == "llama"
