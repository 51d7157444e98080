"""Fixtures for publishing: runs, model folders of each kind, and a local Hub."""

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import run_here
from tests.local_hub.accounts import WRITE_TOKEN
from tests.local_hub.server import LocalHub


TASK_ITEMS = {
    "hellaswag": 10042,
    "openbookqa": 500,
    "winogrande": 1267,
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "boolq": 3270,
    "piqa": 1838,
}

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub").serving() as hub:
        yield hub


@contextlib.contextmanager
def client_of(endpoint: str, home: Path, token: str = WRITE_TOKEN) -> Iterator[None]:
    """Makes the client in this process use a Hub. It reads its settings when it is imported."""
    from huggingface_hub import constants, hf_api

    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint),
    }
    with (
        mock.patch.multiple(constants, **settings),
        mock.patch.object(hf_api.api, "endpoint", endpoint),  # of the functions that are no methods
        mock.patch.dict(os.environ, {"HF_TOKEN": token}),
    ):
        yield


@pytest.fixture
def online(hub, tmp_path) -> Iterator[LocalHub]:
    """The local Hub, used by the client in this process."""
    with client_of(hub.endpoint, tmp_path / "hf-home"):
        yield hub


def files_on_hub(hub: LocalHub, repo: str) -> dict[str, dict[str, bytes]]:
    """Every file on every branch except `.gitattributes`."""
    stored = hub.storage.repo("models", repo)
    return {
        branch: {
            path: hub.storage.content(file).read_bytes()
            for path, file in stored["commits"][commit]["files"].items()
            if path != ".gitattributes"
        }
        for branch, commit in stored["branches"].items()
    }


def put_on_hub(
    hub: LocalHub, repo: str, files: dict[str, bytes], branch: str = "main", title: str = "by hand"
) -> None:
    """Commits files as another client would."""
    stored = hub.storage.repo("models", repo)
    there, changes = stored["commits"][stored["branches"][branch]]["files"], []
    for path, content in files.items():
        value = {"path": path, "content": base64.b64encode(content).decode()}
        is_lfs = hub.storage.upload_mode(there, path, len(content), content[:512]) == "lfs"
        if is_lfs:
            value = {"path": path, "oid": hashlib.sha256(content).hexdigest()}
            hub.storage.add_lfs(value["oid"], io.BytesIO(content), len(content))
        changes.append({"key": "lfsFile" if is_lfs else "file", "value": value})
    hub.storage.commit("models", repo, branch, title, changes, "")


