"""Models that the tests of quantisation, and those of the server, share."""

import copy

import pytest
import torch

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.chat.templates import load_template


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


@pytest.fixture(scope="session")
def served_folder(tokenizer_folder, tmp_path_factory):
    """A random model that goes on for ever, as a base model whose tokenizer lies in SentencePiece's form alone."""
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=400))
    model.lm_head.weight.data[2] = 0.0
    folder = tmp_path_factory.mktemp("served") / "my-model"
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


@pytest.fixture(scope="module")
def local(served_folder):
    """The same model and tokenizer in this process."""
    model, tokenizer = load(served_folder)
    tokenizer.chat_template = load_template("llama2")
    return model, tokenizer


@pytest.fixture(scope="module")
def app(local):
    """The server's application for it."""
    from tinyllama_hf.inference.serving import build_app

    return build_app("my-model", *local)


@pytest.fixture(scope="module")
def client(app):
    """Asks the application in this process."""
    from starlette.testclient import TestClient

    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


@pytest.fixture(scope="module")
def target():
    """A micro model that says something else after every prompt, in fp32; it ends nowhere by itself."""
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=128, max_position_embeddings=64, num_hidden_layers=3)
    model = TinyLlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def draft(target):
    """One that agrees with the target most of the time."""
    torch.manual_seed(1)
    made = copy.deepcopy(target)
    for parameter in made.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter) * parameter.std()
    return made
