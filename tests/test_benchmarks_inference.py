"""Benchmarks of inference run on a CPU with a small model, and those of one GPU with a minimum of packages."""

import argparse
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


RUN = ROOT / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    import run

    return run


def rehearse(output, *options):
    """Runs parts on a CPU; returns the process and the rows of its file."""
    command = [sys.executable, str(RUN), "--device", "cpu", "--tiny", "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_the_gpu_scripts_need_neither_pydantic_nor_sentencepiece_nor_quantization():
    script = """
import sys
for name in ("pydantic", "sentencepiece", "typer", "trl", "datasets", "bitsandbytes", "torchao", "pytest"):
    sys.modules[name] = None
sys.path.insert(0, {folder!r})
import run, importlib
for module, function in run.MODULES.values():
    getattr(importlib.import_module(module), function)
import measuring, quantization
print([row for row in quantization.quantizations(measuring.Bench("cpu", True)) if "skipped" in row])
"""
    done = subprocess.run([sys.executable, "-c", script.format(folder=str(RUN.parent))], check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.count("needs the package bitsandbytes") == 2, "one for int8, one for nf4"
    assert done.stdout.count("needs an NVIDIA GPU") == 2, "one for int4, one for fp8"


@pytest.mark.slow
def test_the_gpu_script_refuses_a_machine_without_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, str(RUN), "--output", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU that torch can use; --device cpu --tiny" in done.stderr


@pytest.mark.slow
def test_exactness_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    done, rows = rehearse(tmp_path / "rows.jsonl", "--parts", "exactness")
    compared = [row for row in rows if "wrong" in row]
    assert not [row for row in compared if row["wrong"]] and len(compared) == 23
    assert rows[-1]["finished"] and done.returncode == 0, done.stdout[-2000:]
    drafts = compared[0]
    assert drafts["equal"] == drafts["rows"] == 20 and 0 < drafts["accepted"] < drafts["drafted"]
    assert "| rows that join with a draft |" in done.stdout


@pytest.mark.slow
def test_the_speed_of_all_parts_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "rows.jsonl"
    earlier = {"part": "exactness", "variant": "of an earlier run", "wrong": 0}
    output.write_text(json.dumps(earlier) + "\n")
    names = ["plain", "drafts", "quantization", "peers", "samples", "heads"]
    done, rows = rehearse(output, "--parts", *names)
    assert done.returncode == 0, done.stdout[-2000:]
    assert rows[0] == earlier and "of an earlier run" in done.stdout
    assert not [row for row in rows if "error" in row or "stopped" in row]
    parts = {name: [row for row in rows if row["part"] == name and "variant" in row] for name in names}
    assert [row["variant"] for row in parts["plain"]] == [
        *("first call of the process", "first call of another model", "memory reads"),
        *(["graphs", "graphs off"] * 2),
        *("profile, graphs", "profile, graphs off", "compiled"),
    ]
    assert all(row["share_of_limit"] > 0 for row in parts["plain"] if row["variant"].startswith("graphs"))
    speculative = [row for row in parts["drafts"] if "ours_over_plain" in row]
    assert {row["batch"] for row in speculative} == {1, 2} and all(row["draft_share"] > 0 for row in speculative)
    kinds = [row["variant"] for row in parts["quantization"]]
    assert kinds == [*["float32", "nf4"] * 2, "int4", "fp8", *["float32", "int8"] * 2]
    assert "bitsandbytes" in parts["quantization"][-1]["without_graphs"], "int8"
    assert [row["variant"] for row in parts["peers"]][-2:] == ["static cache, compiled", "continuous batching"]
    sizes = {row["parameters"] for row in parts["heads"]}
    assert max(sizes) / min(sizes) < 1.001, "of equal size"
    assert {row["key_value_heads"] for row in parts["heads"]} == {1, 2, 4}


@pytest.mark.slow
def test_a_part_that_reaches_its_limit_is_stopped(tmp_path):
    done, rows = rehearse(tmp_path / "rows.jsonl", "--parts", "exactness", "samples", "--seconds", "12")
    assert ["stopped" in row for row in rows if row["part"] == "exactness"][-1]
    assert rows[-1] == {"part": "samples", "stopped": "before it began: no time left"}
    assert done.returncode == 1, "exactness was not checked to its end"


def test_the_table_has_the_last_run_of_each_part(run, tmp_path):
    rows = [
        {"part": "plain", "provenance": {}},
        {"part": "plain", "variant": "old", "tokens_per_second": 1},
        {"part": "plain", "provenance": {}},
        {"part": "plain", "variant": "new", "seconds": 2, "at": 5.0},
        {"part": "plain", "variant": "newer", "tokens_per_second": 3, "at": 6.0},
        {"part": "plain", "finished": True, "at": 6.1},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run.latest(path)
    assert [row.get("variant") for row in found] == ["new", "newer", None]
    assert run.table(found).splitlines()[3:] == [
        "| variant | seconds | tokens_per_second |",
        "|---|---|---|",
        "| new | 2 |  |",
        "| newer |  | 3 |",
    ]


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        ({"part": "exactness", "wrong": 0}, False),
        ({"part": "exactness", "wrong": 1}, True),
        ({"part": "exactness", "skipped": "bitsandbytes is missing"}, False),
        ({"part": "exactness", "stopped": "after 90 s"}, True),
        ({"part": "peers", "stopped": "after 90 s"}, False),
        ({"part": "peers", "failed": "ended with status 1"}, True),
    ],
)
def test_the_exit_status(run, row, bad):
    assert run.is_bad(row) is bad


@pytest.mark.slow
def test_passes_of_a_pair(monkeypatch):
    """The bound of benchmarks/speculative.py is made of measured passes over rows of different lengths."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import speculative
    import torch

    model = speculative.controlled_model(torch.float32, num_hidden_layers=1, vocab_size=500)
    assert speculative.pass_seconds(model, 3, 2, 20, repeats=1) > 0
    sizes = speculative.memory(model, model, 2, 20)
    assert sizes["target_cache_mb"] == sizes["draft_cache_mb"] > 0


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
