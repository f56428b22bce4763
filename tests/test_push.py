"""A pushed model can be read back from the hub with the same logits; everything that is refused is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import mico
from mico import cli
from mico.console import Console
from mico.errors import UserError
from mico.push import card_of, check_push, push, pushable, section
from tests.standin import LFS_BYTES, Hub
from tests.workspace import Workspace, workspace


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run(space: Workspace) -> Path:
    return space.run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template[template.index("/{") :])
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is that of a closed server
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        yield hub


def ours(run: Path) -> dict[str, Path]:
    return {path.name: path for path in (run / "model").iterdir()}


def uploads(hub: Hub) -> int:
    return sum(line.startswith("PUT /lfs/") for line in hub.asked)


def test_a_pushed_model_read_back_gives_the_same_logits(run: Path, hub: Hub, tmp_path: Path) -> None:
    console = Console()
    result = push(str(run), "tiny", console=console, json=str(tmp_path / "figures.json"))
    assert result["repo"] == "someone/tiny" and result["changed"] and not hub.private["someone/tiny"]
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    held = hub.files["someone/tiny"]
    assert held.keys() == ours(run).keys() and max(map(len, held.values())) >= LFS_BYTES and uploads(hub) >= 1
    assert {name for name in held if held[name] != ours(run)[name].read_bytes()} == {"README.md"}
    assert b'from_pretrained("someone/tiny")' in held["README.md"]
    assert result["bytes"] == sum(path.stat().st_size for path in ours(run).values())
    copy = huggingface_hub.snapshot_download(
        "someone/tiny", cache_dir=str(tmp_path / "cache"), endpoint=hub.url, token="hf_good"
    )
    ids = torch.arange(1, 33).unsqueeze(0)
    with torch.no_grad():
        sent, found = (mico.load(str(folder))(ids).logits for folder in (run, copy))
    assert torch.equal(sent, found)


def again(space: Workspace, *flags: str) -> int:
    """The command of the finished run once more, with other flags."""
    return cli.main(
        ["compress", str(space.model), "--eval=wikitext2", "--arm=mi", f"--save={space.run}", *space.flags, *flags]
    )


def test_compress_pushes_what_it_made(
    space: Workspace, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(space, "--push-to-hub=tiny", "--private") == 0
    assert hub.files["someone/tiny"].keys() == ours(run).keys() and hub.private["someone/tiny"]
    shown = capsys.readouterr()
    assert "Push to someone/tiny" in shown.out and "reusing it" in shown.err


def test_compress_is_told_before_any_work_what_cannot_be_pushed(
    space: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(space, "--push-to-hub=others/tiny") == 2 == again(space, "--private")
    first, second = capsys.readouterr().err.splitlines()
    assert "begin with one of them" in first and "--private has no effect without --push-to-hub" in second
    assert not hub.files


def test_a_second_push_sends_nothing_and_makes_no_commit(run: Path, hub: Hub) -> None:
    first = push(str(run), "a-team/tiny", private=True)
    sent = uploads(hub)
    again = push(str(run), "a-team/tiny")
    assert hub.private["a-team/tiny"] and hub.commits["a-team/tiny"] == 1 and uploads(hub) == sent
    assert again == first | dict(changed=False)
    assert "nothing changed" in str(section(again).rows)


def test_a_push_that_broke_goes_on(run: Path, hub: Hub) -> None:
    hub.fail_uploads = 1
    with pytest.raises(UserError, match=r"^push tiny: the hub refuses with 400 .*: mico push goes on where this"):
        push(str(run), "tiny")
    assert not hub.files["someone/tiny"]
    assert push(str(run), "tiny")["changed"] and hub.files["someone/tiny"].keys() == ours(run).keys()


def test_weights_of_an_earlier_push_go_and_other_files_stay(run: Path, hub: Hub) -> None:
    hub.files["someone/tiny"] = {
        "model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "NOTES.md": b"mine",
    }  # fmt: skip
    hub.private["someone/tiny"] = False
    push(str(run), "tiny")
    assert hub.files["someone/tiny"].keys() == ours(run).keys() | {"NOTES.md"}


def test_what_arrived_otherwise_is_told(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(dict):  # type: ignore[type-arg]
        def __setitem__(self, name: str, data: bytes) -> None:
            super().__setitem__(name, data[:-1] if name == "config.json" else data)

    hub.files["someone/tiny"] = Lossy()
    hub.private["someone/tiny"] = False
    with pytest.raises(UserError, match=r"^push tiny: the hub holds config.json otherwise|holds config.json otherwise"):
        push(str(run), "tiny")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-x", "x.git"])
def test_a_wrong_name(name: str, hub: Hub) -> None:
    with pytest.raises(UserError, match=rf"^--push-to-hub {name}: no name of a repository"):
        check_push(name)
    assert not hub.asked


@pytest.mark.parametrize(
    ("token", "role", "repo", "said"),
    [
        (None, "write", "tiny", "no token for the hub: run `hf auth login`, or set HF_TOKEN"),
        ("hf_bad", "write", "tiny", "the hub does not know the token"),
        ("hf_good", "read", "tiny", "the token may only read"),
        ("hf_good", "write", "others/tiny", "the token belongs to someone, a-team: begin with one of them"),
    ],
)
def test_a_wrong_token(
    token: str | None, role: str, repo: str, said: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.role = role
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"^--push-to-hub {repo}: {said}"):
        check_push(repo)
    assert not hub.files


def test_a_right_name_and_token_pass(hub: Hub) -> None:
    for name in ("tiny", "someone/tiny", "a-team/tiny"):
        check_push(name)
    assert set(hub.asked) == {"GET /api/whoami-v2"} and not hub.files


def test_no_permission_and_no_network(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 403
    with pytest.raises(UserError, match=r"^push tiny: the token may not write there"):
        push(str(run), "tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^push tiny: the hub is off"):
        push(str(run), "tiny")


def test_a_hub_out_of_reach(run: Path, hub: Hub) -> None:
    hub.__exit__()
    with pytest.raises(UserError, match=r"^push tiny: the hub cannot be reached \(.*\): check the network, then mico"):
        push(str(run), "tiny")


def test_a_damaged_or_unfinished_run_is_not_sent(run: Path, hub: Hub, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = copy / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        push(str(copy), "tiny")
    (copy / "report.json").unlink()
    with pytest.raises(UserError, match=rf"^push {copy}: the run is unfinished: run its mico compress again first"):
        push(str(copy), "tiny")
    with pytest.raises(UserError, match=rf"^push {tmp_path}: there is no model in it: give a finished run folder"):
        push(str(tmp_path), "tiny")
    with pytest.raises(UserError, match=r"no such folder"):
        pushable(str(tmp_path / "nothing"))
    assert not hub.files


def test_the_card_loads_by_the_name_on_the_hub(run: Path) -> None:
    local: Any = (run / "model" / "README.md").read_text(encoding="utf-8")
    card = card_of(run / "model", "a-team/tiny").decode()
    assert local.count('from_pretrained("') == card.count('from_pretrained("a-team/tiny"') == 2
