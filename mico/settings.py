"""The arguments of the verbs as frozen records, validated at the door; every message names its option."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from mico.errors import UserError
from mico.profiles import PROFILES

METHOD_NAMES = ("mico", "sparsegpt", "gptq", "wanda", "rtn")
ARMS = ("original", "enhanced", "mi")
MI_METHODS = ("gaussian", "copula", "histogram", "knn")
CLUSTERINGS = ("spectral", "hierarchical", "kmeans")
GROUPINGS = ("mi", "importance", "random", "range", "alpha")
ALLOCATIONS = ("rate", "thresholds")
EMBED_BITS = (4, 8, 16)
PROTOCOLS = ("sparsegpt", "gptq")  # by which perplexity is measured; the first is the default
EXPORTS = ("dense", "vllm", "gguf", "gptq")
AVERAGE_BITS = (2.0, 8.0)  # the range that mixed widths can reach: groups of 2 to 8 bits


def choose(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError listing the valid names unless `value` is one of them."""
    if value not in allowed:
        raise UserError(f"{option} {value}: choose from {', '.join(allowed)}")


@dataclass(frozen=True)
class Source:
    """Which model reads which text: what the statistics depend on, and the first part of every fingerprint."""

    model: str
    calib: str | None = None  # None: docs for a shipped reference model without --data-dir, else c4
    data_dir: str | None = None
    data_file: str | None = None
    nsamples: int = 128
    seqlen: int | None = None  # None: the model's own, at most 2048
    batch_size: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    trust_remote_code: bool = False
    stream: bool | None = None  # keep blocks on disk; None: when the model would take most of the free memory
    image_folder: str | None = None  # of the pictures that a LLaVA-Instruct file names
    compress_vision: bool = False  # the vision tower's blocks too
    compress_projector: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """What that sees images is compressed too, by the names in the options."""
        return ("vision",) * self.compress_vision + ("projector",) * self.compress_projector

    def __post_init__(self) -> None:
        for option in ("nsamples", "seqlen", "batch_size"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"--{option.replace('_', '-')} {value}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must be from 0 to 4294967295")
        if self.calib is not None and self.data_file is not None:
            raise UserError(f"--calib {self.calib} and --data-file {self.data_file} exclude each other: leave one out")
        if self.image_folder is not None and self.calib is None:
            raise UserError(f"--image-folder {self.image_folder}: give the file that names the pictures as --calib")
        if self.towers and self.stream:
            raise UserError(f"--compress-{self.towers[0]} needs the whole model in memory: leave --stream out")
        choose("--dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class Grouping:
    """How the channels of a stream are grouped."""

    n_groups: int | str = "auto"
    kind: str = "mi"  # a member of GROUPINGS; the last three are the controls that run beside MI
    mi_method: str = "gaussian"
    cluster: str = "spectral"

    def __post_init__(self) -> None:
        if self.n_groups != "auto" and (not isinstance(self.n_groups, int) or self.n_groups < 1):
            raise UserError(f"--n-groups {self.n_groups}: give a whole number of at least 1, or auto")
        choose("--mi-method", self.mi_method, MI_METHODS)
        choose("--cluster", self.cluster, CLUSTERINGS)
        choose("--grouping", self.kind, GROUPINGS)


@dataclass(frozen=True)
class Compression:
    """What to do with the weights. `grouping` None: one scale group a row (or contiguous --group-size ones).

    profile: a name of PROFILES, whose grids and groups the weights then have.
    """

    method: str = "mico"
    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None
    wbits: int = 16
    target_avg_bits: float | None = None
    grouping: Grouping | None = None
    group_size: int | None = None
    allocation: str = "rate"
    percdamp: float = 0.01
    blocksize: int = 128
    embed_bits: int = 16
    profile: str | None = None

    @property
    def allocates(self) -> bool:
        """Whether groups or Linears get different widths, by the statistics of the dense model."""
        return self.wbits != 16 and (self.grouping is not None or self.target_avg_bits is not None)

    def __post_init__(self) -> None:
        choose("--method", self.method, METHOD_NAMES)
        choose("--allocation", self.allocation, ALLOCATIONS)
        if not 0 <= self.sparsity < 1:
            raise UserError(f"--sparsity {self.sparsity}: must be at least 0 and below 1 (0.5 prunes half)")
        if self.wbits not in (*range(2, 9), 16):
            raise UserError(f"--wbits {self.wbits}: choose 2 to 8, or 16 for no quantization")
        low, high = AVERAGE_BITS
        if self.target_avg_bits is not None and not low <= self.target_avg_bits <= high:
            raise UserError(f"--target-avg-bits {self.target_avg_bits}: must be from {low:g} to {high:g}")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"--group-size {self.group_size}: must be at least 1")
        if self.group_size is not None and self.grouping is not None:
            raise UserError(f"--group-size {self.group_size} and channel groups exclude each other: --no-mi-grouping")
        if self.profile is not None:
            choose("--profile", self.profile, tuple(PROFILES))
            PROFILES[self.profile].check(self.wbits, self.target_avg_bits, self.group_size)
        if self.target_avg_bits is not None and self.grouping is None and self.profile is None:
            if self.wbits == 16:
                raise UserError(f"--target-avg-bits {self.target_avg_bits} contradicts --wbits 16: leave --wbits out")
            raise UserError(
                f"--target-avg-bits {self.target_avg_bits} needs channel groups: --method mico or sparsegpt with "
                "--use-mi-grouping, and no --group-size; or a --profile"
            )
        if self.method == "gptq" and (self.sparsity or self.pattern):
            raise UserError("--method gptq does not prune: use --method sparsegpt or mico, or --sparsity 0")
        if not 0 < self.percdamp < math.inf:
            raise UserError(f"--percdamp {self.percdamp}: must be above 0 and finite")
        if self.embed_bits not in EMBED_BITS:
            raise UserError(f"--embed-bits {self.embed_bits}: choose from {', '.join(map(str, EMBED_BITS))}")
        if self.blocksize < 1:
            raise UserError(f"--blocksize {self.blocksize}: must be at least 1")
        if self.pattern and self.blocksize % self.pattern[1]:
            raise UserError(f"--blocksize {self.blocksize}: must be a multiple of the pattern's {self.pattern[1]}")


