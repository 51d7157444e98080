"""Adapters of every kind, trained on a small stock model."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tinyllama_hf import TinyLlamaConfig, load_tokenizer


ROWS = 512
NEW_TOKENS = ["<|im_start|>", "<|im_end|>", "[PAD]"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ATTENTION = ["q_proj", "v_proj"]
KINDS = {
    "plain": {},
    "embeddings": {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "ranks": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
}
RESIZED = ("plain", "embeddings", "whole embeddings")
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in RESIZED]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tokenizer_folder, tmp_path_factory):
    """A stock model without a chat template."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TinyLlamaConfig(
        **sizes, vocab_size=ROWS, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=request.param
    )
    LlamaForCausalLM(config.to_llama()).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


def trained(base, kind, resized, folder, **saving):
    """Saves an adapter with its tokenizer; returns the trained model."""
    from peft import LoraConfig, get_peft_model

    tokenizer, model = load_tokenizer(base), LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    if resized:
        tokenizer.add_tokens(NEW_TOKENS, special_tokens=True)
        tokenizer.chat_template = TEMPLATE
        model.resize_token_embeddings(len(tokenizer))
    options = {"target_modules": ATTENTION, "r": 4, "task_type": "CAUSAL_LM", **KINDS[kind]}
    adapted = get_peft_model(model, LoraConfig(**options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return adapted.eval()
