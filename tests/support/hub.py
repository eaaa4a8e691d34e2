"""A small Hugging Face hub on this machine, which the real huggingface_hub talks to: HF_ENDPOINT names it.

It serves models and data sets (information, tree, files with ETag and X-Repo-Commit), says who has logged in, makes
repositories and takes commits, large files by LFS. What it does not have it answers as the hub does, by a 404 with an
error code. A request is one line in `Hub.requests`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"
LARGE = 4096
"""Bytes from which on a file goes by LFS."""


@dataclass
class Repository:
    """Files by commit; the last commit is main."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """The id of the commit that has these files."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.main]


@dataclass
class Hub:
    """What the server knows."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By models/NAME and datasets/NAME."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: re.Pattern[str] | None = None
    """Requests that are answered by 400."""

    def add(self, name: str, folder: Path, kind: str = "models", without: tuple[str, ...] = ()) -> Repository:
        """A repository with the files below a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in without
        }
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository())
        repository.commit(files)
        return repository

    def environment(self, home: Path, *, token: bool = False) -> dict[str, str]:
        """For a subprocess: this hub, a cache of its own, and perhaps a login; files by LFS, as the stub has no Xet."""
        found = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return found | ({"HF_TOKEN": TOKEN} if token else {})

    def fetched(self, pattern: str) -> list[str]:
        """The files that were sent, by their paths."""
        sent = [line.split("/", 6)[-1] for line in self.requests if line.startswith("GET ") and "/resolve/" in line]
        names = [re.sub(r".*resolve/[^/]+/", "", name) for name in sent]
        return [name for name in names if re.search(pattern, name)]


@contextmanager
def serve():
    """A Hub that answers."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        if self.hub.broken is not None and self.hub.broken.search(f"{method} {path}"):
            return self.refuse(400, "", "broken")
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return answer(self, body, **found.groupdict())
        self.refuse(404, "RepoNotFound", path)

    def send(self, data: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def say(self, record: Any) -> None:
        self.send(json.dumps(record).encode())

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(b'{"error": "%s"}' % message.encode(), status=status, X_Error_Code=code, X_Error_Message=message)

    @property
    def has_login(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def files_of(self, kind: str, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None after an answer that refuses."""
        repository = self.hub.repositories.get(f"{kind or 'models'}/{name}")
        if repository is None or (repository.private and not self.has_login):
            return self.refuse(404 if self.has_login else 401, "RepoNotFound", "Repository not found")
        commit = repository.main if revision in (None, "main") else revision
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # ----------------------------------------------------------------------------------------------------- what is read
    def whoami(self, _: bytes) -> None:
        if not self.has_login:
            return self.refuse(401, "", "Invalid username or password.")
        self.say({"type": "user", "name": "me", "fullname": "Me", "orgs": [{"name": "lab"}], "auth": {}})

    def info(self, _: bytes, kind: str, name: str, revision: str | None = None) -> None:
        if found := self.files_of(kind, name, revision):
            commit, files = found
            siblings = [{"rfilename": path} for path in files]
            about = {"private": False, "disabled": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
            self.say({"_id": "1", "id": name, "sha": commit, "siblings": siblings} | about)

    def tree(self, _: bytes, kind: str, name: str, revision: str, path: str | None) -> None:
        if found := self.files_of(kind, name, revision):
            inside = {p: data for p, data in found[1].items() if not path or p.startswith(f"{path}/")}
            if path and not inside:
                return self.refuse(404, "EntryNotFound", path)
            self.say([_entry(p, data) for p, data in inside.items()])

    def resolve(self, _: bytes, name: str, revision: str, path: str, kind: str | None = None) -> None:
        found = self.files_of(kind or "models", name, revision)
        if found is None:
            return None
        commit, files = found
        repository = self.hub.repositories[f"{kind or 'models'}/{name}"]
        if repository.gated:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data, about = files[path], _entry(path, files[path])
        headers = {"ETag": f'"{about["oid"]}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if "lfs" in about:
            headers |= {"X_Linked_Etag": f'"{about["lfs"]["oid"]}"', "X_Linked_Size": str(len(data))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            end = int(part[2]) + 1 if part[2] else len(data)
            headers["Content_Range"] = f"bytes {part[1]}-{end - 1}/{len(data)}"
            data = data[int(part[1]) : end]
        self.send(data, "application/octet-stream", 206 if part else 200, **headers)

    # -------------------------------------------------------------------------------------------------- what is written
    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.has_login:
            return self.refuse(401, "", "Invalid username or password.")
        repository = self.hub.repositories.setdefault(f"models/{name}", Repository())
        repository.private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repository.commit({".gitattributes": b""})
        self.say({"url": f"{self.hub.endpoint}/{name}"})

    def preupload(self, body: bytes, kind: str, name: str) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.say({"files": modes})

    def lfs_batch(self, body: bytes, name: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.send(json.dumps({"transfer": "basic", "objects": objects}).encode(), "application/vnd.git-lfs+json")

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(422, "", "not what was announced")
        self.hub.blobs[oid] = body
        self.send(b"")

    def commit(self, body: bytes, kind: str, name: str) -> None:
        if not self.has_login:
            return self.refuse(401, "", "Invalid username or password.")
        repository = self.hub.repositories[f"{kind}/{name}"]
        files = dict(repository.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self.say({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def validate(self, body: bytes) -> None:
        self.say({"errors": [], "warnings": []})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """What the tree says of a file."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


_REPO = r"(?P<kind>models|datasets)/(?P<name>[\w.-]+(?:/[\w.-]+)?)"
_ROUTES = (
    ("/api/whoami-v2", _Handler.whoami),
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.validate),
    (rf"/api/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", _Handler.tree),
    (rf"/api/{_REPO}/preupload/[^/]+", _Handler.preupload),
    (rf"/api/{_REPO}/commit/[^/]+", _Handler.commit),
    (rf"/api/{_REPO}", _Handler.info),
    (r"/(?P<name>[\w.-]+(?:/[\w.-]+)?)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (
        r"/(?:(?P<kind>datasets)/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.*)",
        _Handler.resolve,
    ),
)
