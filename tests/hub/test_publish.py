"""Publishing to a local Hub with the real client: uploads, repeated calls, and errors."""

import hashlib
import json
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from tests.hub.conftest import files_on_hub, put_on_hub
from tests.local_hub.accounts import FINE_REPOSITORY, FINE_TOKEN, READ_TOKEN, WRITE_TOKEN
from tests.local_hub.server import LocalHub
from tinyllama_hf.errors import InputError
from tinyllama_hf.hub.access import explain_errors
from tinyllama_hf.hub.publish import Revision, _heads, _upload, plan_revisions, publish


REPO = "demo/micro"
# A user with transformers alone.
STOCK = """
import json, sys
sys.modules["tinyllama_hf"] = None
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
repo, *revisions = sys.argv[1:]
found = {}
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
    assert type(model) is LlamaForCausalLM
    model(**tokenizer("def main():", return_tensors="pt"))
    found[revision] = {n: hf_hub_download(repo, n, revision=revision) for n in ("model.safetensors", "README.md")}
print(json.dumps(found))
"""
OURS = """
import json, sys
from tinyllama_hf import load
model, tokenizer = load(sys.argv[1])
print(json.dumps([type(model).__name__, float(model.model.embed_tokens.weight.sum()), len(tokenizer)]))
"""


def milestones(run: Path) -> list[Path]:
    """The milestones, oldest first."""
    return sorted((run / "milestones").iterdir(), key=lambda path: int(path.name.split("-")[1]))


