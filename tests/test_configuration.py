"""The configuration: published presets, checked fields, plain form."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from tinyllama_hf import TinyLlamaConfig
from tinyllama_hf.errors import InputError
from tinyllama_hf.presets import PRESETS


def test_1_1b_is_the_published_architecture(shared):
    import yaml

    facts = yaml.safe_load((shared / "facts" / "released.yaml").read_text())["architecture"]
    config = TinyLlamaConfig.preset("1.1b")
    assert config.num_hidden_layers == facts["layers"]
    assert config.hidden_size == facts["hidden_size"]
    assert config.num_attention_heads == facts["attention_heads"]
    assert config.num_key_value_heads == facts["key_value_heads"]
    assert config.head_dim == facts["head_dim"]
    assert config.intermediate_size == facts["intermediate_size"]
    assert config.max_position_embeddings == facts["context"]
    assert config.vocab_size == facts["vocab"]
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == facts["rope_theta"]
    assert config.tie_word_embeddings is False
    sibling = TinyLlamaConfig.preset("120m")
    assert facts["smaller_sibling_120m"] == {
        "layers": sibling.num_hidden_layers,
        "hidden_size": sibling.hidden_size,
        "attention_heads": sibling.num_attention_heads,
        "key_value_heads": sibling.num_key_value_heads,
        "intermediate_size": sibling.intermediate_size,
    }


@pytest.mark.parametrize("preset", ["nano", "micro"])
def test_small_presets_fit_blocks_of_128_and_share_keys(preset):
    config = TinyLlamaConfig.preset(preset)
    widths = (config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim)
    assert all(width % 128 == 0 for width in widths), widths
    assert config.num_key_value_heads < config.num_attention_heads


def test_own_fields_are_checked():
    """A subclass of a strict dataclass is not strict by default."""
    with pytest.raises(StrictDataclassFieldValidationError):
        TinyLlamaConfig(num_hidden_layers="many")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'nano'"):
        TinyLlamaConfig.preset("nanno")


def test_unknown_field_names_the_nearest():
    with pytest.raises(InputError, match=r"hiden_size=3: .* did you mean 'hidden_size'"):
        TinyLlamaConfig.preset("nano", hiden_size=3)
    assert TinyLlamaConfig.preset("nano", rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    assert set(PRESETS) == {"1.1b", "120m", "nano", "micro"}


def test_round_trip_through_plain_llama():
    config = TinyLlamaConfig.preset(
        "micro", vocab_size=77, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    )
    back = TinyLlamaConfig.from_llama(config.to_llama())
    assert back.to_dict() == config.to_dict()
