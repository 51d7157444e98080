"""Bits per byte of models, or of the milestones of a run, on held-out documents. The same as `tinyllama-hf eval text`.

python eval/bits_per_byte.py RUN_OR_MODEL... [--data FOLDER] [--baselines] [--max-bytes all] [--output scores.json]
"""

import sys

from tinyllama_hf_cli import main


if __name__ == "__main__":
    sys.argv[1:1] = ["eval", "text"]
    main()
