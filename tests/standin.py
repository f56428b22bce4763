"""A stand-in of the hub's HTTP API, as far as pushing and reading a model go: it keeps what it is sent in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 20_000  # files from this size on go through LFS, as weights do


@dataclass
class Hub:
    """What the stand-in holds: `url` while it runs, the files of every repository, and what it was asked."""

    user: str = "someone"
    role: str = "write"
    status: int = 0  # of every answer but whoami, when it shall refuse
    fail_uploads: int = 0  # the first uploads of LFS files that break
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    commits: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> Hub:
        handler = type("Bound", (_Handler,), dict(hub=self))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repo: str) -> str:
        return f"{self.commits.get(repo, 0):040x}"


def git_digest(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in dict({"Content-Length": str(len(data))}, **headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != "Bearer hf_good" and not path.startswith("/lfs/"):
            return self._answer(dict(error="Invalid credentials"), 401)
        if path == "/api/whoami-v2":
            token = dict(accessToken=dict(role=hub.role))
            return self._answer(dict(name=hub.user, orgs=[dict(name="a-team")], auth=token))
        if hub.status:
            return self._answer(dict(error="Forbidden by the stand-in"), hub.status)
        if path == "/api/validate-yaml":
            return self._answer(dict(errors=[], warnings=[]))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/lfs/"):
            return self._lfs(path.removeprefix("/lfs/"), body)
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._model(f"{owner}/{name}", rest, body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        repo, _, rest = path[1:].partition("/resolve/")
        return self._resolve(repo, rest.partition("/")[2])

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        known = repo in self.hub.files
        self.hub.files.setdefault(repo, {})
        self.hub.private.setdefault(repo, wanted.get("visibility") == "private")
        self._answer(dict(url=f"{self.hub.url}/{repo}", name=repo), 409 if known else 200)

    def _model(self, repo: str, rest: list[str], body: bytes) -> None:
        hub, held = self.hub, self.hub.files[repo]
        if rest[:1] == ["preupload"]:
            files = [
                dict(
                    path=file["path"], uploadMode="lfs" if file["size"] >= LFS_BYTES else "regular", shouldIgnore=False,
                    oid=self._oid(held, file["path"]),
                )
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self._answer(dict(files=files))
        if rest[:1] == ["commit"]:
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        if rest[:1] == ["paths-info"]:
            return self._answer([self._entry(held, path) for path in parse_qs(body.decode())["paths"] if path in held])
        if rest[:1] == ["tree"]:
            return self._answer([self._entry(held, path) for path in held])
        siblings = [dict(rfilename=name) for name in held]
        self._answer(dict(id=repo, sha=hub.sha(repo), siblings=siblings, private=hub.private[repo], tags=[]))

    def _oid(self, held: dict[str, bytes], path: str) -> str | None:
        entry = self._entry(held, path) if path in held else {}
        return entry.get("lfs", {}).get("oid") or entry.get("oid")

    def _entry(self, held: dict[str, bytes], path: str) -> dict[str, Any]:
        data = held[path]
        entry: dict[str, Any] = dict(type="file", path=path, size=len(data), oid=git_digest(data))
        if len(data) >= LFS_BYTES:
            entry["lfs"] = dict(oid=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=130)
        return entry

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        hub, held = self.hub, self.hub.files[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del held[value["path"]]
        hub.commits[repo] = hub.commits.get(repo, 0) + 1
        url = f"{hub.url}/{repo}/commit/{hub.sha(repo)}"
        self._answer(dict(success=True, commitOid=hub.sha(repo), commitUrl=url))

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for one in wanted["objects"]:
            upload = dict(upload=dict(href=f"{self.hub.url}/lfs/{one['oid']}"))
            objects.append(one if one["oid"] in self.hub.blobs else one | dict(actions=upload))
        self._answer(dict(transfer="basic", objects=objects))

    def _lfs(self, oid: str, body: bytes) -> None:
        if self.hub.fail_uploads:
            self.hub.fail_uploads -= 1
            return self._answer(dict(error="broken"), 400)
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer({})

    def _resolve(self, repo: str, name: str) -> None:
        held = self.hub.files.get(repo, {})
        if name not in held:
            return self._answer(dict(error="Entry not found"), 404, X_Error_Code="EntryNotFound")
        etag = f'"{self._oid(held, name)}"'
        self._answer(held[name], ETag=etag, X_Repo_Commit=self.hub.sha(repo))
