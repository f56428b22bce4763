"""A Hugging Face tokenizer in the terms of llama.cpp: tokens, types, merges or scores, and a named pre-tokenizer.

llama.cpp has no pre-tokenizer of its own making: it knows a list of names, each with a built-in regular expression.
A tokenizer whose expression is not in the table below is refused, because the model would read other tokens than
those it was trained on, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mico.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the numbers of gguf.TokenType
SPACE = "▁"  # how SentencePiece writes a space

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, DIGITS = "ByteLevel", "Digits, ByteLevel"  # pre-tokenizers without an expression of their own
PRE_TYPES: Mapping[tuple[str, bool], str] = {  # (expression, whole words bypass the merges) -> llama.cpp's name
    (GPT2, False): "gpt-2",
    (DIGITS, False): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (_CASED, True): "tekken",
}
SPECIALS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}


@dataclass(frozen=True)
class Vocabulary:
    """What goes under `tokenizer.ggml.` in the file; tokens, types (and scores) in the order of the ids.

    model: "gpt2" (byte-level BPE, with merges and pre) or "llama" (SentencePiece BPE, with scores).
    """

    model: str
    tokens: list[str]
    types: list[int]
    specials: dict[str, int]
    add_bos: bool
    add_eos: bool
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool = False
    template: str | None = None
    notes: list[str] = field(default_factory=list)


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a fast tokenizer for an embedding of `rows` rows.

    Raises UserError naming the part of the tokenizer that llama.cpp cannot follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"{type(tokenizer).__name__} has no tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refusal(f"it uses {option} {model[option]!r}")
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise _refusal(f"it has a token {last} and the embedding has {rows} rows")
    tokens, types = _tokens(described, rows)
    common = dict(tokens=tokens, types=types, specials=_specials(tokenizer, rows), template=_template(tokenizer))
    common |= dict(zip(("add_bos", "add_eos"), _surroundings(tokenizer), strict=True))
    return (_sentencepiece if model.get("byte_fallback") else _byte_level)(described, common)


def _byte_level(described: dict[str, Any], common: dict[str, Any]) -> Vocabulary:
    model, notes = described["model"], []
    if (normalizer := described["normalizer"]) is not None:
        if normalizer["type"] != "NFC":
            raise _refusal(f"its normalizer is {normalizer['type']}")
        notes.append("llama.cpp does not apply the tokenizer's NFC: text in another normal form gives other tokens")
    key = (_expression(described["pre_tokenizer"]), bool(model.get("ignore_merges")))
    if key not in PRE_TYPES:
        raise _refusal(f"its pre-tokenizer is none that is known: {key[0]:.120}{', ignore_merges' * key[1]}")
    merges = [" ".join(_pair(merge)) for merge in model["merges"]]
    return Vocabulary("gpt2", pre=PRE_TYPES[key], merges=merges, notes=notes, **common)


def _expression(pre: dict[str, Any] | None) -> str:
    """The regular expression of a byte-level pre-tokenizer, GPT2 or DIGITS; its JSON when it is another kind."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    *before, last = steps or [{"type": "nothing"}]
    plain = last["type"] == "ByteLevel" and not last["add_prefix_space"]
    if plain and last["use_regex"]:
        if not before:
            return GPT2
        if before == [{"type": "Digits", "individual_digits": True}]:
            return DIGITS
    if plain and not last["use_regex"] and len(before) == 1 and before[0]["type"] == "Split":
        split = before[0]
        if split["behavior"] == "Isolated" and not split["invert"]:
            return split["pattern"].get("Regex", json.dumps(split))
    return json.dumps(pre)


def _sentencepiece(described: dict[str, Any], common: dict[str, Any]) -> Vocabulary:
    """llama.cpp joins the neighbours whose union has the highest score: minus its rank among the merges."""
    model, pieces = described["model"], described["model"]["vocab"]
    if any(f"<0x{byte:02X}>" not in pieces for byte in range(256)):
        raise _refusal("it falls back to bytes but lacks some of the tokens <0x00> to <0xFF>")
    prefix, notes = _space_prefix(described)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    scores = [-float(ranks.get(token, len(model["merges"]))) for token in common["tokens"]]
    types = common.pop("types")
    for token, index in pieces.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
            scores[index] = 0.0
    if "unk" in common["specials"]:
        types[common["specials"]["unk"]] = UNKNOWN
    return Vocabulary("llama", types=types, scores=scores, space_prefix=prefix, notes=notes, **common)


def _space_prefix(described: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is put in front of a text, and what differs from llama.cpp in how."""
    normalizer, pre = described["normalizer"], described["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre is None and steps in ([prepend, replace], [replace]):
        return prepend in steps, []
    metaspace = pre is not None and pre["type"] == "Metaspace" and pre["replacement"] == SPACE
    if metaspace and not pre["split"] and not steps:
        prefix = pre["prepend_scheme"] != "never"
        differs = "llama.cpp puts a space also before text that begins with one, and after every special token"
        return prefix, [differs] if prefix else []
    raise _refusal(f"its normalizer and pre-tokenizer are not SentencePiece's: {json.dumps([normalizer, pre]):.120}")


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _tokens(described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; rows of the embedding without a token get a placeholder that no text produces."""
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in described["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _specials(tokenizer: Any, rows: int) -> dict[str, int]:
    found = {name: getattr(tokenizer, attribute, None) for name, attribute in SPECIALS.items()}
    return {name: int(index) for name, index in found.items() if index is not None and index < rows}


def _surroundings(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text. Raises UserError when it puts anything else."""
    bare, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in ([], bos):
        for after in ([], eos):
            if full == before + bare + after:
                return bool(before), bool(after)
    raise _refusal(f"it surrounds a text with other tokens than BOS and EOS: {full}")


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def _refusal(why: str) -> UserError:
    return UserError(f"the tokenizer has no exact form in llama.cpp: {why}; export with --to dense")
