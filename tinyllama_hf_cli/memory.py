"""`tinyllama-hf memory`."""

from typing import Annotated

import typer

from .loading import QUANTIZATION, import_libraries


def memory_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder, released name, Hub id, or a size: 1.1b, 120m, nano, micro. No weights are read."
        ),
    ],
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence, prompt and continuation; default: the model's context.")
    ] = None,
    quantization: QUANTIZATION = "none",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (from config.json; bf16 without a folder), fp32 or bf16.")
    ] = "auto",
    cache: Annotated[str, typer.Option(hidden=True, help="Removed; ends in a message.")] = "dynamic",
    device: Annotated[
        str | None,
        typer.Option(
            help="Device to fit: a100-40g, 4090, ..., or a size such as 16GB; default: the free memory here."
        ),
    ] = None,
) -> None:
    """Compute the memory of generation: weights, cache, and the largest batch that fits. Loads no weights.

    Exits with status 2 if the batch does not fit.

    Example: tinyllama-hf memory step-1431k-3T --batch 100 --context 2048 --quantization nf4 --device 4090
    """
    from tinyllama_hf.devices import check_dtype, find_dtype
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.presets import PRESETS
    from tinyllama_hf.quantization.names import GPU_CAPABILITIES, check_quantization_name
    from tinyllama_hf.released import check_model

    if cache != "dynamic":
        raise InputError(
            f"--cache {cache!r}: quantized caches were removed, since no command generates with one; omit it"
        )
    check_dtype(dtype)
    check_quantization_name(quantization)
    if model not in PRESETS:
        try:
            check_model(model)
        except InputError as error:
            raise InputError(f"{error}; or use a size: {', '.join(PRESETS)}") from error
    import_libraries()
    from tinyllama_hf.planning.inference_memory import Setup, batch_memory, check_batch, fit_lines, memory_lines
    from tinyllama_hf.planning.named_architecture import find_architecture
    from tinyllama_hf.quantization.quantized_model import choose_quantization
    from tinyllama_hf.quantization.torchao import check_layers

    found = find_architecture(model)
    kind = choose_quantization(quantization, found.quantization, model)
    source = found.source if found.quantization == "none" else f"{found.source}, saved as {found.quantization}"
    weights_dtype = find_dtype(dtype) or found.dtype
    if weights_dtype is None:
        raise InputError("--dtype auto: the model's config.json has no dtype; use fp32 or bf16")
    if kind in GPU_CAPABILITIES:
        check_layers(kind, found.config, weights_dtype)
    available, where, has_graphs = _available(device)
    setup = Setup(found.config, weights_dtype, kind, has_graphs)
    needed = batch_memory(setup, batch, found.config.max_position_embeddings if context is None else context)
    print("\n".join([*memory_lines(f"{model} ({source})", needed), *fit_lines(needed, available, where)]), flush=True)
    check_batch(needed, available)


def _available(device: str | None) -> tuple[int, str, bool]:
    """Returns the bytes of a device, its name, and whether it is an NVIDIA GPU; a size may be that of any device."""
    import re

    import torch
    from accelerate.utils import convert_file_size_to_int

    from tinyllama_hf.devices import find_device
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.inference.load import choose_device
    from tinyllama_hf.planning.inference_memory import free_memory

    if device is None:
        here = torch.device(choose_device("auto"))
        return free_memory(here), f"{here} of this machine, free memory", here.type == "cuda"
    if re.fullmatch(r"\d+(\.\d+)?[KMG]I?B", device.upper()):
        return convert_file_size_to_int(device.upper()), device, False  # a lowercase b would mean bits
    try:
        known = find_device(device)
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('?')}, or use a size such as 16GB") from error
    return known.memory, known.name, True