def parse_pattern(text: str | None) -> tuple[int, int] | None:
    """'2:4' -> (2, 4): of every m consecutive weights n are kept. Raises UserError otherwise."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]) <= 32:
        raise UserError(f"--pattern {text}: expected n:m with 0 < n < m <= 32, for example 2:4")
    return int(match[1]), int(match[2])


def record(settings: Any) -> dict[str, Any]:
    """A settings record as plain JSON values, for manifests and fingerprints."""
    return asdict(settings)


# The field's ablation: what each arm sets. The third is mico's default.
_ARM_SETTINGS: dict[str, dict[str, Any]] = {
    "original": dict(method="sparsegpt", use_mi_grouping=False),
    "enhanced": dict(method="sparsegpt", grouping="importance", allocation="thresholds"),
    "mi": dict(method="mico", grouping="mi", allocation="rate"),
}
DEFAULT_SPARSITY = 0.5


def _refuse_unused(n_groups: int | str, mi_method: str, cluster: str, allocation: str | None, method: str) -> None:
    """Options about groups where there are none; an arm takes them all, so that arms run with the same command."""
    unused = {"--n-groups": n_groups != "auto", "--mi-method": mi_method != "gaussian"}
    unused |= {"--cluster": cluster != "spectral", "--allocation": allocation is not None}
    for option, given in unused.items():
        if given:
            raise UserError(f"{option} has no effect: --method {method} has no channel groups here (--use-mi-grouping)")


def _refuse_with_profile(profile: str, given: dict[str, Any]) -> None:
    """Options about groups and bits that a profile settles itself."""
    choose("--profile", profile, tuple(PROFILES))
    for name in ("arm", "use_mi_grouping", "grouping", "n_groups", "mi_method", "cluster"):
        if given.get(name):
            raise UserError(
                f"--{name.replace('_', '-')} contradicts --profile {profile}, whose groups are consecutive channels: "
                "leave one of them out"
            )
    if given["allocation"] not in (None, "rate"):
        raise UserError(f"--allocation {given['allocation']} contradicts --profile {profile} (rate): leave it out")


def compression_of(
    *,
    sparsity: float | None,
    pattern: str | None,
    wbits: int,
    target_avg_bits: float | None,
    n_groups: int | str,
    use_mi_grouping: bool | None,
    grouping: str | None,
    mi_method: str,
    cluster: str,
    method: str | None,
    arm: str | None,
    allocation: str | None,
    group_size: int | None,
    percdamp: float,
    blocksize: int,
    profile: str | None,
    embed_bits: int,
) -> Compression:
    """The options of `compress` as one record; None means 'by the arm, else by the method'.

    Raises UserError for options that contradict each other or the arm.
    """
    given: dict[str, Any] = dict(
        method=method, use_mi_grouping=use_mi_grouping, grouping=grouping, allocation=allocation
    )
    if arm is not None:
        choose("--arm", arm, ARMS)
        for option, value in _ARM_SETTINGS[arm].items():
            if given[option] not in (None, value):
                name = option.replace("_", "-")
                raise UserError(f"--{name} {given[option]} contradicts --arm {arm} ({value}): leave one of them out")
            given[option] = value
    name = given["method"] or "mico"
    if profile is not None:
        asked = given | dict(arm=arm, n_groups=n_groups != "auto", mi_method=mi_method != "gaussian")
        _refuse_with_profile(profile, asked | dict(cluster=cluster != "spectral"))
        given["use_mi_grouping"] = False
    parsed = parse_pattern(pattern)
    if sparsity is None:
        sparsity = 0.0 if parsed or profile or name in ("gptq", "rtn") else DEFAULT_SPARSITY
    elif parsed and sparsity != 0 and not math.isclose(sparsity, 1 - parsed[0] / parsed[1], abs_tol=0.005):
        raise UserError(f"--sparsity {sparsity} contradicts --pattern {pattern}: leave --sparsity out")
    wanted = given["grouping"] is not None or given["use_mi_grouping"]
    if wanted is None:
        wanted = name == "mico" and group_size is None
    if given["use_mi_grouping"] is False and given["grouping"] is not None:
        raise UserError(f"--no-mi-grouping contradicts --grouping {given['grouping']}: leave one of them out")
    if wanted and name in ("gptq", "wanda", "rtn"):
        raise UserError(f"--method {name} has no channel groups: leave the grouping options out, or use mico")
    if not wanted and arm is None:
        _refuse_unused(n_groups, mi_method, cluster, given["allocation"], name)
    groups = Grouping(n_groups, given["grouping"] or "mi", mi_method, cluster) if wanted and wbits != 16 else None
    return Compression(
        method=name, sparsity=0.0 if parsed else sparsity, pattern=parsed, wbits=wbits,
        target_avg_bits=target_avg_bits, grouping=groups, group_size=group_size,
        allocation=given["allocation"] or "rate", percdamp=percdamp, blocksize=blocksize, profile=profile,
        embed_bits=embed_bits,
    )  # fmt: skip
