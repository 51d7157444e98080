"""The benchmarks for GPUs run on a CPU too, with a small model, and without what a bare machine lacks."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_gpu_scripts_need_no_pydantic_and_no_sentencepiece():
    script = """
import sys
sys.modules["pydantic"] = sys.modules["sentencepiece"] = sys.modules["typer"] = None
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks/gpu"]
import pretrain, train_ladder, workload
"""
    subprocess.run([sys.executable, "-c", script.format(root=str(ROOT))], check=True, capture_output=True, text=True)


@pytest.mark.slow
def test_pretrain_on_a_cpu():
    """A row of ours and one of stock: the same loss from the same weights on the same tokens."""
    base = {"preset": "micro", "sequence_length": 64, "micro_batch_size": 2, "accumulation": 2, "precision": "fp32",
            "compile": "off", "attention": "sdpa", "kernels": "none", "activation_checkpointing": False,
            "loss_chunk_megabytes": 128, "warmup_steps": 1, "steps": 2}  # fmt: skip
    rows = {}
    for model in ("ours", "stock"):
        command = [
            sys.executable,
            ROOT / "benchmarks" / "gpu" / "pretrain.py",
            "--measure",
            json.dumps(base | {"model": model}),
        ]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
        rows[model] = json.loads(done.stdout.splitlines()[-1])
    assert rows["ours"]["loss"] == pytest.approx(rows["stock"]["loss"], abs=1e-3)
    assert all(row["tokens_per_second"] > 0 and row["peak_gigabytes"] > 0 for row in rows.values())


@pytest.mark.slow
def test_train_ladder_on_a_cpu(prepared, tmp_path):
    from transformers import AutoModelForCausalLM

    command = [
        *(sys.executable, ROOT / "benchmarks" / "gpu" / "train_ladder.py", "--data", prepared, "--minutes", 0.3),
        *("--models", "micro", "--sequence-length", 64, "--micro-batch-size", 4, "--output", tmp_path / "out"),
    ]
    subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    row = json.loads((tmp_path / "out" / "models.json").read_text())["figures"][0]
    assert row["validation_loss"] < 6.2, "untrained it would be 6.24"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "micro").num_parameters() == row["parameters"]
