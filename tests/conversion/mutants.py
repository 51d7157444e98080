"""Reads damaged copies of checkpoints in every container.

A separate program, `python -m tests.conversion.mutants SOURCES KINDS NUMBER`, since it limits the memory of its
process and checks what is imported there. It prints JSON: outcomes by kind and region, and forbidden outcomes.
"""

import collections
import faulthandler
import io
import json
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tests.conversion.files import patched_pickle, records, write_archive
from tinyllama_hf import load_tokenizer
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.errors import InputError
from tinyllama_hf.gguf.file import read_header


# Which files of each kind are damaged.
KINDS = {
    "safetensors": ("model.safetensors", "config.json"),
    "sharded safetensors": ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model.bin",),
    "sharded bin": ("pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
    "lit-gpt, protocol 5": ("lit_model.pth", "lit_config.json"),
    "litgpt, training": ("lit_model.pth", "model_config.yaml"),
    "Meta": ("consolidated.01.pth", "params.json"),
    "GGUF f32": ("model-f32.gguf",),
    "GGUF q4_0": ("model-q4_0.gguf",),
    "llama2.c": ("model.bin",),
    "converted": ("model.safetensors", "provenance.json"),
}
SECONDS, ADDITIONAL_BYTES = 10, 1 << 30
# Allowed outcomes besides an `InputError`: the original tensors; other values with the same names, shapes and dtypes;
# or none.
EXACT, STRUCTURE, REFUSED = "exact", "structure", "refused"
_RULES = {"payload of safetensors": STRUCTURE, "payload of GGUF": STRUCTURE, "payload of llama2.c": STRUCTURE,
          "pickle, checksum repaired": STRUCTURE, "other opcodes in the pickle": STRUCTURE,
          "another name in the pickle": REFUSED}  # fmt: skip
_OF_PICKLES = ("pickle, checksum repaired", "other opcodes in the pickle", "another name in the pickle")
_OPCODES = (
    b"R",
    b"\x81",
    b"b",
    b"0",
    b"1",
    b"2",
    b"(",
    b"t",
    b"\x85",
    b"Q",
    b"N",
    b"}",
    b"]",
    b")",
    b"s",
    b"u",
    b"a",
    b"e",
    b"\x93",
    b"\x94",
    b"h\x00",
    b"h\x01",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\x7f" * 8,
    b"cthis\ns\n",
    b".",
)
_ODD_NUMBERS = (0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_ODD_VALUES = (None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), 0.5, "x", "",
               "../x", "a" * 5000, "\ud800", [], {}, [1, [2]], {"a": {"b": []}})  # fmt: skip
_CANARIES = ("this", "__hello__")  # modules of Python that nothing imports


class Mutant(NamedTuple):
    """A file with other contents, and the allowed outcome of reading its folder."""

    file: str
    region: str
    data: bytes
    rule: str


class Hang(BaseException):
    """Reading took too long."""


def regions(path: Path, data: bytes) -> dict[str, list[tuple[int, int]]]:
    """The regions of a file, by the names in `_RULES`."""
    if path.suffix == ".safetensors":
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        return {"header of safetensors": [(0, begin)], "payload of safetensors": [(begin, len(data))]}
    if path.suffix == ".gguf":
        begin = min(tensor.offset for tensor in read_header(path).tensors.values())
        return {"header of GGUF": [(0, begin)], "payload of GGUF": [(begin, len(data))]}
    if data[:2] != b"PK":
        return {"header of llama2.c": [(0, 28)], "payload of llama2.c": [(28, len(data))]}
    found = {"local headers": [], "payload of zip": [], "pickle": []}
    with zipfile.ZipFile(path) as opened:
        for info in opened.infolist():
            begin = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
            found["local headers"].append((info.header_offset, begin))
            name = "pickle" if info.filename.endswith("data.pkl") else "payload of zip"
            found[name].append((begin, begin + info.file_size))
        found["directory"] = [(opened.start_dir, len(data))]
    return found


def mutants(folder: Path, files: tuple[str, ...], kind: str, number: int) -> Iterator[Mutant]:
    """Yields the same mutants at every call."""
    for i in range(number):
        choose = random.Random(f"{kind} {i}")
        path = folder / files[0]
        if len(files) > 1 and i % 4 == 3:
            path = folder / files[1]
            yield Mutant(path.name, path.suffix[1:], _odd_fields(path, choose), EXACT)
            continue
        data = path.read_bytes()
        found = regions(path, data)
        region = choose.choice([*found, "cut", *(_OF_PICKLES if "pickle" in found else ())])
        rule = REFUSED if kind == "converted" and "payload" in region else _RULES.get(region, EXACT)
        yield Mutant(path.name, region, _damaged(path, data, region, found, choose), rule)


def _damaged(path: Path, data: bytes, region: str, found: Mapping[str, Any], choose: random.Random) -> bytes:
    if region == "cut":
        begin, end = choose.choice([place for places in found.values() for place in places])
        return data[: choose.randrange(begin, end)] if end > begin else data[:begin]
    if region == "pickle, checksum repaired":
        return patched_pickle(data, lambda before: _changed(before, 0, len(before), choose))
    if region in _OF_PICKLES:
        held = records(path)
        description = (_renamed if "name" in region else _reordered)(held.pop("data.pkl"), choose)
        with tempfile.TemporaryDirectory() as scratch:
            return write_archive(Path(scratch) / path.name, description, held).read_bytes()
    begin, end = choose.choice([place for place in found[region] if place[0] < place[1]])
    if "payload" in region or choose.random() < 0.5:
        return _changed(data, begin, end, choose)
    return _moved(data, begin, end, choose)


def _changed(data: bytes, begin: int, end: int, choose: random.Random) -> bytes:
    """Replaces some bytes between two positions."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(begin, end)
        if choose.random() < 0.4:
            form = choose.choice("BHIQ")
            limit = 1 << 8 * struct.calcsize(f"<{form}")
            new = struct.pack(f"<{form}", choose.choice(_ODD_NUMBERS) % limit)[: end - at]
        else:
            new = bytes([changed[at] ^ 1 << choose.randrange(8)])
        changed[at : at + len(new)] = new
    return bytes(changed) if changed != data else _changed(data, begin, end, choose)


def _moved(data: bytes, begin: int, end: int, choose: random.Random) -> bytes:
    """Removes, inserts or doubles some bytes, so that everything after them moves."""
    first = choose.randrange(begin, end)
    last = min(end, first + choose.randint(1, 64))
    new = choose.choice((b"", choose.randbytes(choose.randint(1, 64)), 2 * data[first:last]))
    return data[:first] + new + data[last if not new or choose.random() < 0.5 else first :]


def _renamed(description: bytes, choose: random.Random) -> bytes:
    """The pickle with one name replaced by that of a module that must not be imported."""
    canary = choose.choice(_CANARIES).encode()
    known = (b"torch._utils", b"torch", b"collections")
    spellings = [(b"c%b\n" % name, b"c%b\n" % canary) for name in known]
    spellings += [(b"\x8c%c%b" % (len(name), name), b"\x8c%c%b" % (len(canary), canary)) for name in known]
    old, new = choose.choice([pair for pair in spellings if pair[0] in description])
    return description.replace(old, new, 1)


def _reordered(description: bytes, choose: random.Random) -> bytes:
    """The pickle with opcodes removed, inserted, doubled or replaced."""
    begins = [position for *_, position in pickletools.genops(description)]
    opcodes = [description[a:b] for a, b in zip(begins, [*begins[1:], len(description)], strict=True)]
    for _ in range(choose.randint(1, 3)):
        at, other = choose.randrange(len(opcodes) - 1), choose.randrange(len(opcodes))
        new = choose.choice(
            ([], [choose.choice(_OPCODES)], [opcodes[at]] * 2, [opcodes[other]], opcodes[at : at + 2][::-1])
        )
        opcodes[at : at + len(new[:2]) or at + 1] = new
    return b"".join(opcodes)


def _odd_fields(path: Path, choose: random.Random) -> bytes:
    """A JSON or YAML file with an odd value, without a field, or with damaged text."""
    data = path.read_bytes()
    if choose.random() < 0.3 or path.suffix == ".yaml":
        return (_changed if choose.random() < 0.7 else _moved)(data, 0, len(data), choose)
    fields = json.loads(data)
    inside = fields
    while True:
        key = choose.choice(list(inside))
        if not isinstance(inside[key], dict) or not inside[key] or choose.random() < 0.3:
            break
        inside = inside[key]
    if choose.random() < 0.2:
        del inside[key]
    else:
        inside[key] = choose.choice(_ODD_VALUES)
    return json.dumps(fields).encode()


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a conversion reads."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    if checkpoint.tokenizer is not None and checkpoint.layout == "GGUF":
        load_tokenizer(checkpoint.tokenizer)
    return tensors


def outcome(folder: Path, mutant: Mutant, original: Mapping[str, torch.Tensor]) -> tuple[str, str | None]:
    """The outcome of reading, and a description of it if it is not allowed."""
    before = set(sys.modules)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # for what does not come back to Python
    try:
        found, problem = read(folder), None
    except InputError as error:
        found, problem = None, None if str(folder) in str(error) else f"does not name the file: {error}"
    except BaseException as error:
        steps = "; ".join(
            f"{Path(s.filename).name}:{s.lineno}" for s in traceback.extract_tb(error.__traceback__)[-4:]
        )
        return "problem", f"{type(error).__name__}: {str(error)[:300]} ({steps})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    imported = {name for name in set(sys.modules) - before if not name.startswith("encodings.")}  # of odd text
    if imported := imported | set(_CANARIES) & sys.modules.keys():
        return "problem", f"imported {sorted(imported)[:5]}"
    if problem or found is None:
        return "problem" if problem else "refused", problem
    if mutant.region == "json" and "lm_head.weight" not in found:  # the changed configuration is tied
        original = {name: tensor for name, tensor in original.items() if name != "lm_head.weight"}
    places = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.items()} for each in (found, original)]
    kind = "other" if places[0] != places[1] else (
        "the original" if all(found[name].equal(tensor) for name, tensor in original.items()) else "other values"
    )  # fmt: skip
    allowed = {EXACT: ("the original",), STRUCTURE: ("the original", "other values"), REFUSED: ()}[mutant.rule]
    return (kind, None) if kind in allowed else ("problem", f"ends in {kind}, the rule is {mutant.rule}")


def run(sources: Path, kinds: list[str], number: int) -> dict[str, Any]:
    """Reads `number` mutants of each kind."""
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in kinds}
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        originals = {}
        for kind in kinds:
            shutil.copytree(sources / kind, Path(scratch) / kind)
            originals[kind] = read(Path(scratch) / kind)
        # Once before imports and memory are looked at: what a refusal needs is loaded then.
        for bounded, each in ((False, min(number, 6)), (True, number)):
            if bounded:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + ADDITIONAL_BYTES, resource.RLIM_INFINITY))
            for kind in kinds:
                folder = Path(scratch) / kind
                for i, mutant in enumerate(mutants(sources / kind, KINDS[kind], kind, each)):
                    (folder / mutant.file).write_bytes(mutant.data)
                    end, problem = outcome(folder, mutant, originals[kind])
                    shutil.copyfile(sources / kind / mutant.file, folder / mutant.file)
                    if bounded:
                        counts[kind][f"{mutant.region}: {end}"] += 1
                        problems += [f"{kind} {i}, {mutant.file}, {mutant.region}: {problem}"] if problem else []
    return {"counts": counts, "problems": problems}


def _stop(*_: Any) -> None:
    raise Hang


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _stop)
    printed, sys.stdout = sys.stdout, io.StringIO()  # "this" would print
    result = run(Path(sys.argv[1]), sys.argv[2].split("|"), int(sys.argv[3]))
    json.dump(result, printed)
