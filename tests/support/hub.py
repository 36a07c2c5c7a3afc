"""A stand-in for the Hugging Face hub on the loopback interface: the requests that huggingface_hub really sends.

Repositories, branches, tags, commits; gated and private models; files in Git LFS; downloads that break off. It
keeps everything in memory. No Xet: the client falls back to LFS with `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
_LFS_SUFFIXES = (".onnx", ".data", ".onnx_data", ".safetensors", ".bin", ".plan", ".npy")


class Refused(Exception):
    """An answer of the hub that is an error: its status, and the code that huggingface_hub reads."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Repository:
    """A repository: its commits, its branches and tags, and who may read it."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str = "") -> str:
        """Make a commit with exactly these files; return its id."""
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str:
        """Return the commit of a branch, tag or commit."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return sha


class Hub:
    """The whole hub. `token` is the one token that it knows; it may read everything except gated models."""

    token = "hf_thetokenofthetests"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None
        """If set, every download of more bytes breaks off after so many."""
        self.url = ""

    def add(self, name: str, files: Files, **options: Any) -> Repository:
        """Add a repository with one commit on main."""
        repository = self.repositories[name] = Repository(**options)
        repository.commit("main", files)
        return repository

    def environment(self, home: object, *, token: bool = False) -> dict[str, str]:
        """The variables with which a client in another process asks this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": self.token} if token else {}),
        }


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Start a hub in a thread; it stops at the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_cache(bundle: Path, cache: Path) -> Path:
    """Lay out a bundle in the cache `cache` as huggingface_hub does for owner/name; return the snapshot's folder."""
    commit = "a" * 40
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        if not blob.exists():
            shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for pattern, answer in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return getattr(self, answer)(**match.groupdict())
            raise Refused(404)
        except Refused as refused:
            self._read()
            self._send(json.dumps({"error": refused.code}).encode(), status=refused.status, X_Error_Code=refused.code)

    # Reading

    def _info(self, name: str, revision: str = "main") -> None:
        repository = self._readable(name)
        sha = repository.at(revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        repository = self._readable(name)
        self._json([_entry(path, data) for path, data in repository.commits[repository.at(revision)].items()])

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._readable(name)
        if repository.gated:
            raise Refused(403, "GatedRepo")
        sha = repository.at(revision)
        headers = {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if file not in repository.commits[sha]:
            return self._send(b"", status=404, X_Error_Code="EntryNotFound", **headers)
        data = repository.commits[sha][file]
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        return self._send(data, status=206 if asked else 200, **headers)

    # Writing

    def _create(self) -> None:
        self._require_token()
        asked = json.loads(self._read())
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._send(json.dumps({"url": f"{self.hub.url}/{name}"}).encode(), status=409)
        self.hub.add(
            name, {".gitattributes": b""}, private=asked.get("visibility") == "private" or asked.get("private") is True
        )
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        self._read()
        if branch in repository.refs:
            raise Refused(409)
        repository.refs[branch] = repository.at("main")
        self._json({})

    def _validate(self) -> None:
        self._read()
        self._json({"warnings": [], "errors": []})

    def _preupload(self, name: str, revision: str) -> None:
        self._writable(name).at(revision)
        files = json.loads(self._read())["files"]
        modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False, "oid": None} for f in files]
        self._json({"files": modes})

    def _batch(self, name: str) -> None:
        self._writable(name)
        asked = json.loads(self._read())["objects"]
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}}
            for each in asked
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs(self, oid: str) -> None:
        data = self._read()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400)
        self.hub.uploaded[oid] = data
        self._send(b"")

    def _commit(self, name: str, revision: str) -> None:
        repository = self._writable(name)
        files, message = dict(repository.commits[repository.at(revision)]), ""
        for line in self._read().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # Who asks, and how it is answered

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _require_token(self) -> None:
        if not self._has_token():
            raise Refused(401)

    def _readable(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._has_token()):
            # As the hub: it does not tell whether there is a private repository of this name.
            raise Refused(404 if self._has_token() else 401, "RepoNotFound")
        return repository

    def _writable(self, name: str) -> Repository:
        self._require_token()
        return self._readable(name)

    def _read(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Content-Length"]
        return data

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json")

    def _send(self, data: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after
        if cut is not None and len(data) > cut:
            data, self.close_connection = data[:cut], True
        self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(_LFS_SUFFIXES) else "regular"


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if _mode(path) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


_NAME, _REVISION = "(?P<name>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
_ROUTES = (
    (rf"GET /api/models/{_NAME}", "_info"),
    (rf"GET /api/models/{_NAME}/revision/{_REVISION}", "_info"),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}", "_tree"),
    (rf"(HEAD|GET) /{_NAME}/resolve/{_REVISION}/(?P<file>.+)", "_resolve"),
    ("POST /api/repos/create", "_create"),
    ("POST /api/validate-yaml", "_validate"),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>[^/]+)", "_branch"),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", "_preupload"),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", "_commit"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "_batch"),
    ("PUT /lfs/(?P<oid>[0-9a-f]{64})", "_lfs"),
)
