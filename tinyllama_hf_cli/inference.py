"""`tinyllama-hf list`, `tinyllama-hf generate` and `tinyllama-hf chat`."""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .batch import generate_file
from .loading import (
    ADAPTER,
    COMPILE,
    DEVICE,
    DTYPE,
    MODEL,
    QUANTIZATION,
    VERBOSE,
    check_model_options,
    import_libraries,
    load_model,
    note,
    show_log,
)


if TYPE_CHECKING:
    from tinyllama_hf.inference.chat import ChatSession


def list_command() -> None:
    """List the released checkpoints; every command accepts these names in place of a model folder.

    pythia-1b is listed only as the baseline of the published table: it is not a Llama and cannot be loaded.

    Example: tinyllama-hf list
    """
    from rich.console import Console
    from rich.table import Table

    from tinyllama_hf.released import released

    table = Table("name", "tokens", "Hub id", "revision", "average", box=None, pad_edge=False)
    for model in released():
        average = "" if model.average is None else f"{model.average:.2f}"
        tokens = f"{model.tokens / 1e9:,.0f}B" if model.kind != "chat" else "chat"
        table.add_row(model.name, tokens, model.hub, model.revision, average)
    # Not wrapped unless the output is a terminal, so that it can be searched line by line.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    print("average: unweighted mean of the seven published commonsense scores, in percent")
    print(
        "There is also a checkpoint every 5k steps, with names like step-715k-token-1499B (steps x 2,097,152 tokens)"
    )


_TEMPERATURE = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
_TOP_P = Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this total probability.")]
_MAX_NEW_TOKENS = Annotated[int | None, typer.Option(help="Default: 256, or less if the context is nearly full.")]
_SEED = Annotated[int | None, typer.Option(help="Makes sampling repeatable; 0 to 2**64 - 1.")]
_DRAFT = Annotated[
    str | None,
    typer.Option(
        help="Speculative decoding: a smaller model with the same tokenizer, lookup (proposes from the text so far), "
        "or layers:N (the first N layers of the model)."
    ),
]
_INPUT = Annotated[
    Path | None,
    typer.Option(
        "--input",
        help='File of JSON lines in place of one prompt: {"prompt": "..."}, or {"messages": [...]} for a chat model; '
        "other fields are kept.",
    ),
]
_OUTPUT = Annotated[Path | None, typer.Option(help="With --input: file of JSON lines to write, in the same order.")]
_BATCH_SIZE = Annotated[int | None, typer.Option(help="With --input: number of prompts at a time; default: 8.")]
_ENGINE = Annotated[str | None, typer.Option(hidden=True, help="Removed; prints an error.")]


def generate_command(
    model: MODEL,
    prompt: Annotated[str, typer.Argument(help="Text to continue; without it, a new text is generated.")] = "",
    input_file: _INPUT = None,
    output: _OUTPUT = None,
    batch_size: _BATCH_SIZE = None,
    engine: _ENGINE = None,
    temperature: _TEMPERATURE = 0.8,
    top_p: _TOP_P = 0.95,
    max_new_tokens: _MAX_NEW_TOKENS = None,
    seed: _SEED = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantization: QUANTIZATION = "none",
    adapter: ADAPTER = None,
    draft: _DRAFT = None,
    compiled: COMPILE = False,
    verbose: VERBOSE = False,
) -> None:
    """Continue a prompt, streamed to standard output, or the prompts of a file. Measurements go to standard error.

    The prompt - is read from standard input, without its last line end.

    With --input, results are kept when the command is interrupted; run it again to resume. An invalid line gets an
    error in its row, and the exit status is 2 after the other lines are finished.

    Example: tinyllama-hf generate step-1431k-3T "The capital of France is" --temperature 0 --max-new-tokens 20
    """
    from tinyllama_hf.errors import InputError, check_seed
    from tinyllama_hf.inference.options import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens)
    if seed is not None:
        check_seed(seed)
    if engine is not None:
        raise InputError(
            f"--engine {engine}: this option was removed, and the only engine is the one that was called batch. "
            "Leave the option out"
        )
    if input_file is not None and prompt:
        raise InputError(f"PROMPT {prompt!r}: not valid with --input; write it into {input_file}")
    for option, value in (("--output", output), ("--batch-size", batch_size)):
        if input_file is None and value is not None:
            raise InputError(f"{option} {value}: only valid with --input; leave it out, or give a file of prompts")
    check_model_options(model, dtype, device, quantization, draft, adapter, compiled)
    if verbose or compiled:
        show_log()
    import_libraries()
    from tinyllama_hf.inference.generation import ExactTextStreamer, generate_text

    load = functools.partial(load_model, model, dtype, device, quantization, draft, adapter, compiled)
    if input_file is not None:
        weights = {"dtype": dtype, "quantization": quantization}
        generate_file(model, input_file, output, batch_size, sampling, seed, draft, adapter, weights, load)
        return
    if prompt == "-":
        prompt = _read_standard_input()
    loaded, tokenizer, helper = load()
    streamer = ExactTextStreamer(tokenizer)
    generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, streamer, helper)
    print(flush=True)
    if helper:
        note(str(helper.statistics))


def _read_standard_input() -> str:
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.text import ENCODING

    try:
        return sys.stdin.buffer.read().decode(ENCODING).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(f"PROMPT -: standard input is not UTF-8 ({error.reason} at byte {error.start})") from error


def chat_command(
    model: MODEL,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: _TEMPERATURE = 0.8,
    top_p: _TOP_P = 0.95,
    max_new_tokens: _MAX_NEW_TOKENS = None,
    seed: _SEED = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantization: QUANTIZATION = "none",
    adapter: ADAPTER = None,
    draft: _DRAFT = None,
    compiled: COMPILE = False,
    verbose: VERBOSE = False,
) -> None:
    """Chat with a model; each line is a message. Commands: /system TEXT, /reset, /help, /exit. Ctrl-C stops a reply.

    Lines can also come from a file or a pipe. Control tokens that are typed in a message stay text.

    Example: tinyllama-hf chat chat-v1.0 --system "Answer in one sentence." --quantization nf4
    """
    import contextlib

    from tinyllama_hf.errors import check_seed
    from tinyllama_hf.inference.options import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens)
    if seed is not None:
        check_seed(seed)
    check_model_options(model, dtype, device, quantization, draft, adapter, compiled)
    if verbose or compiled:
        show_log()
    import_libraries()
    from tinyllama_hf.inference.chat import ChatSession

    loaded, tokenizer, helper = load_model(model, dtype, device, quantization, draft, adapter, compiled)
    session = ChatSession(loaded, tokenizer, system, sampling, seed, helper, note=note)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives input() line editing
        note("Type a message. /help shows the commands, /exit quits.")
    while _turn(session):
        pass


def _turn(session: "ChatSession") -> bool:
    """Reads and handles one line; on a terminal, errors and Ctrl-C do not end the conversation."""
    from tinyllama_hf.errors import InputError

    is_terminal, line = sys.stdin.isatty(), None
    try:
        line = input("> " if is_terminal else "")
        return session.handle(line)
    except EOFError:
        if is_terminal:
            print(flush=True)
        return False
    except (InputError, KeyboardInterrupt) as error:
        if not is_terminal:
            raise
        if isinstance(error, InputError):
            note(f"error: {error}")
        else:
            print(flush=True)
            note("(/exit quits)" if line is None else "(stopped; this exchange is not kept)")
        return True
