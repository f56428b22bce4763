"""What `mico eval --suite` does: questions read and checked before any weight, answered with resume, scored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mico.adapters import family_of
from mico.console import Console
from mico.errors import UserError
from mico.files import fingerprint
from mico.loading import LoadedModel, load_config, load_processor
from mico.metrics.generation import end_tokens
from mico.metrics.vision.answers import Answers
from mico.metrics.vision.ask import Asker, Costs, ask_all, check_images
from mico.metrics.vision.question import Question, Record, share
from mico.metrics.vision.suites import SUITES, load_suite, part_of, suite_names

FOLDER = "suites"  # of the answers, inside the output folder
SAME = ("suite", "limit", "tokens")  # fields that tell one record of results.json from another
PROMPT_FIELDS = ("image_token", "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@dataclass(frozen=True)
class Tokens:
    """How visual tokens are pruned: the arguments of `mico.visual_tokens.enable`."""

    retain: int
    method: str = "sparsevlm"
    version: str = "2.0"
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.retain < 1:
            raise UserError(f"--retain-tokens {self.retain}: must be at least 1")
        from mico.visual_tokens.methods import method_of

        needs = method_of(self.method, self.version).needs
        if self.adaptive and "raters" not in needs:
            raise UserError(f"--adaptive: {self.method} has no raters whose attention has a rank: leave it out")


@dataclass(frozen=True)
class Suites:
    """Suites that are asked for: all their questions, and those that are put to the model."""

    questions: Mapping[str, Sequence[Question]]
    chosen: Mapping[str, Sequence[Question]]
    limit: float | None
    tokens: Tokens | None
    batch_size: int
    folder: str  # of the model
    hub: Mapping[str, Any]

    def run(self, loaded: LoadedModel, output: Path | None, console: Console) -> list[dict[str, Any]]:
        """One record a suite, see `_record`; answers go to `output`/suites/ as they come."""
        if not self.questions:
            return []
        processor = load_processor(self.folder, tell=console.note, **self.hub)
        if output is None:
            console.note("suites: answers are not kept, a killed run starts over: name a folder with --output-path")
        return [self._suite(name, loaded, processor, output, console) for name in self.questions]

    def _suite(
        self, name: str, loaded: LoadedModel, processor: Any, output: Path | None, console: Console
    ) -> dict[str, Any]:
        suite, questions = SUITES[name], self.chosen[name]
        facts = self._facts(name, loaded, processor)
        path = None if output is None else output / FOLDER / f"{name}-{fingerprint(facts)}.jsonl"
        answers = Answers(path, facts)
        reused = sum(question.id in answers.found for question in questions)
        if reused:
            console.note(f"suite {name}: {reused:,} of {len(questions):,} answers are read from {path}")
        with console.stage(f"suite {name}"), _peak(loaded.device) as peak, self._pruning(loaded.model) as costs:
            asker = Asker(loaded.model, processor, self.batch_size, console, costs, suite.new_tokens, name)
            ask_all(asker, questions, answers.found.__contains__, answers.add)
        found = [answers.found[question.id] for question in questions]
        figures = suite.score([Record(q, one["text"]) for q, one in zip(questions, found, strict=True)])
        cut = sum(one["cut"] for one in found)
        if cut:
            console.note(
                f"suite {name}: {cut:,} of {len(found):,} answers did not end within {suite.new_tokens} tokens"
            )
        return dict(
            suite=name, questions=len(questions), of=len(self.questions[name]), limit=self.limit,
            tokens=None if self.tokens is None else asdict(self.tokens), figures=figures,
            **_means(found), reused=reused, cut=cut, batch_size=asker.batch_size,
            batch_halvings=asker.halvings, peak_device_bytes=peak.get("bytes"),
            answers=None if path is None else str(path.name), data=facts["data"],
        )  # fmt: skip

    def _facts(self, name: str, loaded: LoadedModel, processor: Any) -> dict[str, Any]:
        """All that an answer depends on, but for the rounding that another batch size or device brings."""
        return dict(
            suite=name, data=fingerprint([question.facts() for question in self.questions[name]]),
            model=loaded.fingerprint, dtype=str(loaded.dtype), new_tokens=SUITES[name].new_tokens,
            template=processor.chat_template, images=fingerprint(processor.image_processor.to_json_string()),
            processor={field: getattr(processor, field, None) for field in PROMPT_FIELDS},
            tokenizer=fingerprint(_tokenizer_facts(processor.tokenizer)),
            ends=sorted(end_tokens(loaded.model, processor.tokenizer)),
            tokens=None if self.tokens is None else asdict(self.tokens),
        )  # fmt: skip

    @contextlib.contextmanager
    def _pruning(self, model: Any) -> Iterator[Costs]:
        """Inside, visual tokens are pruned where that was asked for; yields what tells the costs of a question."""
        if self.tokens is None:
            yield lambda visual, prompt: [dense_costs(model, *one) for one in zip(visual, prompt, strict=True)]
            return
        from mico.visual_tokens import enable

        with enable(model, **asdict(self.tokens)) as pruning:
            yield partial(pruned_costs, model, pruning)


def asked_suites(
    suite: str | Sequence[str] | None,
    vlm_data: str | None,
    limit: float | None,
    batch_size: int,
    folder: str,
    hub: Mapping[str, Any],
    *,
    retain_tokens: int | None = None,
    token_method: str | None = None,
    sparsevlm_version: str | None = None,
    adaptive: bool = False,
) -> Suites:
    """The suites to run on the model in `folder`, empty for none; hub: offline and trust_remote_code.

    Raises UserError, before any weight is read, when a name, an option, a file or an image is wrong or missing, or when
    the model sees no images.
    """
    names = suite_names(suite)
    given = dict(vlm_data=vlm_data, retain_tokens=retain_tokens, token_method=token_method)
    given |= dict(sparsevlm_version=sparsevlm_version, adaptive=adaptive or None)
    for option, value in given.items():
        needed = "suite" if option in ("vlm_data", "retain_tokens") else "retain_tokens"
        missing = not names if needed == "suite" else retain_tokens is None
        if value is not None and missing:
            flags = [f"--{name.replace('_', '-')}" for name in (option, needed)]
            raise UserError(f"{flags[0]} has no effect without {flags[1]}: give both, or leave it out")
    chosen = dict(method=token_method, version=sparsevlm_version)
    tokens = None
    if retain_tokens is not None:
        tokens = Tokens(retain_tokens, adaptive=adaptive, **{name: v for name, v in chosen.items() if v is not None})
    if names:
        _check_model(folder, names, tokens, hub)
    questions = {name: load_suite(name, None if vlm_data is None else Path(vlm_data).expanduser()) for name in names}
    parts = {name: part_of(found, limit) for name, found in questions.items()}
    for found in questions.values():  # with a limit too: what an answer is kept under has all images of the suite
        check_images(found)
    return Suites(questions, parts, limit, tokens, batch_size, folder, hub)


def _check_model(folder: str, names: Sequence[str], tokens: Tokens | None, hub: Mapping[str, Any]) -> None:
    config = load_config(folder, packed=True, **hub)
    if not family_of(config).vision:
        raise UserError(f"--suite {','.join(names)}: {folder} ({config.model_type}) sees no images: give a LLaVA model")
    if tokens is not None:
        from mico.visual_tokens.budgets import check_budget
        from mico.visual_tokens.methods import method_of

        check_budget(config, tokens.retain, method_of(tokens.method, tokens.version).schedule)
    load_processor(folder, **hub)


def _tokenizer_facts(tokenizer: Any) -> Any:
    """What cuts a text into ids and joins them, without what the last call left in it: padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, tokenizer.get_vocab()]
    parts: dict[str, Any] = json.loads(backend.to_str())
    return {name: part for name, part in parts.items() if name not in ("padding", "truncation")}


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds in all, and means: seconds and new tokens of a question; of those with an image what a prompt costs."""
    seen = [one for one in found if one["visual_tokens"]] or found
    costs = {name: share([float(one["costs"][name]) for one in seen]) for name in seen[0]["costs"]}
    return dict(
        seconds=sum(one["seconds"] for one in found), latency=share([one["seconds"] for one in found]),
        new_tokens=share([float(one["tokens"]) for one in found]),
        **{name: share([float(one[name]) for one in seen]) for name in ("visual_tokens", "prompt_tokens")}, **costs,
    )  # fmt: skip


def dense_costs(model: Any, visual: int, prompt: int) -> dict[str, float]:
    """Of a prefill of `prompt` tokens, `visual` of them of an image, where all stay in every layer.

    processed_tokens: visual tokens a layer, equal_tokens: as the field counts them, both means over the layers;
    prefill_flops of the decoder layers; kv_bytes that the prompt leaves in the cache.
    """
    from mico.visual_tokens.flops import Shape, prefill_flops

    config = model.config.get_text_config()
    tokens, shape = [prompt] * config.num_hidden_layers, Shape.of(config)
    return dict(
        processed_tokens=visual, equal_tokens=visual, kv_bytes=_kv_bytes(model, tokens),
        prefill_flops=prefill_flops(shape, tokens), without_rater=0.0,
    )  # fmt: skip


def pruned_costs(model: Any, pruning: Any, visual: list[int], prompt: list[int]) -> list[dict[str, float]]:
    """The same of the prompts that were pruned last; without_rater: the share whose whole question had to judge."""
    if not any(visual):  # text alone
        return [dense_costs(model, *one) for one in zip(visual, prompt, strict=True)]
    trace = pruning.trace
    return [
        dict(
            processed_tokens=trace.processed_tokens(sample), equal_tokens=trace.equal_tokens(sample),
            kv_bytes=_kv_bytes(model, trace.tokens_per_layer(sample)), prefill_flops=trace.flops(sample),
            without_rater=trace.without_rater / len(visual),
        )
        for sample in range(len(visual))
    ]  # fmt: skip


def _kv_bytes(model: Any, tokens: Sequence[int]) -> int:
    """Keys and values of so many tokens in each layer."""
    from mico.visual_tokens.flops import Shape

    shape = Shape.of(model.config.get_text_config())
    return 2 * sum(tokens) * shape.key_heads * shape.head_dim * model.dtype.itemsize


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, int]]:
    """Filled at the end with the most memory that the device had in use; empty on the CPU."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["bytes"] = torch.cuda.max_memory_allocated(device)


def merged(earlier: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of earlier calls on the same model, those replaced that were made again with the same options."""
    made = [[record[name] for name in SAME] for record in found]
    kept = [dict(record) for record in earlier if [record.get(name) for name in SAME] not in made]
    return [*kept, *map(dict, found)]
