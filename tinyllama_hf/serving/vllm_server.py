"""Starts vLLM instead of this package's server, for more clients than one process can serve."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from ..chat.templates import template_file
from ..errors import InputError
from ..inference.options import Sampling
from ..released import find_model, read_llama_fields


def start_vllm(
    model: str, name: str, host: str, port: int, template: str | None, dtype: str, rows: int, api_key: str | None
) -> None:
    """Replaces this process with vLLM's server on the same folder, with this package's template, context and sampling.

    Raises:
        InputError: if vLLM is not installed, or the folder is not a Llama.
    """
    place = find_model(model)
    if importlib.util.find_spec("vllm"):  # not its command, which expects a package with another name on a CPU
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place)]
    elif program := shutil.which("vllm"):  # in another environment
        command = [program, "serve", str(place)]
    else:
        raise InputError("--engine vllm: vLLM is not installed. Install it (pip install vllm), or leave --engine out")
    sampling = {"temperature": Sampling().temperature, "top_p": Sampling().top_p, "top_k": 0}
    command += ["--served-model-name", name, "--host", host, "--port", str(port)]
    command += ["--max-num-seqs", str(rows), "--override-generation-config", json.dumps(sampling)]
    if isinstance(place, Path):
        command += ["--max-model-len", str(read_llama_fields(place)["max_position_embeddings"])]
    if template is not None:
        command += ["--chat-template", str(template_file(template))]
    if dtype != "auto":
        command += ["--dtype", {"fp32": "float32", "bf16": "bfloat16"}[dtype]]
    if api_key is not None:
        os.environ["VLLM_API_KEY"] = api_key  # not on the command line, which other users of the machine can read
    sys.stdout.flush()
    os.execv(command[0], command)
