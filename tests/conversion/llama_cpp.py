"""Runs llama.cpp on a GGUF file as a separate program, with a JSON request on standard input and the answer in a file.

It only needs the package xllamacpp. It uses one thread: more threads spin while they wait for each other, and on a
busy machine every token takes seconds.
"""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 512, 1, -1, False
    params.use_jinja = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if request["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["lora"], 1.0)]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)  # it ends with this name

    def post(path, **fields):
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.listening_address + path, json.dumps(fields).encode(), headers)
        with urllib.request.urlopen(call) as answer:
            return json.load(answer)

    ids = [post("/tokenize", content=t, add_special=False, parse_special=False)["tokens"] for t in request["texts"]]
    framed = post("/tokenize", content="a", add_special=True)["tokens"]
    greedy = {
        "n_predict": 64,
        **request["options"],
        "temperature": 0,
        "top_k": 1,
        "return_tokens": True,
        "cache_prompt": False,
    }
    continued = [post("/completion", prompt=prompt, **greedy)["tokens"] for prompt in request["prompts"]]
    rendered = [post("/apply-template", messages=messages)["prompt"] for messages in request["conversations"]]
    asked = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in rendered]
    # A file for the answer: the server's own threads write on standard output.
    with open(request["answer"], "w") as stream:
        json.dump({"ids": ids, "framed": framed, "continued": continued, "rendered": rendered, "asked": asked}, stream)


if __name__ == "__main__":
    main()
