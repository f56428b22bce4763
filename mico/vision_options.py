"""The options of `mico eval` about images alone; those it shares with other verbs are in options.py."""

from __future__ import annotations

from typing import Annotated

from mico.options import _choice, _option

_IMAGES = "Questions about images"
SUITES = ("mme", "pope", "scienceqa", "gqa", "textvqa", "grids", "grids-photo")
METHODS = ("sparsevlm", "fastv", "random", "cls", "mico")

Suite = Annotated[
    str | None,
    _option(
        _IMAGES, "--suite", metavar="NAME,NAME",
        help=f"Suites, with commas: {', '.join(SUITES)}; grids come with mico and need no files.",
    ),
]  # fmt: skip
VlmData = Annotated[
    str | None,
    _option(_IMAGES, "--vlm-data", metavar="DIR", help="Folder with mme/, pope/, ...; calib_data/README.md tells how."),
]
RetainTokens = Annotated[
    int | None,
    _option(_IMAGES, "--retain-tokens", metavar="N", help="Visual tokens to keep, on average.", show_default="all"),
]
TokenMethod = Annotated[
    str | None,
    _choice(_IMAGES, "--token-method", METHODS, "Who chooses the visual tokens.", show_default="sparsevlm"),
]
SparseVlmVersion = Annotated[
    str | None, _option(_IMAGES, "--sparsevlm-version", metavar="1.0|2.0", help="Of SparseVLM.", show_default="2.0")
]
Adaptive = Annotated[
    bool, _option(_IMAGES, "--adaptive", help="Let the rank of the attention choose how many tokens stay.")
]
