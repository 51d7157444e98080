"""Packed weights: the same products up to rounding, nothing that could be lost without an error."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference import packed_weights
from tinyllama_hf.inference.packed_weights import PackedLinear, pack_weights


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    monkeypatch.setattr(packed_weights, "processor_name", lambda: "AMD EPYC")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, attention_bias=True, tie_word_embeddings=True)
    return TinyLlamaForCausalLM(config).eval()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (8, 1), (1, 64), (2, 33)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits(model, shape, mode):
    ids = torch.randint(0, 512, shape)
    packed = copy.deepcopy(model)
    assert pack_weights(packed) == 1 + 7 * model.config.num_hidden_layers
    with mode():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=0, atol=2e-5)
    assert packed.model.embed_tokens.weight.equal(model.model.embed_tokens.weight) and pack_weights(packed) == 0


def test_generated_text(model):
    prompt = torch.tensor([[5, 17, 33]])
    packed = copy.deepcopy(model)
    pack_weights(packed)
    found = [each.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0) for each in (model, packed)]
    assert found[0].equal(found[1])


def test_a_packed_model_is_not_saved_without_its_weights(model, tmp_path):
    pack_weights(model)
    with pytest.raises(InputError, match="packed, and cannot be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="packed, and cannot be saved"):
        model.state_dict()


def test_what_is_not_packed(model, monkeypatch):
    """Other dtypes, layers below an adapter, which reads their weights, and where torch's own product is as fast."""
    assert pack_weights(copy.deepcopy(model).bfloat16()) == 0
    assert pack_weights(copy.deepcopy(model).double()) == 0
    with monkeypatch.context() as patched:
        patched.setattr(packed_weights, "processor_name", lambda: "Intel(R) Xeon(R)")
        assert pack_weights(copy.deepcopy(model)) == 0
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert pack_weights(adapted) == 0 and not any(isinstance(each, PackedLinear) for each in adapted.modules())
