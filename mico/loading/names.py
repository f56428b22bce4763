"""From what the user calls a model to a folder on this machine: aliases, shipped models, local folders, the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NoReturn

from mico.errors import UserError
from mico.loading.safety import INDEX, PICKLE_REMEDY, WEIGHTS, reason

REFERENCE_DIR = Path(__file__).parents[1] / "reference"
REFERENCES = ("tiny-llama", "tiny-opt", "tiny-llava")
ALIASES: dict[str, str] = {
    **{name: str(REFERENCE_DIR / name) for name in REFERENCES},
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")},
    **{f"vicuna-{size}": f"lmsys/vicuna-{size}-v1.5" for size in ("7b", "13b")},
    **{f"llama2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")},
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    **{f"yi-{size.lower()}": f"01-ai/Yi-{size}" for size in ("6B", "34B")},
    **{f"qwen2-{size.lower()}": f"Qwen/Qwen2-{size}" for size in ("0.5B", "1.5B", "7B", "72B")},
    **{f"qwen2.5-{size.lower()}": f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
    **{f"minicpm4-{size.lower()}": f"openbmb/MiniCPM4-{size}" for size in ("0.5B", "8B")},
    **{f"llava-1.5-{size}": f"llava-hf/llava-1.5-{size}-hf" for size in ("7b", "13b")},
}
_SMALL_PATTERNS = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"]
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")  # of models that see images
PROCESSOR_FILES = (*IMAGE_FILES, "chat_template.json", "chat_template.jinja")
_SMALL_PATTERNS += ["added_tokens.json", "vocab.json", "merges.txt", "chat_template*", *PROCESSOR_FILES]
_WEIGHT_PATTERNS = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]  # not Mistral's second copy, consolidated.safetensors


def resolve(name: str) -> str:
    """The folder or hub id behind an alias (case does not matter); any other name is returned as it is."""
    return ALIASES.get(name.lower(), name)


def is_reference(name: str) -> bool:
    """Whether a name, alias or path is one of the models shipped with the package."""
    path = Path(resolve(name)).expanduser().resolve()
    return path in {(REFERENCE_DIR / reference).resolve() for reference in REFERENCES}


def model_in(name: str | Path) -> Path:
    """The folder that holds config.json: the one named, or `model/` inside a run folder of mico."""
    path = Path(resolve(str(name))).expanduser()
    inside = path / "model"
    return inside if not (path / "config.json").exists() and (inside / "config.json").is_file() else path


def local_folder(name: str, *, weights: bool = True, offline: bool = False, trust_remote_code: bool = False) -> Path:
    """The folder of a model on this machine; a hub id is downloaded first (without its weights if not `weights`).

    Raises UserError when the folder is missing, the name unknown, or the hub out of reach.
    """
    target = resolve(name)
    path = Path(target).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model {name}: {path} is a file, give the folder it lies in")
    if is_reference(name):
        raise UserError(f"model {name}: {path} is missing from this installation: reinstall mico")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", target):
        return _hub_folder(name, target, weights, offline, ["*.py"] if trust_remote_code else [])
    if "/" in target or target.startswith((".", "~")):
        raise UserError(f"model {name}: no such folder")
    close = difflib.get_close_matches(name.lower(), ALIASES, n=2)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UserError(
        f"unknown model '{name}'{hint}: `mico models` lists the names; a local folder or org/name works too"
    )


def _hub_folder(name: str, repo: str, weights: bool, offline: bool, extra: list[str]) -> Path:
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    patterns = [*_SMALL_PATTERNS, *extra, *(_WEIGHT_PATTERNS if weights else [])]
    folder = _snapshot(name, repo, None, patterns, offline)
    if not weights or (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return folder
    # Older repositories (OPT, Vicuna) hold pickle files; the hub's conversion bot offers safetensors as a pull request.
    revision = _converted_revision(name, repo, offline)
    if revision is None:
        raise UserError(f"model {name}: {repo} has no safetensors weights; {PICKLE_REMEDY}")
    return _snapshot(name, repo, revision, patterns, offline)


def _snapshot(name: str, repo: str, revision: str | None, patterns: list[str], offline: bool) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=offline
            )
        )
    except Exception as error:  # the client raises its own types and those of its http library
        raise_hub_error(name, repo, offline, error)


def raise_hub_error(name: str, repo: str, offline: bool, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    elsewhere = "or give a local folder, or tiny-llama"
    if isinstance(error, GatedRepoError):
        text = f"{repo} is gated: accept its licence on huggingface.co and run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        text = f"no repository {repo} on the hub (or it is private): `mico models` lists the names"
    elif isinstance(error, LocalEntryNotFoundError) and offline:
        text = f"{repo} is not whole in the hub cache and the hub is off (--offline or HF_HUB_OFFLINE): allow it once, "
        text += elsewhere
    elif isinstance(error, LocalEntryNotFoundError):
        text = f"{repo} is not in the hub cache and the hub cannot be reached: check the network, {elsewhere}"
    else:
        text = f"{repo} could not be read from the hub ({reason(error)}): check the network, {elsewhere}"
    raise UserError(f"model {name}: {text}") from None


def _converted_revision(name: str, repo: str, offline: bool) -> str | None:
    """The pull request of the hub's own conversion bot that adds safetensors to a repository, as a git reference."""
    from huggingface_hub import constants, get_repo_discussions

    if offline:
        refs = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / "refs" / "pr"
        numbers = [int(path.name) for path in refs.glob("*") if path.name.isdigit()]
    else:
        bot = dict(author="SFconvertbot", discussion_type="pull_request", discussion_status="open")
        try:
            numbers = [discussion.num for discussion in get_repo_discussions(repo, **bot)]  # type: ignore[arg-type]
        except Exception as error:  # as in _snapshot
            raise_hub_error(name, repo, offline, error)
    return f"refs/pr/{max(numbers)}" if numbers else None


def source_of(name: str, folder: Path) -> str:
    return f"{resolve(name)}@{folder.name[:12]}" if folder.parent.name == "snapshots" else str(folder)
