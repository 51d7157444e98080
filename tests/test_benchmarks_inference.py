"""Benchmarks of inference run on a CPU with a small model, and the GPU benchmark with a minimum of packages."""

import argparse
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


INFERENCE = ROOT / "benchmarks" / "gpu" / "inference.py"


@pytest.mark.slow
def test_the_gpu_script_needs_no_pydantic_no_sentencepiece_and_no_quantization():
    script = """
import sys
for name in ("pydantic", "sentencepiece", "typer", "bitsandbytes", "torchao"):
    sys.modules[name] = None
sys.path.insert(0, {folder!r})
import inference
print([row for row in inference.quantizations(inference.Bench("cpu", True)) if "error" in row])
"""
    done = subprocess.run([sys.executable, "-c", script.format(folder=str(INFERENCE.parent))], check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.count("skipped: quantization") == 2, "one for int8, one for nf4"
    assert done.stdout.count("skipped: --quantization") == 2, "one for int4, one for fp8, which need a GPU"


@pytest.mark.slow
def test_the_gpu_script_refuses_a_machine_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, str(INFERENCE)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU that torch can use; --device cpu --tiny" in done.stderr


@pytest.mark.slow
def test_gpu_inference_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "figures.json"
    other = {"part": "batch", "variant": "of an earlier run"}
    output.write_text(json.dumps({"figures": {"rows": [other]}}))
    command = [sys.executable, str(INFERENCE), "--device", "cpu", "--tiny", "--output", str(output)]
    command += ["--parts", "samples", "quantization", "speculative", "heads"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(output.read_text())["figures"]["rows"]
    assert rows[0] == other
    skipped = {row["variant"]: row["error"] for row in rows if "error" in row}
    assert skipped.keys() == {"int4", "fp8"}
    assert all(f"skipped: --quantization {kind}: needs an NVIDIA GPU" in reason for kind, reason in skipped.items())
    parts = {part: [row for row in rows if row["part"] == part] for part in ("quantization", "speculative", "heads")}
    assert [row["variant"] for row in parts["quantization"]] == ["int4", "fp8", *["float32", "int8", "nf4"] * 2]
    assert {row["batch"] for row in parts["speculative"]} == {1, 2}
    assert {row["key_value_heads"] for row in parts["heads"]} == {1, 2, 4}
    sizes = {row["parameters"] for row in parts["heads"]}
    assert max(sizes) / min(sizes) < 1.001, "of equal size"


@pytest.mark.slow
def test_decode(tmp_path, monkeypatch):
    """One row for each engine and number of threads; engines that hold the same model share a process."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import decode

    engines = [name for name in decode.ENGINES if "nf4" in name]
    arguments = argparse.Namespace(
        engines=engines, threads=[1, 2], rounds=1, prompt_tokens=8, new_tokens=4, peers=None
    )
    real, started = decode.Process, []
    monkeypatch.setattr(decode, "Process", lambda *made: started.append(made) or real(*made))
    rows = decode.measure(arguments, decode.prepared(tmp_path, "micro"))
    assert [(row["engine"], row["threads"]) for row in rows] == [(name, t) for t in (1, 2) for name in engines]
    assert all(row["tokens_per_second"] > 0 and row["tokens_per_cpu_second"] > 0 for row in rows)
    assert "tinyllama_hf nf4 over the best of bitsandbytes nf4" in decode.table(rows)
    assert len(started) == 2
