"""A server that speaks the hub's protocol on this machine, with faults on demand.

What a client of the hub asks for: a model's description with sizes and hashes at a revision, and files at a commit,
large ones by way of a redirect, in ranges. Faults are given per file and used up one request at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

# A fault is given the answer under way and does what it likes: the function gives the bytes to send, or None if it
# has answered itself.
Fault = Callable[["Handler", bytes], bytes | None]
LARGE = 1000  # bytes from which on a file is of the large kind, with a sha256 and a redirect


def drop(after: int) -> Fault:
    """Close the connection after so many bytes of a body that was announced whole."""

    def fault(handler: Handler, body: bytes) -> bytes | None:
        handler.start(206, body, len(body))
        handler.wfile.write(body[:after])
        handler.close_connection = True
        handler.connection.close()
        return None

    return fault


def truncated(to: int) -> Fault:
    """A shorter body, announced as such."""
    return lambda handler, body: body[:to]


def wrong(at: int) -> Fault:
    """One flipped byte, the length right."""
    return lambda handler, body: body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def longer(by: int) -> Fault:
    return lambda handler, body: body + b"x" * by


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    def fault(handler: Handler, body: bytes) -> bytes | None:
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        return None

    return fault


def ignores_range(handler: Handler, body: bytes) -> bytes | None:
    """200 with the whole file, whatever was asked for."""
    whole = handler.whole
    handler.start(200, whole, len(whole))
    handler.wfile.write(whole)
    return None


class FakeHub:
    """repos: name -> commit -> file name -> content; branches: name -> branch -> commit. Use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.gated: set[str] = set()
        self.token = ""
        self.listed: dict[str, dict[str, Any]] = {}  # what the description says of a file instead
        self.sent = 0
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed is no news
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def publish(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of a branch."""
        commit = hashlib.sha1(json.dumps([repo, *sorted((n, c.hex()) for n, c in files.items())]).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub
    whole = b""

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(self.path.partition("?")[0])
        hub.requests.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._describe(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, commit, name = found.groups()
            content = hub.repos.get(repo, {}).get(commit, {}).get(name)
            if content is None:
                return self._error(404, "EntryNotFound")
            if len(content) >= LARGE:
                self.send_response(302)
                self.send_header("Location", f"{hub.url}/cdn/{repo}/{commit}/{name}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._send(name, content)
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            repo, commit, name = found.groups()
            self._send(name, hub.repos[repo][commit][name])
        else:
            self._error(404, "")

    def _describe(self, repo: str, revision: str) -> None:
        hub = self.hub
        if repo not in hub.repos:
            return self._error(404 if hub.token in self.headers.get("Authorization", "") else 401, "RepoNotFound")
        if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(403, "GatedRepo")
        if faults := hub.faults.get("describe"):
            faults.pop(0)(self, b"")
            return None
        commit = hub.branches[repo].get(revision, revision)
        if commit not in hub.repos[repo]:
            return self._error(404, "RevisionNotFound")
        siblings = []
        for name, content in hub.repos[repo][commit].items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
            if len(content) >= LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry | hub.listed.get(name, {}))
        body = json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, name: str, content: bytes) -> None:
        self.whole = content
        match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2] or len(content) - 1) + 1) if match else (0, len(content))
        if start >= len(content) > 0:
            return self._error(416, "")
        body: bytes | None = content[start:stop]
        self._start = start
        if faults := self.hub.faults.get(name):
            body = faults.pop(0)(self, content[start:stop])
        if body is not None:
            self.start(206, body, len(body))
            self.wfile.write(body)
            self.hub.sent += len(body)

    def start(self, code: int, body: bytes, length: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        if code == 206:
            self.send_header("Content-Range", f"bytes {self._start}-{self._start + length - 1}/{len(self.whole)}")
        self.end_headers()

    def _error(self, code: int, name: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Error-Message", name or "no such place")
        self.send_header("Content-Length", "0")
        self.end_headers()
