from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mico.errors import UserError
from mico.files import (
    atomic_json,
    atomic_write,
    differences,
    fingerprint,
    load_tensors,
    save_tensors,
    sha256_file,
    writing,
)
from tests.faults import full_disk_message, killing_at


def test_atomic_write_honours_umask_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        previous = os.umask(umask)
        try:
            atomic_write(file, str(mode).encode())
            save_tensors(tmp_path / "b", {"x": torch.ones(2)})
        finally:
            os.umask(previous)
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode) == mode
        assert file.read_bytes() == str(mode).encode()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_atomic_json_round_trip(tmp_path: Path) -> None:
    atomic_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": 1, "a": "é"}


def test_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    point = 0
    while True:
        atomic_write(file, b"old" * 100)
        killed = killing_at(point, lambda: atomic_write(file, b"new" * 200), tmp_path)
        assert file.read_bytes() in (b"old" * 100, b"new" * 200)
        if not killed:
            break
        point += 1
    assert point == 3  # fsync of the file, rename, fsync of the folder


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"a cannot be written \(No space left on device\): free disk space"):
        atomic_write(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError("5000 requested and 1024 written"), True),
        (SafetensorError("I/O error: File too large (os error 27)"), True),
        (Exception("File too large (os error 27)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("differs"), False),
    ],
)
def test_a_full_disk_is_known_in_the_words_of_every_library(tmp_path: Path, error: Exception, full: bool) -> None:
    with pytest.raises(UserError if full else type(error)) as caught, writing(tmp_path / "x", full_alone=True):
        raise error
    assert full == ("x cannot be written (" in str(caught.value) and "free disk space" in str(caught.value))


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "big"
    message = full_disk_message(lambda: save_tensors(file, {"x": torch.ones(5000)}), tmp_path / "answer", 4096)
    assert str(file) in message and "free disk space" in message and "\n" not in message
    assert sorted(os.listdir(tmp_path)) == ["answer"]


def test_unwritable_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a cannot be written .*choose a folder"):
        atomic_write(tmp_path / "file" / "a", b"")


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=6))
@settings(max_examples=20, deadline=None)
def test_save_tensors_is_deterministic(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str]) -> None:
    folder = tmp_path_factory.mktemp("save")
    shared = torch.arange(12.0).view(3, 4)
    tensors = {"a": shared, "b": shared.T, "c": shared[1:], "d": torch.zeros(0, 2), "é": torch.ones(1).bfloat16()}
    digest = save_tensors(folder / "1", tensors, metadata)
    again = dict(reversed(metadata.items()))
    assert save_tensors(folder / "2", dict(reversed(tensors.items())), again) == digest == sha256_file(folder / "2")
    loaded = load_tensors(folder / "1", digest)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(folder / "1", framework="pt") as file:
        assert (file.metadata() or {}) == metadata


def test_truncated_tensors_are_named(tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    data = save({"x": torch.arange(100.0)}, metadata={"k": "v"})
    for size in range(0, len(data), len(data) // 20):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"shard\.safetensors is truncated or damaged .*run again"):
            load_tensors(file)


def test_flipped_bit_and_missing_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    digest = save_tensors(file, {"x": torch.arange(100.0)})
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    load_tensors(file)  # the format itself cannot tell
    with pytest.raises(UserError, match=rf"shard\.safetensors is truncated or damaged .*{digest[:12]}"):
        load_tensors(file, digest)
    for expected in (None, digest):
        with pytest.raises(UserError, match=r"gone\.safetensors cannot be read"):
            load_tensors(tmp_path / "gone.safetensors", expected)


def test_mutated_headers_are_user_errors(tmp_path: Path) -> None:
    file = tmp_path / "shard.safetensors"
    data = save({"x": torch.arange(20.0), "y": torch.ones(3, dtype=torch.uint8)})
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        mutated = bytearray(data)
        for at in torch.randint(0, 120, (3,), generator=generator).tolist():
            mutated[at] = int(torch.randint(0, 256, (1,), generator=generator))
        file.write_bytes(mutated)
        try:
            load_tensors(file)
        except UserError as error:
            refused += 1
            assert "shard.safetensors" in str(error) and "\n" not in str(error)
    assert refused > 200


def test_fingerprint_depends_on_content_not_order() -> None:
    assert fingerprint(dict(a=1, b=(2, 3))) == fingerprint(dict(b=[2, 3], a=1))
    assert len({fingerprint(value) for value in ({}, dict(a=1), dict(a=2), dict(b=1), dict(a="1"))}) == 5
    assert len(fingerprint({})) == 16 and int(fingerprint({}), 16) >= 0


def test_differences_name_nested_fields() -> None:
    there, here = dict(a=1, b=dict(c=2, d=3), e=5), dict(a=1, b=dict(c=2, d=4), f="x")
    assert differences(there, here) == [
        "b.d: there 3, here 4",
        'f: there nothing, here "x"',
        "e: there 5, here nothing",
    ]
    assert differences(there, there) == []
