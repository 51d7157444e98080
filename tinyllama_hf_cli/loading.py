"""What the commands that load a model have in common."""

import sys
from typing import Annotated, Any

import typer


MODEL = Annotated[str, typer.Argument(help="Model folder, released name or Hub id.")]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTYPE = Annotated[str, typer.Option(help="Of the weights: auto (the file's), fp32 or bf16.")]
QUANTIZATION = Annotated[str, typer.Option(help="none, int8 or nf4 (4 bit). A folder saved quantised stays as it is.")]
ADAPTER = Annotated[
    str | None,
    typer.Option(help="PEFT adapter to put on top of the model, with its tokenizer and template: folder or Hub id."),
]


def load_model(
    model: str, dtype: str, device: str, quantization: str, draft: str | None, adapter: str | None
) -> tuple[Any, Any, Any]:
    """(model, tokenizer, draft or None), with the memory of a quantised model on standard error."""
    from tinyllama_hf.devices import find_dtype
    from tinyllama_hf.inference.drafts import load_draft
    from tinyllama_hf.inference.load import load
    from tinyllama_hf.progress import quiet_library_bars
    from tinyllama_hf.quantization.bitsandbytes import QuantizedTinyLlama, footprint_line

    chosen = find_dtype(dtype) or "auto"
    quiet_library_bars()
    loaded, tokenizer = load(model, chosen, device, quantization, adapter=adapter)
    if isinstance(loaded, QuantizedTinyLlama):
        note(footprint_line(loaded))
    return loaded, tokenizer, load_draft(draft, loaded, tokenizer, chosen, device) if draft else None


def note(line: str) -> None:
    """Prints a line to standard error, where measurements go."""
    print(line, file=sys.stderr, flush=True)
