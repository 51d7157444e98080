"""A small Hub over the standard library: the endpoints that huggingface_hub 2.4 calls to publish and to load."""

import base64
import collections
import contextlib
import hashlib
import hmac
import io
import json
import re
import secrets
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from .accounts import authenticate, check_read, check_write, whoami
from .storage import File, HubError, Storage, history, lfs_pointer, resolve


_LICENSES = (
    "apache-2.0",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc0-1.0",
    "gpl-3.0",
    "llama2",
    "mit",
    "openrail",
    "other",
    "unknown",
)
_CHUNK = 1 << 20

_REPO = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_WEB = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, re.Pattern[str], str]] = []  # method, path, name of the handler's method


def _route(method: str, path: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        _ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return register


class LocalHub:
    """A Hub server on a free local port.

    Args:
        storage (`Path`): folder for repositories and objects.

    Attributes:
        endpoint (`str`): URL of the server, for `HF_ENDPOINT`.
        counts (`Counter`): number of commits (`"commit"`) and of uploaded objects (`"put"`).
        puts_left (`int`, *optional*): number of uploads that still succeed; all if `None`. Further ones fail as if the
            upload URL had expired.
    """

    def __init__(self, storage: Path):
        self.storage = Storage(storage)
        self.counts: collections.Counter[str] = collections.Counter()
        self.puts_left: int | None = None
        self.secret = secrets.token_bytes(16)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator["LocalHub"]:
        """Serves requests in a thread until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def signature(self, sha256: str) -> str:
        """The signature that makes the URL of an object valid without a token."""
        return hmac.new(self.secret, sha256.encode(), hashlib.sha256).hexdigest()

    def object_url(self, sha256: str) -> str:
        return f"{self.endpoint}/objects/{sha256}?signature={self.signature(sha256)}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores connection errors of a client that was killed between two requests."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Handles one request. Routed methods return the JSON response, or `None` if they have sent a response."""

    protocol_version = "HTTP/1.1"
    server_version = "LocalHub"

    @property
    def hub(self) -> LocalHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: tests look at the client."""

    def _answer(self) -> None:
        raw, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query))
        self.body = _Body(self.rfile, self.headers)
        try:
            self.token = authenticate(self.headers.get("Authorization"))
            for method, pattern, name in _ROUTES:
                if method == self.command and (match := pattern.fullmatch(raw)):
                    parts = {key: urllib.parse.unquote(value or "") for key, value in match.groupdict().items()}
                    answer = getattr(self, name)(**parts)
                    break
            else:
                raise HubError(404, f"no such address: {self.command} {raw}")
            if answer is not None:
                self._send_json(200, answer)
        except HubError as error:
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send_json(error.status, {"error": error.message}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if not self.body.is_read:
            self.close_connection = True  # the rest of the body would be read as the next request
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _readable(self, kind: str, name: str) -> dict[str, Any]:
        """A repository that the token may read. To anonymous requests a missing one looks like a private one."""
        try:
            repo = self.hub.storage.repo(kind, name)
        except HubError:
            check_read(self.token, private=True)
            raise
        check_read(self.token, repo["private"])
        return repo

    def _writable(self, kind: str, name: str) -> dict[str, Any]:
        check_write(self.token, name)
        return self.hub.storage.repo(kind, name)

    # Accounts and repositories

    @_route("GET", r"/api/whoami-v2")
    def whoami(self) -> Any:
        return whoami(self.token)

    @_route("POST", r"/api/repos/create")
    def create(self) -> Any:
        wanted = self.body.json()
        kind = f"{wanted.get('type') or 'model'}s"
        name = f"{wanted.get('organization') or whoami(self.token)['name']}/{wanted['name']}"
        check_write(self.token, name)
        private = wanted.get("visibility") == "private"
        try:
            self.hub.storage.create(kind, name, private)
        except HubError as error:
            self._send_json(error.status, {"error": error.message, "url": self._url(kind, name)})
            return None
        return {"url": self._url(kind, name), "name": name, "private": private}

    @_route("POST", r"/api/validate-yaml")
    def validate_yaml(self) -> Any:
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", self.body.json()["content"], re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
            wrong = [] if isinstance(data, dict) else ["the metadata must be a mapping"]
        except yaml.YAMLError as error:
            data, wrong = {}, [str(error)]
        if not wrong and data.get("license", "other") not in _LICENSES:
            wrong.append(f'"license" must be one of [{", ".join(_LICENSES)}]')
        if wrong and self.headers.get("Accept") == "text/plain":
            self._send(400, "\n".join(wrong).encode(), {"Content-Type": "text/plain"})
            return None
        if wrong:
            self._send_json(400, {"errors": [{"message": message} for message in wrong], "warnings": []})
            return None
        return {"errors": [], "warnings": [] if match else [{"message": "empty or missing yaml metadata"}]}

    @_route("GET", rf"/api/{_REPO}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, name: str, revision: str) -> Any:
        repo = self._readable(kind, name)
        sha = resolve(repo, revision or "main")
        commit = repo["commits"][sha]
        return {
            "id": name,
            "author": name.split("/")[0],
            "sha": sha,
            "private": repo["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": repo["created"],
            "lastModified": commit["date"],
            "siblings": [{"rfilename": path} for path in sorted(commit["files"])],
        }

    @_route("GET", rf"/api/{_REPO}/refs")
    def refs(self, kind: str, name: str) -> Any:
        repo = self._readable(kind, name)
        return {
            "converts": [],
            **{
                refs: [{"name": n, "ref": f"refs/{git}/{n}", "targetCommit": c} for n, c in repo[refs].items()]
                for refs, git in (("branches", "heads"), ("tags", "tags"))
            },
        }

    @_route("GET", rf"/api/{_REPO}/commits/(?P<revision>[^/]+)")
    def commits(self, kind: str, name: str, revision: str) -> Any:
        repo = self._readable(kind, name)
        rows = [(sha, repo["commits"][sha]) for sha in history(repo, resolve(repo, revision))]
        authors = [{"user": name.split("/")[0]}]
        return [{"id": s, "title": c["title"], "message": "", "date": c["date"], "authors": authors} for s, c in rows]

    @_route("GET", rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, kind: str, name: str, revision: str, path: str) -> Any:
        repo = self._readable(kind, name)
        files = repo["commits"][resolve(repo, revision)]["files"]
        start = f"{path}/" if path else ""
        inside = {p: file for p, file in sorted(files.items()) if p.startswith(start)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive") == "true"
        folders = {
            start + "/".join(parts[:i])
            for parts in (p[len(start) :].split("/") for p in inside)
            for i in (range(1, len(parts)) if deep else range(1, min(len(parts), 2)))
        }
        shown = [_file_entry(p, file) for p, file in inside.items() if deep or "/" not in p[len(start) :]]
        return [_folder_entry(folder) for folder in sorted(folders)] + shown

    @_route("POST", rf"/api/{_REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, name: str, revision: str) -> Any:
        repo = self._readable(kind, name)
        files = repo["commits"][resolve(repo, revision)]["files"]
        asked = urllib.parse.parse_qs(self.body.read().decode()).get("paths", [])
        folders = [p for p in asked if p not in files and any(f.startswith(f"{p}/") for f in files)]
        return [_file_entry(p, files[p]) for p in asked if p in files] + [_folder_entry(p) for p in folders]

    # Changes

    @_route("POST", rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, name: str, revision: str) -> Any:
        repo = self._writable(kind, name)
        files, storage = repo["commits"][resolve(repo, revision)]["files"], self.hub.storage
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": storage.upload_mode(
                        files, file["path"], file["size"], base64.b64decode(file["sample"])
                    ),
                    "shouldIgnore": False,
                    "oid": _known_oid(files.get(file["path"])),
                }
                for file in self.body.json()["files"]
            ]
        }

    @_route("POST", rf"/api/{_REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, name: str, revision: str) -> Any:
        self._writable(kind, name)
        header, *changes = (json.loads(line) for line in self.body.read().splitlines())
        parent = header["value"].get("parentCommit", "")
        sha = self.hub.storage.commit(kind, name, revision, header["value"]["summary"], changes, parent)
        self.hub.counts["commit"] += 1
        return {"success": True, "commitOid": sha, "commitUrl": f"{self._url(kind, name)}/commit/{sha}"}

    @_route("POST", rf"/api/{_REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, kind: str, name: str, branch: str) -> Any:
        self._writable(kind, name)
        start = self.body.json().get("startingPoint") or "main"
        self.hub.storage.create_ref(kind, name, "branches", branch, start)
        return {}

    @_route("DELETE", rf"/api/{_REPO}/branch/(?P<branch>[^/]+)")
    def delete_branch(self, kind: str, name: str, branch: str) -> Any:
        self._writable(kind, name)
        self.hub.storage.delete_ref(kind, name, "branches", branch)
        return {}

    @_route("POST", rf"/api/{_REPO}/tag/(?P<revision>[^/]+)")
    def create_tag(self, kind: str, name: str, revision: str) -> Any:
        self._writable(kind, name)
        self.hub.storage.create_ref(kind, name, "tags", self.body.json()["tag"], revision)
        return {}

    @_route("DELETE", rf"/api/{_REPO}/tag/(?P<tag>[^/]+)")
    def delete_tag(self, kind: str, name: str, tag: str) -> Any:
        self._writable(kind, name)
        self.hub.storage.delete_ref(kind, name, "tags", tag)
        return {}

    # Large files

    @_route("POST", rf"{_WEB}\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str, name: str) -> Any:
        self._writable(kind.rstrip("/") or "models", name)
        objects = []
        for wanted in self.body.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.storage.lfs(wanted["oid"]).is_file():
                verify = f"{self.hub.endpoint}/{kind}{name}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": self.hub.object_url(wanted["oid"])}, "verify": {"href": verify}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    @_route("POST", rf"{_WEB}\.git/info/lfs/verify")
    def lfs_verify(self, kind: str, name: str) -> Any:
        self._writable(kind.rstrip("/") or "models", name)
        wanted = self.body.json()
        stored = self.hub.storage.lfs(wanted["oid"])
        if not stored.is_file() or stored.stat().st_size != wanted["size"]:
            raise HubError(404, f"object {wanted['oid']} was not uploaded")
        return {}

    @_route("PUT", r"/objects/(?P<sha256>[0-9a-f]{64})")
    def put_object(self, sha256: str) -> Any:
        self._check_signature(sha256)
        with self.hub.storage.lock:
            fails = self.hub.puts_left == 0
            if self.hub.puts_left:
                self.hub.puts_left -= 1
        if fails:
            self.body.read()
            raise HubError(403, "Request has expired")
        self.hub.storage.add_lfs(sha256, self.body, self.body.length)
        self.hub.counts["put"] += 1
        return {}

    @_route("GET", rf"{_WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    @_route("HEAD", rf"{_WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self._readable(kind.rstrip("/") or "models", name)
        sha = resolve(repo, revision)
        if path not in repo["commits"][sha]["files"]:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        file = repo["commits"][sha]["files"][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file["oid"]}"'}
        if file["sha256"]:
            # The Hub also redirects to its storage, on another host. A redirect on one host the client follows by
            # itself, and then misses these headers.
            headers |= {"X-Linked-Etag": f'"{file["sha256"]}"', "X-Linked-Size": str(file["size"])}
        self._send_file(self.hub.storage.content(file), headers)

    def _check_signature(self, sha256: str) -> None:
        if not hmac.compare_digest(self.query.get("signature", ""), self.hub.signature(sha256)):
            raise HubError(403, "Access denied")

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, end = _byte_range(self.headers.get("Range"), size)
        self.send_response(206 if self.headers.get("Range") else 200)
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as stream:
            stream.seek(start)
            while start < end and (chunk := stream.read(min(end - start, _CHUNK))):
                self.wfile.write(chunk)
                start += len(chunk)

    def _url(self, kind: str, name: str) -> str:
        return f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{name}"


class _Body(io.RawIOBase):
    """The body of a request, with reads limited to its length."""

    def __init__(self, stream: BinaryIO, headers: Any):
        self._stream = stream
        self.length = int(headers.get("Content-Length") or 0)
        self._left = self.length

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(chunk)
        return chunk

    def json(self) -> Any:
        return json.loads(self.read() or b"{}")

    @property
    def is_read(self) -> bool:
        return self._left == 0


def _byte_range(header: str | None, size: int) -> tuple[int, int]:
    """The start and end of a `Range` header, or of the whole file without one."""
    if not header:
        return 0, size
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match and match[1]:
        start, end = int(match[1]), min(int(match[2] or size - 1) + 1, size)
    elif match and match[2]:
        start, end = max(size - int(match[2]), 0), size
    else:
        start, end = size, size
    if start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _known_oid(file: File | None) -> str | None:
    """The hash that the client compares with its own file, to skip an unchanged one."""
    return file and (file["sha256"] or file["oid"])


def _file_entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
    if file["sha256"]:
        pointer = len(lfs_pointer(file["sha256"], file["size"]))
        entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": pointer}
    return entry


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
