"""Models that the tests of quantisation share."""

import pytest
import torch

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer


@pytest.fixture(scope="session")
def nano_folder(tokenizer_folder, tmp_path_factory):
    """A random model whose layers all fit the kernels, in fp32."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("nano", vocab_size=512, max_position_embeddings=64)).save_pretrained(
        path
    )
    load_tokenizer(tokenizer_folder).save_pretrained(path)
    return path
