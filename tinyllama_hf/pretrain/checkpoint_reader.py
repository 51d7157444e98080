"""Reads the files of a checkpoint without running code that they name.

torch.distributed.checkpoint unpickles two kinds of data without restrictions (torch 2.11 and 2.13): `.metadata`
(`FileSystemReader.read_metadata`) and every entry that is not a tensor (`DefaultLoadPlanner.load_bytes`). A run folder
from an untrusted source could run any command that way. Here `.metadata` is read by an unpickler that allows only the
names that a checkpoint needs, and entries that are not tensors are refused. Tensors are read by torch with
`weights_only=True`.
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
# The names that torch.distributed.checkpoint writes for tensors and plain values. Calling one only builds a value.
_NAMES = {
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "MetadataIndex",
        "StorageMeta",
    ),
}
_PATHS = ("pathlib", "pathlib._local")  # the module of `PosixPath` before Python 3.13, and since


class _MetadataUnpickler(pickle.Unpickler):
    """Allows the names in `_NAMES`, and refuses any other before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if module in _PATHS and name == "PosixPath":
            return PurePosixPath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs; no code was run")


class CheckpointReader(FileSystemReader):
    """Reads the tensors of a checkpoint.

    Args:
        checkpoint (`Path`): its folder.

    Raises:
        InputError: if its `.metadata` is damaged, names other objects to import, or refers to a file outside the
            folder.
    """

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint)
        path = checkpoint / METADATA_FILE
        # Read here, since torch (2.13, `_load_state_dict`) answers an error by a search for other metadata.
        try:
            self._metadata: Metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            files = {entry.relative_path for entry in self._metadata.storage_data.values()}
        except Exception as error:  # a damaged pickle may raise anything
            raise InputError(f"{path}: not valid checkpoint metadata ({one_line(error)})") from error
        if outside := sorted(name for name in files if Path(name).name != name):
            raise InputError(f"{path}: names {outside[0]!r}; the files of a checkpoint must be in its folder")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors; any other entry is refused without being unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        assert self.metadata is not None  # torch sets it before it loads entries
        file = self.metadata.storage_data[read_item.storage_index].relative_path
        raise InputError(f"{file}: {read_item.dest_index.fqn} is not a tensor; no code was run")
