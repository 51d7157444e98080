"""No published file contains paths of this machine, or the names of its user and host."""

import json
import re
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.hub.conftest import commonsense_scores, files_on_hub
from tinyllama_hf import portable
from tinyllama_hf.hub.publish import publish


REPO = "demo/micro"
PLANTED = [
    "/home/zaphod/corpora/poems",
    "data.train=/srv/zaphod/poems",
    "--config=~/poems",
    "file:///srv/poems",
    "C:\\Users\\zaphod\\poems",
    "[{path: /srv/poems, weight: 1}]",
    "betelgeuse:29500",
    "zaphod@betelgeuse",
]
# Any path from the root of a file system, whatever the function that cuts them thinks of it.
ABSOLUTE = re.compile(
    rb"(?<![\w.:/<\\-])/(?:home|root|srv|tmp|var|usr|mnt|Users|private)\b|[A-Z]:\\\\?Users|file:/|~/"
)


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """Sets user and host names that occur in no vocabulary."""
    monkeypatch.setattr("socket.gethostname", lambda: "betelgeuse")
    monkeypatch.setenv("LOGNAME", "zaphod")
    portable._own_names.cache_clear()
    yield
    portable._own_names.cache_clear()


def plant(file: Path, **fields) -> None:
    """Adds paths and names to a JSON file, including the command line of a provenance record."""
    value = json.loads(file.read_text())
    if "command" in value:
        fields["command"] = ["pretrain.py", *PLANTED]
    file.write_text(json.dumps(value | fields, indent=2))


def assert_private(files: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    own = [str(tmp_path), tempfile.gettempdir() + "/", str(Path.home()) + "/", "zaphod", "betelgeuse"]
    for branch, contents in files.items():
        for path, content in contents.items():
            for text in own:
                assert text.encode() not in content, (branch, path, text)
            if Path(path).suffix not in (".safetensors", ".gguf", ".model", ".png"):
                assert not (found := ABSOLUTE.search(content)), (
                    branch,
                    path,
                    content[found.start() - 40 : found.end() + 40],
                )


def test_every_file_of_every_revision(run, online, tmp_path, no_pictures):
    """Paths and names are added to every file of a run that could contain them."""
    names = [folder.name for folder in (run / "milestones").iterdir()]
    (run / "commonsense.json").write_text(json.dumps(commonsense_scores(names, 100)))
    scores = (run / "scores.json").read_text()
    (run / "scores.json").write_text(scores.replace(json.loads(scores)["data"][0]["path"], "/srv/zaphod/poems"))
    for milestone in (run / "milestones").iterdir():
        record = json.loads((milestone / "provenance.json").read_text())
        assert tempfile.gettempdir() in "".join(record["data"]), "where the data lie is recorded here"
        plant(
            milestone / "provenance.json", data={"/srv/a/poems": "a" * 64, "/srv/b/poems": "b" * 64, **record["data"]}
        )
        plant(milestone / "config.json", _name_or_path="/srv/zaphod/base")
        plant(
            milestone / "tokenizer_config.json",
            name_or_path="/srv/base",
            tokenizer_file="/srv/base/tokenizer.json",
            extra_special_tokens=["/think"],
            chat_template="{{ '/srv' if a else '[/INST]' }}",
        )
        settings = yaml.safe_load((milestone / "training.yaml").read_text())
        settings["data"]["sources"][0]["path"] = "/srv/zaphod/poems"
        text = f"# by zaphod, in /srv\n{yaml.safe_dump(settings)}\nmore: {json.dumps(PLANTED)}\n"
        (milestone / "training.yaml").write_text(text)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    publish(run, REPO, license="mit")
    files = files_on_hub(online, REPO)
    assert_private(
        {b: {p: c for p, c in f.items() if p != "tokenizer_config.json"} for b, f in files.items()}, tmp_path
    )
    assert {path: path.read_bytes() for path in before} == before, "local files keep their paths"
    assert not any(published.changed for published in publish(run, REPO)), "and the same is not sent twice"
    for contents in files.values():
        record = json.loads(contents["provenance.json"])
        assert record["command"] == [
            "pretrain.py",
            "poems",
            "data.train=poems",
            "--config=poems",
            "poems",
            "poems",
            "[{path: poems, weight: 1}]",
            "host:29500",
            "user@host",
        ]
        assert (record["data"]["poems"], record["data"]["poems (2)"]) == ("a" * 64, "b" * 64)
        assert yaml.safe_load(contents["training.yaml"])["data"]["sources"][0]["path"] == "poems"
        assert json.loads(contents["config.json"])["_name_or_path"] == "base"
        tokenizer = json.loads(contents["tokenizer_config.json"])
        assert (tokenizer["name_or_path"], tokenizer["tokenizer_file"]) == ("base", "tokenizer.json")
        assert tokenizer["extra_special_tokens"] == ["/think"]
        assert tokenizer["chat_template"] == "{{ '/srv' if a else '[/INST]' }}", "what a program obeys is not touched"
        assert "| poems |" in contents["README.md"].decode()


def test_titles_of_commits(chat, online, tmp_path):
    """The titles contain the name of the folder."""
    publish(chat.rename(tmp_path / "zaphod-chat"), REPO)
    titles = [commit["title"] for commit in online.storage.repo("models", REPO)["commits"].values()]
    assert "Publish user-chat" in titles


@pytest.mark.parametrize("folder", ["llama", "awq", "w4a16", "gguf-q8_0", "nf4", "adapter"], indirect=True)
def test_folders_of_other_kinds(folder, online, tmp_path):
    if (folder / "provenance.json").is_file():
        settings = json.loads((folder / "provenance.json").read_text())["conversion"]
        plant(folder / "provenance.json", conversion=settings | {"source": "/srv/zaphod/base"})
    for name, field in (("config.json", "_name_or_path"), ("adapter_config.json", "somewhere")):
        if (folder / name).is_file():
            plant(folder / name, **{field: "/srv/zaphod/base"})
    publish(folder, REPO, base_model="demo/base")
    assert_private(files_on_hub(online, REPO), tmp_path)
