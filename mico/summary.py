"""What a run says at its end: one set of sections, shown on the terminal and written as Markdown; and flat JSON.

`report` is the dictionary that `compress` writes to report.json.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mico.costs import costs, costs_section, total_seconds
from mico.files import atomic_write
from mico.tables import (
    NOTHING,
    Section,
    duration_text,
    markdown,
    number,
    perplexity_text,
    print_sections,
    size_text,
    spread,
)

FALLBACKS_SHOWN = 5

Report = dict[str, Any]


# --- JSON -----------------------------------------------------------------------------------------------------------


def flat(report: Report) -> dict[str, Any]:
    """The figures of a report by plain names, for `--json FILE` and for tables over many runs.

    bytes: of the weight files written; packed_bytes: what their tensors take by their bits, without headers;
    seconds: of the whole run.
    """
    size = report["size"]
    return {
        "model": report["model"],
        "arm": report["arm"],
        "method": report["settings"]["method"],
        "dense": {name: score["perplexity"] for name, score in report["dense"].items()},
        "compressed": {name: score["perplexity"] for name, score in report["compressed"].items()},
        "nominal_bits": size["nominal_bits"],
        "true_bits": size["true_bits"],
        "bytes": size["bytes"],
        "packed_bytes": size["packed_bytes"],
        "sparsity": size["sparsity"],
        "seconds": total_seconds(report["seconds"]),
        "peak_host_bytes": report["peak_host_bytes"],
        "protocol": report["protocol"],
        "cost": costs(report),
    }


# --- figures in words -----------------------------------------------------------------------------------------------


def command_text(argv: Sequence[str]) -> str:
    """The command as it would be typed again."""
    program = Path(argv[0])
    ours = program.name == "mico" or program.parts[-2:] == ("mico", "__main__.py")
    return shlex.join([*(["mico"] if ours else ["python", argv[0]]), *argv[1:]])


def settings_text(settings: dict[str, Any]) -> str:
    """'method mico, sparsity 0.5, ...': a settings record without what is not set."""
    words = []
    for name, value in settings.items():
        if isinstance(value, dict):
            words.append(f"{name} ({settings_text(value)})")
        elif value is not None:
            words.append(f"{name} {':'.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return ", ".join(words)


def architecture_text(facts: dict[str, Any]) -> str:
    """One line on the architecture that `loading.describe` found."""
    heads = f"{facts['heads']} heads" + (f" ({facts['kv_heads']} kv)" if facts["kv_heads"] != facts["heads"] else "")
    tied = "tied head" if facts["tied_head"] else "own head"
    return (
        f"{facts['family']}, {facts['layers']} layers, hidden {facts['hidden']}, {heads}, ffn {facts['ffn']}, "
        f"vocabulary {facts['vocabulary']:,}, {tied}, {facts['parameters']:,} parameters"
    )


# --- sections of one report -----------------------------------------------------------------------------------------


def sections(report: Report) -> list[Section]:
    """The whole report, in the order it is read: what was done, how it went, what came out."""
    return [
        _setup(report),
        *([groups_section("Channel groups", report["groups"])] if report["groups"] else []),
        _bits(report["layers"]),
        *([_errors(report["layers"])] if report["layers"][0]["error"] is not None else []),
        *([_training(report["training"])] if "training" in report else []),
        _fallbacks(report["fallbacks"]),
        _perplexity(report),
        _sizes(report["size"]),
        costs_section(report),
        Section("Command", lines=(command_text(report["command"]),), code=True),
    ]


def _setup(report: Report) -> Section:
    environment = report["environment"]
    rows = (
        ("model", report["model"]),
        ("architecture", architecture_text(report["architecture"])),
        ("arm", report["arm"] or "none named"),
        ("settings", settings_text(report["settings"])),
        ("calibration", f"{report['calibration']}, seed {report['identity']['seed']}"),
        ("environment", settings_text(environment)),
        ("folder", report["folder"]),
    )
    return Section(f"mico: {report['model']}", ("", ""), rows)


def groups_section(title: str, records: list[dict[str, Any]], more: tuple[str, ...] = ()) -> Section:
    """Groups and their quality by kind of stream; sizes over all groups, the rest as means over blocks."""
    rows = []
    for stream, members in _by_stream(records).items():
        sizes = [size for record in members for size in record["sizes"]]
        rows.append(
            (
                stream,
                spread([record["n_groups"] for record in members]),
                spread(sizes),
                *(_mean(members, key) for key in ("within_mi", "between_mi", "silhouette", "davies_bouldin")),
            )
        )
    columns = ("stream", "groups", "group sizes", "MI within", "MI between", "silhouette", "Davies-B.")
    kind = records[0]["method"]
    lines = (
        f"Grouping: {kind}. Groups and sizes: min/median/max over {len(_blocks(records))} blocks; "
        "MI in nats a pair, mean over blocks.",
    )
    return Section(title, columns, tuple(rows), lines + more)


def _bits(layers: list[dict[str, Any]]) -> Section:
    rows = []
    for stream, members in _by_stream(layers).items():
        # The Linears of a stream share its groups, and each gives them widths of its own.
        widths = Counter(width for line in members for width in line["bits"])
        sizes = [size for line in members for size in line["sizes"]]
        weights = sum(line["weights"] for line in members)
        kept = sum(line["kept"] for line in members)
        stored = sum(sum(line["stored"].values()) for line in members)
        rows.append(
            (
                stream,
                spread(sizes),
                " ".join(f"{width}b×{count}" for width, count in sorted(widths.items())),
                number(sum(line["stored"]["codes"] for line in members) / max(kept, 1), 2),
                number(stored / weights, 2),
                number(1 - kept / weights, 3),
            )
        )
    columns = ("stream", "group sizes", "widths (groups)", "bits/kept", "true bits", "sparsity")
    return Section("Bits", columns, tuple(rows))


def _errors(layers: list[dict[str, Any]]) -> Section:
    """Relative output error: one row a block and one column a Linear where the blocks are alike."""
    paths, blocks = _paths(layers), _blocks(layers)
    names = _names(paths)
    found: dict[tuple[int, str], float] = {}
    for line, path in zip(layers, paths, strict=True):
        found[line["block"], path] = max(line["error"], found.get((line["block"], path), 0.0))
    worst = max(found, key=lambda place: found[place])
    rows, strong = [], set()
    for index, block in enumerate(blocks):
        rows.append((str(block), *(_error_text(found.get((block, path))) for path in names)))
        strong |= {(index, column) for column, path in enumerate(names, 1) if (block, path) == worst}
    lines = (
        f"Squared error of the output on the inputs that the layer sees, relative. Worst: {_error_text(found[worst])} "
        f"at block {worst[0]}, {worst[1]}."
        + (" Of experts the worst." if any("experts.*" in path for path in names) else ""),
    )
    return Section("Error per layer", ("block", *names.values()), tuple(rows), lines, frozenset(strong))


def _training(results: dict[str, dict[str, Any]]) -> Section:
    """Loss on the held-out text before and after training, as its perplexity."""
    after, train = results["eval"], results["train"]
    before = results["before"]
    rows = (
        ("quantized, before training", number(before["eval_loss"]), perplexity_text(before["eval_perplexity"])),
        ("after training", number(after["eval_loss"]), perplexity_text(after["eval_perplexity"])),
    )
    lines = (
        f"Held-out text of the training file. Loss while training: {number(train['train_loss'])} on average, "
        f"{train['epoch']:.3g} epochs in {duration_text(train['train_runtime'])}.",
    )
    return Section("Training", ("", "loss", "perplexity"), rows, lines, frozenset({(1, 2)}))


def _fallbacks(fallbacks: list[dict[str, Any]]) -> Section:
    if not fallbacks:
        return Section("Fallbacks", lines=("none: every layer went by the book",))
    shown = tuple(f"{entry['layer']}: {entry['what']}" for entry in fallbacks[:FALLBACKS_SHOWN])
    left = len(fallbacks) - len(shown)
    return Section(f"Fallbacks: {len(fallbacks)}", lines=shown + ((f"and {left} more (report.json)",) if left else ()))


def _perplexity(report: Report) -> Section:
    if not report["compressed"]:
        return Section("Perplexity", lines=("not measured: --eval none",))
    rows, lines = [], []
    told = any("kl_divergence" in score for score in report["compressed"].values())
    for name, score in report["compressed"].items():
        dense, compressed = report["dense"][name]["perplexity"], score["perplexity"]
        cells = (name, perplexity_text(dense), perplexity_text(compressed), f"×{compressed / dense:.3f}")
        rows.append((*cells, *(divergence_cells(score) if told else ())))
        lines.append(score_line(name, score))
    if told:
        over = ", ".join(f"{name} {score.get('kl_tokens', 0):,}" for name, score in report["compressed"].items())
        lines.append(f"KL from the dense model in nats a token, and top-1 agreement with it, over tokens: {over}")
    columns = ("text", "dense", "compressed", "ratio", *(("KL", "top-1") if told else ()))
    strong = frozenset((row, 2) for row in range(len(rows)))
    return Section("Perplexity", columns, tuple(rows), tuple(lines), strong)


def score_line(name: str, score: dict[str, Any]) -> str:
    """How one perplexity was measured."""
    short = f", {score['shortfall']:,} tokens short of the protocol" if score["shortfall"] else ""
    if halvings := score.get("batch_halvings", 0):
        short += f", batch halved {halvings} times for want of memory"
    bos = "kept" if score["bos"] else "none"
    return (
        f"protocol {score['protocol']}: {name} from {score['origin']}, {score['tokens']:,} tokens in "
        f"{score['windows']:,} windows of {score['seqlen']:,}, BOS {bos}{short}"
    )


def divergence_cells(score: dict[str, Any]) -> tuple[str, str]:
    """KL divergence to the dense model and top-1 agreement of one text; dashes where no token of it was compared."""
    if "kl_divergence" not in score:
        return NOTHING, NOTHING
    return f"{score['kl_divergence']:.3g}", f"{score['top1_agreement']:.1%}"


def _sizes(size: dict[str, Any]) -> Section:
    packed = size["packed_bytes"]
    rows = (
        ("nominal bits a kept weight", number(size["nominal_bits"])),
        ("true bits a weight", number(size["true_bits"])),
        ("sparsity", number(size["sparsity"])),
        ("share of the model compressed", f"{size['share_compressed']:.1%}"),
        ("dense model at 16 bits", size_text(size["dense_bytes"])),
        ("at true bits", f"{size_text(packed)}, {packed / size['dense_bytes']:.1%} of dense"),
        ("weight files written", f"{size_text(size['bytes'])}, {size['bytes'] / packed - 1:+.2%} for headers"),
    )
    lines = (
        "True bits count codes, scales, zeros, widths, masks, labels and biases of the compressed Linears. The size at "
        "true bits adds the rest of the model (embeddings, norms) as it is stored.",
    )
    return Section("Size", ("", ""), rows, lines, frozenset({(1, 1)}))


# --- helpers of the sections ----------------------------------------------------------------------------------------


def _by_stream(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    streams: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        streams.setdefault(_any_expert(record["stream"]), []).append(record)
    return streams


def _blocks(records: Iterable[dict[str, Any]]) -> list[int]:
    return sorted({record["block"] for record in records})


def _mean(records: list[dict[str, Any]], key: str) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    return number(statistics.fmean(values)) if values else NOTHING


def _inside_block(layer: str) -> str:
    """'mlp.up_proj' of 'model.layers.0.mlp.up_proj': what stands behind the block's number, if it has one."""
    parts = layer.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[number + 1 :])


def linear_names(layers: list[dict[str, Any]]) -> list[str]:
    """The name of every layer inside its block, as short as tells them apart; the experts of a block share theirs."""
    paths = _paths(layers)
    names = _names(paths)
    return [names[path] for path in paths]


def _paths(layers: list[dict[str, Any]]) -> list[str]:
    return [_any_expert(_inside_block(line["layer"])) for line in layers]


def _names(paths: list[str]) -> dict[str, str]:
    names = {path: _short(path) for path in paths}
    # Two Linears of one name: their whole paths tell them apart.
    return names if len(set(names.values())) == len(names) else {path: path for path in paths}


def _any_expert(path: str) -> str:
    """The path with the number of an expert left open: those of a layer are told as one."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", path)


def _short(path: str) -> str:
    return path.rpartition(".")[2].removesuffix("_proj")


def _error_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"


def print_report(report: Report, console: Console) -> None:
    """Show the report of one run."""
    print_sections(sections(report), console)


def write_markdown(report: Report, path: str | Path) -> None:
    """Write the report of one run as Markdown, whole or not at all."""
    atomic_write(path, markdown(sections(report)).encode())
