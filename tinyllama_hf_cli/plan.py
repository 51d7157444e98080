"""`tinyllama-hf plan`."""

from pathlib import Path
from typing import Annotated

import typer

from .loading import import_libraries


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of pretraining.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, replaces a value of the recipe.")
    ] = None,
    devices: Annotated[int, typer.Option(help="Number of devices, one process per device.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Kind of device: h200, h100, a100-40g, a100-80g, a40, l40s, a6000, 3090, 4090, 5090, ..."),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Expected MFU, the share of the device's peak rate; used to estimate the time. Default: 0.4."
        ),
    ] = None,
) -> None:
    """Estimate the steps, milestones, memory, time and disk space of a pretraining recipe. Needs no data and no GPU.

    Example: tinyllama-hf plan recipes/pretrain/tinyllama-1.1b.yaml --devices 16 --device a100-40g --mfu 0.56
    """
    from tinyllama_hf.devices import find_device
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.pretrain.config import load_pretrain_config

    if devices < 1:
        raise InputError(f"--devices {devices}: must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu}: must be above 0 and at most 1")
    if mfu is not None and device is None:
        raise InputError("--mfu: needs --device, since it is a share of the device's peak rate")
    kind = find_device(device) if device is not None else None
    config = load_pretrain_config(recipe, overrides or ())
    import_libraries()
    from tinyllama_hf.planning.run_plan import DEFAULT_MFU, plan_lines, plan_run

    vocab_size, source = _vocabulary(config.data.tokenizer)
    print("\n".join(plan_lines(plan_run(config, vocab_size, devices, kind, DEFAULT_MFU if mfu is None else mfu))))
    print(f"vocabulary  {source}")


def _vocabulary(tokenizer: str) -> tuple[int, str]:
    """The size of the vocabulary, and its source."""
    from tinyllama_hf.tokenization_tinyllama import load_tokenizer

    if Path(tokenizer).exists():
        return len(load_tokenizer(tokenizer)), f"of data.tokenizer {tokenizer}"
    return 32000, f"32,000, as in Llama 2: data.tokenizer {tokenizer} does not exist yet"
