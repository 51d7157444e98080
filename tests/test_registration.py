"""What `import tinyllama_hf` does to the Auto classes, and what it costs."""

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tinyllama_hf
from tinyllama_hf.errors import InputError


OPTIONAL = ("trl", "peft", "bitsandbytes", "lm_eval", "datatrove", "datasets", "matplotlib", "gguf")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


ORDERS = ("import tinyllama_hf, transformers", "import transformers, tinyllama_hf")


@pytest.mark.parametrize("order", [ORDERS[0], pytest.param(ORDERS[1], marks=pytest.mark.slow)])
def test_a_fresh_process(tmp_path, order):
    """The import alone, in either order, makes the Auto classes know the model type.

    Their module keeps its own loader, which reads its source, and no optional package is imported.
    """
    config = tinyllama_hf.TinyLlamaConfig.preset("micro", vocab_size=64)
    tinyllama_hf.TinyLlamaForCausalLM(config).save_pretrained(tmp_path, as_tinyllama=True)
    code = (
        f"{order}; import inspect, sys;"
        f"print(type(transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__);"
        "auto = sys.modules['transformers.models.auto.configuration_auto'];"
        "print(auto.__loader__ is auto.__spec__.loader, 'CONFIG_MAPPING' in inspect.getsource(auto));"
        "print([f for f in sys.meta_path if 'tinyllama' in type(f).__module__]);"
        "tinyllama_hf.TinyLlamaForCausalLM; tinyllama_hf.load; print(*sys.modules)"
    )
    *found, loaded = python(code).splitlines()
    assert found == ["TinyLlamaForCausalLM", "True True", "[]"]
    assert not set(OPTIONAL).intersection(loaded.split())


def test_auto_classes(tmp_path, tokenizer_folder):
    config = AutoConfig.for_model(
        "tinyllama", num_hidden_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=512
    )
    assert type(config) is tinyllama_hf.TinyLlamaConfig
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is tinyllama_hf.TinyLlamaForCausalLM
    model.save_pretrained(tmp_path, as_tinyllama=True)
    # A folder with nothing but tokenizer.model gets the exact pipeline, where stock Llama gets another one.
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is tinyllama_hf.TinyLlamaTokenizer
    assert tokenizer.padding_side == "right"
    assert AutoTokenizer.from_pretrained(tmp_path, padding_side="left").padding_side == "left"
    with pytest.raises(InputError, match="setting 'subfolder'"):
        tinyllama_hf.TinyLlamaTokenizer.from_pretrained(tmp_path, subfolder="x")


def test_import_is_lean():
    loaded = python("import tinyllama_hf, sys; print(*sys.modules)").split()
    assert not {"torch", "transformers", *OPTIONAL}.intersection(loaded)


def test_public_names():
    for name in tinyllama_hf.__all__:
        assert getattr(tinyllama_hf, name) is not None
    assert dir(tinyllama_hf) == sorted(tinyllama_hf.__all__)
