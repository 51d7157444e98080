"""Errors of `tinyllama-hf serve` before it starts to serve."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tinyllama_hf_cli
from tinyllama_hf.errors import InputError
from tinyllama_hf.serving.run_server import bind


for package in ("fastapi", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(package)


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns its message."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tinyllama-hf", "serve", *map(str, words)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            tinyllama_hf_cli.main()
        output, errors = capsys.readouterr()
        assert stop.value.code == 2 and not output and errors.startswith("error: ") and errors.count("\n") == 1
        return errors

    return run


def test_a_port_in_use(served_folder, refuse):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        errors = refuse(served_folder, "--port", port)
    assert f"--host 127.0.0.1 --port {port}: not available (Address already in use)" in errors


def test_addresses():
    with pytest.raises(InputError, match="--port 70000: must be between 0"):
        bind("127.0.0.1", 70000)
    with pytest.raises(InputError, match=r"--host nowhere\.invalid: not an address"):
        bind("nowhere.invalid", 0)
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1 --port 0: not available"):
        bind("192.0.2.1", 0)


def test_models_and_templates(served_folder, refuse):
    assert "model 'nowhere': no such folder" in refuse("nowhere", "--port", 0)
    errors = refuse(served_folder, "--template", "lama2")
    assert "chat template 'lama2'; did you mean 'llama2'?" in errors
    errors = refuse(served_folder, "--template", "chatml")
    assert "chat template chatml needs <|im_start|>, <|im_end|>" in errors


def test_without_the_packages(served_folder, monkeypatch, refuse):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve needs the package uvicorn: pip install 'tinyllama_hf[serving]'" in refuse(served_folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "vlm"), "--engine vlm: unknown; did you mean 'vllm'?"),
        (("--api-key", ""), "--api-key: must be printable ASCII"),
        (("--api-key", "k\u00e9y"), "--api-key: must be printable ASCII"),
        (("--engine", "vllm", "--page"), "--page: not supported with --engine vllm"),
        (("--engine", "vllm", "--draft", "lookup"), "--draft: not supported with --engine vllm"),
        (("--draft", "layers:9"), "--draft layers:9: the model has"),
        (("--engine", "vllm"), "--engine vllm: vLLM is not installed"),
    ],
)
def test_options(served_folder, refuse, words, message, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert message in refuse(served_folder, *words)


def test_vllm_is_started_on_the_same_folder(served_folder, tmp_path):
    """A program in its place records what it is started with; benchmarks/peers has the real one."""
    record = tmp_path / "record.json"
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ.get('VLLM_API_KEY')], open({str(record)!r}, 'w'))\n"
    )
    program.chmod(0o755)
    command = [Path(sys.executable).parent / "tinyllama-hf", "serve", served_folder, "--engine", "vllm"]
    command += ["--template", "llama2", "--dtype", "bf16", "--rows", "5", "--api-key", "k", "--port", "81"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([*map(str, command)], env=os.environ | {"PATH": path}, check=True, timeout=120)
    words, key = json.loads(record.read_text())
    assert words[:2] == ["serve", str(served_folder)] and key == "k" and "k" not in words
    given = dict(zip(words[2::2], words[3::2], strict=True))
    template = given.pop("--chat-template")
    assert "[INST]" in Path(template).read_text()
    assert json.loads(given.pop("--override-generation-config")) == {"temperature": 0.8, "top_p": 0.95, "top_k": 0}
    assert given == {
        "--served-model-name": "my-model", "--host": "127.0.0.1", "--port": "81", "--max-num-seqs": "5",
        "--max-model-len": "400", "--dtype": "bfloat16",
    }  # fmt: skip
