"""A finished run made up of figures alone, as mico compress would report it, and a reader of HTML pages."""

from __future__ import annotations

import base64
import gzip
import json
import math
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

LINEARS = {
    "self_attn.q_proj": "attn_in", "self_attn.k_proj": "attn_in", "self_attn.v_proj": "attn_in",
    "self_attn.o_proj": "attn_out", "mlp.gate_proj": "mlp_in", "mlp.up_proj": "mlp_in", "mlp.down_proj": "mlp_out",
}  # fmt: skip
STREAMS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
SIZES = [4, 2, 6]


def made(blocks: int = 3, **changes: Any) -> dict[str, Any]:
    """A report of `blocks` blocks of seven Linears; `changes` replace fields."""
    layers = [_layer(block, place, path) for block in range(blocks) for place, path in enumerate(LINEARS)]
    grouping = dict(n_groups="auto", kind="mi", mi_method="gaussian", cluster="spectral")
    report = dict(
        model="tiny", arm="mi", calibration="docs/train: 1,024 tokens", identity=dict(seed=0),
        architecture=dict(
            family="Llama", layers=blocks, hidden=12, heads=2, kv_heads=1, ffn=24, vocabulary=100, tied_head=True,
            parameters=2000, coverage=1.0,
        ),
        settings=dict(method="mico", sparsity=0.5, wbits=4, grouping=grouping), protocol="sparsegpt",
        dense=dict(docs=score(30.25), wiki=score(41.5)), compressed=dict(docs=score(36.125), wiki=score(88.75)),
        size=dict(
            weights=1000, share_compressed=0.5, sparsity=0.5, nominal_bits=4.25, true_bits=3.1275, stored_bits=3128,
            packed_bytes=1_513_000, dense_bytes=3_411_000, bytes=1_519_000,
        ),
        layers=layers, groups=[_groups(block, stream) for block in range(blocks) for stream in STREAMS],
        heat_maps=[_heat(block, stream) for block in sorted({0, blocks // 2, blocks - 1}) for stream in STREAMS],
        fallbacks=[], seconds={"load": 0.5, "groups": 12.25, "clustering": 11.5, "compress": 73.0, "total": 140.5},
        reused_seconds={}, resumed_blocks=0, environment_changes=[], processes=[], peak_host_bytes=890_000_000,
        peak_device_bytes=0, environment=dict(python="3.11", mico="0.1.0"), folder="results/tiny-run",
        command=["/usr/bin/mico", "compress", "tiny", "--save", "results/tiny-run"],
    )  # fmt: skip
    return report | changes


def score(perplexity: float, **more: Any) -> dict[str, Any]:
    way = dict(tokens=1024, windows=8, seqlen=128, bos=False, origin="a test", protocol="sparsegpt", shortfall=0)
    return dict(perplexity=perplexity) | way | more


def _layer(block: int, place: int, path: str) -> dict[str, Any]:
    bits = [2 + (block + place) % 4, 4, 4]
    return dict(
        block=block, stream=LINEARS[path], layer=f"model.layers.{block}.{path}", rows=8 + place, channels=12,
        weights=12 * (8 + place), kept=6 * (8 + place), sizes=SIZES, bits=bits, nominal_bits=4.0, fallbacks=[],
        stored=dict(codes=200, scales=16, mask=50), error=0.001 * (1 + place) * (1 + block) ** 2,
    )  # fmt: skip


def _groups(block: int, stream: str) -> dict[str, Any]:
    place = STREAMS.index(stream)
    return dict(
        block=block, stream=stream, method="spectral", n_groups=3, sizes=SIZES, silhouette=0.01 * (place - block),
        davies_bouldin=0.5 + 0.1 * place, within_mi=0.02, between_mi=0.01,
    )  # fmt: skip


def _heat(block: int, stream: str) -> dict[str, Any]:
    cells = [" ".join(f"{(row * 12 + column) / 1000:.4g}" for column in range(row + 1)) for row in range(12)]
    return dict(block=block, stream=stream, sizes=SIZES, cells=cells)


# --- a reader of pages ----------------------------------------------------------------------------------------------


@dataclass
class Element:
    """One element of a page; `text` is all the text inside."""

    tag: str
    attributes: dict[str, str]
    path: tuple[str, ...]
    text: str = ""


VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


@dataclass
class Page(HTMLParser):
    """Every element of a page in its order, read by Python's own parser."""

    source: str
    elements: list[Element] = field(default_factory=list)
    _open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        assert not self._open, f"not closed: {self._open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Element(tag, {name: value or "" for name, value in attrs}, tuple(one.tag for one in self._open))
        self.elements.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}, ()))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [one for one in self.elements if one.tag == tag and wanted.items() <= one.attributes.items()]

    def tables(self) -> dict[str, list[list[str]]]:
        """{heading of its section: the rows of the table, heads among them}."""
        found: dict[str, list[list[str]]] = {}
        heading = ""
        for one in self.elements:
            if one.tag == "h2":
                heading = one.text
            elif one.tag == "tr":
                found.setdefault(heading, []).append([])
            elif one.tag in ("th", "td"):
                found[heading][-1].append(one.text)
        return found

    def data(self) -> dict[str, Any]:
        """The JSON inside the page."""
        (script,) = self.all("script", id="data")
        text = script.text
        if script.attributes.get("data-encoding"):
            text = gzip.decompress(base64.b64decode(text)).decode()
        return json.loads(text, parse_constant=lambda name: math.nan)
