"""Converts a checkpoint between formats. The output appears complete or not at all."""

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from .. import provenance
from ..devices import find_dtype
from ..errors import InputError
from ..files import new_folder, read_json, write_json
from ..progress import progress_bar
from ..released import local_folder
from ..text import read_text
from ..tokenization_tinyllama import TinyLlamaTokenizer, declared_padding
from .arguments import (
    CALIBRATED,
    DTYPES,
    HAND_OFF,
    LORA,
    MAX_SHARD_SIZE,
    NUMBER_BYTES,
    check_arguments,
    check_destination,
)
from .checkpoint import EMBEDDING, OUTPUT, Checkpoint
from .formats.llama_write import write_generation_config, write_llama
from .reading.recognize import open_checkpoint, read_llama_config
from .resize import resize_vocabulary


LLAMA_QUANTIZE = "llama-quantize"
# Fields of a generation configuration that GGUF keeps or that only matter to calls of transformers.
_NOT_LOST = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
}  # fmt: skip


class Conversion(NamedTuple):
    """The result of [`convert`]: output folder, format, layout of the source, and notes for the user.

    `next_lines` explain how another program makes the requested format from `format`; empty if nothing remains to do.
    """

    output: Path
    format: str
    layout: str
    notes: tuple[str, ...]
    next_lines: tuple[str, ...] = ()


def convert(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    vocab_rows: int | None = None,
    config: str | Path | None = None,
    calibration: Sequence[str | Path] = (),
    base: str | Path | None = None,
    check: Callable[[Checkpoint], None] | None = None,
    force: bool = False,
    progress: bool = False,
) -> Conversion:
    """Converts a checkpoint to another format.

    Memory use stays near the size of two tensors, or of one layer and its activations for `w4a16` and `awq`.

    Args:
        source (`str` or `Path`): a file or folder in any supported layout, a released name, or a Hub id; for
            `gguf-lora`, the folder of a LoRA adapter of PEFT.
        to (`str`): one of `FORMATS`, `gguf-lora`, or one of `HAND_OFF`, for which the input of its program is written.
            K-quants are made if llama.cpp's program `llama-quantize` is on the `PATH`.
        output (`str` or `Path`): the folder to write, for `gguf-lora` the file. It is created only when the conversion
            is complete.
        dtype (`str`, *optional*, defaults to `"auto"`): `"fp32"`, `"fp16"` or `"bf16"`; `"auto"` keeps the dtype of
            each tensor. Only for `llama` and `litgpt`.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): largest file of `llama`, `w4a16` and `awq`.
        vocab_rows (`int`, *optional*): number of embedding rows to write, see [`resize_vocabulary`].
        config (`str` or `Path`, *optional*): a configuration to use instead of the source's.
        calibration (`Sequence`, *optional*): text files to search the scales of `w4a16` and `awq`; without them
            weights are only rounded.
        base (`str` or `Path`, *optional*): the base model of an adapter, of which only the configuration is read; by
            default the one that the adapter names. Only for `gguf-lora`.
        check (`Callable`, *optional*): called with the checkpoint before anything is written; may raise.
        force (`bool`, *optional*, defaults to `False`): replace the output of an earlier conversion.
        progress (`bool`, *optional*, defaults to `False`): show the progress.

    Raises:
        InputError: if the arguments or the source cannot be used. Nothing is written then.
    """
    output = Path(output).absolute() if Path(output).name in ("", "..") else Path(output)
    torch_dtype = find_dtype(dtype, DTYPES)
    of_models = {"--vocab-rows": vocab_rows, "--config": config, "--sanity": check}
    check_arguments(to, dtype, max_shard_size, calibration, base, of_models)
    shard_size = _shard_bytes(max_shard_size)
    check_destination(to, output, source, force)
    if to == LORA:
        return _convert_adapter(source, output, base)
    asked, to = to, HAND_OFF.get(to, to)
    program = shutil.which(LLAMA_QUANTIZE) if to == "gguf-f16" and asked != to else None
    checkpoint = open_checkpoint(source, config)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory(prefix="tinyllama-hf-") as scratch:
        if vocab_rows is not None:
            resize_vocabulary(checkpoint, vocab_rows, Path(scratch))
        _check_tokenizer(checkpoint)
        _check_space(checkpoint, asked if program else to, torch_dtype, output)
        if check is not None:
            check(checkpoint)
        with (
            new_folder(output, overwrite=force) as folder,
            progress_bar("converting", "bytes", checkpoint.num_bytes, progress, columns) as update,
        ):
            checkpoint.advance = lambda num_bytes: update(advance=num_bytes)
            notes, digests = _write_weights(checkpoint, to, folder, torch_dtype, shard_size, calibration, output.name)
            if program:
                update(description=LLAMA_QUANTIZE)
                _make_k_quant(program, folder, asked)
                to = asked
            if not to.startswith("gguf-"):  # a GGUF file contains the tokenizer
                notes += _write_tokenizer_files(checkpoint, to, folder)
            weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".pth"))
            settings = {"source": str(source), "to": to, "dtype": dtype, "vocab_rows": vocab_rows}
            record = provenance.collect(
                conversion={"layout": checkpoint.layout, **settings},
                sha256={path.name: digests.get(path.name) or provenance.file_sha256(path) for path in weights},
                **({"converted_from": checkpoint.provenance} if checkpoint.provenance else {}),
            )
            write_json(folder / "provenance.json", record)
    next_lines = _next_commands(asked, output) if asked != to else ()
    return Conversion(output, to, checkpoint.layout, (*checkpoint.notes, *notes), next_lines)