@pytest.fixture
def python(hub, tmp_path) -> Callable[..., str]:
    """Runs code in a new process that uses the local Hub, and returns its output. The client reads its settings when
    it is imported."""

    def run(code: str, *arguments: str, token: str = WRITE_TOKEN, **environment: str) -> str:
        known = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        known |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf-home")}
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=tmp_path,
            env=known | {"HF_TOKEN": token, "COLUMNS": "120"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def command(hub, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `tinyllama-hf` in this process, as a user of the local Hub with a token, or with an empty one."""

    def run(*words: object, token: str = WRITE_TOKEN, endpoint: str = hub.endpoint) -> subprocess.CompletedProcess:
        with client_of(endpoint, tmp_path / "hf-home", token):
            return run_here("tinyllama-hf", *words, cwd=tmp_path)

    return run


@pytest.fixture(scope="session")
def trained(request, tmp_path_factory) -> Path:
    """A micro run with two milestones, bits per byte and commonsense scores with recognizable values."""
    from tests.conftest import write_recipe
    from tests.pretrain.runs import pretrain
    from tinyllama_hf.pretrain.config import load_pretrain_config

    folder = tmp_path_factory.mktemp("trained")
    prepared, tokenizer = (request.getfixturevalue(name) for name in ("prepared", "tokenizer_folder"))
    pretrain(load_pretrain_config(write_recipe(folder, prepared, tokenizer)))
    run = folder / "run"
    names = sorted((path.name for path in (run / "milestones").iterdir()), key=lambda name: int(name.split("-")[1]))
    (run / "scores.json").write_text(json.dumps(bits_per_byte_scores(names, str(prepared))))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def chat(trained, tmp_path) -> Path:
    """A fine-tuned model, which is published as one revision without pictures."""
    folder = Path(shutil.copytree(sorted((trained / "milestones").iterdir())[0], tmp_path / "chat"))
    record = json.loads((folder / "provenance.json").read_text())
    for key in ("step", "tokens", "validation_loss", "data"):
        del record[key]
    record |= {
        "base_model": {"path": str(trained / "milestones" / "base"), "sha256": {"model.safetensors": "5" * 64}},
        "conversations": {"source": "embedded:questions", "train": 1728, "held_out": 96, "dropped": 0},
        "held_out_loss": {"before": 5.8301, "after": 2.7402},
    }
    (folder / "provenance.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="session")
def folders(tokenizer_folder, tmp_path_factory) -> Path:
    """A plain Llama without provenance, `base`, and its conversions, quantized copies and adapter, each named by its
    kind."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
    from tinyllama_hf.conversion.convert import convert

    made = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig(**SIZES)).save_as_llama(made / "base")
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.save_pretrained(made / "base")
    for target in ("llama", "awq", "w4a16", "gguf-q8_0"):
        convert(made / "base", target, made / target)
    for kind in ("nf4", "int8"):
        load(made / "base", quantization=kind)[0].save_pretrained(made / kind)
        tokenizer.save_pretrained(made / kind)
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    settings = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(made / "adapter")
    return made


@pytest.fixture
def folder(folders, request, tmp_path) -> Path:
    """A copy of one of them that a test may change."""
    return Path(shutil.copytree(folders / request.param, tmp_path / request.param))


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Skips drawing pictures, which takes a second per run."""
    monkeypatch.setattr("tinyllama_hf.hub.revisions._draw_pictures", lambda *_: {})


def bits_per_byte_scores(names: list[str], data: str) -> dict:
    """Scores as `tinyllama-hf eval text RUN --baselines` writes them: 2.5 bits for the first milestone, 2.25 for the
    next."""
    tokens = [1536, 3072]
    rows = [
        {
            "name": name,
            "path": f"run/milestones/{name}",
            "step": t // 256,
            "tokens": t,
            "bits_per_byte": 2.5 - i / 4,
            "by_source": {data: 2.5 - i / 4},
            "protocol": {"context": 32, "stride": 16, "bos": True, "dtype": "float32"},
            "scored_with": {"transformers": "5.23.0"},
            "seconds": 1.0,
        }
        for i, (name, t) in enumerate(zip(names, tokens, strict=False))
    ]
    baselines = [
        {
            "name": name,
            "step": t // 256,
            "tokens": t,
            "distinct_tokens": t,
            "bits_per_byte": bits,
            "by_source": {data: bits},
        }
        for t in tokens
        for name, bits in (("unigram", 4.0), ("5-gram", 3.0))
    ]
    return {
        "task": "bits_per_byte",
        "data": [{"path": data, "fingerprint": "f" * 64, "documents": 6, "bytes": 31_415}],
        "models": rows,
        "baselines": baselines,
        "provenance": {"libraries": {"transformers": "5.99.0"}},  # of the last call, which scored other rows
    }


def commonsense_scores(names: list[str], limit: int | None, sample: bool = False) -> dict:
    """Scores as `tinyllama-hf eval tasks RUN` writes them: 30, 31, ... percent, each 2 more later."""
    protocol = {
        "harness": "lm_eval 0.4.13",
        "task_versions": dict.fromkeys(TASK_ITEMS, 1),
        "metrics": metrics(),
        "dtype": "float32",
        "num_fewshot": 0,
        "add_bos_token": False,
        "apply_chat_template": False,
        "context_length": 512,
        "limit": limit,
        "data": dict.fromkeys(TASK_ITEMS, "0" * 64),
        "sample": sample,
    }
    rows = []
    for i, name in enumerate(names):
        results = {
            task: {
                "metric": metrics()[task],
                "score": 30.0 + j + 2 * i,
                "standard_error": 0.7,
                "items": min(limit or items, items),
                "version": 1,
            }
            for j, (task, items) in enumerate(TASK_ITEMS.items())
        }
        rows.append(
            {
                "name": name,
                "path": f"run/milestones/{name}",
                "fingerprint": "0" * 64,
                "results": results,
                "average": 33.0 + 2 * i,
                "average_standard_error": 0.7 / math.sqrt(7),
                "cut_requests": 0,
                "seconds": 1.0,
            }
        )
    return {"task": "commonsense", "protocol": protocol, "models": rows}


def metrics() -> dict[str, str]:
    """The metric of each task of the published protocol."""
    return dict.fromkeys(TASK_ITEMS, "acc_norm") | {"winogrande": "acc", "boolq": "acc"}
