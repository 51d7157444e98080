"""Formats that other programs make from what we write: the commands, printed instead of imitated."""

from pathlib import Path


_K_QUANTS = ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
HAND_OFF = (*(f"gguf-{kind}" for kind in _K_QUANTS), "gptq")


def hand_off(to: str, source: str, output: Path) -> str:
    """What to run for a format that this package leaves to its own program."""
    if to == "gptq":
        return f"""--to gptq: is made by llm-compressor, from a plain Llama folder. Run
  tinyllama-hf convert {source} --to llama --output {output}-llama
  python -c 'TODO'"""
    kind = to.removeprefix("gguf-").upper()
    return f"""--to {to}: K-quants are made by llama.cpp, from a GGUF file of full precision. Run
  tinyllama-hf convert {source} --to gguf-f16 --output {output}
  llama-quantize {output}/model-f16.gguf {output}/model-{kind}.gguf {kind}"""
