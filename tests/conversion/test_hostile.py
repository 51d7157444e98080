"""Malicious files: code in pickles in every container, and a few bytes that expand to billions."""

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conversion import files, layouts
from tinyllama_hf.conversion.reading.pickles import read_pickle
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.errors import InputError


@pytest.fixture(scope="module")
def model():
    return files.small_model()


@pytest.fixture
def bounded():
    """Limits memory to one more gigabyte, so that a bomb fails the test and not the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def text(value: str | bytes) -> bytes:
    """The opcode that pushes a string."""
    value = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(value)) + value


def by_os(canary: Path) -> bytes:
    return b"cos\nsystem\n" + text(f"touch {canary}") + b"\x85R"


def code(canary: Path) -> bytes:
    return text(f"open({str(canary)!r}, 'w').close()")


def mapped(canary: Path) -> bytes:
    """Arguments for a `__new__` that iterates over a `map` and so calls the mapped function."""
    exec_one = b"cbuiltins\nexec\n](" + code(canary) + b"e"
    return b"(cbuiltins\nmap\n(" + exec_one + b"t\x81t"


# Opcodes that leave one object, having run something under pickle.loads; and what our refusal names.
PAYLOADS = {
    "os.system": (by_os, "names os.system"),
    "posix.system": (lambda c: b"cposix\nsystem\n" + text(f"touch {c}") + b"\x85R", "names posix.system"),
    "eval": (lambda c: b"cbuiltins\nexec\n" + code(c) + b"\x85R", "names builtins.exec"),
    "python 2 names": (
        lambda c: b"\x80\x02c__builtin__\neval\n" + text(f"open({str(c)!r}, 'w')") + b"\x85R",
        "__builtin__.eval",
    ),
    "STACK_GLOBAL": (lambda c: b"\x8c\x02os\x8c\x06system\x93" + text(f"touch {c}") + b"\x85R", "names os.system"),
    "through a module": (
        lambda c: b"\x8c\x13torch.serialization\x8c\x09os.system\x93" + text(f"touch {c}") + b"\x85R",
        "names torch.serialization.os.system",
    ),
    "INST": (lambda c: b"(S'touch %b'\nios\nsystem\n" % str(c).encode(), "opcode INST"),
    "OBJ": (lambda c: b"(cbuiltins\nexec\n" + code(c) + b"o", "names builtins.exec"),
    "NEWOBJ": (lambda c: b"ctorch\nSize\n" + mapped(c) + b"\x81", "names builtins.map"),
    "NEWOBJ_EX": (lambda c: b"ctorch\nSize\n" + mapped(c) + b"}\x92", "names builtins.map"),
    "BUILD": (
        lambda c: (
            b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cos\nsystem\nsb" + text(f"touch {c}") + b"b"
        ),
        "names os.system",
    ),
    "EXT1": (lambda c: b"\x82\x01" + text(f"touch {c}") + b"\x85R", "opcode EXT1"),
    "EXT2": (lambda c: b"\x83\x01\x00" + text(f"touch {c}") + b"\x85R", "opcode EXT2"),
    "EXT4": (lambda c: b"\x84\x01\x00\x00\x00" + text(f"touch {c}") + b"\x85R", "opcode EXT4"),
    "arguments of a tensor": (
        lambda c: b"ctorch._utils\n_rebuild_tensor_v2\n(" + by_os(c) + b"K\x00))\x89}tR",
        "names os.system",
    ),
    "persistent id": (
        lambda c: b"(" + text("storage") + by_os(c) + text("0") + text("cpu") + b"K\x01tQ",
        "names os.system",
    ),
    "key": (lambda c: b"}" + by_os(c) + b"K\x01s", "names os.system"),
    "popped": (lambda c: by_os(c) + b"0N", "names os.system"),
}


def stream(payload: bytes, protocol: int = 5) -> bytes:
    """A state dict with the payload as one of its tensors."""
    return b"\x80%c}" % protocol + text("model.norm.weight") + payload + b"s."


def _put(folder: Path, where: str, payload: bytes, model) -> tuple[Path, Path]:
    """A checkpoint with the payload in one of its files; returns what is opened, and the file."""
    weights, config = model
    if where == "lit-gpt":
        files.write_lit_gpt(folder, weights, config)
        return folder, files.write_archive(folder / "lit_model.pth", stream(payload))
    if where == "Meta":
        layouts.write_meta(folder, weights, config, 2)
        return folder, files.write_archive(folder / "consolidated.00.pth", stream(payload, 2))
    files.write_sharded(folder, weights, config, "bin")
    if where == "shard":
        return folder, files.write_archive(folder / "pytorch_model-00002-of-00002.bin", stream(payload))
    (folder / "pytorch_model.bin.index.json").unlink()
    if where == "bin":
        return folder, files.write_archive(folder / "pytorch_model.bin", stream(payload))
    (folder / "pytorch_model.bin").write_bytes(stream(payload))
    return folder, folder / "pytorch_model.bin"


# Opens what the names in a JSON file say, in the way that runs code.
CONTROL = """
import copyreg, json, pickle, sys, torch
copyreg.add_extension("os", "system", 1)
for archive, bare in json.load(open(sys.argv[1])):
    for load in (lambda: torch.load(archive, weights_only=False), lambda: pickle.load(open(bare, "rb"))):
        try:
            load()
        except Exception:
            pass
