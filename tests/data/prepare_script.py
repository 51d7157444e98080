"""Prepares data in a process, which a test kills."""

import sys

from tinyllama_hf.data.prepare import prepare


if __name__ == "__main__":
    source, tokenizer, output = sys.argv[1:]
    prepare([source], tokenizer, output, validation_fraction=0.1, workers=1, progress=False)
