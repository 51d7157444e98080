"""Reads the pickles in torch's checkpoints without calling anything that they name.

This interprets the few opcodes that plain data and tensors need, on top of the standard library's decoder
(`pickletools.genops`). It supports protocols up to 5, including the files of TinyLlama's exporter, which
`torch.load(weights_only=True)` refuses (torch 2.13: "Unsupported operand 149"). A tensor becomes a description of
where its values are stored. All names except those that rebuild tensors are refused.
"""

import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...errors import InputError, refuse_damage


class Storage(NamedTuple):
    """A record of numbers in the file; `dtype` is `None` for an untyped storage."""

    key: str
    dtype: torch.dtype | None
    numel: int


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
_MARK = object()


def read_pickle(data: bytes, what: str) -> Any:
    """Returns the plain data of a pickle, with a [`StoredTensor`] for each tensor.

    Args:
        data (`bytes`): a complete pickle.
        what (`str`): the file, for messages.

    Raises:
        InputError: if the pickle is damaged, or contains a name that is not needed to rebuild tensors. No code is run.
    """
    try:
        # On damaged data, genops and the interpreter raise many errors, such as an IndexError for the stack.
        with refuse_damage(f"{what}: its pickle"):
            return _Interpreter().run(data)
    except UnsafePickleError as error:
        raise InputError(f"{what}: {error}. No code was run. Use safetensors, or a source that you trust") from error


class _Interpreter:
    """The stack machine of a pickle. Opcodes that are not in the tables below are refused."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, data: bytes) -> Any:
        self.length = len(data)
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                if len(self.stack) != 1:
                    raise ValueError(f"{len(self.stack)} objects on the stack at the end")
                return self.stack.pop()
            if opcode.name in _PUSHED:
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise ValueError(f"a number of {argument.bit_length()} bits at byte {position}")
                self.stack.append(argument)
            elif opcode.name in _NEW:
                self.stack.append(_NEW[opcode.name]())
            elif action := _ACTIONS.get(opcode.name):
                action(self, argument)
            else:
                raise UnsafePickleError(f"its pickle uses the forbidden opcode {opcode.name} at byte {position}")
        raise ValueError("no STOP")

    def pop_to_mark(self) -> list[Any]:
        begin = next(i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK)
        items = self.stack[begin + 1 :]
        del self.stack[begin:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, number: int) -> None:
        items = tuple(self.stack[len(self.stack) - number :])
        if len(items) != number or any(item is _MARK for item in items):
            raise IndexError("stack too short")
        del self.stack[len(self.stack) - number :]
        self.push(items)

    def append(self, items: list[Any]) -> None:
        _checked(self.stack[-1], list).extend(items)

    def new_dict(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        keys = [_key(key) for key in items[::2]]
        _checked(self.stack[-1], dict).update(zip(keys, items[1::2], strict=True))

    def add_items(self, items: list[Any]) -> None:
        _checked(self.stack[-1], set).update(map(_key, items))

    def name(self, module: Any, attribute: Any) -> None:
        name = Name(_checked(module, str), _checked(attribute, str))
        if name not in _KNOWN:
            raise UnsafePickleError(f"its pickle names {_shown(name)}, which is not needed to rebuild tensors")
        self.push(_KNOWN[name] if isinstance(_KNOWN[name], torch.dtype) else name)

    def stack_name(self) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.name(module, attribute)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        rebuild = _KNOWN.get(function) if isinstance(function, Name) else None
        if not callable(rebuild) or isinstance(rebuild, torch.dtype):
            raise UnsafePickleError(f"its pickle calls {_shown(function)}")
        # Bounded, since calls that copy one memoized object again and again would need unlimited memory.
        for argument in _checked(arguments, tuple):
            self.copied += len(argument) if isinstance(argument, (str, list, tuple, dict, set, bytes)) else 0
        if self.copied > self.length:
            raise ValueError("its calls copy more data than it contains")
        self.push(rebuild(*arguments))

    def build(self) -> None:
        """Drops the attributes of an OrderedDict, which `state_dict()` sets."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise UnsafePickleError(f"its pickle sets the state of a {type(self.stack[-1]).__name__}")

    def persistent(self) -> None:
        kind, storage, key, _, numel = _checked(self.stack.pop(), tuple)
        name = storage.attribute if isinstance(storage, Name) else ""
        if kind != "storage" or name not in STORAGES:
            raise UnsafePickleError(f"its pickle refers to {_shown(storage)} of {_shown(kind)}, not to a storage")
        # The key is a string in files of torch.save and a number in those of TinyLlama's exporter.
        if not isinstance(key, (str, int)) or not isinstance(numel, int) or numel < 0:
            raise ValueError(f"a storage {key!r} of {numel!r} elements")
        self.push(Storage(str(key), STORAGES[name], numel))


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
    num_bytes = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
    # The number of elements is bounded too, since strides of 0 expand a few bytes without limit.
    if math.prod(shape) and max(last + 1, math.prod(shape)) * dtype.itemsize > num_bytes:
        raise ValueError(f"a tensor of shape {shape} exceeds its storage of {num_bytes} bytes")
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

# Opcodes with the object as argument.
_PUSHED = frozenset(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
                     "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING", "STRING",
                     "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"))  # fmt: skip
# Opcodes that push a new object.
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_ACTIONS: dict[str, Callable[[_Interpreter, Any], Any]] = {
    "PROTO": lambda self, version: None,
    "FRAME": lambda self, length: None,
    "POP": lambda self, _: self.stack.pop(),
    "POP_MARK": lambda self, _: self.pop_to_mark(),
    "TUPLE1": lambda self, _: self.tuple_of(1),
    "TUPLE2": lambda self, _: self.tuple_of(2),
    "TUPLE3": lambda self, _: self.tuple_of(3),
    "TUPLE": lambda self, _: self.push(tuple(self.pop_to_mark())),
    "LIST": lambda self, _: self.push(self.pop_to_mark()),
    "DICT": lambda self, _: self.new_dict(self.pop_to_mark()),
    "APPEND": lambda self, _: self.append([self.stack.pop()]),
    "APPENDS": lambda self, _: self.append(self.pop_to_mark()),
    "SETITEM": lambda self, _: self.set_items([self.stack.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda self, _: self.set_items(self.pop_to_mark()),
    "ADDITEMS": lambda self, _: self.add_items(self.pop_to_mark()),
    "MEMOIZE": lambda self, _: self.memo.update({len(self.memo): self.stack[-1]}),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda self, index: self.memo.update({index: self.stack[-1]})),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda self, index: self.push(self.memo[index])),
    "GLOBAL": lambda self, names: self.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda self, _: self.stack_name(),
    "REDUCE": lambda self, _: self.reduce(),
    "BUILD": lambda self, _: self.build(),
    "BINPERSID": lambda self, _: self.persistent(),
}
