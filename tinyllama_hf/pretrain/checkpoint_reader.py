"""Reads the files of a checkpoint without running anything that they name.

torch.distributed.checkpoint unpickles two kinds of data with all that a pickle can do (torch 2.11 and 2.13): `.metadata`
(`FileSystemReader.read_metadata`) and every entry that is not a tensor (`DefaultLoadPlanner.load_bytes`). A run folder that
others made could run any command that way. Here `.metadata` goes through an unpickler that knows the names which a
checkpoint needs, and entries that are not tensors are not read. Tensors are read by torch with `weights_only=True`.
"""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from ..errors import InputError, one_line


METADATA_FILE = ".metadata"
# What torch.distributed.checkpoint writes of tensors and plain values. Calling any of these builds a value, and no more.
_NAMES = {
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta",
    ),
}  # fmt: skip
_PATHS = ("pathlib", "pathlib._local")  # the module of a path before and from Python 3.13 on


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what `_NAMES` allows, and refuses any other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if module in _PATHS and name == "PosixPath":
            return PurePosixPath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs; nothing was run")


def read_metadata(checkpoint: Path) -> Metadata:
    """The `.metadata` of a checkpoint: which tensors it holds, and where in which file.

    Raises:
        InputError: if it is damaged, names something to import or call, or leads out of the folder.
    """
    path = checkpoint / METADATA_FILE
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        files = {entry.relative_path for entry in metadata.storage_data.values()}
    # A damaged pickle fails as its damage has it: a torn stack, a name of no type, a missing attribute.
    except Exception as error:
        raise InputError(f"{path}: not the metadata of a checkpoint ({one_line(error)})") from error
    if outside := sorted(name for name in files if Path(name).name != name):
        raise InputError(f"{path}: names {outside[0]!r}; a checkpoint reads files of its own folder only")
    return metadata


class CheckpointReader(FileSystemReader):
    """Reads the tensors of a checkpoint.

    Args:
        checkpoint (`Path`): its folder.

    Raises:
        InputError: as [`read_metadata`].
    """

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint)
        # Read here: torch would turn an error into a search for other metadata (`_load_state_dict`, torch 2.13).
        self._metadata = read_metadata(checkpoint)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class TensorPlanner(DefaultLoadPlanner):
    """Loads a state of tensors; an entry that is not one is refused unread."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        file = self.metadata.storage_data[read_item.storage_index].relative_path
        raise InputError(f"{file}: {read_item.dest_index.fqn} is not a tensor; nothing of it was run")
