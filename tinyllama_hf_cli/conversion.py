"""`tinyllama-hf convert`, `tinyllama-hf merge` and `tinyllama-hf verify`."""

from pathlib import Path
from typing import Annotated

import typer

from .loading import DEVICE, MODEL, import_libraries


_SOURCE = Annotated[
    str, typer.Argument(help="File or folder in any supported layout, released name, Hub id, or user/repository/FILE.")
]
_CONFIG = Annotated[
    Path | None, typer.Option(help="config.json, model_config.yaml or lit_config.json for a source without one.")
]


def convert_command(
    source: _SOURCE,
    to: Annotated[
        str,
        typer.Option(
            help="llama, litgpt, gguf-f32, gguf-f16, gguf-bf16, gguf-q8_0, gguf-q4_0, w4a16 or awq. gguf-q4_k_m and "
            "other K-quants need llama-quantize of llama.cpp. gptq prints the command of the program that makes it. "
            "gguf-lora is for a LoRA adapter of PEFT."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write, for gguf-lora a file. It is created only when the conversion is complete."
        ),
    ],
    dtype: Annotated[str, typer.Option(help="auto (keep), fp32, bf16 or fp16; llama and litgpt only.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file: 500MB, 2GB, ...")] = "5GB",
    vocab_rows: Annotated[
        int | None, typer.Option(help="Embedding rows to write: 32000 trims 32003; more adds mean rows.")
    ] = None,
    config: _CONFIG = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text file for the scales of w4a16 and awq; repeatable.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="gguf-lora: the adapter's base model; default: the one that it names.")
    ] = None,
    sanity: Annotated[
        bool, typer.Option("--sanity", help="First check that the model predicts a bundled text better than chance.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier conversion.")] = False,
) -> None:
    """Convert a checkpoint to another format without running any code from it.

    Reads Hugging Face (safetensors, .bin), lit-gpt and litgpt (.pth), Meta (consolidated.*.pth), GGUF, llama2.c,
    AWQ and W4A16 (compressed-tensors). The layout is detected from the contents.

    Example: tinyllama-hf convert lit_model.pth --to llama --output my-model
    """
    import time

    from tinyllama_hf.conversion.arguments import DTYPES, check_arguments, check_destination
    from tinyllama_hf.devices import check_dtype
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.released import find_model

    check_dtype(dtype, DTYPES)
    find_model(source)
    of_models = {"--vocab-rows": vocab_rows, "--config": config, "--sanity": sanity}
    check_arguments(to, dtype, max_shard_size, calibration or (), base, of_models)
    check_destination(to, output, source, force)
    import_libraries()
    from tinyllama_hf.conversion.convert import convert
    from tinyllama_hf.conversion.verify import check_sanity
    from tinyllama_hf.progress import quiet_library_bars

    _end_on_signals()
    quiet_library_bars()
    losses: list[float] = []
    started = time.monotonic()
    check = (lambda checkpoint: losses.append(check_sanity(checkpoint))) if sanity else None
    done = convert(
        source,
        to,
        output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        vocab_rows=vocab_rows,
        config=config,
        calibration=calibration or (),
        base=base,
        check=check,
        force=force,
        progress=True,
    )
    print(f"read        {source}: {done.layout}")
    for note in done.notes:
        print(f"note        {note}")
    if losses:
        print(f"sanity      loss {losses[0]:.3f} nats per token on the bundled text")
    size = sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file())
    print(f"wrote {output}: {done.format}, {size / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
    if done.next_lines and to != "gptq":
        raise InputError(
            f"--to {to}: only {done.format} was written, since llama.cpp's program llama-quantize is not on the PATH. "
            f"Install llama.cpp and run:\n  {done.next_lines[0]}"
        )
    for line in done.next_lines:
        print(line)


def _end_on_signals() -> None:
    """Ends at SIGTERM and SIGHUP like at Ctrl-C, so that the unfinished output is removed."""
    import signal
    import sys

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def merge_command(
    base: MODEL,
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a PEFT adapter trained on this model.")],
    output: Annotated[Path, typer.Option(help="Folder to write. It is created only when the result is checked.")],
    dtype: Annotated[str, typer.Option(help="auto (the model's), fp32, bf16 or fp16.")] = "auto",
    device: DEVICE = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
) -> None:
    """Merge an adapter into its base model, with the adapter's tokenizer and chat template; write a Llama folder.

    The sum is computed in fp32 and rounded once. The merged model is loaded again and its logits are compared with
    those of the base with the adapter on top before the folder gets its name. An adapter that was trained on a model
    in 4 or 8 bit (QLoRA) is merged into the model that was quantized.

    Example: tinyllama-hf merge step-1431k-3T my-adapter --output my-merged
    """
    import time

    from tinyllama_hf.conversion.arguments import DTYPES
    from tinyllama_hf.devices import check_device, check_dtype
    from tinyllama_hf.inference.options import check_merge

    check_dtype(dtype, DTYPES)
    check_device(device)
    check_merge(base, adapter, output, overwrite)
    import_libraries()
    from tinyllama_hf.inference.merge import merge_adapter
    from tinyllama_hf.progress import quiet_library_bars

    _end_on_signals()
    quiet_library_bars()
    started = time.monotonic()
    merged = merge_adapter(base, adapter, output, dtype=dtype, device=device, overwrite=overwrite)
    print(f"adapter     {adapter}: trained on {merged.trained_on}, changes the logits by {merged.effect:.2g}")
    print(f"merged      the logits differ by {merged.difference:.2g} from the adapter on top of {base}")
    print("            (root mean squares in units of the standard deviation of the logits)")
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"wrote {output}: {merged.dtype}, {size / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")


def verify_command(
    a: _SOURCE,
    b: Annotated[str, typer.Argument(help="The checkpoint to compare with.")],
    text: Annotated[Path | None, typer.Option(help="Text file to compute on; its first 512 tokens are used.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest allowed difference of a logit.")] = 1e-5,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also report every tensor.")] = False,
    config: _CONFIG = None,
) -> None:
    """Compare the logits of two checkpoints in any formats on the same tokens; exit status 1 beyond the tolerance.

    Both are computed in fp32 by stock Llama; quantized GGUF tensors are dequantized. A difference of 0 means that the
    conversion was lossless.

    Example: tinyllama-hf verify lit_model.pth my-model
    """
    from tinyllama_hf.released import find_model

    find_model(a)
    find_model(b)
    import_libraries()
    from tinyllama_hf.conversion.verify import compare_tensors, verify
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    if tensors:
        for row in compare_tensors(a, b, config):
            verdict = "same bits" if row.is_same_bits else f"largest {row.largest:.3g}, mean {row.mean:.3g}"
            print(f"{row.name:<56} {verdict:<36} {row.what}")
    found = verify(a, b, text=text, tolerance=tolerance, config=config)
    print(f"{a}: {found.layouts[0]}\n{b}: {found.layouts[1]}")
    print(f"{found.num_tokens} tokens of {found.inputs}")
    for note in found.notes:
        print(f"note: {note}")
    agreement = f"same most likely token at {found.argmax_agreement:.2%} of the positions"
    print(f"logits: largest difference {found.largest:.3g}, mean {found.mean:.3g}, {agreement}")
    if not found.is_equal:
        print(f"different: beyond {tolerance:g} from position {found.first_position} on")
        raise typer.Exit(1)
    print("equal" if found.largest == 0 else f"equal within {tolerance:g}")
