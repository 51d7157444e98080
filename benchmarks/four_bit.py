"""Perplexity of 4-bit folders, each dequantized as its readers compute with it.

    tinyllama-hf convert SMOLLM2 --to w4a16 --output ours --calibration validation.txt
    python benchmarks/four_bit.py SMOLLM2 ours OTHERS... [--tokens 4096] [--data WIKITEXT2/test.jsonl.gz]

SMOLLM2 is the folder that `quality.py` makes. OTHERS are AWQ folders, and compressed-tensors folders of this package
or of llm-compressor (`peers/gptq_llmcompressor.py`). The protocol is that of `quality.py`: windows of 512 tokens, in
fp32.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from common import save
from quality import DATA, WINDOW, perplexity, texts

from tinyllama_hf import convert, load, load_tokenizer
from tinyllama_hf.tokenization_tinyllama import encode_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--data", type=Path, default=DATA / "test.jsonl.gz")
    arguments = parser.parse_args()

    text = "\n\n".join(texts(arguments.data))
    ids = torch.tensor(encode_text(load_tokenizer(arguments.folders[0]), text)[: arguments.tokens])
    rows = {}
    for folder in arguments.folders:
        with tempfile.TemporaryDirectory() as scratch:
            done = convert(folder, "llama", Path(scratch) / "plain", dtype="fp32")
            model, _ = load(Path(scratch) / "plain", device="cpu")
            weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            rows[folder.name] = {
                "layout": done.layout,
                "megabytes": round(weights / 1e6, 1),
                "perplexity": round(perplexity(model, ids), 4),
            }
        print(folder.name, rows[folder.name], flush=True)
    figures = {"tokens": arguments.tokens, "window": WINDOW, "folders": rows}
    print(f"wrote {os.path.relpath(save('four_bit', figures))}")


if __name__ == "__main__":
    main()