def on_hub(hub: LocalHub, repo: str = REPO) -> dict[str, dict[str, str]]:
    """SHA-256 of every file on every branch except `.gitattributes`."""
    return {
        branch: {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        for branch, files in files_on_hub(hub, repo).items()
    }


def meant(run: Path, repo: str = REPO) -> dict[str, dict[str, str]]:
    """The expected value of `on_hub`."""
    return {
        revision.name: {
            path: hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
            for path, content in revision.files.items()
        }
        for revision in plan_revisions(run, repo)
    }


@pytest.mark.slow
def test_every_milestone_loads_by_its_revision(run, hub, command, python):
    """Stock transformers downloads the same bytes, and a second call uploads nothing."""
    first, last = milestones(run)
    for stray in ("optimizer.pt", ".config.json.123.tmp", "notes.txt"):
        (last / stray).write_text("not part of a milestone")
    begun, again = (command("publish", run, "--repo", REPO) for _ in range(2))
    assert begun.returncode == again.returncode == 0, begun.stderr + again.stderr
    where = [f"{hub.endpoint}/{REPO}/tree/{folder.name}" for folder in (first, last)] + [f"{hub.endpoint}/{REPO}"]
    for address in where:
        assert f"{address}  uploaded\n" in begun.stdout and f"{address}  up to date\n" in again.stdout
    # Weights of two milestones, two pictures; the tokenizer's model is the same file everywhere.
    assert hub.counts == {"commit": 3, "put": 5}
    assert on_hub(hub) == meant(run)
    assert set(on_hub(hub)["main"]) == {path.name for path in first.iterdir()} | {
        "README.md",
        "loss.png",
        "trajectory.png",
    }

    found = json.loads(python(STOCK, REPO, first.name, last.name, "main"))
    for revision, folder, bits in ((first.name, first, 2.5), (last.name, last, 2.25), ("main", last, 2.25)):
        assert Path(found[revision]["model.safetensors"]).read_bytes() == (folder / "model.safetensors").read_bytes()
        card = ModelCard.load(found[revision]["README.md"])
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
        [result] = card.data.eval_results
        assert (result.metric_type, result.metric_value, result.dataset_config) == ("bits_per_byte", bits, "f" * 64)
    from safetensors.torch import load_file

    kind, total, vocabulary = json.loads(python(OURS, f"{REPO}@{first.name}"))
    weights = load_file(first / "model.safetensors")["model.embed_tokens.weight"]
    assert (kind, vocabulary) == ("TinyLlamaForCausalLM", 512) and total == pytest.approx(float(weights.sum()))


@pytest.mark.slow
def test_an_upload_that_was_cut_goes_on_and_later_ones_follow_the_run(run, hub, command):
    """No revision is partial, nothing is uploaded twice, outdated weights are deleted, and other files are kept."""
    words = ("publish", run, "--repo", REPO)
    hub.puts_left = 2  # the large files of the first milestone
    first, last = milestones(run)
    cut = command(*words)
    assert cut.returncode == 2 and "it resumes where it stopped" in cut.stderr
    assert "Request has expired" in cut.stderr and cut.stderr.count("\n") == 1
    assert on_hub(hub) == {"main": {}, first.name: meant(run)[first.name], last.name: {}}
    hub.puts_left = None
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert f"{first.name}  up to date" in done.stdout and f"{last.name}  uploaded" in done.stdout
    assert on_hub(hub) == meant(run)
    assert hub.counts == {"commit": 3, "put": 5}

    put_on_hub(hub, REPO, {"model-00001-of-00002.safetensors": b"old", "old/notes.txt": b"theirs"}, last.name)
    before, scores = on_hub(hub), json.loads((run / "scores.json").read_text())
    row = scores["models"][1]
    row["bits_per_byte"] = row["by_source"][scores["data"][0]["path"]] = 2.125
    (run / "scores.json").write_text(json.dumps(scores))
    planned, done = command(*words, "--dry-run"), command(*words)
    assert "model-00001-of-00002.safetensors  to delete" in planned.stdout and "notes.txt" not in planned.stdout
    assert done.returncode == 0, done.stderr
    after = on_hub(hub)
    assert after[last.name].pop("old/notes.txt") == before[last.name].pop("old/notes.txt")
    assert after == meant(run)
    changed = {
        branch: {path for path in files | before[branch] if files.get(path) != before[branch].get(path)}
        for branch, files in after.items()
    }
    assert changed == {
        first.name: {"README.md"},
        last.name: {"README.md", "model-00001-of-00002.safetensors"},
        "main": {"README.md", "trajectory.png"},
    }
    assert hub.counts == {"commit": 6, "put": 6}


def test_dry_run(run, hub, command):
    """Prints the plan and uploads nothing: with a Hub, without a token, and offline."""
    dry = ("publish", run, "--repo", REPO, "--private", "--license", "mit", "--dry-run")
    with_token, without = command(*dry), command(*dry, token="")
    lines = []
    publish(run, REPO, private=True, dry_run=True, note=lines.append)  # here, the client is offline
    offline = "\n".join(lines) + "\n"
    assert with_token.returncode == without.returncode == 0, with_token.stderr + without.stderr
    for said in (with_token.stdout, without.stdout, offline):
        assert said.endswith("dry run: nothing was uploaded\n")
        size = (milestones(run)[0] / "model.safetensors").stat().st_size
        assert said.count(f"{size:>14,}  model.safetensors\n") == 3
        assert "demo/micro, private: 3 revisions" in said and "main  from step-12-token-0.003M" in said
    assert "the repository does not exist" in with_token.stdout
    assert "not compared with the Hub: HF_HUB_OFFLINE is set" in offline
    assert not hub.counts and not list((hub.storage.folder / "repos" / "models").iterdir())
    assert not list((hub.storage.folder / "lfs").iterdir())


@pytest.mark.slow
def test_private_repositories_and_those_of_others(run, hub, command):
    hub.storage.create("models", "demo/other", private=False)
    put_on_hub(hub, "demo/other", {"model.bin": b"weights"})
    hidden, exposed, other, fine, fine_elsewhere = (
        command("publish", run, "--repo", *words, token=token)
        for token, *words in (
            (WRITE_TOKEN, "demo-lab/hidden", "--private"),
            (WRITE_TOKEN, "demo/other", "--private"),
            (WRITE_TOKEN, "demo/other"),
            (FINE_TOKEN, FINE_REPOSITORY, "--license", "apache-2.0"),
            (FINE_TOKEN, "demo/elsewhere"),
        )
    )
    assert hidden.returncode == 0 and hub.storage.repo("models", "demo-lab/hidden")["private"]
    assert fine.returncode == 0 and not hub.storage.repo("models", FINE_REPOSITORY)["private"], fine.stderr
    for refused, message in (
        (exposed, "--private: demo/other exists and is public"),
        (other, "demo/other: holds other files (model.bin), which publishing would replace"),
        (fine_elsewhere, "'fine' lacks the permission repo.write for demo/elsewhere"),
    ):
        assert refused.returncode == 2 and message in refused.stderr
    assert on_hub(hub, "demo/other")["main"].keys() == {"model.bin"}


def test_a_fine_tuned_model_lies_on_main(chat, online):
    """A folder without milestones. Its held-out conversations are not published."""
    (chat / "validation.jsonl").write_text("{}\n")
    figures = {"replies": 100, "stop_rate": 0.975, "median_length": 12.5, "max_new_tokens": 64, "loss": 2.5}
    replies = {"name": "chat", "path": "chat", "data_sha256": "0" * 64, "samples": [], **figures}
    other = replies | {"name": "another", "stop_rate": 0.125}
    (chat / "replies.json").write_text(json.dumps({"task": "replies", "models": [other, replies]}))
    publish(chat, REPO)
    there = on_hub(online)
    assert there == meant(chat) and there.keys() == {"main"} and "validation.jsonl" not in there["main"]
    [revision] = plan_revisions(chat, REPO)
    card = ModelCard(revision.files["README.md"].decode())
    assert card.data.base_model is None, "the base was a folder of this machine"
    for fact in (
        "fine-tuned from base on 1,728 conversations",
        "went from 5.830 to **2.740**",
        "100 held-out questions, 97.5% end",
        "5" * 64,
        "embedded:questions: 1,728 trained, 96 held out",
    ):
        assert fact in card.text, fact


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", b'"llama"', b'"Llama"'),
        pytest.param("README.md", b"A Llama of", b"a Llama of", marks=pytest.mark.slow),
        pytest.param("provenance.json", b'"python"', b'"Python"', marks=pytest.mark.slow),
        pytest.param("tokenizer.model", b"\x0a", b"\x0b", marks=pytest.mark.slow),
        ("model.safetensors", b"F32", b"f32"),
        ("loss.png", b"one", b"two"),
    ],
)
def test_other_content_of_equal_size_is_sent(run, online, monkeypatch, name, old, new):
    """Files are compared by hash, in git and in LFS, local and generated. A dry run reports them too."""
    monkeypatch.setattr("tinyllama_hf.hub.revisions._draw_pictures", lambda *_: {"loss.png": b"\x89PNG\0one"})
    publish(run, REPO)
    right = files_on_hub(online, REPO)["main"][name]
    other = right.replace(old, new)
    assert len(other) == len(right) and other != right
    put_on_hub(online, REPO, {name: other})
    for dry_run in (True, False):
        assert [published.changed for published in publish(run, REPO, dry_run=dry_run)] == [[], [], [name]]
    assert files_on_hub(online, REPO)["main"][name] == right


