"""A model, and the application that serves it."""

import pytest
import torch

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load
from tinyllama_hf.chat.templates import load_template


@pytest.fixture(scope="session")
def served_folder(tokenizer_folder, tmp_path_factory):
    """A random base model that never stops; its tokenizer is a SentencePiece file only."""
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
def reader(local):
    """Reads requests to this model."""
    from tinyllama_hf.serving.request_fields import Limits, RequestReader

    return RequestReader("my-model", local[1], Limits.of(*local))


@pytest.fixture(scope="module")
def app(local):
    """The application of the server for this model."""
    from tinyllama_hf.serving.app import ServerOptions, build_app

    made = build_app("my-model", *local, options=ServerOptions(page=True), described={"quantization": "none"})
    yield made
    made.state.service.scheduler.close(0)


@pytest.fixture(scope="module")
def client(app):
    """A client of the application in this process."""
    from starlette.testclient import TestClient

    return TestClient(app, "http://127.0.0.1", raise_server_exceptions=False, follow_redirects=False)
