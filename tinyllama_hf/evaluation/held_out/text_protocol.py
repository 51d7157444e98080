"""Checks that bits per byte in one score file are comparable: same text, same dtype, same windows."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ...quantization.names import arithmetic_dtype
from ..score_files import ScoredModel, TextRow, TextScoreFile, TextSource
from .held_out_text import held_out_source


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def check_text_dtype(dtype: str) -> None:
    """Checks the name of the dtype to score in.

    Raises:
        InputError: if it is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: unknown type; use {' or '.join(DTYPES)}")


def text_dtype(model: ScoredModel, dtype: str) -> str:
    """Returns torch's name of the dtype that a model is scored in."""
    return arithmetic_dtype(model.quantization, DTYPES[dtype])


def check_same_text(file: TextScoreFile, data: Sequence[str], max_bytes: int | None, path: Path | None) -> None:
    """Checks that the scores of a file are on the same documents. Reads no documents.

    Args:
        file (`TextScoreFile`): the scores.
        data (`Sequence[str]`): the data sets to score on.
        max_bytes (`int`, *optional*): size of the sample of each; `None` for everything.
        path (`Path`, *optional*): path of the score file, for the message.

    Raises:
        InputError: if they are on other data sets, or on another sample of these.
    """
    there, now = file.data, [held_out_source(folder, max_bytes) for folder in data]
    if [(source.path, source.fingerprint) for source in there] != [(s.path, s.fingerprint) for s in now]:
        lines = [
            f"  {name}: {', '.join(f'{source.path} ({source.fingerprint[:12]})' for source in sources)}"
            for name, sources in (("file", there), ("now", now))
        ]
        raise InputError(
            f"{path} has scores on other text. A file has scores on one text only: replace them with --rescore, or "
            "write to another file with --output\n" + "\n".join(lines)
        )
    for old, new in zip(there, now, strict=True):
        if old.max_bytes != new.max_bytes:
            before = max((source.max_bytes for source in there if source.max_bytes), default="all")
            raise InputError(
                f"{path} has scores on {_amount(old)} of the held-out text of {old.path}, not on {_amount(new)}. A "
                f"file has scores on one text only: use `eval text` with --max-bytes {before} to add to them, with "
                "--rescore to replace them, or with --output to write to another file"
            )


def _amount(source: TextSource) -> str:
    if source.max_bytes is None:
        return f"all {source.bytes:,} bytes"
    return f"a sample of {source.max_bytes:,} bytes"


def check_same_dtype(rows: Sequence[TextRow], models: Sequence[ScoredModel], dtype: str, path: Path | None) -> None:
    """Checks, before models are scored, that all rows of a file will have the same dtype.

    Args:
        rows (`Sequence[TextRow]`): the rows of the file.
        models (`Sequence[ScoredModel]`): the models to score.
        dtype (`str`): `"fp32"` or `"bf16"`.
        path (`Path`, *optional*): path of the score file, for the message.

    Raises:
        InputError: if the dtypes differ.
    """
    dtypes = {model.name: text_dtype(model, dtype) for model in models}
    for row in rows:
        for name, wanted in dtypes.items():
            if row.protocol.dtype != wanted:
                raise InputError(
                    f"{path}: {row.name} was scored in {row.protocol.dtype}, but {name} would be in {wanted}. A file "
                    "has one protocol: choose --dtype to match, score all models again with --rescore, or write to "
                    "another file with --output"
                )
    if len(set(dtypes.values())) > 1:
        first = next(iter(dtypes))
        other = next(name for name in dtypes if dtypes[name] != dtypes[first])
        raise InputError(
            f"{first} would be scored in {dtypes[first]}, but {other} in {dtypes[other]}. Scores of one call have one "
            "protocol: use --dtype bf16, which int4 and fp8 require, or score them in two calls"
        )


def check_same_protocol(row: TextRow, others: Sequence[TextRow], path: Path | None) -> None:
    """Checks that a new row was scored like the other rows of its file that have the same context.

    Raises:
        InputError: if not.
    """
    for other in others:
        old, new = other.protocol, row.protocol
        if old.context == new.context and old != new:
            raise InputError(
                f"{path}: {other.name} was scored under {vars(old)}, {row.name} under {vars(new)}. A file has one "
                "protocol: score all models again with --rescore, or write to another file with --output"
            )
