"""What options and config alone tell, before any text or weight is read: for the verbs that work and for plan."""

from __future__ import annotations

from typing import Any

from mico.adapters import family_of, with_towers
from mico.channels.information import KNN_CHANNELS, MIN_ROWS
from mico.checkpoint import check_execution
from mico.errors import UserError
from mico.exports.targets import check_profile
from mico.loading import context_length, stream_widths
from mico.packed.table import run_length
from mico.profiles import PROFILES
from mico.settings import Compression, Grouping, Source

COVERAGE = 0.9  # share of the Linear parameters that must be compressed, unless --allow-partial


def check_shapes(config: Any, source: Source, settings: Compression) -> None:
    """Raise UserError for what the shapes of a model cannot take. config: of the model of `source`."""
    check_execution()
    if settings.profile:
        check_profile(settings.profile, config, family_of(config))
    widths = _widths(config, source)
    if settings.pattern and any(width % settings.pattern[1] for width in widths):
        n, m = settings.pattern
        raise UserError(f"--pattern {n}:{m}: the model's input widths {widths} are not multiples of {m}")
    if settings.profile:
        for width in widths:
            PROFILES[settings.profile].group_size(width, settings.group_size)
    if settings.embed_bits != 16:
        text = config.get_text_config()
        run_length(getattr(text, "word_embed_proj_dim", text.hidden_size), settings.embed_bits)
    if settings.grouping:
        check_grouping(config, source, settings.grouping)


def check_grouping(config: Any, source: Source, grouping: Grouping) -> None:
    """Raise UserError for channel groups that the streams of a model, or so little text, cannot have."""
    widths, wanted = _widths(config, source), grouping.n_groups
    if isinstance(wanted, int) and wanted > widths[0]:
        raise UserError(f"--n-groups {wanted}: more groups than channels, the narrowest stream has {widths[0]}")
    if grouping.kind != "mi":
        return
    if grouping.mi_method == "knn" and widths[-1] > KNN_CHANNELS:
        raise UserError(f"--mi-method knn: {widths[-1]} channels exceed {KNN_CHANNELS}: use gaussian or copula")
    rows = source.nsamples * context_length(config, source.seqlen)
    if grouping.mi_method != "gaussian" and rows < MIN_ROWS:
        raise UserError(
            f"--mi-method {grouping.mi_method}: needs at least {MIN_ROWS} sampled rows, got {rows}: "
            "raise --nsamples or --seqlen, or use gaussian"
        )


def check_coverage(share: float, model: str, allow_partial: bool) -> None:
    """Raise UserError when so small a share of the Linear parameters of a model would be compressed."""
    if share < COVERAGE and not allow_partial:
        raise UserError(
            f"model {model}: {share:.1%} of its Linear parameters would be compressed, "
            f"below {COVERAGE:.0%}: pass --allow-partial if that is meant"
        )


def _widths(config: Any, source: Source) -> list[int]:
    """Input channels that streams of the model have, ascending."""
    family = with_towers(
        family_of(config), config, vision=source.compress_vision, projector=source.compress_projector
    )  # fmt: skip
    return sorted(set(stream_widths(config, source.trust_remote_code, family).values()))
