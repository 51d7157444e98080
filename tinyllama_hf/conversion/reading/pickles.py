"""Reads the pickles in torch's checkpoints without calling anything that they name.

This limits the standard library's unpickler to the few opcodes that plain data and tensors need. It supports protocols
up to 5, including the files of TinyLlama's exporter, which `torch.load(weights_only=True)` refuses (torch 2.13:
"Unsupported operand 149"). A tensor becomes a description of where its values are stored. All names except those that
rebuild tensors are refused.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...errors import InputError, refuse_damage


class Storage(NamedTuple):
    """A record of numbers in the file; `dtype` is `None` for an untyped storage."""

    key: str
    dtype: torch.dtype | None
    num_bytes: int


class StoredTensor(NamedTuple):
    """A view of a storage, with offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Name(NamedTuple):
    """A module attribute that a pickle names. It is never imported."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


class UnsafePickleError(InputError):
    """The pickle contains a name or an operation that no checkpoint needs."""


STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": None,
}  # fmt: skip
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values() if dtype}
_MAX_DIMENSIONS = 16
_KEYS = (str, int, float, type(None))  # types of dict keys; hashing nested tuples could take forever
# Bits of a number. Random states have hundreds; Python refuses to print numbers with many thousands. Keys have fewer,
# since any number of larger keys can have the same hash.
_MAX_BITS, _MAX_KEY_BITS, _MAX_KEY_LENGTH = 4096, 60, 1024
# Opcodes that only move plain data between pickle, stack and memo, or that call `find_class` or `persistent_load`.
_STANDARD = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
        "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
        "SHORT_BINBYTES BINBYTES8 EMPTY_LIST EMPTY_DICT EMPTY_SET EMPTY_TUPLE LIST APPEND APPENDS TUPLE TUPLE1 TUPLE2 "
        "TUPLE3 MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
    ).split()
]


def read_pickle(data: bytes, what: str) -> Any:
    """Returns the plain data of a pickle, with a [`StoredTensor`] for each tensor.

    Args:
        data (`bytes`): a complete pickle.
        what (`str`): the file, for messages.

    Raises:
        InputError: if the pickle is damaged, or contains a name that is not needed to rebuild tensors. No code is run.
    """
    try:
        # On damaged data, genops and the unpickler raise many errors, such as an IndexError for the stack.
        with refuse_damage(f"{what}: its pickle"):
            for _, argument, position in pickletools.genops(data):  # also checks every length against the data
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise ValueError(f"a number of {argument.bit_length()} bits at byte {position}")
            return _Unpickler(data).load()
    except UnsafePickleError as error:
        raise InputError(f"{what}: {error}. No code was run. Use safetensors, or a source that you trust") from error


class _Methods(dict[int, Callable[[Any], None]]):
    """Methods by opcode. Looking up another opcode raises an error."""

    def __missing__(self, opcode: int) -> None:
        name = next(known.name for known in pickletools.opcodes if ord(known.code) == opcode)
        raise UnsafePickleError(f"its pickle uses the forbidden opcode {name}")


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, limited to the opcodes that plain data and tensors need."""

    stack: list[Any]  # the objects since the last mark
    pop_mark: Callable[[], list[Any]]  # returns these objects, and continues with those before the mark

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self.can_copy = len(data)

    def find_class(self, module: str, name: str) -> Any:
        found = Name(module, name)
        if found not in _KNOWN:
            raise UnsafePickleError(f"its pickle names {_shown(found)}, which is not needed to rebuild tensors")
        return _KNOWN[found] if isinstance(_KNOWN[found], torch.dtype) else found

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, numel = _checked(pid, tuple)
        name = storage.attribute if isinstance(storage, Name) else ""
        if kind != "storage" or name not in STORAGES:
            raise UnsafePickleError(f"its pickle refers to {_shown(storage)} of {_shown(kind)}, not to a storage")
        # The key is a string in files of torch.save and a number in those of TinyLlama's exporter.
        if not isinstance(key, (str, int)) or not isinstance(numel, int) or numel < 0:
            raise ValueError(f"a storage {key!r} of {numel!r} elements")
        dtype = STORAGES[name]
        return Storage(str(key), dtype, numel * (dtype.itemsize if dtype else 1))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        rebuild = _KNOWN.get(function) if isinstance(function, Name) else None
        if not callable(rebuild):
            raise UnsafePickleError(f"its pickle calls {_shown(function)}")
        # Bounded, since calls that copy one memoized object again and again would need unlimited memory.
        for argument in _checked(arguments, tuple):
            self.can_copy -= len(argument) if isinstance(argument, (str, list, tuple, dict, set, bytes)) else 0
        if self.can_copy < 0:
            raise ValueError("its calls copy more data than it contains")
        self.stack.append(rebuild(*arguments))

    def load_build(self) -> None:
        """Drops the attributes of an OrderedDict, which `state_dict()` sets."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise UnsafePickleError(f"its pickle sets the state of a {type(self.stack[-1]).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def load_setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self.set_items(items)

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        keys = [_key(key) for key in items[::2]]
        _checked(self.stack[-1], dict).update(zip(keys, items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        _checked(self.stack[-1], set).update(map(_key, items))

    dispatch = _Methods({code: pickle._Unpickler.dispatch[code] for code in _STANDARD} | {
        pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build, pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.ADDITEMS[0]: load_additems,
    })  # fmt: skip


def _checked(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{kind if isinstance(kind, tuple) else kind.__name__} expected, not {type(value).__name__}")
    return value


def _key(value: Any) -> Any:
    """Returns a value that is allowed as a dict key or set item."""
    size = len(value) if isinstance(value, str) else 0
    if size > _MAX_KEY_LENGTH or (isinstance(value, int) and value.bit_length() > _MAX_KEY_BITS):
        raise ValueError(f"a key of {size} characters, or too large a number as key")
    return _checked(value, _KEYS)


def _shown(value: Any) -> str:
    """Returns a name or text, or only the type of other objects, since printing nested ones could take forever."""
    return str(value)[:80] if isinstance(value, (Name, str)) else f"a {type(value).__name__}"


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: Any = None) -> StoredTensor:
    """Stands for `torch._utils._rebuild_tensor_v2` and similar ones; drops their last arguments, such as hooks."""
    shape, strides = tuple(_checked(shape, tuple)), tuple(_checked(strides, tuple))
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(shape) != len(strides):
        raise ValueError("a tensor with implausible shape, strides or offset")
    dtype = _checked(storage, Storage).dtype if dtype is None else _checked(dtype, torch.dtype)
    if len(shape) > _MAX_DIMENSIONS or dtype is None:
        raise ValueError(f"a tensor with {len(shape)} dimensions and dtype {dtype}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # The number of elements is bounded too, since strides of 0 expand a few bytes without limit.
    if math.prod(shape) and max(last + 1, math.prod(shape)) * dtype.itemsize > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} exceeds its storage of {storage.num_bytes} bytes")
    return StoredTensor(storage, offset, shape, strides, dtype)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    _requires_grad, _hooks, dtype, *_ = rest
    return _rebuild_tensor(storage, offset, shape, strides, dtype=dtype)


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    return _checked(tensor, StoredTensor)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in _checked(pairs, (list, tuple))}


def _path(*parts: Any) -> str:
    """Returns a path among hyperparameters, which litgpt saves, as text."""
    return "/".join(_checked(part, str) for part in parts)


_KNOWN: dict[Name, Any] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Name("torch", "Size"): tuple,
    Name("pathlib", "PosixPath"): _path,
    Name("pathlib", "WindowsPath"): _path,
    **{Name("torch", name): None for name in STORAGES},
    Name("torch.storage", "UntypedStorage"): None,
    **{Name("torch", name): dtype for name, dtype in _DTYPES.items()},
}  # fmt: skip