def _convert_adapter(source: str | Path, output: Path, base: str | Path | None) -> Conversion:
    from .formats.gguf_lora import ADAPTER_FILES, open_lora, write_lora

    adapter = open_lora(local_folder(str(source), ADAPTER_FILES))
    name = base or adapter.trained_on
    if name is None:
        raise InputError(f"adapter {source}: names no base model. Give the model that it was trained on with --base")
    try:
        path = local_folder(str(name), ("config.json",))
        file = path / "config.json"
        config = read_llama_config(file)[0] if file.is_file() else open_checkpoint(path).config
    except InputError as error:
        raise InputError(f"adapter {source}: its base {name} cannot be read ({error}). Give it with --base") from error
    write_lora(adapter, config, output)
    notes = [f"use it on a GGUF file of its base, {name}: llama-server -m BASE.gguf --lora {shlex.quote(str(output))}"]
    if (adapter.folder / "chat_template.jinja").is_file():
        notes.append("the adapter's chat template is not in the file: add --chat-template-file chat_template.jinja")
    return Conversion(output, LORA, f"LoRA adapter, {len(adapter.matrices)} matrices", tuple(notes))


def _write_weights(
    checkpoint: Checkpoint,
    to: str,
    folder: Path,
    dtype: torch.dtype | None,
    shard_size: int,
    calibration: Sequence[str | Path],
    name: str,
) -> tuple[list[str], dict[str, str]]:
    """Writes weights and model configuration. Writers are imported when needed, since some require extras.

    Returns:
        Notes for the user, and the SHA-256 of the files that were hashed while they were written, by name.
    """
    if to.startswith("gguf-"):
        from .formats.gguf_write import write_gguf

        fields = checkpoint.generation or {}
        lost = sorted(name for name, value in fields.items() if name not in _NOT_LOST or isinstance(value, list))
        notes = [f"GGUF cannot store these fields of the generation configuration: {', '.join(lost)}"] if lost else []
        return [*notes, *write_gguf(checkpoint, folder, to.removeprefix("gguf-"), name)], {}
    if to == "litgpt":
        from .formats.lit_gpt import write_litgpt

        return write_litgpt(checkpoint, folder, dtype, name), {}
    if to in CALIBRATED:
        if to == "awq":
            from .awq.write import write_awq as write
        else:
            from .quantized.w4a16 import write_w4a16 as write
        texts = [read_text(Path(path)) for path in calibration]
        note, digests = write(checkpoint, folder, texts or None, shard_size)
        return [note], digests
    return [], write_llama(checkpoint, folder, dtype, shard_size)


def _write_tokenizer_files(checkpoint: Checkpoint, to: str, folder: Path) -> list[str]:
    """Writes generation configuration and tokenizer; returns notes for the user."""
    tokenizer = checkpoint.load_tokenizer()
    # Without a tokenizer, padding is <unk> as in the rest of the package.
    write_generation_config(checkpoint, folder, 0 if tokenizer is None else tokenizer.pad_token_id)
    if tokenizer is None:
        return ["the source has no tokenizer, so none was written; add one to the folder"]
    tokenizer.save_pretrained(folder)
    if to == "litgpt":  # without `add_bos_token`, it removes the begin-of-sequence token
        file = folder / "tokenizer_config.json"
        add_bos_token = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        write_json(file, read_json(file) | {"add_bos_token": add_bos_token})
    if not (folder / "tokenizer.model").is_file() and isinstance(tokenizer, TinyLlamaTokenizer):
        return ["the source has no tokenizer.model, so only tokenizer.json was written"]
    return []


