"""A mistake in a path or an option is reported before torch is imported, which takes seconds."""

import json
import os
import pty
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tinyllama_hf_cli.loading import import_libraries


RECIPE = str(ROOT / "recipes" / "pretrain" / "micro.yaml")
WRONG = {
    "chat /nope": "model '/nope': no such folder",
    "chat micro --dtype fp8": "--dtype 'fp8': unknown type; use auto, fp32, bf16",
    "generate /nope x": "model '/nope': no such folder",
    "generate empty x": "model empty: holds no config.json",
    "generate model.gguf x": "tinyllama-hf convert model.gguf --to llama",
    "generate x --temperature -1": "--temperature -1.0: ",
    "generate x --seed -1": "--seed -1: ",
    "generate x --device gpu": "--device 'gpu': unknown device; use auto, cpu, cuda or cuda:N",
    "generate empty x --quantization int5": "--quantization 'int5': unknown quantization; use none, int8",
    "generate empty x --quantization int4 --device cpu": "--quantization int4: needs an NVIDIA GPU with compute",
    "eval replies x y --quantization fp8 --device cpu": "--quantization fp8: needs an NVIDIA GPU with compute",
    "generate x --output out.jsonl": "--output out.jsonl: only valid with --input",
    "generate llama x --draft layers:x": "--draft layers:x: ",
    "generate llama x --draft layers:3": "--draft layers:3: the model has 3 layers. Use fewer",
    "generate gguf x": "tinyllama-hf convert gguf --to llama",
    "generate llama/model.safetensors x": "llama/model.safetensors: a file, not a model folder. Give the folder llama",
    "generate llama x --draft /nope": "model '/nope': no such folder",
    "generate llama x --adapter /nope": "model '/nope': no such folder",
    "generate adapter x": "It is an adapter: give its base model with --adapter adapter, or merge the two",
    "serve /nope": "model '/nope': no such folder",
    "plan /nope": "recipe /nope does not exist",
    f"plan {RECIPE} training.sed=1": "training.sed: unknown key",
    f"plan {RECIPE} --device a100": "--device 'a100': unknown device; use a100-40g",
    "memory /nope": "model '/nope': no such folder; or use a size: 1.1b",
    "memory 1.1b --quantization nf5": "--quantization 'nf5': ",
    "convert /nope --to llama --output x": "model '/nope': no such folder",
    "convert empty --to llama --output x --dtype fp8": "--dtype 'fp8': unknown type; use auto, fp32, bf16, fp16",
    "convert llama --to gguf --output x": "--to 'gguf': unknown format; valid: awq, gguf-bf16",
    "convert llama --to awq --output x --calibration /nope": "--calibration /nope: file not found",
    "convert empty --to llama --output llama": "--output llama: already exists",
    "convert empty --to gguf-lora --output x": "--output x: gguf-lora is one file",
    "convert empty --to gguf-lora --output x.gguf --vocab-rows 3": "--vocab-rows: changes a model",
    "convert llama --to awq --output x --base llama": "--base llama: only used by gguf-lora, not by awq",
    "merge /nope empty --output x": "model '/nope': no such folder",
    "merge llama /nope --output x": "model '/nope': no such folder",
    "merge nf4 empty --output x": "model nf4: its weights are quantized",
    "merge llama empty --output gguf": "--output gguf: already exists. Choose another folder, or pass --overwrite",
    "merge llama empty --output x --dtype fp8": "--dtype 'fp8': unknown type; use auto, fp32, bf16, fp16",
    "merge llama empty --output x --device gpu": "--device 'gpu': unknown device",
    "verify empty /nope": "model '/nope': no such folder",
    "eval text /nope": "model '/nope': no such folder",
    "eval text empty --watch --every 0": "--every 0.0: must be above 0",
    "eval tasks /nope": "model '/nope': no such folder",
    "eval tasks llama --published step-50k": "--published 'step-50k'",
    "compare step-50k-105b step-50k-105": "did you mean 'step-50k-105b'?",
    "compare step-50k-105b llama/config.json": "llama/config.json: is not a file of commonsense scores",
    "compare step-50k-105b": "has one model, and a comparison needs two",
    "compare step-50k-105b v1.1 --resamples 5": "--resamples 5: must be from 1,000",
    "compare step-50k-105b v1.1 --json empty": "--json empty is a folder",
    "eval replies empty": "model empty: holds no config.json",
    "report /nope --output x": "run /nope: no such folder",
    "report empty llama --output x --prompt a": "--prompt: is for the report of one run, not for 2",
    "report empty llama --output x --stages a": "--stages: is for the report of one run, not for 2",
    "report empty llama --output x --chat empty": "--chat: is for the report of one run, not for 2",
    "report empty llama llama --output x": "run llama: is given twice",
    "select /nope": "/nope: no such run or score file",
    "select empty --metric accuracyy": "--metric 'accuracyy': unknown metric; did you mean 'accuracy'?",
    "publish model.gguf --repo a/b": "run model.gguf: a file, not a folder. Give the folder",
    "publish llama --repo ab": "--repo 'ab': the name must have the form USER/NAME",
    "publish llama --repo a/b --base-model b": "--base-model 'b': the name must have the form USER/NAME",
    "publish /nope --repo a/b": "run /nope: no such folder",
    "prepare /nope --tokenizer empty --output x": "source /nope does not exist",
    "prepare empty --tokenizer /nope --output x": "model '/nope': no such folder",
    "prepare empty --output x": "--tokenizer is required",
    "tokenizer train /nope --output x": "source /nope does not exist",
    "tokenizer verify /nope": "model '/nope': no such folder",
    "train a.yaml training.seed=1 --dry-run": "recipes copy recipes && accelerate launch --quiet recipes/pretrain.py "
    "a.yaml training.seed=1 --dry-run",
    "sft": "accelerate launch --quiet recipes/sft.py recipes/sft/full.yaml",
    "dpo": "accelerate launch --quiet recipes/dpo.py recipes/dpo/lora.yaml",
    "recipes copy empty": "empty: already exists",
    "pretrain.py /nope": "recipe /nope does not exist",
    f"pretrain.py {RECIPE} training.sed=1": "training.sed: unknown key; did you mean 'seed'?",
    "sft.py /nope": "recipe /nope does not exist",
    "dpo.py /nope": "recipe /nope does not exist",
}
# Runs all in one process, which is only possible as long as none imports torch.
RUN = """
import contextlib, io, json, runpy, sys
from tinyllama_hf_cli import main
found = {{}}
for command in json.load(sys.stdin):
    words, err = command.split(" "), io.StringIO()
    script = {recipes!r} + "/" + words[0]
    sys.argv = words if words[0].endswith(".py") else ["tinyllama-hf", *words]
    with contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__") if words[0].endswith(".py") else main()
            status = 0
        except SystemExit as stop:
            status = stop.code
    found[command] = [status, err.getvalue(), sorted({{"torch", "transformers"}} & sys.modules.keys())]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start_up")
    (folder / "empty").mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    (folder / "llama" / "model.safetensors").touch()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "nf4").mkdir()
    (folder / "nf4" / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}')
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model-q8_0.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-c", RUN.format(recipes=str(ROOT / "recipes"))]
    done = subprocess.run(command, cwd=folder, input=json.dumps(list(WRONG)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("command", "message"), WRONG.items())
def test_a_mistake_is_reported_without_torch(outcomes, command, message):
    status, error, imported = outcomes[command]
    assert status == 2 and message in error and error.startswith("error: ")
    assert imported == []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_that_libraries_are_loading(terminal, monkeypatch):
    """And a pipe gets nothing before ten seconds."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    monkeypatch.setenv("TERM", "xterm")
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        import_libraries()
        stream.write("end")
        stream.flush()
        printed = os.read(reader, 100_000).decode()
    os.close(reader)
    assert ("Loading torch and transformers" in printed) == terminal and (terminal or printed == "end")
