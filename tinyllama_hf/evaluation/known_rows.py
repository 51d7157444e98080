"""Finds the rows of a model in a task score file, by its folder and by the hash of its files."""

from collections.abc import Sequence

from ..inference.adapters import adapter_folder
from ..provenance import file_sha256, fingerprint
from .score_files import ScoredModel, TaskRow


# The files that affect scores. The chat template does not, since no protocol uses it.
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# These do too, but are not in the fingerprints of early versions: stock transformers reads tokens from the first four
# if the files above lack them, and the stop tokens from the last one.
LATER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json")


def model_fingerprints(model: ScoredModel) -> list[str]:
    """Returns the hash of the files of a model, and the one that early versions wrote."""
    folders = [model.folder, *([adapter_folder(model.adapter)] if model.adapter else [])]
    patterns = (*MODEL_FILES, *LATER_FILES)
    files = {f"{n}/{file.name}": file for n, f in enumerate(folders) for p in patterns for file in f.glob(p)}
    if model.adapter:
        files["adapter_config.json"] = folders[1] / "adapter_config.json"
    # As before for a model without an adapter, so that its row in an existing file is found.
    hashes = {name if model.adapter else file.name: file_sha256(file) for name, file in files.items()}
    early = {name: value for name, value in hashes.items() if name.rpartition("/")[2] not in LATER_FILES}
    # With the names of missing files, so that the two always differ: a row with the first hash is of this version.
    return [fingerprint(dict.fromkeys(LATER_FILES) | hashes), fingerprint(early)]


def find_rows(
    rows: Sequence[TaskRow], model: ScoredModel, fingerprints: Sequence[str]
) -> tuple[TaskRow | None, list[TaskRow]]:
    """Returns a row with scores of the same weights, and the rows that a new row of this model replaces.

    These are the rows of its folder, and rows with the same weights in a folder that no longer exists, since the
    model was moved. A copy that still exists keeps its row.

    Args:
        rows (`Sequence[TaskRow]`): the rows of the file.
        model (`ScoredModel`): the model. Rows with another quantization or adapter belong to other models.
        fingerprints (`Sequence[str]`): from [`model_fingerprints`].
    """
    own = [row for row in rows if is_row_of(row, model)]
    equal = [row for row in rows if row.fingerprint in fingerprints and _is_same_kind(row, model)]
    known = next((row for row in equal if row in own), equal[0] if equal else None)
    return known, own + [row for row in equal if not row.folder.exists()]


def is_row_of(row: TaskRow, model: ScoredModel) -> bool:
    """Returns whether a row is of the folder of a model, with its quantization and adapter."""
    return row.folder.absolute() == model.folder.absolute() and _is_same_kind(row, model)


def _is_same_kind(row: TaskRow, model: ScoredModel) -> bool:
    return (row.quantization, row.adapter) == (model.quantization, model.adapter)
