"""Accuracy of tiny-llava by method and number of visual tokens, of 144; what the kept tokens show, and FLOPs.

    python -m benchmarks.token_methods [--pictures 100] [--background photo] [--model RUN/model]

Every method answers the same questions about test pictures with the same mean of visual tokens in a layer. An answer is
right when its first token is: answers are one token. "shown" is the mean share of the patches asked about that survive
the first pruning; FLOPs are those of the language model's prefill with all that pruning computes, relative to dense.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch

from mico.loading import load_model, load_processor
from mico.reference.grids import BACKGROUNDS, KINDS, GridQuestion, examples, patches
from mico.visual_tokens import enable

RETAIN = (48, 32, 24, 16)
ARMS = {
    "random": ("random", "2.0"),
    "CLS": ("cls", "2.0"),
    "FastV": ("fastv", "2.0"),
    "SparseVLM 1.0": ("sparsevlm", "1.0"),
    "SparseVLM 2.0": ("sparsevlm", "2.0"),
    "mico": ("mico", "2.0"),
    "oracle": ("oracle", "2.0"),
}
Asked = list[tuple[Any, GridQuestion]]  # a picture and a question about it


@torch.no_grad()
def measure(
    model: Any, processor: Any, asked: Asked, batch_size: int, retain: int = 0, method: str = "", version: str = ""
) -> dict[str, float]:
    """Shares of right answers, in all and by kind; with a method also `shown` and `flops`. retain: 0 is dense."""
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}] for _, q in part]
        texts = [processor.apply_chat_template(chat) for chat in chats]
        inputs = processor(images=[image for image, _ in part], text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        if retain:
            wanted = [patches(question.cells) for _, question in part]
            positions = wanted.__getitem__ if method == "oracle" else None
            with enable(model, retain, method, version, positions=positions) as pruning:
                logits = model(**inputs).logits
            trace = pruning.trace
            assert trace is not None
            for sample, cells in enumerate(wanted):
                right["shown"].append(len(cells & set(trace.kept[0][sample])) / len(cells))
                right["flops"].append(trace.flops(sample) / trace.dense_flops(sample))
        else:
            logits = model(**inputs).logits
        for (_, question), token in zip(part, logits[:, -1].argmax(-1).tolist(), strict=True):
            hit = processor.tokenizer.decode([token]).strip() == question.answer
            right[question.kind].append(hit)
            right["all"].append(hit)
    return {name: sum(found) / len(found) for name, found in right.items()}


def row(name: str, retain: int | str, found: dict[str, float]) -> str:
    shares = " | ".join(f"{100 * found[kind]:.1f}" for kind in ("all", *KINDS))
    pruned = f"{100 * found['shown']:.0f} | {found['flops']:.2f}" if "flops" in found else "100 | 1"
    return f"| {retain} | {name} | {shares} | {pruned} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava", help="a name or folder; a packed one too")
    parser.add_argument("--pictures", type=int, default=100, help="with four questions each")
    parser.add_argument("--background", choices=BACKGROUNDS, default="plain")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--retain", default=",".join(map(str, RETAIN)), help="numbers of tokens, with commas")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"with commas, of {', '.join(ARMS)}")
    options = parser.parse_args()
    model = load_model(options.model, device="auto", dtype="float32", packed=True).model
    processor = load_processor(options.model)
    found = examples("test", options.pictures, options.seed, background=options.background, per_image=4)
    asked = [(example.image, question) for example in found for question in example.questions]
    print(f"| visual tokens | method | right % | {' | '.join(KINDS)} | shown % | FLOPs |")
    print("|" + "---|" * (len(KINDS) + 5))
    print(row("dense", 144, measure(model, processor, asked, options.batch_size)), flush=True)
    for retain in map(int, options.retain.split(",")):
        for name in options.arms.split(","):
            print(
                row(name, retain, measure(model, processor, asked, options.batch_size, retain, *ARMS[name])), flush=True
            )


if __name__ == "__main__":
    main()
