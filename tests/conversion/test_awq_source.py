"""AWQ folders as a source: the weights that readers compute with, and inconsistent folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.conversion.test_awq import MICRO, dequantize_awq, random_model
from tinyllama_hf import convert, verify
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.errors import InputError


@pytest.fixture
def quantized(tmp_path):
    random_model(**MICRO).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", "awq", tmp_path / "awq")
    return tmp_path / "awq"


def test_the_weights_that_readers_compute_with(quantized, tmp_path):
    """Compares with a reader written from the published layout; the dequantized folder is an ordinary one."""
    config = AutoConfig.from_pretrained(quantized)
    del config.quantization_config
    wanted = dequantize_awq(load_file(quantized / "model.safetensors"), config).state_dict()
    found = open_checkpoint(quantized)
    assert all(found.load(name).float().equal(wanted[name]) for name in found.tensors)
    convert(quantized, "llama", tmp_path / "plain")
    assert verify(quantized, tmp_path / "plain").largest == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert 0 < verify(tmp_path / "model", quantized, tolerance=5).largest


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 8}, "bits is 8; AWQ supports only 4"), ({"version": "gemv"}, "version is 'gemv'"),
     ({"group_size": 64}, "inconsistent for group_size 64"), ({"group_size": 0}, "inconsistent for group_size 0"),
     ({"quant_method": "gptq"}, "weights are quantized")],
)  # fmt: skip
def test_other_kinds(quantized, change, message):
    fields = json.loads((quantized / "config.json").read_text())
    fields["quantization_config"] |= change
    (quantized / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        open_checkpoint(quantized)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_part_that_is_missing_or_of_another_type(quantized, part):
    tensors = load_file(quantized / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    for changed, message in (
        ({**tensors, name: tensors[name].to(torch.int16)}, "inconsistent for group_size 128"),
        ({key: t for key, t in tensors.items() if key != name}, f"up_proj.{part} is missing"),
    ):
        save_file(changed, quantized / "model.safetensors", {"format": "pt"})
        (quantized / "provenance.json").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            open_checkpoint(quantized)
