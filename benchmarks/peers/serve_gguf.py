"""llama.cpp's server (wheel `xllamacpp`) as a peer of benchmarks/serving_load.py.

    pip install --target PEERS --no-deps xllamacpp==2026.10.11549
    PYTHONPATH=PEERS python serve_gguf.py MODEL.gguf --port 8001 [--rows 8] [--context 1024] [--threads 2]

It serves `/v1` until Ctrl-C or SIGTERM. The cache is in fp32 like that of the other servers. Prompts are not kept,
since every round of the benchmark sends the same ones.
"""

import argparse
import signal
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=8, help="requests at a time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each row")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = str(arguments.gguf), arguments.port
    parameters.n_parallel, parameters.n_ctx = arguments.rows, arguments.rows * arguments.context
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.use_jinja, parameters.cache_prompt, parameters.cache_ram_mib = True, False, 0
    parameters.model_alias, parameters.verbosity = {arguments.gguf.stem}, -1
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # also in the threads of the server
    server = xllamacpp.Server(parameters)  # it ends with this name
    print(f"serving {arguments.gguf.name} at {server.listening_address}/v1", flush=True)
    signal.sigwait(ends)


if __name__ == "__main__":
    main()
