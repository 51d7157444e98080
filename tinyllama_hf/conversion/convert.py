"""Converts a checkpoint of any known layout into another; whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .. import provenance
from ..devices import find_dtype
from ..errors import InputError, did_you_mean
from ..files import new_folder, read_json, write_json
from ..text import read_text
from ..tokenization_tinyllama import TinyLlamaTokenizer, declared_padding
from .checkpoint import EMBEDDING, OUTPUT, Checkpoint
from .formats.llama_write import write_generation_config, write_llama
from .reading.recognize import open_checkpoint
from .resize import resize_vocabulary


# Bytes of an output for a parameter, at most, for the look at the disk.
_BYTES = {"gguf-f32": 4, "gguf-f16": 2, "gguf-bf16": 2, "gguf-q8_0": 1.1, "gguf-q4_0": 0.6, "awq": 2}
FORMATS = ("llama", "litgpt", *_BYTES)
_K_QUANTS = ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
# Formats that other programs make, and the format that each program starts from.
HAND_OFF = {**{f"gguf-{kind}": "gguf-f16" for kind in _K_QUANTS}, "gptq": "llama"}
# Of a generation configuration: what GGUF keeps, and what concerns calls of transformers alone.
_NOT_LOST = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache",
             "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}  # fmt: skip
MAX_SHARD_SIZE = "5GB"
DTYPES = ("fp32", "fp16", "bf16")


class Conversion(NamedTuple):
    """What was written: the folder and its format, the layout it came from, and lines that a user should read.

    `next_lines` are the commands of the program that makes the format that was asked for out of the one that was written.
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
    check: Callable[[Checkpoint], None] | None = None,
    force: bool = False,
    progress: bool = False,
) -> Conversion:
    """Converts a checkpoint; memory stays near two of its tensors, or near a layer and its activations for `awq`.

    Args:
        source (`str` or `Path`): a file or folder of any known layout, a released name, or a Hub id.
        to (`str`): one of `FORMATS`; or of `HAND_OFF`, for which what its program starts from is written.
        output (`str` or `Path`): a folder, which gets its name when everything lies in it.
        dtype (`str`, *optional*, defaults to `"auto"`): `"fp32"`, `"fp16"`, `"bf16"`, or that of each tensor; of `llama` and
            `litgpt` only.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): of `llama` and `awq`.
        vocab_rows (`int`, *optional*): write so many embedding rows, see [`resize_vocabulary`].
        config (`str` or `Path`, *optional*): where the source brings no configuration, or a wrong one.
        calibration (`Sequence`, *optional*): text files for the scales of `awq`; without them weights are rounded.
        check (`Callable`, *optional*): is given the checkpoint before anything is written, and may raise.
        force (`bool`, *optional*, defaults to `False`): replace an output that an earlier conversion wrote.
        progress (`bool`, *optional*, defaults to `False`): show a bar of the bytes read.

    Raises:
        InputError: for anything that can be known before, and for damage found on the way; then nothing is written.
    """
    output = Path(output).absolute() if Path(output).name in ("", "..") else Path(output)
    _check_arguments(to, dtype, max_shard_size, calibration)
    shard_size = _parse_size(max_shard_size)
    _check_output(output, source, force)
    asked, to = to, HAND_OFF.get(to, to)
    checkpoint = open_checkpoint(source, config)
    with tempfile.TemporaryDirectory(prefix="tinyllama-hf-") as scratch:
        if vocab_rows is not None:
            resize_vocabulary(checkpoint, vocab_rows, Path(scratch))
        _check_tokenizer(checkpoint)
        _check_space(checkpoint, to, dtype, output)
        if check is not None:
            check(checkpoint)
        with new_folder(output, overwrite=force) as folder, _bar(checkpoint, progress):
            notes, digests = _write_weights(
                checkpoint, to, folder, find_dtype(dtype, DTYPES), shard_size, calibration, output.name
            )
            if not to.startswith("gguf-"):  # one file holds everything
                notes += _write_surroundings(checkpoint, to, folder)
            settings = {"source": str(source), "to": to, "dtype": dtype, "vocab_rows": vocab_rows}
            _write_provenance(checkpoint, folder, settings, digests)
    next_lines = _next_commands(asked, output) if asked in HAND_OFF else ()
    return Conversion(output, to, checkpoint.layout, (*checkpoint.notes, *notes), tuple(next_lines))


def _write_weights(
    checkpoint: Checkpoint,
    to: str,
    folder: Path,
    dtype: torch.dtype | None,
    shard_size: int,
    calibration: Sequence[str | Path],
    name: str,
) -> tuple[list[str], dict[str, str]]:
    """Writes the weights and their configuration; each writer is imported when it is wanted, since some need extras.

    Returns:
        Lines for the user, and the SHA-256 by name of the files that were hashed while they were written.
    """
    if to.startswith("gguf-"):
        from .formats.gguf_write import write_gguf

        fields = checkpoint.generation or {}
        lost = sorted(name for name, value in fields.items() if name not in _NOT_LOST or isinstance(value, list))
        notes = [f"GGUF has no place for these of the generation configuration: {', '.join(lost)}"] if lost else []
        return [*notes, *write_gguf(checkpoint, folder, to.removeprefix("gguf-"), name)], {}
    if to == "litgpt":
        from .formats.lit_gpt import write_litgpt

        return write_litgpt(checkpoint, folder, dtype, name), {}
    if to == "awq":
        from .awq.write import write_awq

        texts = [read_text(Path(path)) for path in calibration]
        note, digests = write_awq(checkpoint, folder, texts or None, shard_size)
        return [note], digests
    return [], write_llama(checkpoint, folder, dtype, shard_size)


