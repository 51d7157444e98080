"""Why the package does not run `transformers serve` (5.23) itself. If a test fails, its workaround can go."""

import asyncio

import pytest
import torch
from huggingface_hub import CacheNotFound
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

from tests.serving.served import CONTEXT
from tinyllama_hf import load_tokenizer
from tinyllama_hf.serving.app import PATHS, OneModel


testclient = pytest.importorskip("starlette.testclient")


def test_reads_prompts_otherwise(served_folder):
    ours, stock = load_tokenizer(served_folder), AutoTokenizer.from_pretrained(served_folder)
    texts = ["def f(x):\n    return x", " x", "a </s> b"]
    assert all(stock(text)["input_ids"] != ours(text, split_special_tokens=True)["input_ids"] for text in texts)


def test_joins_words_and_leaves_the_context(local):
    model, tokenizer = local
    token = tokenizer.convert_tokens_to_ids("\u2581a")
    config = GenerationConfig(max_new_tokens=CONTEXT, pad_token_id=0, sequence_bias={(token,): 100.0})
    inputs = tokenizer("x", return_tensors="pt")
    text, length, new = asyncio.run(GenerateManager().generate_non_streaming(model, tokenizer, inputs, config, "1"))
    assert length + len(new) > CONTEXT
    assert tokenizer.decode([*inputs["input_ids"][0], *new], skip_special_tokens=True).startswith("x a a a")
    assert text.startswith("a a a")


def test_keeps_a_stop_string(local):
    model, tokenizer = local
    token = tokenizer.convert_tokens_to_ids("\u2581a")
    config = GenerationConfig(max_new_tokens=9, pad_token_id=0, sequence_bias={(token,): 100.0}, stop_strings="a a")
    inputs = tokenizer("x", return_tensors="pt")
    assert asyncio.run(GenerateManager().generate_non_streaming(model, tokenizer, inputs, config, "1"))[0] == "a a"


def test_cannot_stream_bytes_that_are_no_text(local):
    """A line break is a byte token in Llama's vocabulary."""
    _, tokenizer = local
    stream = DecodeStream([], skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix encountered"):
        for token in tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE2>", "\u2581a"]):
            stream.step(tokenizer._tokenizer, token)


def test_ignores_a_temperature():
    handler = BaseHandler(None, GenerationState())
    config = handler._build_generation_config({"temperature": 0.7}, GenerationConfig(do_sample=False))
    assert config.temperature == 0.7 and not config.do_sample


def test_fails_at_values():
    handler = CompletionHandler(None, GenerationState())
    for body in ({"max_tokens": "ten"}, {"seed": "x"}, {"generation_config": "nojson"}):
        with pytest.raises(ValueError, match=r"invalid literal|Expecting value"):
            handler._build_generation_config(body, GenerationConfig())


def test_leaves_the_models_settings_out_beside_those_of_a_request():
    body = {"generation_config": '{"top_k": 5}', "logit_bias": {"1": 1.0}}
    config = CompletionHandler(None, GenerationState())._build_generation_config(body, GenerationConfig(min_p=0.5))
    assert config.min_p is None and config.sequence_bias is None


def test_needs_a_cache_of_the_hub(tmp_path):
    with pytest.raises(CacheNotFound):
        ModelManager.get_gen_models(str(tmp_path / "nowhere"))


def test_seeds_when_a_request_comes():
    """Not when it is generated, so that other draws in between change the result."""
    with torch.random.fork_rng():
        CompletionHandler(None, GenerationState())._build_generation_config({"seed": 12345}, GenerationConfig())
        assert torch.initial_seed() == 12345


def test_streams_errors_as_a_text(local):
    handler = CompletionHandler(OneModel("my-model", *local), GenerationState())
    body = {
        "prompt": "x",
        "stream": True,
        "max_tokens": 2,
        "temperature": 1e-40,
        "generation_config": '{"do_sample": true}',
    }

    async def last():
        response = await handler.handle_request(body, "1")
        return [part async for part in response.body_iterator][-1]

    assert asyncio.run(last()).startswith('data: {"error": "probability tensor')


def test_streams_the_usage_unasked_and_no_end(local):
    handler = CompletionHandler(OneModel("my-model", *local), GenerationState())

    async def last():
        response = await handler.handle_request({"prompt": "x", "stream": True, "max_tokens": 2}, "1")
        return [part async for part in response.body_iterator][-1]

    end = asyncio.run(last())
    assert '"usage":{' in end and "[DONE]" not in end


def test_limits_bodies_in_plain_text():
    """Tests the middleware of Starlette (1.10)."""
    limit = pytest.importorskip("starlette.middleware.body_limit").RequestBodyLimitMiddleware

    async def app(scope, receive, send):
        await receive()

    answer = testclient.TestClient(limit(app, max_body_size=1)).post("/", content=b"xx")
    assert answer.status_code == 413 and answer.headers["content-type"].startswith("text/plain")


ROUTES = {
    "/openapi.json": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},  # a page that loads scripts of another server
    "/docs/oauth2-redirect": {"GET", "HEAD"},
    "/redoc": {"GET", "HEAD"},
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/responses": {"POST"},
    "/v1/systemone": {"POST"},  # decisions
    "/v1/audio/transcriptions": {"POST"},
    "/load_model": {"POST"},
    "/reset": {"POST"},  # unloads the models
    "/v1/models": {"GET", "OPTIONS"},
    "/health": {"GET"},
}


def test_routes(local):
    """Lists all endpoints; serving/app.py must decide about each new one."""
    manager = OneModel("my-model", *local)
    app = build_server(manager, None, None, None, None, None, GenerationState())
    found = {}
    for route in app.routes:
        found.setdefault(route.path, set()).update(route.methods)
    assert found == ROUTES and set(PATHS) <= ROUTES.keys()
    assert testclient.TestClient(app).post("/reset").status_code == 200 and not manager.loaded_models
