"""Converts released names from a local Hub with micro models under the real repository names."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_here
from tests.hub.conftest import client_of
from tests.local_hub.server import LocalHub
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer


RUNG = "TinyLlama/TinyLlama-1.1B-step-50K-105b"
FIRST = "TinyLlama/tinyLlama-intermediate-checkpoints"
REPAIRED = "TinyLlama/tinyLlama-intermediate-checkpoints-after-1T-token"
# Every repository and branch, each with a model of its own. Steps 485k to 715k of the first collection are withdrawn:
# one of them has the name of a repaired one, the other has not.
SERVED = {
    (RUNG, "main"): 1,
    (FIRST, "main"): 2,
    (FIRST, "step-480k-token-1007B"): 3,
    (FIRST, "step-500k-token-1049B"): 4,
    (FIRST, "step-600k-token-1258B"): 5,
    (REPAIRED, "main"): 6,
    (REPAIRED, "step-500k-token-1049B"): 7,
    (REPAIRED, "step-715k-token-1499B"): 8,
}


def model(seed: int) -> TinyLlamaForCausalLM:
    torch.manual_seed(seed)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16)
    return TinyLlamaForCausalLM(config)


@pytest.fixture(scope="module")
def hub(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    hub = LocalHub(folder / "hub")
    for (repository, branch), seed in SERVED.items():
        files = folder / str(seed)
        model(seed).save_pretrained(files)
        load_tokenizer(tokenizer_folder).save_pretrained(files)
        if branch == "main":
            hub.storage.create("models", repository, private=False)
        else:
            hub.storage.create_ref("models", repository, "branches", branch, "main")
        changes = [change(hub, file) for file in sorted(files.iterdir())]
        hub.storage.commit("models", repository, branch, "a checkpoint", changes, parent="")
    with hub.serving():
        yield hub


def change(hub: LocalHub, file: Path) -> dict:
    """A line of a commit as sent by the client; weights go to large file storage."""
    content = file.read_bytes()
    if file.suffix not in (".safetensors", ".model"):
        return {"key": "file", "value": {"path": file.name, "content": base64.b64encode(content).decode()}}
    digest = hashlib.sha256(content).hexdigest()
    with file.open("rb") as stream:
        hub.storage.add_lfs(digest, stream, len(content))
    return {"key": "lfsFile", "value": {"path": file.name, "oid": digest}}


MEANS = {
    "step-50k-105b": 1,
    RUNG: 1,
    "step-480k-token-1007B": 3,
    "step-500k-token-1049B": 7,  # of the repaired run
    "step-715k-token-1499B": 8,
    f"{FIRST}@step-500k-token-1049B": 4,  # withdrawn
    f"{FIRST}@step-600k-token-1258B": 5,
}
# A withdrawn checkpoint, a step between two checkpoints, and a revision and a repository that the Hub does not have.
REFUSED = {
    "step-600k-token-1258B": f"{REPAIRED} cannot be fetched from the Hub (RevisionNotFoundError",
    "step-603k-token-1265B": "checkpoints exist every 5k steps",
    f"{FIRST}@step-715k-token-1499B": f"{FIRST} cannot be fetched from the Hub (RevisionNotFoundError",
    "step-240k-503b": "step-240k-503b cannot be fetched from the Hub (RepositoryNotFoundError",
}


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """The results of `tinyllama-hf convert NAME --to llama --output N` for each name and its index N.

    All run as a user without a token. Finally one output is verified against its name.
    """
    folder, names = tmp_path_factory.mktemp("converted"), [*MEANS, *REFUSED]
    calls = {name: ("convert", name, "--to", "llama", "--output", i) for i, name in enumerate(names)}
    calls["verify"] = ("verify", names[0], "0", "--tensors")
    with client_of(hub.endpoint, folder / "hf-home", token=""):
        done = {name: run_here("tinyllama-hf", *words, cwd=folder) for name, words in calls.items()}
    return folder, {name: (result.returncode, result.stdout, result.stderr) for name, result in done.items()}


def environment(hub: LocalHub, folder: Path) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf-home"),
        "HF_TOKEN": "",
    }


def test_names_and_full_ids_reach_what_they_mean(converted):
    folder, results = converted
    for i, (name, seed) in enumerate(MEANS.items()):
        status, out, err = results[name]
        assert status == 0 and f"wrote {i}: llama" in " ".join(out.split()), (name, err)
        found, expected = load_file(folder / str(i) / "model.safetensors"), model(seed).state_dict()
        assert found.keys() == expected.keys() and all(found[key].equal(t) for key, t in expected.items()), name
        assert (folder / str(i) / "tokenizer.model").is_file()
        record = json.loads((folder / str(i) / "provenance.json").read_text())
        assert record["conversion"]["source"] == name
    status, out, err = results["verify"]
    assert status == 0 and "same bits" in out, err


def test_what_the_hub_has_not_is_refused(converted):
    folder, results = converted
    for name, message in REFUSED.items():
        status, _, err = results[name]
        assert status == 2 and message in " ".join(err.split()) and "Traceback" not in err, (name, err)
    assert {path.name for path in folder.iterdir()} == {"hf-home", *(str(i) for i in range(len(MEANS)))}


@pytest.mark.slow
def test_the_command_as_a_user_types_it(hub, run_command, tmp_path):
    for name, seed in (("step-50k-105b", 1), ("step-715k-token-1499B", 8)):
        done = run_command("tinyllama-hf", "convert", name, "--to", "llama", "--output", f"out-{seed}", cwd=tmp_path,
                           env=environment(hub, tmp_path))  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / f"out-{seed}" / "model.safetensors")
        assert all(found[key].equal(t) for key, t in model(seed).state_dict().items())
