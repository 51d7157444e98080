"""A conversion is complete or absent: interrupted, killed, refused, or replacing an existing output."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.conversion import files
from tests.conversion.files import changed, filled, refuse
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert, progress
from tinyllama_hf.conversion.reading.recognize import open_checkpoint


NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model():
    return files.small_model()


@pytest.fixture
def source(model, tmp_path):
    return files.write_folder(tmp_path / "model", *model)


@pytest.mark.parametrize("to", ["llama", "litgpt", "gguf-q8_0"])
def test_interrupted(to, source, tmp_path, monkeypatch):
    """Interrupted at the fifth tensor, without and with an existing output."""
    seen = []

    def update(self, task, advance):
        seen.append(advance)
        if len(seen) % 5 == 0:
            raise KeyboardInterrupt

    convert(source, "llama", tmp_path / "there")
    monkeypatch.setattr(progress.Progress, "update", update)  # `Checkpoint.advance` calls it
    before = sorted(tmp_path.rglob("*"))
    for output, force in (("out", False), ("there", True)):
        with pytest.raises(KeyboardInterrupt):
            convert(source, to, tmp_path / output, force=force)
        assert sorted(tmp_path.rglob("*")) == before and len(seen) % 5 == 0
    assert open_checkpoint(tmp_path / "there").load(NORM).equal(open_checkpoint(source).load(NORM))


@pytest.mark.slow
def test_killed_and_run_again(source, tmp_path):
    script = """
import os, signal, sys
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert
from tinyllama_hf.conversion import checkpoint
load, number = checkpoint.Checkpoint.load, []
def kill(*arguments):
    number.append(0)
    if len(number) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(*arguments)
checkpoint.Checkpoint.load = kill
convert(sys.argv[1], "llama", sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", script, source, tmp_path / "out"], cwd=ROOT,
                          env=os.environ | {"TMPDIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    convert(source, "llama", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("tinyllama-hf-")) == ["model", "out"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_an_output_that_exists(source, model, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, "llama", tmp_path / "out")  # an empty folder is none
    refuse(source, "out: already exists.* --force", tmp_path)
    convert(source, "litgpt", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "lit_model.pth").exists() and not (tmp_path / "out" / "model.safetensors").exists()
    refuse(tmp_path / "out", "out: contains the source", tmp_path, force=True)
    wrong = files.write_folder(tmp_path / "wrong", changed(model[0], NORM, filled(float("nan"))), model[1])
    refuse(wrong, "not finite", tmp_path, force=True)
    assert open_checkpoint(tmp_path / "out").load(NORM).equal(model[0][NORM]), "what was there is there still"
    (tmp_path / "out" / "provenance.json").write_text('{"created": "by another program"}')
    refuse(source, "not written by a conversion, so --force does not replace it", tmp_path, force=True)
    (tmp_path / "out" / "provenance.json").unlink()
    refuse(source, "not written by a conversion", tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "wrong"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGINT))]
)
def test_a_request_to_stop_leaves_nothing(tmp_path, number):
    """Signals the command while it writes a model."""
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("1.1b", vocab_size=512, num_hidden_layers=3)).save_pretrained(
        tmp_path / "model"
    )
    command = [
        Path(sys.executable).parent / "tinyllama-hf",
        "convert",
        "model",
        "--to",
        "gguf-q4_0",
        "--output",
        "out",
    ]
    process = subprocess.Popen([str(c) for c in command], cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)},
                               stderr=subprocess.PIPE)  # fmt: skip
    while not any(tmp_path.glob(".out.*.tmp")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    while process.poll() is None:  # Python loses a signal if its handler raises during garbage collection
        process.send_signal(number)
        time.sleep(0.2)
    assert process.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
