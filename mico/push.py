"""The model of a finished run to the Hugging Face hub (mico push RUN ID, mico compress --push-to-hub ID).

Files that the hub already has are not sent again, so a push that was cut off goes on and a second one changes nothing.
What arrived is compared with what lies on disk, by sha256 or git's own digest.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from mico.callable import callable_module
from mico.checkpoint import verify_checkpoint
from mico.console import Console
from mico.errors import UserError
from mico.files import TEMPORARY, atomic_json, check_writable, sha256_file
from mico.loading.names import model_in
from mico.loading.safety import reason
from mico.tables import Section, size_text

callable_module(__name__)
CARD, CONFIG = "README.md", "config.json"
WEIGHTS = (".safetensors", ".safetensors.index.json")  # files of an earlier push that are no longer part of the model
MESSAGE = "Upload model with mico"


def check_push(repo: str, option: str = "--push-to-hub") -> None:
    """Refuse, before any long work, a name that is none, a token that is missing, unknown or may not write there.

    Asks the hub who the token is. Nothing is made there yet. Raises UserError naming the option and the remedy.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(
            f"{option} {repo}: no name of a repository: give NAME or ORGANIZATION/NAME of letters, digits, - _ and ."
        ) from None
    if huggingface_hub.get_token() is None:
        raise UserError(f"{option} {repo}: no token for the hub: run `hf auth login`, or set HF_TOKEN")
    try:
        known = huggingface_hub.HfApi().whoami()
    except Exception as error:  # the client raises its own types and those of its http library
        raise _explained(option, repo, error) from error
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{option} {repo}: the token may only read: make one that may write, then `hf auth login`")
    own = [known["name"], *(organization["name"] for organization in known.get("orgs", []))]
    if "/" in repo and repo.split("/")[0] not in own:
        raise UserError(f"{option} {repo}: the token belongs to {', '.join(own)}: begin with one of them")


def push(
    run: str,
    repo: str,
    *,
    private: bool = False,
    commit_message: str = MESSAGE,
    json: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Upload the model of a run folder (or a model folder) to the repository `repo`, which is made when it is new.

    private: for a new repository; an old one stays as it is. Returns plain JSON values, also written to `json`:
    `repo`, `url`, `commit`, `files`, `bytes`, `changed`. Raises UserError for a folder that is not whole and for
    whatever the hub refuses.
    """
    console = console or Console()
    if json is not None:
        check_writable("--json", json)
    folder = pushable(run)
    check_push(repo, "push")
    verify_checkpoint(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    try:
        result = _upload(folder, files, repo, private, commit_message, console)
    except UserError:
        raise
    except Exception as error:  # as in check_push
        raise _explained("push", repo, error) from error
    if json is not None:
        atomic_json(json, result)
    return result


def pushable(run: str) -> Path:
    """The model folder of a run. Raises UserError when there is none, or the run is unfinished."""
    folder = model_in(run)
    if not (folder / CONFIG).is_file() or not list(folder.glob("*.safetensors")):
        what = "no such folder" if not Path(run).exists() else "there is no model in it"
        raise UserError(f"push {run}: {what}: give a finished run folder of mico compress")
    inside = folder != Path(run) and (folder.parent / "manifest.json").is_file()
    if inside and not (folder.parent / "report.json").is_file():
        raise UserError(f"push {run}: the run is unfinished: run its mico compress again first")
    return folder


def card_of(folder: Path, repo: str) -> bytes:
    """The model card, which loads the model by the name that it has on the hub."""
    text = (folder / CARD).read_text(encoding="utf-8")
    return re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{repo}"', text).encode()


def section(result: dict[str, Any]) -> Section:
    """What was done, for the terminal."""
    what = "uploaded" if result["changed"] else "was there already, nothing changed"
    rows = (
        ("repository", result["url"]),
        ("commit", result["commit"]),
        ("files", f"{result['files']} of {size_text(result['bytes'])}: {what}"),
    )
    return Section(f"Push to {result['repo']}", ("", ""), rows)


def _upload(
    folder: Path, files: list[Path], repo: str, private: bool, message: str, console: Console
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with console.stage("push"):
        made = api.create_repo(repo, private=private, exist_ok=True)
        before = api.model_info(made.repo_id)
        contents = {file.relative_to(folder).as_posix(): file for file in files}
        cards = {CARD: card_of(folder, made.repo_id)} if CARD in contents else {}
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=cards.get(name, str(file)))
            for name, file in contents.items()
        ]
        there = [sibling.rfilename for sibling in before.siblings or []]
        stale = [name for name in there if name.endswith(WEIGHTS) and name not in contents]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        console.note(f"push: {len(contents)} files to {made.url}")
        commit = api.create_commit(made.repo_id, operations, commit_message=message)
        _compare(api, made.repo_id, commit.oid, contents, cards)
    return dict(
        repo=made.repo_id, url=str(made), commit=commit.oid, files=len(contents),
        bytes=sum(file.stat().st_size for file in files), changed=commit.oid != before.sha,
    )  # fmt: skip


def _compare(api: Any, repo: str, revision: str, contents: dict[str, Path], cards: dict[str, bytes]) -> None:
    """Raise UserError naming a file that the hub does not hold as it lies on disk."""
    found = {entry.path: entry for entry in api.get_paths_info(repo, list(contents), revision=revision)}
    for name, file in contents.items():
        entry = found.get(name)
        if entry is None:
            same = False
        elif entry.lfs is not None:
            same = entry.lfs.sha256 == sha256_file(file)
        else:
            same = entry.blob_id == _git_digest(cards.get(name) or file.read_bytes())
        if not same:
            raise UserError(f"push {repo}: the hub holds {name} otherwise than it was sent: run mico push again")


def _git_digest(data: bytes) -> str:
    """How git names the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", TEMPORARY)) or part == "__pycache__" for part in path.parts)


def _explained(option: str, repo: str, error: BaseException) -> UserError:
    """One line on what the hub refused, or why it cannot be reached."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None and cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        text = "the hub is off (--offline or HF_HUB_OFFLINE): allow it, or leave the push to mico push later"
    elif status == 401:
        text = "the hub does not know the token: run `hf auth login`, or mend HF_TOKEN"
    elif status == 403:
        text = "the token may not write there: give it write access, or choose another name"
    elif status is not None:
        text = f"the hub refuses with {status} ({reason(cause or error)}): mico push goes on where this stopped"
    else:
        text = f"the hub cannot be reached ({reason(cause or error)}): check the network, then mico push RUN {repo}"
    return UserError(f"{option} {repo}: {text}")