"""


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """The payloads that did run without protection, in an archive and in a bare pickle."""
    folder = tmp_path_factory.mktemp("control")
    pairs = []
    for name, (payload, _) in PAYLOADS.items():
        archive, bare = folder / f"{name}.pth", folder / f"{name}.pkl"
        files.write_archive(archive, stream(payload(folder / f"archive-{name.replace(' ', '-')}")))
        bare.write_bytes(stream(payload(folder / f"bare-{name.replace(' ', '-')}")))
        pairs.append((str(archive), str(bare)))
    (folder / "files.json").write_text(json.dumps(pairs))
    subprocess.run([sys.executable, "-c", CONTROL, folder / "files.json"], check=True, capture_output=True)
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", PAYLOADS)
def test_code_in_a_pickle_is_refused_by_name_and_not_run(name, model, control, tmp_path):
    payload, message = PAYLOADS[name]
    for where in ("archive", "bare"):
        assert f"{where}-{name.replace(' ', '-')}" in control, "the payload does nothing anywhere: no test"
    canary = tmp_path / "canary"
    for where in ("bin", "shard", "lit-gpt", "Meta", "bare"):
        source, file = _put(tmp_path / where, where, payload(canary), model)
        expected = "a pickle without a container" if where == "bare" else message
        with pytest.raises(InputError, match=expected) as error:
            open_checkpoint(source)
        assert str(file) in str(error.value) and not canary.exists()


STRANGE = {
    "a call of text": (text("os.system") + b")R", "calls os.system"),
    "a call of a dtype": (b"ctorch\nfloat32\n)R", "calls a dtype"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R", "calls torch.FloatStorage"),
    "NEWOBJ of a known name": (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
    "OBJ of a known name": (b"(ccollections\nOrderedDict\no", "opcode OBJ"),
    "a name in parts": (
        b"\x8c\x05torch\x8c\x19_utils._rebuild_tensor_v2\x93",
        "names torch._utils._rebuild_tensor_v2",
    ),
    "a persistent id as text": (b"Pstorage\n", "opcode PERSID"),
    "a persistent id of a module": (b"(" + text("module") + b"ctorch\nSize\nNNNtQ", "refers to torch.Size of module"),
    "a persistent id of a Size": (b"(" + text("storage") + b"ctorch\nSize\nNNNtQ", "refers to torch.Size"),
    "a short persistent id": (b"(NNtQ", "damaged .*ValueError: not enough values"),
    "a state for a list": (b"]}b", "sets the state of a list"),
    "no tensor in a parameter": (
        b"ctorch._utils\n_rebuild_parameter\n" + text("x") + b"\x85R",
        "StoredTensor expected",
    ),
    "a path of numbers": (b"cpathlib\nPosixPath\nK\x01\x85R", "str expected"),
    "a Size of a number": (b"ctorch\nSize\nK\x01\x85R", "TypeError"),
    "a memo that was never filled": (b"h\x07", "Memo value not found"),
    "a mark that was never set": (b"t", "IndexError"),
    "half an entry": (b"}(K\x01u", "a key without a value"),
    "a buffer out of band": (b"\x97", "opcode NEXT_BUFFER"),
    "bytes to write into": (b"\x96" + bytes(8), "opcode BYTEARRAY8"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_known_opcodes_and_names_used_otherwise(name):
    what, message = STRANGE[name]
    with pytest.raises(InputError, match=message):
        read_pickle(stream(what), "file")


def doubled(first: bytes, pair: str, levels: int = 60) -> bytes:
    """Nested memoized objects, each containing the previous one twice."""
    built = first + b"q\x00"
    for level in range(levels):
        both = b"h%ch%c" % (level, level)
        whole = {"list": b"](%be", "tuple": b"%b\x86", "path": b"cpathlib\nPosixPath\n%b\x86R"}[pair] % both
        built += b"0" + whole + b"q%c" % (level + 1)
    return built


LONG = struct.pack("<I", 3000) + b"\x7f" * 3000
BOMBS = {
    "lists": (doubled(b"]", "list"), "refers to itself"),
    "tuples": (doubled(b")", "tuple"), "refers to itself"),
    "tuples as a key": (b"}" + doubled(b")", "tuple") + b"Ns", "not tuple"),
    "tuples in a set": (b"\x8f(" + doubled(b")", "tuple") + b"\x90", "not tuple"),
    "tuples as a storage": (b"(" + text("storage") + doubled(b")", "tuple") + b"NNNtQ", "refers to a tuple"),
    "tuples that are called": (doubled(b")", "tuple") + b")R", "calls a tuple"),
    "a list in itself": (b"]q\x00h\x00a", "refers to itself"),
    "a dict in itself": (b"}q\x00" + text("a") + b"h\x00s", "refers to itself"),
    "paths": (doubled(text("a" * 64), "path"), "its calls copy more"),
    "sizes": (b"](" + b"N" * 9999 + b"eq\x00(" + b"ctorch\nSize\nh\x00\x85R" * 9999 + b"t", "its calls copy more"),
    "a long number": (b"\x8b" + LONG, "a number of 23999 bits"),
    "a long number as key": (b"}\x8b" + LONG + b"Ns", "a number of 23999 bits"),
    "keys of one hash": (b"}\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x1fNs", "or too large a number"),
    "a long key": (b"}" + text("a" * 5000) + b"Ns", "a key of 5000 characters"),
    "memo far out": (b"}r\x00\x00\x00\x80", "'model.norm.weight' is not a named tensor"),
    "text without end": (b"\x8d" + struct.pack("<Q", 2**62) + b"a", "expected 4611686018427387904 bytes"),
    "a frame without end": (b"\x95" + struct.pack("<Q", 2**62) + b"N", "'model.norm.weight' is not a named tensor"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_little_that_stands_for_much(name, model, tmp_path, bounded):
    what, message = BOMBS[name]
    for where in ("bin", "lit-gpt"):
        source, file = _put(tmp_path / where, where, what, model)
        with pytest.raises(InputError, match=message) as error:
            open_checkpoint(source)
        assert str(file) in str(error.value) and len(str(error.value)) < 1000


def test_a_pickle_larger_than_any_description(model, tmp_path):
    source, file = _put(tmp_path / "model", "bin", b"N", model)
    files.write_archive(file, b"\x80\x02" + b"]" * (1 << 24) + b".")
    with pytest.raises(InputError, match=r"pytorch_model.bin: damaged .*a pickle of 16777219 bytes"):
        open_checkpoint(source)


TENSORS = {
    "beyond its storage": (files.stored((4, 4), (4, 1), 15), "exceeds its storage of 60 bytes"),
    "beyond by its offset": (files.stored((4, 4), (4, 1), 16, offset=1), "exceeds its storage"),
    "strides of 0": (files.stored((2**20, 2**20), (0, 0), 16), "exceeds its storage"),
    "a huge shape": (files.stored((2**47,) * 3, (1, 1, 1), 16), "exceeds its storage"),
    "beyond any number": (files.stored((2**70,), (1,), 16), "implausible shape, strides or offset"),
    "a negative stride": (files.stored((4,), (-1,), 16, offset=3), "implausible shape, strides or offset"),
    "numbers with a point": (files.stored((4.0,), (1,), 16), "implausible shape, strides or offset"),
    "too many dimensions": (files.stored((1,) * 17, (1,) * 17, 16), "with 17 dimensions"),
    "fewer strides": (files.stored((4, 4), (1,), 16), "implausible shape, strides or offset"),
    "no record": (files.stored((4, 4), (4, 1), 16, key="7"), "record data/7 is missing or of another size"),
    "another size": (files.stored((4, 4), (4, 1), 17), "record data/0 is missing or of another size"),
    "a storage of -1": (files.stored((4, 4), (4, 1), -1), "a storage '0' of -1 elements"),
    "a record elsewhere": (files.stored((4, 4), (4, 1), 16, key="../data.pkl"), "is missing or of another size"),
    "quantized": (files.stored((4, 4), (4, 1), 16, storage=torch.QInt8Storage), "names torch.QInt8Storage"),
    "whole numbers": (files.stored((4, 4), (4, 1), 16, storage=torch.IntStorage), "norm.weight: dtype int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("protocol", [2, 5])
def test_tensors_that_lie_about_their_place(name, protocol, model, tmp_path, bounded):
    tensor, message = TENSORS[name]
    weights, config = model
    source = files.write_sharded(tmp_path / "model", weights, config, "bin")
    (source / "pytorch_model.bin.index.json").unlink()
    if "dtype int32" in message:  # all else is right
        torch.save(weights | {"model.norm.weight": torch.zeros(64, dtype=torch.int32)}, source / "pytorch_model.bin")
    else:
        files.write_archive(source / "pytorch_model.bin", files.dumps({"a": tensor}, protocol), {"data/0": bytes(64)})
    with pytest.raises(InputError, match=message):
        open_checkpoint(source)
