"""A hub on this machine, which huggingface_hub takes for the real one."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".gguf")
_CHUNK = 1 << 14


@dataclass
class Repository:
    """commits: files by commit.  revisions: the commit of each branch and tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    access: str = "open"  # or gated (files are refused) or private; both open to `Hub.token`


@dataclass
class Hub:
    """Where a large file breaks off: `cut_bytes` (once, the connection ends) or `hang_bytes`.

    pace: bytes of a large file a second.  status: answered to everything, if set.
    downloads: file and first byte of each GET.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str = "hf_right"
    cut_bytes: int | None = None
    hang_bytes: int | None = None
    pace: int | None = None
    status: int | None = None
    downloads: list[tuple[str, int]] = field(default_factory=list)
    num_requests: int = 0

    def add(self, name: str, files: dict[str, bytes], revision: str = "main", **how: Any) -> str:
        """Commit these files; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(**how))
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[commit] = files
        repository.revisions[revision] = commit
        return commit

    def started(self, file: str) -> list[int]:
        """The first byte of each download of the file."""
        return [begin for name, begin in self.downloads if name == file]

    def environment(self, home: object) -> dict[str, str]:
        """Of a process that knows no other hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "0",
        }


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.num_requests += 1
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.hub.status is not None:
            self._refuse(self.hub.status, "")
        elif parts[:2] == ["api", "models"]:
            revision = "/".join(parts[5:]) or "main"
            self._describe("/".join(parts[2:4]), revision)
        elif parts[2:3] == ["resolve"]:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "")

    def _describe(self, name: str, revision: str) -> None:
        if (commit := self._commit(name, revision, wants_file=False)) is None:
            return
        files = self.hub.repositories[name].commits[commit]
        listed = [_sibling(file, content) for file, content in files.items()]
        body = json.dumps({"id": name, "sha": commit, "siblings": listed}).encode()
        self._head(200, len(body), {"Content-Type": "application/json"})
        self._write(body)

    def _send_file(self, name: str, revision: str, file: str) -> None:
        if (commit := self._commit(name, revision, wants_file=True)) is None:
            return None
        content = self.hub.repositories[name].commits[commit].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        etag = _etag(file, content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(_LARGE):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._head(206 if begin else 200, len(content) - begin, headers)
        if self.command == "GET":
            self.hub.downloads.append((file, begin))
            self._write_file(file, content[begin:])
        return None

    def _write_file(self, file: str, content: bytes) -> None:
        if not file.endswith(_LARGE):
            return self._write(content)
        sent = 0
        for begin in range(0, len(content), _CHUNK):
            if self.hub.hang_bytes is not None and sent >= self.hub.hang_bytes:
                time.sleep(60)
            if self.hub.cut_bytes is not None and sent >= self.hub.cut_bytes:
                self.hub.cut_bytes = None
                self.close_connection = True
                return None
            chunk = content[begin : begin + _CHUNK]
            self._write(chunk)
            sent += len(chunk)
            if self.hub.pace is not None:
                time.sleep(len(chunk) / self.hub.pace)
        return None

    def _commit(self, name: str, revision: str, *, wants_file: bool) -> str | None:
        """None if the request has been refused."""
        repository = self.hub.repositories.get(name)
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        if repository is None or (repository.access == "private" and given is None):
            self._refuse(401 if given is None else 404, "RepoNotFound")
            return None
        if repository.access == "gated" and given is None and wants_file:
            self._refuse(401, "GatedRepo")
            return None
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._head(status, 0, {name: value for name, value in headers.items() if value})

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _write(self, body: bytes) -> None:
        if self.command == "GET":
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # who asked is gone
                self.close_connection = True

    def log_message(self, *_: object) -> None: ...


def _sibling(file: str, content: bytes) -> dict[str, Any]:
    listed: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": "0" * 40}
    if file.endswith(_LARGE):
        listed["lfs"] = {"size": len(content), "sha256": _etag(file, content), "pointerSize": 130}
    return listed


def _etag(file: str, content: bytes) -> str:
    digest = hashlib.sha256 if file.endswith(_LARGE) else hashlib.sha1
    return digest(content).hexdigest()
