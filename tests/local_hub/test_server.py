"""The local Hub, tested with the client of huggingface_hub."""

import http.client
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.local_hub.accounts import FINE_REPOSITORY, FINE_TOKEN, READ_TOKEN, WRITE_TOKEN
from tests.local_hub.server import LocalHub


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub").serving() as hub:
        yield hub


def client(hub: LocalHub, token: str | None, tmp_path: Path, code: str) -> str:
    """Runs code in a new process that uses this Hub, with the client as `api`. Returns its output."""
    head = (
        "from huggingface_hub import CommitOperationAdd, HfApi, errors, hf_hub_download, snapshot_download\n"
        "api = HfApi()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf-home")}
    environment |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run([sys.executable, "-c", head + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_go_up_and_come_down(hub, tmp_path):
    """Small and large files, a folder, branches, tags, history and deletion. Each commit is an immutable snapshot."""
    out = client(
        hub,
        WRITE_TOKEN,
        tmp_path,
        """
import json, os
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
repo = "demo/some-model"
assert api.whoami()["name"] == "demo"
api.create_repo(repo); api.create_repo(repo, exist_ok=True)
small, large = b"some text\\n", os.urandom(3_000_000)
first = api.upload_file(path_or_fileobj=small, path_in_repo="a/b/notes.txt", repo_id=repo)
second = api.upload_file(path_or_fileobj=large, path_in_repo="model.safetensors", repo_id=repo)
api.create_branch(repo, branch="old", revision=first.oid)
api.create_tag(repo, tag="v1")
refs = api.list_repo_refs(repo)
assert {b.name: b.target_commit for b in refs.branches} == {"main": second.oid, "old": first.oid}
assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", second.oid)]
assert [c.title for c in api.list_repo_commits(repo)][-1] == "initial commit" and len(api.list_repo_commits(repo)) == 3
assert sorted(api.list_repo_files(repo)) == [".gitattributes", "a/b/notes.txt", "model.safetensors"]
assert sorted(api.list_repo_files(repo, revision="old")) == [".gitattributes", "a/b/notes.txt"]
[file] = api.get_paths_info(repo, ["model.safetensors", "nowhere"])
assert file.lfs.size == file.size == len(large)
assert [f.path for f in api.list_repo_tree(repo, "a", recursive=True)] == ["a/b", "a/b/notes.txt"]
for revision in ("main", "v1", second.oid):
    assert open(hf_hub_download(repo, "model.safetensors", revision=revision), "rb").read() == large
assert open(hf_hub_download(repo, "a/b/notes.txt", revision="old"), "rb").read() == small
operations = [CommitOperationDelete("a/", is_folder=True), CommitOperationAdd("b.txt", b"new")]
api.create_commit(repo, operations, commit_message="replace", parent_commit=second.oid)
assert sorted(api.list_repo_files(repo)) == [".gitattributes", "b.txt", "model.safetensors"]
assert sorted(os.listdir(snapshot_download(repo, revision="v1"))) == [".gitattributes", "a", "model.safetensors"]
commit = api.upload_file(path_or_fileobj=large, path_in_repo="model.safetensors", repo_id=repo)
assert commit.oid == api.model_info(repo).sha
api.create_repo("demo/rows", repo_type="dataset")
api.upload_file(path_or_fileobj=small, path_in_repo="rows.txt", repo_id="demo/rows", repo_type="dataset")
assert open(hf_hub_download("demo/rows", "rows.txt", repo_type="dataset"), "rb").read() == small
print(json.dumps([second.oid, len(large)]))
""",
    )
    assert hub.counts == {"commit": 4, "put": 1}, "what was there was not sent again"
    commit, size = json.loads(out)
    # A later start of the server has it all, and answers ranges.
    with LocalHub(hub.storage.folder).serving() as again:
        address = urllib.parse.urlsplit(again.endpoint)
        web = http.client.HTTPConnection(address.hostname, address.port)
        where = f"/demo/some-model/resolve/{commit}/model.safetensors"
        web.request("HEAD", where)
        answer = web.getresponse()
        answer.read()
        assert answer.status == 200 and answer.headers["X-Repo-Commit"] == commit
        assert int(answer.headers["X-Linked-Size"]) == size
        for given, expected in (
            ("bytes=5-9", "bytes 5-9"),
            ("bytes=-10", f"bytes {size - 10}-{size - 1}"),
            (f"bytes={size}-", "bytes *"),
        ):
            web.request("GET", where, headers={"Range": given})
            part = web.getresponse()
            assert part.headers["Content-Range"] == f"{expected}/{size}"
            assert part.status == (416 if "*" in expected else 206)
            part.read()
        web.close()


def test_what_is_not_there(hub, tmp_path):
    """The client raises the same errors as with the real Hub."""
    client(
        hub,
        WRITE_TOKEN,
        tmp_path,
        """
def refused(kind, status, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        assert error.response.status_code == status, error
    else:
        raise AssertionError(f"{call} went through")
repo = "demo/some-model"
refused(errors.RepositoryNotFoundError, 404, api.model_info, repo)
api.create_repo(repo)
refused(errors.RevisionNotFoundError, 404, api.model_info, repo, revision="nowhere")
refused(errors.RemoteEntryNotFoundError, 404, hf_hub_download, repo, "nowhere.txt")
refused(errors.HfHubHTTPError, 409, api.create_repo, repo)
refused(errors.HfHubHTTPError, 409, api.create_branch, repo, branch="main")
refused(errors.HfHubHTTPError, 404, api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id=repo,
        revision="nowhere")
refused(errors.HfHubHTTPError, 412, api.create_commit, repo, [CommitOperationAdd("x", b"y")],
        commit_message="late", parent_commit="0" * 40)
refused(errors.HfHubHTTPError, 403, api.create_repo, "stranger/some-model")
""",
    )
    assert not hub.counts


def test_who_may_do_what(hub, tmp_path):
    """A read-only token, a fine-grained one, an anonymous request, and an unknown token."""
    client(
        hub,
        WRITE_TOKEN,
        tmp_path,
        """
api.create_repo("demo/hidden", private=True)
api.create_repo("demo/shown")
assert api.model_info("demo/hidden").private and not api.model_info("demo/shown").private
""",
    )
    refused = """
for status, repo in {cases}:
    try:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo)
    except errors.HfHubHTTPError as error:
        assert error.response.status_code == status, error
    else:
        raise AssertionError(f"{{repo}} was written")
"""
    client(hub, READ_TOKEN, tmp_path, refused.format(cases=[(403, "demo/shown"), (403, "demo/hidden")]))
    client(
        hub,
        None,
        tmp_path,
        refused.format(cases=[(401, "demo/shown")])
        + """
api.model_info("demo/shown")
try:
    api.model_info("demo/hidden")
except errors.RepositoryNotFoundError as error:
    assert error.response.status_code == 401
else:
    raise AssertionError("a private repository was shown")
""",
    )
    client(hub, "hf_no_such_token", tmp_path, refused.format(cases=[(401, "demo/shown")]))
    client(
        hub,
        FINE_TOKEN,
        tmp_path,
        refused.format(cases=[(403, "demo/shown")])
        + f"""
api.create_repo("{FINE_REPOSITORY}")
api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="{FINE_REPOSITORY}")
""",
    )
    assert hub.counts == {"commit": 1}


def test_the_command_runs_another_against_it(tmp_path):
    """The command gets the Hub in its environment, and its exit status is returned."""
    code = (
        "import os, sys; from huggingface_hub import HfApi\n"
        "assert os.environ['DEMO_HUB'] == os.environ['HF_ENDPOINT'] and 'HF_HUB_OFFLINE' not in os.environ\n"
        "HfApi().create_repo('demo/from-outside'); print(HfApi().model_info('demo/from-outside').id); sys.exit(7)"
    )
    command = [
        sys.executable,
        "-m",
        "tests.local_hub",
        "--storage",
        tmp_path / "new" / "hub",
        "--",
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 7 and done.stdout == "demo/from-outside\n", done.stderr
    assert (tmp_path / "new" / "hub" / "repos" / "models" / "demo" / "from-outside.json").is_file()


def test_it_imports_nothing_heavy():
    code = (
        "import sys, tests.local_hub.__main__; heavy = ('torch', 'numpy', 'tinyllama_hf', 'pytest'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
