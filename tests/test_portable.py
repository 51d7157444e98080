"""What leaves the machine in strings: paths cut, everything that only looks like one unchanged."""

import json

import pytest

from tinyllama_hf import portable as portable_module
from tinyllama_hf.portable import hub_id, portable, portable_text


PATHS = {
    "/home/u/x": "x",
    "/home/u/runs/": "runs/",
    "//home/u/x": "x",
    "/data": "data",
    "/home/u/.": ".",
    "/home/ü/größe": "größe",
    "data.train=/home/u/x": "data.train=x",
    "--config=/x": "--config=x",
    "/home/John Smith/my data.txt": "my data.txt",
    "/home/u/runs/lr=1e-3/model": "model",
    "/home/u (work)/a/s": "s",
    "~/runs/a": "a",
    "~bob/runs/a": "a",
    "file:///home/u/x.json": "x.json",
    "file:///C:/a/x": "x",
    "see file:/home/u/x, or": "see x, or",
    "C:\\Users\\me\\run 1\\model": "model",
    "C:/Users/me/x": "x",
    "out=D:\\x\\y": "out=y",
    "\\\\server\\share\\x": "x",
    "data.sources=[{path: /home/u/my-data, weight: 1.0}, {path: /x/y, weight: 0.5}]":
        "data.sources=[{path: my-data, weight: 1.0}, {path: y, weight: 0.5}]",
    '{"path": "/home/u/x"}': '{"path": "x"}',
    "[/home/u/a,/home/u/b]": "[a,b]",
    "/x/a,/y/b": "a,b",
    "/x/a:/y/b": "a:b",
    "/a/b;/c/d": "b;d",
    "host:/home/u/x": "host:x",
    "'/home/u/a b'": "'a b'",
    "(/home/u/x)": "(x)",
    "<file:///a/b>": "<b>",
    "see /home/u/x and /home/v/y": "see x and y",
    "a\n/home/u/x\nb": "a\nx\nb",
    "http://a/b /home/u/c": "http://a/b c",
    "/home/u/.cache/huggingface/hub/models--org--my-name/snapshots/0123abc": "org/my-name@0123abc",
    "at /cache/models--org--name/snapshots/0123abc/config.json": "at org/name@0123abc/config.json",
}  # fmt: skip
OTHERS = [
    "org/name", "org/name@step-3", "a/b and 1/2, km/h", "runs/a/b", "./a/b", "../a", "..\\x\\y", "${HOME}/x",
    "embedded:sample", "https://huggingface.co/a/b?c=/d", "hf://datasets/a/b", "s3://bucket/key", " / ", "/",
    "and / or", "2026-11-28T08:46:38+00:00",
    "[INST] x [/INST] </s> <s>", "{% if a %}/b{% endif %}", "def f(a): return a // b",
    "Intel(R) Xeon(R) CPU @ 2.20GHz", "~", "~5 GB", "Linux-6.1.0-x86_64-with-glibc2.36", "", "a: b", "C: the language",
]  # fmt: skip


@pytest.mark.parametrize("text", PATHS)
def test_paths_are_cut_to_their_last_part(text):
    assert portable_text(text, names=False) == PATHS[text]
    assert portable_text(PATHS[text], names=False) == PATHS[text]


@pytest.mark.parametrize("text", OTHERS)
def test_what_only_looks_like_a_path(text):
    assert portable_text(text, names=False) == text


@pytest.fixture
def names(monkeypatch):
    """The user zaphod on the host betelgeuse."""
    monkeypatch.setattr("socket.gethostname", lambda: "betelgeuse.example")
    monkeypatch.setenv("LOGNAME", "zaphod")
    monkeypatch.setenv("HOME", "/home/beeblebrox")
    portable_module._own_names.cache_clear()
    yield
    portable_module._own_names.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/zaphod", "user"),
        ("/home/beeblebrox", "user"),
        ("/scratch/zaphod/zaphod-corpus", "user-corpus"),
        ("../../zaphod/data", "../../user/data"),
        ("--address=betelgeuse:29500", "--address=host:29500"),
        ("zaphod@betelgeuse.example", "user@host"),
        ("zaphod/my-model", "zaphod/my-model"),
        ("zaphodia and xbetelgeuse", "zaphodia and xbetelgeuse"),
    ],
)
def test_names_of_user_and_host(names, text, expected):
    """In paths and anywhere else, but not in the id of a repository, by which others find it."""
    assert portable_text(text) == expected
    assert portable_text(text, names=False) == text or text.startswith("/")


def test_whole_records(names):
    """Keys that are paths too; numbers and the record itself stay."""
    record = {
        "command": ["prepare", "--output=/home/zaphod/out", 3, None, 1.5, True],
        "data": {"/a/train": "1", "/b/train": "2", "relative/train": "3"},
        "zaphod": {"host": [{"path": "/x/betelgeuse"}]},
    }
    before = json.dumps(record)
    assert portable(record) == {
        "command": ["prepare", "--output=out", 3, None, 1.5, True],
        "data": {"train": "1", "train (2)": "2", "relative/train": "3"},
        "zaphod": {"host": [{"path": "host"}]},
    }
    assert json.dumps(record) == before and portable(portable(record)) == portable(record)


def test_a_long_text_does_not_cost_its_square():
    """20,000 beginnings of something: minutes where each is read to the end of the text."""
    for part in ("/a ", "a,", "a/", "models--a--", "a-b:", "/a,b ", "C:a "):
        assert portable_text(part * 20_000, names=False) == 1000 * portable_text(part * 20, names=False)
        assert not portable_text("/" + part * 20_000 + "\n", names=False).startswith("/")


def test_the_id_of_a_folder_of_the_cache():
    assert hub_id("/c/models--org--name/snapshots/0123abc") == "org/name"
    assert hub_id("/home/u/name") is None and hub_id("org/name") is None
