"""Storage of a Hub: repositories with commits as snapshots, and the objects that their files point to.

Everything is in one folder, which a restarted server reads again:

    blobs/<git blob id>              contents of small files
    lfs/<sha256>                     contents of large files
    repos/<kind>/<user>/<name>.json  visibility, branches, tags and commits
"""

import base64
import datetime
import fnmatch
import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO


KINDS = ("models", "datasets")
# Content of `.gitattributes` in a new repository, reduced to the patterns that models need.
GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        "*.bin",
        "*.gguf",
        "*.model",
        "*.npz",
        "*.onnx",
        "*.parquet",
        "*.png",
        "*.pt",
        "*.safetensors",
        "*.zip",
    )
)
LFS_BEYOND = 10 * 1024 * 1024  # bytes; larger files are always LFS files

File = dict[
    str, Any
]  # "oid" (git blob id, of an LFS file that of its pointer), "size" in bytes, "sha256" of an LFS file


class HubError(Exception):
    """An error response of the Hub.

    Args:
        status (`int`): HTTP status.
        message (`str`): error message.
        code (`str`, *optional*): value of `X-Error-Code`, which selects the exception class of the client.
        headers (`dict`, *optional*): additional headers.
    """

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def git_blob_id(content: bytes) -> str:
    """The git blob id of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The pointer file that git stores for an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Storage:
    """The repositories and objects in a folder.

    Args:
        folder (`Path`): created if it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("blobs", "lfs", *(f"repos/{kind}" for kind in KINDS)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        # Held while a repository is read, changed and written.
        self.lock = threading.RLock()

    # Objects

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def lfs(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def content(self, file: File) -> Path:
        """Path of the contents of a file."""
        return self.lfs(file["sha256"]) if file["sha256"] else self.blob(file["oid"])

    def add_blob(self, content: bytes) -> File:
        oid = git_blob_id(content)
        _write(self.blob(oid), content)
        return {"oid": oid, "size": len(content), "sha256": None}

    def add_lfs(self, sha256: str, stream: BinaryIO, size: int) -> None:
        """Stores an LFS object atomically.

        Raises:
            HubError: if its hash is not its name.
        """
        digest, left = hashlib.sha256(), size
        with tempfile.NamedTemporaryFile(dir=self.folder / "lfs", prefix=".", delete=False) as temporary:
            try:
                while left and (chunk := stream.read(min(left, 1 << 20))):
                    digest.update(chunk)
                    temporary.write(chunk)
                    left -= len(chunk)
                if left or digest.hexdigest() != sha256:
                    raise HubError(400, f"the object does not have the SHA-256 {sha256}")
                os.replace(temporary.name, self.lfs(sha256))
            finally:
                Path(temporary.name).unlink(missing_ok=True)

    # Repositories

    def create(self, kind: str, name: str, private: bool) -> None:
        """Creates a repository with the initial commit of the Hub.

        Raises:
            HubError: if it exists.
        """
        with self.lock:
            if self._path(kind, name).exists():
                raise HubError(409, "You already created this model repo")
            repo = {"name": name, "private": private, "created": _now(), "branches": {}, "tags": {}, "commits": {}}
            repo["commits"] |= (
                first := _commit([], "initial commit", {".gitattributes": self.add_blob(GIT_ATTRIBUTES.encode())})
            )
            repo["branches"]["main"] = next(iter(first))
            self._save(kind, repo)

    def repo(self, kind: str, name: str) -> dict[str, Any]:
        """Returns a repository.

        Raises:
            HubError: if it does not exist.
        """
        try:
            return json.loads(self._path(kind, name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None

    def commit(self, kind: str, name: str, branch: str, title: str, changes: list[dict[str, Any]], parent: str) -> str:
        """Adds a commit to a branch, with all of its changes or none.

        Args:
            changes (`list[dict]`): operations of the client: `{"key": ..., "value": ...}`.
            parent (`str`): expected head of the branch, `""` to skip the check.

        Returns:
            The commit.
        """
        with self.lock:
            repo = self.repo(kind, name)
            if branch not in repo["branches"]:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = repo["branches"][branch]
            if parent and not head.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo["commits"][head]["files"])
            for change in changes:
                self._apply(files, change["key"], change["value"])
            repo["commits"] |= (commit := _commit([head], title, files))
            repo["branches"][branch] = next(iter(commit))
            self._save(kind, repo)
            return repo["branches"][branch]

    def create_ref(self, kind: str, name: str, refs: str, new: str, start: str) -> None:
        """Creates a branch or tag (`refs` is `"branches"` or `"tags"`) at a commit."""
        with self.lock:
            repo = self.repo(kind, name)
            if new in repo[refs]:
                raise HubError(409, f"Reference already exists: {new}")
            repo[refs][new] = resolve(repo, start)
            self._save(kind, repo)

    def delete_ref(self, kind: str, name: str, refs: str, old: str) -> None:
        """Deletes a branch other than main, or a tag."""
        with self.lock:
            repo = self.repo(kind, name)
            if old not in repo[refs]:
                raise HubError(404, f"Invalid rev id: {old}", "RevisionNotFound")
            if (refs, old) == ("branches", "main"):
                raise HubError(403, "Cannot delete the main branch")
            del repo[refs][old]
            self._save(kind, repo)

    def upload_mode(self, files: dict[str, File], path: str, size: int, sample: bytes) -> str:
        """`"lfs"` or `"regular"`, decided by `.gitattributes`, the size and the first bytes of a file."""
        attributes = files.get(".gitattributes")
        lines = self.content(attributes).read_text(encoding="utf-8").splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        large = size > LFS_BEYOND or b"\0" in sample or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        return "lfs" if large else "regular"

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.add_blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.lfs(value["oid"]).is_file():
                raise HubError(400, f"LFS object {value['oid']} of {path} was not uploaded")
            size = self.lfs(value["oid"]).stat().st_size
            files[path] = {"oid": git_blob_id(lfs_pointer(value["oid"], size)), "size": size, "sha256": value["oid"]}
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for inside in [other for other in files if other.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise HubError(400, f"unknown operation {key}")

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / "repos" / kind / f"{name}.json"

    def _save(self, kind: str, repo: dict[str, Any]) -> None:
        path = self._path(kind, repo["name"])
        path.parent.mkdir(exist_ok=True)
        _write(path, json.dumps(repo).encode())


def resolve(repo: dict[str, Any], revision: str) -> str:
    """Returns the commit of a branch, a tag or a commit id.

    Raises:
        HubError: if there is no such revision.
    """
    found = {**{commit: commit for commit in repo["commits"]}, **repo["tags"], **repo["branches"]}.get(revision)
    if found is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return found


def history(repo: dict[str, Any], commit: str) -> list[str]:
    """A commit and its ancestors, newest first."""
    found = [commit]
    while parents := repo["commits"][found[-1]]["parents"]:
        found += parents
    return found


def _commit(parents: list[str], title: str, files: dict[str, File]) -> dict[str, dict[str, Any]]:
    body = {"parents": parents, "title": title, "date": _now(), "files": files}
    return {hashlib.sha1(json.dumps(body, sort_keys=True).encode()).hexdigest(): body}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as temporary:
        temporary.write(content)
    os.replace(temporary.name, path)
