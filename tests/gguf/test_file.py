"""Reads GGUF headers, and refuses damaged ones."""

import random
import struct

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf.gguf_reader import GGUFReader as Library

from tinyllama_hf.errors import InputError
from tinyllama_hf.gguf.file import _TYPES, GGUFTensor, check_readable, read_header, read_values


METADATA = {"general.architecture": "llama", "a.string": "naïve ▁ 🚀", "a.flag": True, "a.number": 7, "a.negative": -3,
            "a.real": 0.5, "a.large": 2**40, "a.words": ["one", "", "three"], "a.reals": [0.5, -1.0]}  # fmt: skip


def write(path, alignment=None):
    """A small file with every kind of value and three tensors, written by the package `gguf`."""
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_string("a.string", METADATA["a.string"])
    writer.add_bool("a.flag", True)
    writer.add_uint32("a.number", 7)
    writer.add_int32("a.negative", -3)
    writer.add_float32("a.real", 0.5)
    writer.add_uint64("a.large", 2**40)
    writer.add_array("a.words", METADATA["a.words"])
    writer.add_array("a.reals", METADATA["a.reals"])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    writer.add_tensor("three", np.ones((1, 2, 3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "model.gguf")


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def text(value):
    return u64(len(value)) + value


def header(metadata=b"", keys=0, tensors=b"", count=0, values=b"", version=3):
    """The bytes of a hand-made file."""
    start = b"GGUF" + u32(version) + u64(count) + u64(keys) + metadata + tensors
    return start + b"\0" * (-len(start) % 32) + values


def tensor(name=b"t", shape=(4,), kind=0, offset=0):
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


class TestReading:
    @pytest.mark.parametrize("alignment", [None, 8, 64])
    def test_equals_the_library(self, tmp_path, alignment):
        path = write(tmp_path / "model.gguf", alignment)
        found, library = read_header(path), GGUFReader(path)
        assert {k: v for k, v in found.metadata.items() if k != "general.alignment"} == METADATA
        assert [(t.name, t.type, t.offset, t.num_bytes) for t in found.tensors.values()] == [
            (t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in library.tensors
        ]
        assert [t.shape for t in found.tensors.values()] == [(2, 3), (5,), (1, 2, 3, 4)]
        for own, theirs in zip(found.tensors.values(), library.tensors, strict=True):
            assert np.array_equal(read_values(path, own), theirs.data)

    @pytest.mark.slow
    def test_the_real_file(self, smollm2):
        path = next(smollm2.parent.rglob("*.gguf"))
        found, library = read_header(path), GGUFReader(path)
        assert found.metadata == {k: f.contents() for k, f in library.fields.items() if not k.startswith("GGUF.")}
        assert [(t.name, t.type, t.offset, t.num_bytes, t.shape[::-1]) for t in found.tensors.values()] == [
            (t.name, t.tensor_type.name, t.data_offset, t.n_bytes, tuple(t.shape.tolist())) for t in library.tensors
        ]

    def test_sizes_of_types_are_the_librarys(self):
        assert {kind: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} == _TYPES

    def test_a_type_that_is_not_read_is_named(self, path):
        with pytest.raises(
            InputError, match=r"one has the unsupported type IQ4_NL.*Q8_0, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K"
        ):
            check_readable(path, GGUFTensor("one", (32,), "IQ4_NL", 0, 18))


class TestDamage:
    DAMAGED = {
        "empty": b"",
        "magic": b"GGML" + header()[4:],
        "begin with GGUF": b"GG",
        "version 1": header(version=1),
        "big-endian": b"GGUF" + struct.pack(">I", 3) + header()[8:],
        "a metadata key at byte 32 has a length of": header(u64(2**63), 1),
        "k has the unknown type 13": header(text(b"k") + u32(13), 1),
        "k is neither true nor false": header(text(b"k") + u32(7) + b"\2", 1),
        "k is an array of type 9": header(text(b"k") + u32(9) + u32(9) + u64(1), 1),
        f"k has a length of {2**40} items": header(text(b"k") + u32(9) + u32(0) + u64(2**40), 1),
        "k has a length of 2000 items": header(text(b"k") + u32(9) + u32(8) + u64(2000) + b"\0" * 999, 1),
        "k at byte .* has a length of 4000000 bytes": header(text(b"k") + u32(9) + u32(4) + u64(10**6), 1),
        "not UTF-8": header(text(b"\xff") + u32(0) + b"\0", 1),
        "the metadata key 'k' is empty or repeated": header((text(b"k") + u32(0) + b"\0") * 2, 2),
        "general.alignment is 24": header(text(b"general.alignment") + u32(4) + u32(24), 1),
        "a number at byte 24": header(keys=2**60)[:24],
        "the tensor name 't' is empty or repeated": header(tensors=tensor() * 2, count=2),
        "t has 5 dimensions": header(tensors=tensor(shape=(1,) * 5), count=1),
        "t has 4294967295 dimensions": header(tensors=text(b"t") + u32(2**32 - 1), count=1),
        "t has the unknown type 99": header(tensors=tensor(kind=99), count=1),
        r"the shape \[33\]; rows of Q8_0": header(tensors=tensor(shape=(33,), kind=8), count=1),
        r"t has the shape \[0\]": header(tensors=tensor(shape=(0,)), count=1),
        "t ends at byte": header(tensors=tensor(shape=(2**63, 2**63, 4, 1)), count=1),
        "t ends at byte 80, but the file at 79": header(tensors=tensor(), count=1, values=b"\0" * 15),
        "overlaps": header(tensors=tensor(b"a", (16,)) + tensor(b"b", offset=32), count=2, values=b"\0" * 99),
        "not aligned to 32": header(tensors=tensor(offset=8), count=1, values=b"\0" * 99),
    }  # fmt: skip

    @pytest.mark.parametrize("message", DAMAGED)
    def test_is_named(self, tmp_path, message):
        path = tmp_path / "model.gguf"
        path.write_bytes(self.DAMAGED[message])
        pattern = "begin with GGUF" if message in ("empty", "magic") else message
        with pytest.raises(InputError, match=f"model.gguf: damaged or incomplete .*{pattern}"):
            read_header(path)

    def test_a_header_without_end(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(header(text(b"k") + u32(8) + u64(2**29), 1))
        with path.open("r+b") as stream:
            stream.truncate(2**30)  # sparse
        with pytest.raises(InputError, match="header is longer than"):
            read_header(path)

    def test_every_cut_is_found(self, path):
        whole = path.read_bytes()
        end = max(t.offset + t.num_bytes for t in read_header(path).tensors.values())
        for length in range(end):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match="damaged or incomplete"):
                read_header(path)

    def test_a_file_that_becomes_shorter(self, path):
        tensor = read_header(path).tensors["three"]
        path.write_bytes(path.read_bytes()[: tensor.offset + 4])
        with pytest.raises(InputError, match="ends within three"):
            read_values(path, tensor)

    def test_changed_bytes(self, path):
        """1500 files with changed bytes, half of them with extreme values for lengths."""
        whole, choose = path.read_bytes(), random.Random(0)
        end = read_header(path).tensors["one"].offset
        refused = 0
        for _ in range(1500):
            changed = bytearray(whole)
            for _ in range(choose.randint(1, 3)):
                at = choose.randrange(end)
                new = choose.choice((bytes([choose.randrange(256)]), b"\xff" * 8, u64(2**40), u64(2**63), b"\0" * 8))
                changed[at : at + len(new)] = new
            path.write_bytes(changed)
            try:
                read_header(path)
            except InputError:
                refused += 1
        assert 700 < refused < 1500  # a changed string or number is no damage that can be seen

    def test_the_librarys_reader_goes_on_behind_the_end(self, tmp_path, monkeypatch):
        """The reason for our own reader: if this fails, gguf checks lengths and could be used."""
        path = tmp_path / "model.gguf"
        path.write_bytes(self.DAMAGED[f"k has a length of {2**40} items"])
        read, calls = Library._get_field_parts, 0

        class Enough(Exception):
            pass

        def counted(self, *args):
            nonlocal calls
            calls += 1
            if calls > 10_000:
                raise Enough
            return read(self, *args)

        monkeypatch.setattr(Library, "_get_field_parts", counted)
        with pytest.raises(Enough):
            Library(path)
        assert path.stat().st_size < 100
