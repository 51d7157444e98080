"""Reading a damaged file of any container ends in a clean error or gives the original tensors."""

import collections
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.conversion import files, layouts
from tests.conversion.mutants import KINDS
from tests.conversion.test_gguf_tokenizer import byte_level
from tinyllama_hf import convert, load_tokenizer


@pytest.fixture(scope="module")
def sources(documents, tokenizer_folder, tmp_path_factory):
    """An undamaged checkpoint of each kind, by name."""
    folder = tmp_path_factory.mktemp("sources")
    weights, config = files.small_model()
    plain = files.write_folder(folder / "safetensors", weights, config)
    files.write_sharded(folder / "sharded safetensors", weights, config, "safetensors")
    files.write_sharded(folder / "sharded bin", weights, config, "bin")
    (folder / "bin").mkdir()
    config.save_pretrained(folder / "bin")
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    files.write_lit_gpt(folder / "lit-gpt, protocol 5", weights, config, "A'")
    convert(plain, "litgpt", folder / "litgpt, training")
    torch.save({"model": layouts.lit_gpt(weights, config, "C"), "optimizer": {"state": {0: {"step": torch.ones(())}}},
                "iter_num": 7}, folder / "litgpt, training" / "lit_model.pth")  # fmt: skip
    (folder / "litgpt, training" / "provenance.json").unlink()
    layouts.write_meta(folder / "Meta", weights, config, 2)
    (folder / "llama2.c").mkdir()
    layouts.write_llama2c(folder / "llama2.c" / "model.bin", weights, config)
    convert(plain, "llama", folder / "converted")
    tokenizers = {"f32": load_tokenizer(tokenizer_folder), "q4_0": byte_level("smollm", documents, files.ROWS - 2)}
    for kind, tokenizer in tokenizers.items():
        given = files.write_folder(folder / f"for {kind}", weights, config)
        tokenizer.save_pretrained(given)
        convert(given, f"gguf-{kind}", folder / f"GGUF {kind}")
        (folder / f"GGUF {kind}" / "provenance.json").unlink()
    return folder


def run(sources, number):
    """Two processes, each with every other kind."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.conversion.mutants", sources, "|".join(kinds), str(number)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for kinds in (list(KINDS)[::2], list(KINDS)[1::2])
    ]  # fmt: skip
    counts, problems = {}, []
    for process in running:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr[-3000:]
        counts |= json.loads(stdout)["counts"]
        problems += json.loads(stdout)["problems"]
    assert not problems, "\n".join(problems)
    return counts


def report(counts):
    lines = []
    for kind, found in counts.items():
        ends = collections.Counter()
        for what, n in found.items():
            ends[what.rpartition(": ")[2]] += n
        lines.append(f"{kind:22} {sum(found.values()):5}  " + ", ".join(f"{n} {end}" for end, n in ends.most_common()))
    return "\n".join(lines)


@pytest.mark.slow
def test_thousands_of_mutants(sources):
    """There are at least 2000 mutants, and each kind has refused ones and ones that do not affect the tensors."""
    counts = run(sources, 200)
    print(report(counts))
    assert sum(sum(found.values()) for found in counts.values()) >= 2000
    for kind, found in counts.items():
        assert sum(n for what, n in found.items() if what.endswith(": refused")) >= 60, (kind, found)
        assert any(n for what, n in found.items() if not what.endswith(": refused")), (kind, found)
