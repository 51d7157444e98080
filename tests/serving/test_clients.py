"""Other clients than `openai` on a real server: lm-eval, as `eval tasks --server` uses it, and huggingface_hub."""

import json

import pytest
from huggingface_hub import InferenceClient

from tests.evaluation.test_commonsense import save
from tests.serving.served import Server
from tinyllama_hf import load
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.evaluation.harness.served_model import find_served_model
from tinyllama_hf.evaluation.task_scores import score_tasks
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.options import Sampling


for package in ("aiohttp", "requests", "tenacity", "fastapi", "uvicorn"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    return save(tmp_path_factory.mktemp("clients") / "model", tokenizer_folder, 3, context=256)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    started = Server(folder, tmp_path_factory.mktemp("cwd"), "--dtype", "fp32", "--template", "llama2")
    yield started
    started.stop()


def test_lm_eval_scores_as_without_a_server(server, folder, tmp_path):
    """The same choice and log-likelihoods of every item, from echoed prompts of token ids."""
    names = ("arc_easy", "boolq", "hellaswag")
    found = []
    for name in ("local", "served"):
        options = {"limit": 4, "output": tmp_path / f"{name}.json", "samples": tmp_path / f"{name}.jsonl"}
        options["definition"] = define_protocol(tasks=names)
        served = find_served_model(str(folder), server.url) if name == "served" else None
        assert served is None or (served.takes_tokens and not served.no_choices)
        models = [] if served else [str(folder)]
        score_tasks(models, "embedded:sample", server=served, **options)
        rows = json.loads((tmp_path / f"{name}.json").read_text())["models"]
        items = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        scores = {name: (each["score"], each["items"]) for name, each in rows[0]["results"].items()}
        found.append((scores, [item["log_likelihoods"] for item in items]))
    assert found[0][0] == found[1][0] and len(found[0][1]) == 12
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_the_client_of_huggingface_hub(server, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)  # the server is local
    model, tokenizer = load(folder, dtype="float32")
    tokenizer.chat_template = load_template("llama2")
    expected = ChatSession(
        model, tokenizer, system="Be brief.", sampling=Sampling(0, 1.0, 12), write=lambda text: None
    ).say("One?")
    client = InferenceClient(base_url=server.url, api_key="none")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    whole = client.chat_completion(
        messages, model="model", max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].message.content.strip() == expected and len(whole.choices[0].logprobs.content) == 12
    parts = client.chat_completion(messages, model="model", max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices).strip() == expected
