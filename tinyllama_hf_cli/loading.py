"""Options and loading, shared by the commands that load a model.

Importing torch and transformers takes seconds. Each command first checks what it can without them, then calls
[`import_libraries`], and imports the rest.
"""

import sys
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tinyllama_hf.decoding.proposals import Proposer

MODEL = Annotated[str, typer.Argument(help="Model folder, released name or Hub id.")]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTYPE = Annotated[str, typer.Option(help="Dtype of the weights: auto (as saved), fp32 or bf16.")]
QUANTIZATION = Annotated[
    str,
    typer.Option(
        help="none, int8 or nf4 (4 bit); on an NVIDIA GPU int4 or fp8. A folder that was saved quantized stays so."
    ),
]
ADAPTER = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of a PEFT adapter to load on top, with its tokenizer and chat template."),
]
COMPILE = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="On a GPU: compile the layers, for long-running use. Each new shape of a batch takes tens of seconds.",
    ),
]
VERBOSE = Annotated[
    bool, typer.Option("--verbose", help="Print how generation runs: CUDA graphs and their memory, or why without.")
]


def check_model_options(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    draft: str | None = None,
    adapter: str | None = None,
    compiled: bool = False,
) -> None:
    """Checks the options of [`load_model`] as far as that needs neither torch nor a download."""
    from tinyllama_hf.devices import check_device, check_dtype
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.inference.options import check_draft
    from tinyllama_hf.quantization.names import check_quantization_name
    from tinyllama_hf.released import check_model, find_model

    check_dtype(dtype)
    check_device(device)
    if compiled and device == "cpu":
        raise InputError("--compile: compiles the steps of generation on a GPU, and --device is cpu. Leave it out")
    check_quantization_name(quantization, device)
    check_model(model)
    if draft is not None:
        check_draft(draft, model)
    if adapter is not None:
        find_model(adapter)


def import_libraries() -> None:
    """Imports torch and transformers, and shows that this takes a moment."""
    from tinyllama_hf.progress import quiet_torchao, show_busy

    quiet_torchao()
    with show_busy("Loading torch and transformers"):
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401


def show_log() -> None:
    """Prints what the package logs to standard error."""
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinyllama_hf").setLevel(logging.INFO)


def load_model(
    model: str,
    dtype: str,
    device: str,
    quantization: str,
    draft: str | None,
    adapter: str | None,
    compiled: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast", "Proposer | None"]:
    """Returns model, tokenizer, and draft or `None`; prints the memory of a quantized model to standard error."""
    from tinyllama_hf.decoding.proposals import ModelProposer
    from tinyllama_hf.devices import find_dtype
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.inference.load import choose_device, load, load_draft
    from tinyllama_hf.inference.packed_weights import pack_weights
    from tinyllama_hf.progress import progress_bar, quiet_library_bars
    from tinyllama_hf.quantization.quantized_model import QuantizedTinyLlama, describe_footprint

    if compiled and choose_device(device) == "cpu":
        raise InputError("--compile: compiles the steps of generation on a GPU, and there is none. Leave it out")
    chosen = find_dtype(dtype) or "auto"
    quiet_library_bars()
    with progress_bar(f"loading {model}"):  # on a terminal transformers has a bar
        loaded, tokenizer = load(model, chosen, device, quantization, adapter=adapter)
    if isinstance(loaded, QuantizedTinyLlama):
        note(describe_footprint(loaded))
    helper = load_draft(draft, loaded, tokenizer, chosen, device) if draft else None
    pack_weights(loaded)
    if isinstance(helper, ModelProposer):
        pack_weights(helper.model)
    if compiled:
        from tinyllama_hf.decoding.llama_step import compile_for_generation

        compile_for_generation(loaded)
    return loaded, tokenizer, helper


def note(line: str) -> None:
    """Prints a line to standard error, where measurements and remarks go."""
    print(line, file=sys.stderr, flush=True)