def test_what_was_pushed_meanwhile_is_not_overwritten(online):
    """A commit between reading the branches and uploading is detected."""
    api = HfApi(online.endpoint, token=WRITE_TOKEN)
    api.create_repo(REPO)

    def upload(heads, text):
        _upload(api, REPO, heads, Revision("main", "step-1", text, {}), note=lambda line: None)

    upload(_heads(api, REPO, private=False), "# first\n")
    heads, before = _heads(api, REPO, private=False), files_on_hub(online, REPO)["main"]
    put_on_hub(online, REPO, {"theirs.txt": b"theirs"})
    with pytest.raises(InputError, match=REPO), explain_errors(api, REPO):
        upload(heads, "# second\n")
    assert files_on_hub(online, REPO)["main"] == {**before, "theirs.txt": b"theirs"}


class TestRefusals:
    """Each error is one message with a fix and exit status 2, and nothing is uploaded."""

    def test_before_anything_is_sent(self, run, trained, hub, command, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "begun" / "milestones").mkdir(parents=True)
        weights = milestones(run)[0] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        others = {
            name: Path(shutil.copytree(trained, tmp_path / name))
            for name in ("ours", "untold", "no-tokenizer", "no-log")
        }
        config = milestones(others["ours"])[1] / "config.json"
        config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "tinyllama"'))
        (milestones(others["untold"])[1] / "training.yaml").unlink()
        (milestones(others["no-tokenizer"])[0] / "tokenizer.json").write_text("{")
        (others["no-log"] / "metrics.jsonl").unlink()

        def words(folder: Path, repo: str = REPO, token: str = WRITE_TOKEN, *more: str) -> tuple:
            return (token, "publish", folder, "--repo", repo, *more)

        cases = {
            "--repo 'micro': the name must have the form USER/NAME": words(trained, "micro"),
            "--repo 'a/b/c': the name must have the form USER/NAME": words(trained, "a/b/c"),
            "--repo 'demo/a--b': Cannot have -- or ..": words(trained, "demo/a--b"),
            "empty: holds neither milestones nor a model": words(tmp_path / "empty"),
            "nowhere: no such folder": words(tmp_path / "nowhere"),
            "begun: has no milestone yet": words(tmp_path / "begun"),
            "model.safetensors: damaged": words(run),
            "model_type is 'tinyllama'; only plain Llama folders": words(others["ours"]),
            "training.yaml is missing": words(others["untold"]),
            "tokenizer.json: damaged, not valid JSON": words(others["no-tokenizer"]),
            "no-log: metrics.jsonl is missing": words(others["no-log"]),
            "No Hub token was found. Set HF_TOKEN": words(trained, token=""),
            "rejects the token (Invalid credentials": words(trained, token="hf_no_such_token"),
            "'read' is read-only, and publishing writes to demo/micro": words(trained, token=READ_TOKEN),
            "write access to demo-readers/micro (You don't have the rights": words(trained, "demo-readers/micro"),
            "demo (member of demo-lab, demo-readers), which may not write to stranger": words(
                trained, "stranger/micro"
            ),
            '"license" must be one of': words(trained, REPO, WRITE_TOKEN, "--license", "no-such-license"),
            "'read' is read-only": words(trained, REPO, READ_TOKEN, "--dry-run"),
        }
        for message, (token, *case) in cases.items():
            error = (result := command(*case, token=token)).stderr
            assert result.returncode == 2 and message in error, (case, result)
            assert error.startswith("error: ") and error.count("\n") == 1, error
        assert not hub.counts and not list((hub.storage.folder / "repos" / "models").iterdir())

    def test_no_hub(self, trained, command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))  # not listening: connections are refused
            address = f"http://127.0.0.1:{free.getsockname()[1]}"
            result = command("publish", trained, "--repo", REPO, endpoint=address)
        assert result.returncode == 2 and f"The Hub {address} cannot be reached (ConnectError" in result.stderr

    def test_offline(self, trained):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
            publish(trained, REPO)
