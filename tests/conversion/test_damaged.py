"""Damaged and contradictory checkpoints are refused by a message that names what is wrong."""

import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tests.conversion import files, layouts
from tests.conversion.files import changed, filled, refuse
from tinyllama_hf import convert, load_tokenizer


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    return files.small_model()


STATES = {
    "int64": (lambda w: changed(w, UP, torch.Tensor.long), f"{UP}: dtype int64; it must be float32"),
    "float64": (lambda w: changed(w, UP, torch.Tensor.double), f"{UP}: dtype float64"),
    "an extra key": (lambda w: w | {"model.layers.1.bias": torch.ones(3)}, "model.layers.1.bias: .*no such tensor"),
    "a layer too many": (
        lambda w: w | {"model.layers.02.x.weight": torch.ones(3)},
        "layers.02.x.weight: .*no such tensor",
    ),
    "a missing key": (lambda w: {k: v for k, v in w.items() if k != UP}, f"1 tensors are missing, such as {UP}"),
    "a missing layer": (
        lambda w: {k: v for k, v in w.items() if "layers.1" not in k},
        "9 tensors are missing, such as model.lay",
    ),
    "another shape": (lambda w: changed(w, UP, lambda t: t.T.contiguous()), rf"{UP}: shape \[64, 96\]"),
    "a scalar": (lambda w: changed(w, NORM, lambda t: t[0]), rf"{NORM}: shape \[\]"),
    "nothing in it": (lambda w: changed(w, NORM, lambda t: t[:0]), rf"{NORM}: shape \[0\]"),
    "NaN": (lambda w: changed(w, UP, filled(float("nan"))), f"{UP}: 1 values are not finite"),
    "infinity": (lambda w: changed(w, NORM, filled(float("-inf"))), f"{NORM}: 1 values are not finite"),
    "two models": (
        lambda w: w | {f"module.{NORM}": w[NORM].clone()},
        "two tensor names differ only in the prefix",
    ),
    "quantized": (lambda w: w | {f"{UP[:-7]}.qweight": w[NORM].clone()}, "weights are quantized"),
    "another architecture": (lambda w: {"encoder.weight": w[NORM]}, "unknown layout"),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_tensors_that_make_no_model(name, container, model, tmp_path):
    change, message = STATES[name]
    source = files.write_folder(tmp_path / "model", *model)
    state = change(model[0])
    if container == "safetensors":
        save_file(state, source / "model.safetensors", {"format": "pt"})
    else:
        (source / "model.safetensors").unlink()
        torch.save(state, source / "pytorch_model.bin")
    refuse(source, message, tmp_path)


def test_shards_of_meta(model, tmp_path):
    source = layouts.write_meta(tmp_path / "model", *model, 2)
    shard, second = torch.load(source / "consolidated.01.pth"), source / "consolidated.01.pth"
    for change, message in (
        (lambda s: s | {"x": torch.ones(1)}, "shards contain different tensors"),
        (lambda s: s | {"output.weight": s["output.weight"][:-1]}, "shapes or dtypes in the shards differ"),
        (lambda s: s | {"tok_embeddings.weight": torch.tensor(1.0)}, "shapes or dtypes in the shards differ"),
        (lambda s: list(s.values()), "contains a list; it must be a state dict"),
    ):
        torch.save(change(shard), second)
        refuse(source, message, tmp_path)
    second.rename(source / "consolidated.02.pth")
    refuse(source, r"shards \[0, 2\]", tmp_path)


class TestShards:
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_index_and_shards_that_contradict_each_other(self, suffix, model, tmp_path):
        source = files.write_sharded(tmp_path / "model", *model, suffix)
        index = next(source.glob("*.index.json"))
        fields = json.loads(index.read_text())
        second = fields["weight_map"][UP]
        for weight_map, message in (
            ({UP: f"../model/{second}"}, f"{index.name}: damaged .*refers to '../model/{second}' outside its folder"),
            ({UP: f"/{second}"}, "outside its folder"),
            ({UP: "x" * 5000}, "file not found, but"),
            ({UP: ""}, "file not found, but"),
            ({UP: "none.bin"}, f"none.bin: file not found, but listed in {index.name}"),
            ({UP: 7}, "no weight_map"),
            ({"model.more": second}, f"{second}: damaged .*model.more is missing, but listed in {index.name}"),
        ):
            index.write_text(json.dumps({"weight_map": fields["weight_map"] | weight_map}))
            refuse(source, message, tmp_path)
        index.write_text(json.dumps(fields))
        (source / second).rename(tmp_path / "elsewhere")
        refuse(source, f"{second}: file not found, but listed in {index.name}", tmp_path)


class TestArchives:
    @pytest.fixture
    def archive(self, model, tmp_path):
        files.write_lit_gpt(tmp_path / "model", *model)
        return tmp_path / "model" / "lit_model.pth"

    def test_every_kind_of_cut(self, archive, tmp_path):
        whole = archive.read_bytes()
        for length in (0, 3, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
            archive.write_bytes(whole[:length])
            refuse(archive, "lit_model.pth: damaged or incomplete", tmp_path)

    def test_payload_is_held_against_its_checksum(self, archive, tmp_path):
        data = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as opened:
            record = next(info for info in opened.infolist() if info.filename.endswith("data/5"))
        data[record.header_offset + record.file_size] ^= 1
        archive.write_bytes(data)
        refuse(archive, "wrong checksum of lit_model/data/5", tmp_path)

    def test_another_zip(self, archive, tmp_path):
        held = [(f"lit_model/{name}", data) for name, data in files.records(archive).items()]
        description = next(entry for entry in held if entry[0] == "lit_model/data.pkl")
        big = ("lit_model/byteorder", b"big")
        for entries, options, message in (
            (held, {"compression": zipfile.ZIP_DEFLATED}, "is compressed or encrypted"),
            ([*held, ("other/data.pkl", description[1])], {}, "2 records data.pkl among"),
            ([entry for entry in held if entry != description], {}, "0 records data.pkl among"),
            ([("lit_model/data.pkl", description[1]), big], {}, "big-endian"),
        ):
            files.write_zip(archive, entries, **options)
            refuse(archive, message, tmp_path)
        with pytest.warns(UserWarning, match="Duplicate name"):
            files.write_zip(archive, [*held, held[0]])
        refuse(archive, "records data.pkl among", tmp_path)

    def test_an_encrypted_record(self, archive, tmp_path):
        data = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as opened:
            data[opened.start_dir + 8] |= 1
        archive.write_bytes(data)
        refuse(archive, "is compressed or encrypted", tmp_path)


def test_safetensors_with_a_torn_header(model, tmp_path):
    source = files.write_folder(tmp_path / "model", *model)
    file, whole = source / "model.safetensors", (source / "model.safetensors").read_bytes()
    for data in (
        whole[:200],
        whole[:-1],
        struct.pack("<Q", 2**63) + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole[:50] + whole[51:],
    ):
        file.write_bytes(data)
        refuse(source, "model.safetensors: damaged or incomplete", tmp_path)


def test_gguf_with_an_array_without_end(model, tmp_path):
    convert(files.write_folder(tmp_path / "model", *model), "gguf-f32", tmp_path / "gguf")
    file = tmp_path / "gguf" / "model-f32.gguf"
    whole = file.read_bytes()
    (tmp_path / "gguf" / "provenance.json").unlink()
    key = b"general.endless"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 4, 2**40)
    number = struct.unpack("<Q", whole[16:24])[0]
    file.write_bytes(whole[:16] + struct.pack("<Q", number + 1) + array + whole[24:])
    refuse(file, f"general.endless has a length of {2**40} items", tmp_path)
    file.write_bytes(whole[:-100])
    refuse(file, "the file at", tmp_path)


def test_llama2c_of_another_size(model, tmp_path):
    file = layouts.write_llama2c(tmp_path / "model.bin", *model)
    file.write_bytes(file.read_bytes()[:-4])
    refuse(file, "model.bin: damaged or incomplete .*unlike safetensors, torch's zip, GGUF and llama2.c", tmp_path)


def test_a_tokenizer_with_more_tokens_than_rows(tokenizer_folder, tmp_path):
    source = files.write_folder(tmp_path / "model", *files.small_model(rows=500))
    load_tokenizer(tokenizer_folder).save_pretrained(source)
    refuse(source, "ids up to 511, but the model has 500 embedding rows", tmp_path)


def test_hashes_that_no_longer_hold(model, tmp_path):
    source = files.write_folder(tmp_path / "model", *model)
    convert(source, "llama", tmp_path / "first")
    file, record = tmp_path / "first" / "model.safetensors", tmp_path / "first" / "provenance.json"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refuse(
        tmp_path / "first",
        "model.safetensors: damaged .*its SHA-256 differs from the one in provenance.json",
        tmp_path,
    )
    for hashes, message in (
        ({"x" * 5000: ""}, "file not found, but listed in provenance.json"),
        ({"../a": ""}, "first/a: file not found"),
    ):
        record.write_text(json.dumps({"sha256": hashes}))
        refuse(tmp_path / "first", message, tmp_path)
    record.write_text("[]")
    refuse(tmp_path / "first", "provenance.json: damaged .*not a JSON object", tmp_path)