def _shard_bytes(max_shard_size: str) -> int:
    try:
        shard_size = convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        rule = "not a size. Use KB, MB, GB or TB, such as 2GB"
        raise InputError(f"--max-shard-size {max_shard_size!r}: {rule}") from error
    if shard_size < 1:
        raise InputError(f"--max-shard-size {max_shard_size!r}: must be above 0")
    return shard_size


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuses a tokenizer with ids that have no embedding row: readers of the output would crash on such a token."""
    path, tokenizer, rows = checkpoint.tokenizer, checkpoint.load_tokenizer(), checkpoint.config.vocab_size
    if path is None or tokenizer is None:
        return
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        found = f"ids up to {last:,}, but the model has {rows:,} embedding rows"
        fix = f"Use the model's own tokenizer, or pass --vocab-rows {last + 1}"
        raise InputError(f"{path}: {found}. {fix}")
    config = path / "tokenizer_config.json"
    declared = declared_padding(read_json(config)) if config.is_file() else None
    if declared not in (None, tokenizer.pad_token):
        reason = "it begins or ends text, or has no id"
        checkpoint.notes.append(f"padding token {declared!r} replaced by {tokenizer.pad_token!r}: {reason}")


def _check_space(checkpoint: Checkpoint, to: str, dtype: torch.dtype | None, output: Path) -> None:
    needed = 0.0
    for name, tensor in checkpoint.tensors.items():
        is_head = name == (OUTPUT if OUTPUT in checkpoint.tensors else EMBEDDING)
        format_ = "gguf-q8_0" if to == "gguf-q4_0" and is_head else to
        bytes_per_number = NUMBER_BYTES.get(format_) or (dtype or tensor.dtype).itemsize
        if to in HAND_OFF:  # the f16 file, and the K-quant of at most 8 bit
            bytes_per_number = NUMBER_BYTES["gguf-f16"] + NUMBER_BYTES["gguf-q8_0"]
        needed += tensor.num_bytes / tensor.dtype.itemsize * bytes_per_number
    parent = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        sizes = f"needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        raise InputError(f"--output {output}: {sizes}. Free some space, or choose another disk")


def _next_commands(to: str, output: Path) -> tuple[str, ...]:
    """Returns the commands that make a format of [`HAND_OFF`] from what was written to `output`, with explanations.

    Both were tested, see benchmarks/README.md, "Formats that other programs make".
    """
    if to == "gptq":
        model = output / "tokenizer.model"  # llm-compressor does not copy it
        recipe = 'GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])'
        data = 'load_dataset("json", data_files="calibration.jsonl", split="train")'
        return (
            "llm-compressor makes GPTQ from the plain Llama folder just written and a calibration.jsonl, with a",
            '"text" in each row. In a separate environment (pip install llmcompressor==0.14.0.1) run:',
            "python -c 'from datasets import load_dataset; from llmcompressor import oneshot; "
            "from llmcompressor.modifiers.gptq import GPTQModifier; "
            f'oneshot(model="{output}", dataset={data}, recipe={recipe}, max_seq_length=512, '
            f'num_calibration_samples=128, output_dir="{output}-gptq")\'',
            *([f"cp {shlex.quote(str(model))} {shlex.quote(f'{output}-gptq/')}"] if model.is_file() else []),
        )
    return (shlex.join([LLAMA_QUANTIZE, *_quantize_arguments(output, to)]),)


def _quantize_arguments(folder: Path, to: str) -> list[str]:
    """Returns the arguments of llama.cpp's program for an f16 file: input, output and format."""
    kind = to.removeprefix("gguf-")
    return [*(str(folder / f"model-{name}.gguf") for name in ("f16", kind)), kind.upper()]


def _make_k_quant(program: str, folder: Path, to: str) -> None:
    """Replaces the f16 file in a folder by the K-quant that llama.cpp's program makes from it.

    Raises:
        InputError: if the program fails.
    """
    arguments = _quantize_arguments(folder, to)
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode or not Path(arguments[1]).is_file():
        said = done.stdout.decode(errors="replace").strip().splitlines()[-5:]
        raise InputError(
            f"--to {to}: {program} ended with status {done.returncode}. Use another version of llama.cpp, or --to "
            f"gguf-f16. Its last lines:\n" + "\n".join(f"  {line}" for line in said)
        )
    Path(arguments[0]).unlink()
