"""K-quants by llama.cpp: made where its program is on the `PATH`; else the f16 file, the command, and exit status 2.

The program itself is in no package that runs here. Its work is done by the function of llama.cpp's library that it
calls, from an npm package; a script with the program's name and arguments calls it. What this does not test is the
program's own reading of its command line, which was run once, see benchmarks/README.md.
"""

import collections
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.conftest import run_here
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer


GGUFReader = pytest.importorskip("gguf").GGUFReader

LIBRARY = "@node-llama-cpp/linux-x64@3.22.1"
SCRIPT = """
import ctypes, sys
from gguf import LlamaFileType

class Parameters(ctypes.Structure):  # the first fields of llama_model_quantize_params, and room for the others
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("others", ctypes.c_byte * 1024)]

source, target, kind = sys.argv[1:]
library = ctypes.CDLL("libllama.v0.5.0.so")
library.llama_model_quantize_default_params.restype = Parameters
parameters = library.llama_model_quantize_default_params()
parameters.nthread, parameters.ftype = 1, LlamaFileType["MOSTLY_" + kind]
sys.exit(library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
"""


@pytest.fixture(scope="module")
def source(tokenizer_folder, tmp_path_factory):
    """A small model; 256 divides its rows, as K-quants need."""
    folder = tmp_path_factory.mktemp("source") / "model"
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512)).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_quantize(request, tmp_path_factory):
    """The folder of an executable script `llama-quantize`, which calls llama.cpp."""
    cache = request.config.cache.mkdir("llama-cpp-library")
    with FileLock(cache / "lock"):
        if not (cache / "package").is_dir():
            if not shutil.which("npm"):
                pytest.skip("needs npm to install llama.cpp's library")
            done = subprocess.run(["npm", "pack", LIBRARY], cwd=cache, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"the package index does not serve {LIBRARY}: {done.stderr.strip()[-200:]}")
            (archive,) = cache.glob("*.tgz")
            with tarfile.open(archive) as files:
                files.extractall(cache, filter="data")
    folder, libraries = tmp_path_factory.mktemp("bin"), cache / "package" / "bins" / "linux-x64"
    (folder / "call.py").write_text(SCRIPT)
    command = f'LD_LIBRARY_PATH="{libraries}" exec "{sys.executable}" "{folder / "call.py"}" "$@"'
    return executable(folder, f"#!/bin/sh\n{command}\n")


def executable(folder: Path, text: str) -> Path:
    (folder / "llama-quantize").write_text(text)
    (folder / "llama-quantize").chmod(0o755)
    return folder


@pytest.fixture
def to_k_quant(source, tmp_path):
    """Runs `convert --to gguf-q4_k_m`, with a folder as the only one on the `PATH`."""

    def run(programs: Path, *options):
        return run_here(
            "tinyllama-hf", "convert", source, "--to", "gguf-q4_k_m", "--output", "my out", *options,
            cwd=tmp_path, env={"PATH": str(programs)},
        )  # fmt: skip

    return run


def test_without_the_program_the_f16_file_and_the_command(to_k_quant, llama_quantize, tmp_path):
    (tmp_path / "empty").mkdir()
    done = to_k_quant(tmp_path / "empty")
    assert done.returncode == 2 and "wrote my out: gguf-f16" in done.stdout
    message, command = done.stderr.splitlines()
    assert message.startswith("error: --to gguf-q4_k_m: only gguf-f16 was written, since llama.cpp's program")
    assert sorted(path.name for path in (tmp_path / "my out").iterdir()) == ["model-f16.gguf", "provenance.json"]
    assert command.split()[0] == "llama-quantize"
    subprocess.run(
        shlex.split(command), cwd=tmp_path, check=True, capture_output=True, env={"PATH": str(llama_quantize)}
    )
    assert_is_k_quant(tmp_path / "my out" / "model-q4_k_m.gguf")


def assert_is_k_quant(file: Path) -> None:
    reader = GGUFReader(file)
    assert reader.fields["general.file_type"].parts[-1][0] == 15
    kinds = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
    assert kinds.keys() == {"Q4_K", "Q6_K", "F32"} and kinds["Q4_K"] > kinds["Q6_K"]


def test_with_the_program_the_file(to_k_quant, llama_quantize, source, tmp_path):
    done = to_k_quant(llama_quantize)
    assert done.returncode == 0 and "wrote my out: gguf-q4_k_m" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "my out").iterdir()) == ["model-q4_k_m.gguf", "provenance.json"]
    assert_is_k_quant(tmp_path / "my out" / "model-q4_k_m.gguf")


@pytest.mark.parametrize("text", ["#!/bin/sh\necho no room\nexit 3\n", "#!/bin/sh\necho no room\n"])
def test_a_program_that_fails_leaves_nothing(to_k_quant, tmp_path, text):
    (tmp_path / "bin").mkdir()
    done = to_k_quant(executable(tmp_path / "bin", text))
    assert done.returncode == 2 and "llama-quantize ended with status" in done.stderr and "  no room" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
