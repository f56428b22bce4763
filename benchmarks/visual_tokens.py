"""Prefill of a LLaVA with pruned visual tokens against the same model with all of them: time, FLOPs, and their ratio.

    python -m benchmarks.visual_tokens [--layers 12 --hidden 1024 --retain 192,128,96,64 --arms 1.0,2.0 --threads N ...]
    python -m benchmarks.visual_tokens --model llava-1.5-7b --device cuda --dtype bfloat16 --json speed.json

A LLaVA with random weights and 576 visual tokens, as LLaVA-1.5 has them, or one from disk, dense or packed. Dense and
pruned calls take turns in one process; every ratio is that of two neighbours. Two things are timed in each call: the
language model's prefill (its layers, its norm and all of the pruning), and the whole call, in which the vision tower,
the projector and the head of the last token are the same in both arms. Each is compared with the ratio of its FLOPs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mico.errors import UserError
from mico.files import atomic_json
from mico.loading import DTYPES, load_model, pick_device
from mico.runs import versions
from mico.visual_tokens import METHODS, VERSIONS, enable
from mico.visual_tokens.flops import Shape, prefill_flops

WIDTH = 190  # of a table that goes into a file
NEAR, TWICE = 0.2, 2.0  # the goals: time within 20 % of what FLOPs promise, and twice as fast at the smallest budget
IMAGE, VOCABULARY = 32000, 32064
HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Setting:
    """The model (`model` names one, else the shape of a random one), its prompt, and how it is measured."""

    layers: int = 12
    hidden: int = 1024
    ffn: int = 2816
    vision_layers: int = 2
    vision_hidden: int = 1024
    vision_ffn: int = 4096
    side: int = 336  # pixels of a picture; patches of 14
    before: int = 35  # tokens of text before the picture, and behind it
    behind: int = 30
    batch: int = 1
    repeats: int = 5
    threads: int = 0  # 0: as many as torch takes by itself
    processor_time: int = 0  # 1: of all threads, which busy neighbours distort less than wall time
    device: str = "auto"  # a GPU where there is one
    dtype: str = "auto"  # bfloat16 on a GPU, else float32
    model: str = ""

    def settled(self) -> Setting:
        """The same with the device, the dtype and the threads that `auto` and 0 stand for."""
        device = str(pick_device(self.device))
        dtype = ("bfloat16" if device.startswith("cuda") else "float32") if self.dtype == "auto" else self.dtype
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: choose from auto, {', '.join(DTYPES)}")
        torch.set_num_threads(self.threads or torch.get_num_threads())
        return replace(self, device=device, dtype=dtype, threads=torch.get_num_threads())

    def loaded(self) -> Any:
        """The model that is named, else one with the same random weights at every call."""
        if self.model:
            return load_model(self.model, device=self.device, dtype=self.dtype, packed=True).model
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        heads = max(1, self.hidden // HEAD_CHANNELS)
        config = LlavaConfig(
            text_config=LlamaConfig(
                hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
                num_attention_heads=heads, num_key_value_heads=heads, vocab_size=VOCABULARY,
            ),
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_hidden, intermediate_size=self.vision_ffn, image_size=self.side, patch_size=14,
                num_hidden_layers=self.vision_layers, num_attention_heads=max(1, self.vision_hidden // HEAD_CHANNELS),
            ),
            image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlavaForConditionalGeneration(config)
        return model.to(self.device, DTYPES[self.dtype]).eval().requires_grad_(False)

    def inputs(self, model: Any) -> dict[str, torch.Tensor]:
        """A batch of random prompts with a picture each, all of one length."""
        make, image, side = torch.Generator().manual_seed(1), model.config.image_token_id, _vision(model).image_size
        known = model.config.get_text_config().vocab_size
        text_BT = torch.randint(known // 2, known, (self.batch, self.before + self.behind), generator=make)
        text_BT[text_BT == image] -= 1
        image_BV = torch.full((self.batch, _patches(model)), image)
        ids_BT = torch.cat((text_BT[:, : self.before], image_BV, text_BT[:, self.before :]), 1)
        pixels = torch.randn(self.batch, 3, side, side, generator=make).to(model.dtype)
        inputs = dict(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), pixel_values=pixels)
        return {name: value.to(self.device) for name, value in inputs.items()}


def _vision(model: Any) -> Any:
    return model.config.vision_config


def _patches(model: Any) -> int:
    """Visual tokens of a picture of LLaVA-1.5's kind."""
    return (_vision(model).image_size // _vision(model).patch_size) ** 2


def fixed_flops(model: Any) -> int:
    """Of what does not depend on pruning, for one sample: vision tower with all its layers, projector, head of the
    last token. As mico/visual_tokens/flops.py counts: a multiplication with its addition is two."""
    vision, text = _vision(model), model.config.get_text_config()
    patches, wide = _patches(model), vision.hidden_size
    tokens = patches + 1  # CLS
    embed = 2 * patches * 3 * vision.patch_size**2 * wide
    layer = 8 * tokens * wide**2 + 4 * tokens**2 * wide + 4 * tokens * wide * vision.intermediate_size
    projector = 2 * patches * text.hidden_size * (wide + text.hidden_size)
    return embed + vision.num_hidden_layers * layer + projector + 2 * text.hidden_size * text.vocab_size


def dense_flops(model: Any, setting: Setting) -> int:
    """Of the language model's prefill with all visual tokens, for one sample."""
    text, tokens = model.config.get_text_config(), _patches(model) + setting.before + setting.behind
    return prefill_flops(Shape.of(text), [tokens] * text.num_hidden_layers)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Seconds of a call: as a whole, in the language model, and there outside of its layers (where `layers` is on)."""

    model: Any
    setting: Setting
    layers: bool = False
    _begun: list[float] = field(default_factory=list)
    _language: float = 0.0
    _inside: float = 0.0

    def now(self) -> float:
        if self.setting.device.startswith("cuda"):
            torch.cuda.synchronize()
        return process_time() if self.setting.processor_time else perf_counter()

    @contextmanager
    def hung_on(self) -> Iterator[None]:
        """Hooks on the language model, which see dense and pruned calls alike."""
        language = self.model.model.language_model
        handles = [language.register_forward_pre_hook(self._begin), language.register_forward_hook(self._end_language)]
        for layer in language.layers if self.layers else ():
            handles += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end_layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, *_: Any) -> None:
        self._begun.append(self.now())

    def _end_language(self, *_: Any) -> None:
        self._language = self.now() - self._begun.pop()

    def _end_layer(self, *_: Any) -> None:
        self._inside += self.now() - self._begun.pop()

    @torch.inference_mode()
    def call(self, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """One prefill as `generate` makes it: with a new cache, logits of the last token alone."""
        self._inside = 0.0
        with self.hung_on():
            started = self.now()
            self.model(**inputs, use_cache=True, logits_to_keep=1)
            whole = self.now() - started
        return dict(whole=whole, language=self._language, outside=self._language - self._inside)


@dataclass(frozen=True)
class Arm:
    """A way to prune."""

    method: str
    version: str
    retain: int

    @property
    def name(self) -> str:
        return f"{self.method} {self.version}" if self.method == "sparsevlm" else self.method

    def enabled(self, model: Any) -> AbstractContextManager[Any]:
        return enable(model, self.retain, method=self.method, version=self.version)


def arms_of(names: Sequence[str], budgets: Sequence[int]) -> list[Arm]:
    """Versions of SparseVLM and names of METHODS, each at every budget."""
    pairs = [("sparsevlm", name) if name in VERSIONS else (name, "2.0") for name in names]
    return [Arm(method, version, retain) for method, version in pairs for retain in budgets]


def measure(model: Any, setting: Setting, arms: Sequence[Arm], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """A record an arm: `seconds` {dense, pruned: {whole, language, outside: [one a repeat]}}, and `means` of the
    tokens and FLOPs of a sample. Dense and pruned calls alternate; `outside` comes from a call of its own."""
    inputs = setting.inputs(model)
    watch, closer = Watch(model, setting), Watch(model, setting, layers=True)
    watch.call(inputs)  # the first call of a shape is slower
    found: list[dict[str, Any]] = []
    for arm in arms:
        with arm.enabled(model) as pruning:
            watch.call(inputs)
            found.append(dict(arm=arm, means=pruning.totals.means(), seconds=dict(dense=[], pruned=[])))
    for repeat in range(setting.repeats):
        for record in found:
            arm = record["arm"]
            tell(f"{repeat + 1} of {setting.repeats}: {arm.name}, {arm.retain} tokens")
            for side in ("dense", "pruned") if repeat % 2 else ("pruned", "dense"):
                with arm.enabled(model) if side == "pruned" else nullcontext():
                    seconds = watch.call(inputs) | dict(outside=closer.call(inputs)["outside"])
                record["seconds"][side].append(seconds)
    return found


def ratios(record: dict[str, Any], part: str) -> list[float]:
    """How many times faster pruned was than the dense call beside it, one a repeat."""
    pairs = zip(record["seconds"]["dense"], record["seconds"]["pruned"], strict=True)
    return [dense[part] / pruned[part] for dense, pruned in pairs]


# --- the table ------------------------------------------------------------------------------------------------------


def table(setting: Setting, model: Any, found: Sequence[dict[str, Any]]) -> Table:
    """The figures of `measure`, medians with their range."""
    dense, fixed = dense_flops(model, setting), fixed_flops(model)
    text, vision = model.config.get_text_config(), _vision(model)
    title = (
        f"prefill, {setting.dtype} on {setting.device} | {setting.model or 'LLaVA, random weights'}:"
        f" {text.num_hidden_layers} x {text.hidden_size} (ffn {text.intermediate_size}),"
        f" vision {vision.num_hidden_layers} x {vision.hidden_size} | {_patches(model)} visual tokens,"
        f" {setting.before} + {setting.behind} of text, batch {setting.batch} | threads {setting.threads},"
        f"{' processor time,' * setting.processor_time} median of {setting.repeats} pairs (min-max),"
        f" torch {torch.__version__}"
    )
    columns = ("retain", "method", "equal", "processed", "LM dense, ms", "LM pruned, ms", "outside layers, ms",
               "LM FLOPs", "LM faster", "of FLOPs", "whole FLOPs", "whole faster", "of FLOPs")  # fmt: skip
    made = Table(*columns, title=title)
    for record in found:
        made.add_row(*_row(record, dense, fixed))
    made.caption = (
        f"LM: {dense / 1e9:.3g} GFLOP dense; in both arms besides: {fixed / 1e9:.3g} GFLOP (vision tower, projector, "
        f"head of the last token). Goals: of FLOPs within {1 - NEAR:.1f} to {1 + NEAR:.1f}, LM faster >= {TWICE:g} at "
        "64 tokens."
    )
    return made


def _row(record: dict[str, Any], dense: int, fixed: int) -> Iterator[str]:
    arm, means, seconds = record["arm"], record["means"], record["seconds"]
    assert means["dense_prefill_flops"] == dense

    def middle(side: str, part: str) -> float:
        return 1000 * statistics.median(one[part] for one in seconds[side])

    yield from (str(arm.retain), arm.name, f"{means['equal_tokens']:.0f}", f"{means['processed_tokens']:.0f}")
    yield from (f"{middle('dense', 'language'):.1f}", f"{middle('pruned', 'language'):.1f}")
    yield f"{middle('pruned', 'outside'):.1f} (dense {middle('dense', 'outside'):.1f})"
    for part, shared in (("language", 0), ("whole", fixed)):
        promised, got = (dense + shared) / (means["prefill_flops"] + shared), ratios(record, part)
        yield f"{promised:.2f}"
        yield f"{statistics.median(got):.2f} ({min(got):.2f}-{max(got):.2f})"
        yield f"{statistics.median(got) / promised:.2f}"


# --- command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in fields(Setting):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    parser.add_argument("--retain", default="192,128,96,64", help="budgets, with commas")
    known = (*VERSIONS, *METHODS)
    parser.add_argument("--arms", default="1.0,2.0", help=f"with commas, of {', '.join(known)} (oracle excepted)")
    parser.add_argument("--json", help="a file for every call's seconds, tokens and FLOPs")
    options = vars(parser.parse_args(arguments))
    file = options.pop("json")
    budgets, names = [int(part) for part in options.pop("retain").split(",")], options.pop("arms").split(",")
    if wrong := [name for name in names if name not in known or name == "oracle"]:
        parser.error(f"--arms {wrong[0]}: choose from {', '.join(name for name in known if name != 'oracle')}")
    setting = Setting(**options).settled()
    console = Console()
    model = setting.loaded()
    with console.status("measuring") as status:
        found = measure(model, setting, arms_of(names, budgets), status.update)
    if file is not None:
        records = [record | dict(arm=asdict(record["arm"])) for record in found]
        facts = dict(dense_flops=dense_flops(model, setting), fixed_flops=fixed_flops(model), environment=versions())
        atomic_json(file, dict(command=sys.argv, setting=asdict(setting), arms=records) | facts)
    (console if console.is_terminal else Console(width=WIDTH)).print(table(setting, model, found))


if __name__ == "__main__":
    main()