def _write_surroundings(checkpoint: Checkpoint, to: str, folder: Path) -> list[str]:
    """Writes generation configuration and tokenizer; returns lines for the user."""
    tokenizer = checkpoint.load_tokenizer()
    # Without a tokenizer padding is <unk>, as everywhere in this package.
    write_generation_config(checkpoint, folder, 0 if tokenizer is None else tokenizer.pad_token_id)
    if tokenizer is None:
        return ["the source brings no tokenizer, so none is written; put one beside it"]
    tokenizer.save_pretrained(folder)
    if to == "litgpt":
        from .formats.lit_gpt import complete_tokenizer_config

        complete_tokenizer_config(tokenizer, folder)
    if not (folder / "tokenizer.model").is_file() and isinstance(tokenizer, TinyLlamaTokenizer):
        return ["the source brings no tokenizer.model, so only tokenizer.json is written"]
    return []


def _write_provenance(checkpoint: Checkpoint, folder: Path, settings: dict[str, Any], digests: dict[str, str]) -> None:
    """Where the folder comes from, with a hash of every file of weights; the source's own record goes along."""
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".pth")]
    record = provenance.collect(
        conversion={"layout": checkpoint.layout, **settings},
        sha256={path.name: digests.get(path.name) or provenance.file_sha256(path) for path in sorted(weights)},
        **({"converted_from": checkpoint.provenance} if checkpoint.provenance else {}),
    )
    write_json(folder / "provenance.json", record)


def _check_arguments(to: str, dtype: str, max_shard_size: str, calibration: Sequence) -> None:
    if to not in FORMATS and to not in HAND_OFF:
        raise InputError(f"--to {to!r}: no format{did_you_mean(to, (*FORMATS, *HAND_OFF))}")
    find_dtype(dtype, DTYPES)
    if dtype != "auto" and to not in ("llama", "litgpt"):
        raise InputError(f"--dtype {dtype}: {to} has the types of its name; the option is for llama and litgpt")
    if max_shard_size != MAX_SHARD_SIZE and (to == "litgpt" or to.startswith("gguf-")):
        raise InputError(f"--max-shard-size {max_shard_size}: {to} is one file; the option is for llama and awq")
    if calibration and to != "awq":
        raise InputError(f"--calibration: {to} needs none; the option is for awq")
    for path in calibration:
        if not Path(path).is_file():
            raise InputError(f"--calibration {path}: no such file")


def _parse_size(size: str) -> int:
    try:
        parsed = convert_file_size_to_int(size)
    except ValueError as error:
        raise InputError(
            f"--max-shard-size {size!r}: no size; give a number with KB, MB, GB or TB, as in 2GB"
        ) from error
    if parsed < 1:
        raise InputError(f"--max-shard-size {size!r}: must be above 0")
    return parsed


def _check_output(output: Path, source: str | Path, force: bool) -> None:
    """Refuses an output that holds something, unless it may be replaced and was written by a conversion."""
    if blocked := next((path for path in output.absolute().parents if path.exists() and not path.is_dir()), None):
        raise InputError(f"--output {output}: {blocked} is a file; choose another folder")
    given = Path(source)
    if given.exists() and output.exists():
        inside = [given.resolve(), *given.resolve().parents]
        if output.resolve() in inside:
            raise InputError(f"--output {output}: holds the source {source}; choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise InputError(f"--output {output}: exists; choose another folder, or pass --force to replace it")
    record = output / "provenance.json"
    written = read_json(record) if record.is_file() else None
    if not isinstance(written, dict) or "conversion" not in written:
        raise InputError(
            f"--output {output}: was not written by a conversion, so --force does not replace it; choose another folder, or "
            "remove it yourself"
        )


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """A token without an embedding row would end the program that reads it."""
    tokenizer, rows = checkpoint.load_tokenizer(), checkpoint.config.vocab_size
    if tokenizer is None:
        return
    number = len(tokenizer)
    if number > rows:
        raise InputError(
            f"{checkpoint.tokenizer}: the tokenizer has {number:,} tokens, but the model has rows for {rows:,}; it is of "
            f"another model, or pass --vocab-rows {number}"
        )
    config = checkpoint.tokenizer / "tokenizer_config.json"
    declared = declared_padding(read_json(config)) if config.is_file() else None
    if declared not in (None, tokenizer.pad_token):
        checkpoint.notes.append(
            f"padding token {declared!r}: begins or ends text, or has no id; {tokenizer.pad_token!r} is written"
        )


def _check_space(checkpoint: Checkpoint, to: str, dtype: str, output: Path) -> None:
    numbers = {name: tensor.num_bytes // tensor.dtype.itemsize for name, tensor in checkpoint.tensors.items()}
    kind = find_dtype(dtype, DTYPES)
    per_number = {name: _BYTES.get(to) or (kind or checkpoint.tensors[name].dtype).itemsize for name in numbers}
    if to == "gguf-q4_0":  # whose head is q8_0
        per_number[OUTPUT if OUTPUT in numbers else EMBEDDING] = _BYTES["gguf-q8_0"]
    needed = int(sum(numbers[name] * per_number[name] for name in numbers))
    parent = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"--output {output}: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, or choose another disk"
        )


@contextlib.contextmanager
def _bar(checkpoint: Checkpoint, show: bool) -> Iterator[None]:
    """A bar of the bytes that are read, on standard error."""
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting", total=checkpoint.num_bytes)
        checkpoint.advance = lambda num_bytes: bar.advance(task, num_bytes)
        yield


def _next_commands(to: str, output: Path) -> list[str]:
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
        "K-quants are made by llama.cpp, from the f16 file that was written; run:",
        f"llama-quantize {files} {kind}",
    ]
