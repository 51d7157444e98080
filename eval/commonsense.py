"""The seven commonsense tasks of TinyLlama's table, with lm-eval. The same as `tinyllama-hf eval tasks`.

python eval/commonsense.py RUN_OR_MODEL... [--data FOLDER] [--limit N] [--published NAME] [--quantization nf4]
    [--output FILE] [--samples FILE]
"""

import sys

from tinyllama_hf_cli import main


if __name__ == "__main__":
    sys.argv[1:1] = ["eval", "tasks"]
    main()
