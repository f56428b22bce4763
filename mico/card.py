"""The model card of a packed checkpoint: what it was made from, how, how large it is and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mico.adapters import FAMILIES
from mico.adapters.minicpm import MINICPM
from mico.summary import architecture_text, command_text, score_line, settings_text
from mico.tables import perplexity_text, size_text

_LOADING = """```python
from transformers import {loader}, AutoTokenizer
import mico{without}

model = {loader}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


def model_card(report: dict[str, Any]) -> str:
    """README.md of the checkpoint that a report of `compress` tells of."""
    size, settings = report["size"], report["settings"]
    name = Path(report["folder"]).name
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if 'vision' in report['architecture'] else 'text-generation'}",
        f"base_model: {base_model(report['model'])}",
        "base_model_relation: quantized",
        "tags: [mico, quantized, pruned]" if size["sparsity"] > 0 else "tags: [mico, quantized]",
        "---",
        "",
        f"# {name}",
        "",
        f"{base_model(report['model'])} compressed by mico {report['environment']['mico']}: "
        f"{size['true_bits']:.3f} bits a weight in the compressed Linears, everything counted; "
        f"{size_text(size['bytes'])} of weights on disk against "
        f"{size_text(size['dense_bytes'])} at 16 bits.",
        "",
        "| text | dense | compressed | ratio |",
        "|---|---|---|---|",
    ]
    for text, score in report["compressed"].items():
        dense, compressed = report["dense"][text]["perplexity"], score["perplexity"]
        row = (text, perplexity_text(dense), perplexity_text(compressed), f"{compressed / dense:.3f}")
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "Perplexity, lower is better. Measured on the files of this folder, read back:", ""]
    lines += [f"- {score_line(text, score)}" for text, score in report["compressed"].items()]
    family = next(family for family in FAMILIES if family.name == report["architecture"]["family"])
    without = "" if family is MINICPM else "  # or, without mico: from_pretrained(..., trust_remote_code=True)"
    lines += ["", "## Load", "", _LOADING.format(folder=name, loader=family.auto, without=without), ""]
    lines += [
        "## Made from",
        "",
        f"- model: {base_model(report['model'])} ({architecture_text(report['architecture'])})",
        f"- settings: {settings_text(settings)}",
        f"- calibration: {report['calibration']}, seed {report['identity']['seed']}",
        f"- sparsity of the compressed Linears: {size['sparsity']:.3f}; bits a kept code: {size['nominal_bits']:.3f}",
        f"- command: `{command_text([short_path(word) for word in report['command']])}`",
        f"- environment: {settings_text(report['environment'])}",
    ]
    return "\n".join(lines) + "\n"


def short_path(word: str) -> str:
    """A word of a command, without the folders of the machine it was given on; of `--option=path` the path."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    local = value.startswith(("/", ".", "~")) or value.count("/") > 1 or ("/" in value and Path(value).exists())
    return f"{option}{equals}{Path(value).name or value}" if local and "/" in value else word


def base_model(name: str) -> str:
    """The model's name as the hub knows it; of a local folder its last part."""
    return name if not Path(name).is_absolute() and name.count("/") <= 1 else Path(name).name
