"""AWQ folders as a source: what their readers compute with, and what does not fit together."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.conversion.test_awq import MICRO, dequantised, random_model
from tinyllama_hf import convert, verify
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.errors import InputError


@pytest.fixture
def quantized(tmp_path):
    random_model(**MICRO).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", "awq", tmp_path / "awq")
    return tmp_path / "awq"


def test_the_weights_that_readers_compute_with(quantized, tmp_path):
    """Against a reader written from the published layout; once dequantised, it is a plain folder like any other."""
    config = AutoConfig.from_pretrained(quantized)
    del config.quantization_config
    wanted = dequantised(load_file(quantized / "model.safetensors"), config).state_dict()
    found = open_checkpoint(quantized)
    assert all(found.load(name).float().equal(wanted[name]) for name in found.tensors)
    convert(quantized, "llama", tmp_path / "plain")
    assert verify(quantized, tmp_path / "plain").largest == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert 0 < verify(tmp_path / "model", quantized, tolerance=5).largest


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 8}, "bits is 8; .* AWQ is 4"), ({"version": "gemv"}, "version is 'gemv'"),
     ({"group_size": 64}, "in groups of 64, which do not fit together"), ({"group_size": 0}, "in groups of 0"),
     ({"quant_method": "gptq"}, "holds quantised weights")],
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
    for changed, message in (({**tensors, name: tensors[name].to(torch.int16)}, "do not fit together"),
                             ({key: t for key, t in tensors.items() if key != name}, f"lacks its {part}")):  # fmt: skip
        save_file(changed, quantized / "model.safetensors", {"format": "pt"})
        (quantized / "provenance.json").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            open_checkpoint(quantized)
