"""Errors of `tinyllama-hf serve` before it starts to serve."""

import socket
import sys

import pytest

import tinyllama_hf_cli
from tinyllama_hf.errors import InputError
from tinyllama_hf.serving.app import bind


for package in ("fastapi", "uvicorn", "openai"):
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
