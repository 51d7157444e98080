"""Formats that other programs make, from what is written here: our part is done, their commands are printed."""

from pathlib import Path
from shlex import quote


_K_QUANTS = ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
# The format that is asked for, and the one that its program starts from.
HAND_OFF = {**{f"gguf-{kind}": "gguf-f16" for kind in _K_QUANTS}, "gptq": "llama"}


def hand_off_lines(to: str, output: Path) -> list[str]:
    """What to run after [`HAND_OFF`]'s format was written into `output`.

    Both were run for real: see benchmarks/README.md, "Formats that other programs make".
    """
    sentencepiece = "tokenizer.model"
    has_model = (output / sentencepiece).is_file()  # llm-compressor leaves it behind
    if to == "gptq":
        recipe = 'GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])'
        data = 'load_dataset("json", data_files="calibration.jsonl", split="train")'
        return [
            "GPTQ is made by llm-compressor, from the plain Llama folder that was written, with calibration.jsonl, whose rows",
            'have a "text"; in an environment of its own (pip install llmcompressor==0.14.0.1) run:',
            "python -c 'from datasets import load_dataset; from llmcompressor import oneshot; "
            "from llmcompressor.modifiers.gptq import GPTQModifier; "
            f'oneshot(model="{output}", dataset={data}, recipe={recipe}, max_seq_length=512, '
            f'num_calibration_samples=128, output_dir="{output}-gptq")\'',
            *([f"cp {quote(f'{output}/{sentencepiece}')} {quote(f'{output}-gptq/')}"] if has_model else []),
        ]
    kind = to.removeprefix("gguf-").upper()
    files = " ".join(quote(f"{output}/model-{name}.gguf") for name in ("f16", kind.lower()))
    return [
        "K-quants are made by llama.cpp, from the f16 file that was written; run its program:",
        f"llama-quantize {files} {kind}",
    ]
