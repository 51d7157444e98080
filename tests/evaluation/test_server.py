"""`eval tasks --server` against a real server with a real small model: the scores of the folder, or a refusal."""

import dataclasses
import json

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import run_here
from tests.evaluation.completions_server import CompletionsServer
from tests.evaluation.test_commonsense import save
from tests.evaluation.test_harness import SETTINGS, requests
from tinyllama_hf import load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.harness import server_harness, server_requests
from tinyllama_hf.evaluation.harness.kept_answers import KeptAnswers, count_kept
from tinyllama_hf.evaluation.harness.local_harness import TinyLlamaHarness
from tinyllama_hf.evaluation.harness.served_model import find_served_model
from tinyllama_hf.evaluation.harness.server_harness import ServerHarness
from tinyllama_hf.evaluation.harness.server_requests import api_address
from tinyllama_hf.evaluation.scored_items import read_scored_items
from tinyllama_hf.evaluation.task_scores import score_tasks
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol


for package in ("aiohttp", "requests", "tenacity"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    return save(tmp_path_factory.mktemp("server") / "model", tokenizer_folder, 3, context=256)


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def started(loaded):
    opened = CompletionsServer(*loaded)
    yield opened
    opened.close()


@pytest.fixture
def server(started, monkeypatch):
    started.reset()
    monkeypatch.setattr(server_harness, "FIRST_WAIT", 0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return started


@pytest.fixture
def num_probes(server, folder):
    """Number of requests before the first of a task."""
    find_served_model(str(folder), server.url)
    count = len(server.requests)
    server.reset()
    return count


def asked_once(server, num_probes) -> bool:
    """Whether no request of a task was sent twice."""
    prompts = [json.dumps(request["prompt"]) for request in server.requests[num_probes:]]
    return len(prompts) == len(set(prompts))


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    """The score file of the folder itself."""
    output = tmp_path_factory.mktemp("local") / "out.json"
    score_tasks([str(folder)], "embedded:sample", limit=2, output=output)
    return output


def score(server, folder, output, tasks=("arc_easy", "boolq"), **options):
    served, definition = find_served_model(str(folder), server.url), define_protocol(tasks=tasks)
    return score_tasks([], "embedded:sample", limit=2, output=output, definition=definition, server=served, **options)


def test_multiple_choice_has_the_scores_of_the_folder(server, folder, local, tmp_path):
    server.echo = "without the end"  # some servers have no log-probability of the end-of-sequence that they generate
    scored = score(server, folder, tmp_path / "out.json", ())
    theirs = json.loads(local.read_text())["models"][0]
    (row,) = scored.file.models
    assert row.path == f"{server.url}/v1/models/tiny" and row.name == "tiny (server)" and row.quantization == "none"
    items = read_scored_items(tmp_path / "out.json", row)
    expected = read_scored_items(local, dataclasses.replace(row, items_file=theirs["items_file"]))
    assert len(items) == len(expected) == 14
    for own, other in zip(items, expected, strict=True):
        assert (own.task, own.doc, own.chosen, own.gold) == (other.task, other.doc, other.chosen, other.gold)
        assert own.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-3)
    assert {task: score.score for task, score in row.results.items()} == {
        task: score["score"] for task, score in theirs["results"].items()
    }
    protocol, before = scored.file.protocol, json.loads(local.read_text())["protocol"]
    assert protocol.dtype == "server" and protocol.context_length == 256
    assert protocol.harness == f"{before['harness']} local-completions, token prompts"


def test_requests_that_are_too_long_are_cut_like_those_of_the_folder(server, folder, loaded):
    """A server generates one token after the prompt, so that its requests are two tokens shorter."""
    pairs = [
        ("word " * 400, "is too long"),
        ("", "The end"),
        ("A word ", "and more"),
        ("Once", " more"),
        ("Once", " more"),
    ]
    served = ServerHarness(find_served_model(str(folder), server.url), False, KeptAnswers("", {}, None))
    before = len(server.requests)
    found = served.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert len(server.requests) == before + 4 and served.num_cut == 1  # the same request once
    assert max(len(request["prompt"]) for request in server.requests[before:]) == 255
    local = TinyLlamaHarness(*loaded, add_bos_token=False, max_length=254)
    expected = local.loglikelihood(requests("loglikelihood", pairs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    texts = [("A short text.",), ("A text of several windows. " * 40,)]
    rolling = served.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert rolling[0] == pytest.approx(local.loglikelihood_rolling(requests("", texts[:1]))[0], abs=1e-3)
    assert rolling[1] < 10 * rolling[0]


@pytest.mark.parametrize("add_bos_token", [None, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_texts(server, folder, loaded, settings, add_bos_token):
    server.strips = True  # as decoding the new tokens alone does
    asked = requests("generate_until", [(prompt, settings) for prompt in ("Once upon a time", "x = ", "The answer")])
    served = ServerHarness(find_served_model(str(folder), server.url), add_bos_token, KeptAnswers("", {}, None))
    assert served.generate_until(asked) == TinyLlamaHarness(*loaded, add_bos_token=add_bos_token).generate_until(asked)


def test_text_prompts_where_tokens_are_refused(server, folder, loaded):
    server.takes_tokens, server.strips = False, True
    served = find_served_model(str(folder), server.url)
    assert not served.takes_tokens and served.harness("h") == "h local-completions, text prompts"
    asked = requests("generate_until", [("Once upon a time", SETTINGS[0])])
    found = ServerHarness(served, None, KeptAnswers("", {}, None)).generate_until(asked)
    assert found == TinyLlamaHarness(*loaded).generate_until(asked)
    assert server.requests[-1]["prompt"] == "Once upon a time"
    with pytest.raises(InputError, match=r"piqa: multiple choice needs .*does not accept token ids"):
        served.check_tasks({"gsm8k": "generate_until", "piqa": "multiple_choice"})


def test_samples_of_one_request_have_their_own_seeds_and_answers(server, folder):
    settings = {"until": [], "max_gen_toks": 2, "do_sample": True, "temperature": 1.0}
    kept = KeptAnswers("", {}, None)
    served = ServerHarness(find_served_model(str(folder), server.url), None, kept)
    asked = requests("generate_until", [("Once", settings)] * 3)
    served.generate_until(asked)
    assert sorted(request["seed"] for request in server.requests[-3:]) == [1234, 1235, 1236] and len(kept) == 3
    assert server.requests[-1]["temperature"] == 1.0
    count = len(server.requests)
    served.generate_until(asked)
    assert len(server.requests) == count


REFUSED = {
    "ignored": "it returns 1 log-probabilities for",
    "short": "in an echoed prompt",
    "shifted": "a token has log-probability -",
    "not finite": "not finite",
    "llama.cpp": "no logprobs.token_logprobs",
}


@pytest.mark.parametrize("echo", REFUSED)
def test_multiple_choice_is_refused_without_right_log_probabilities(server, folder, tmp_path, echo):
    server.echo = echo
    done = run_eval(server, folder, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "boolq" in done.stderr and "multiple choice needs log-probabilities of the prompt" in done.stderr
    assert REFUSED[echo] in done.stderr and not (tmp_path / "out.json").exists()
    assert len(server.requests) < 12


TASKS, NUM_REQUESTS = ("--task", "arc_easy", "--task", "boolq"), 12


def run_eval(server, folder, tmp_path, *options):
    arguments = ("--data", "embedded:sample", "--limit", "2", "--output", tmp_path / "out.json", *TASKS, *options)
    return run_here("tinyllama-hf", "eval", "tasks", folder, "--server", server.url, *arguments, cwd=tmp_path)


FAILURES = {
    "status 500": "status 500 Internal Server Error (out of memory)",
    "drop": "the connection was closed during a request",
    "not JSON": "the answer is not a JSON object (<html>)",
    "error object": "overloaded",
    "no text": "no logprobs.token_logprobs",
    "slow": "no answer within 1 seconds",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_server_loses_no_answer(server, num_probes, folder, local, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(server_harness, "ATTEMPTS", 2)
    monkeypatch.setattr(server_requests, "TIMEOUT", 1 if failure == "slow" else 60)
    server.failure, server.fail_from = failure, num_probes + 6
    stopped = run_eval(server, folder, tmp_path)
    assert stopped.returncode == 2 and stopped.stderr.count("\n") == 1, stopped.stderr
    assert FAILURES[failure] in stopped.stderr and f"{server.url}/v1/completions" in stopped.stderr
    assert ("attempt 1 of 2 failed" in stopped.stdout) == (failure != "no text")
    kept = count_kept(tmp_path / "out.json")
    assert 1 <= kept <= 6 and f"out.partial.jsonl has {kept} answers. Run the same command to resume" in stopped.stderr
    server.reset()
    resumed = run_eval(server, folder, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{kept} requests were answered before the interruption" in resumed.stdout
    assert not (tmp_path / "out.partial.jsonl").exists()
    assert asked_once(server, num_probes) and len(server.requests) == num_probes + NUM_REQUESTS - kept
    row, other = (json.loads(path.read_text())["models"][0] for path in (tmp_path / "out.json", local))
    assert {k: v["score"] for k, v in row["results"].items()} == {
        k: other["results"][k]["score"] for k in row["results"]
    }


def test_a_short_failure_is_waited_for(server, folder, tmp_path):
    server.failure, server.fail_from, server.num_failures = "status 500", 6, 5
    notes = []
    score(server, folder, tmp_path / "out.json", note=notes.append)
    # One note for all that fail at the same time. On a slow machine some of the five failures meet a second attempt.
    assert notes and all(f"attempt {number} of 5 failed" in note for number, note in enumerate(notes, start=1)), notes


def test_answers_of_a_folder_or_another_model_are_not_used(server, num_probes, folder, tmp_path, monkeypatch):
    """Of an evaluation that was interrupted."""
    output, add = tmp_path / "out.json", KeptAnswers.add

    def interrupt(self, answers):
        add(self, answers)
        if len(self) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptAnswers, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        score_tasks([str(folder)], "embedded:sample", 2, output=output, definition=define_protocol(tasks=["boolq"]))
    with pytest.raises(KeyboardInterrupt):
        score(server, folder, output)
    monkeypatch.setattr(KeptAnswers, "add", add)
    server.reset()
    server.names = ["other"]
    score(server, folder, output)
    assert asked_once(server, num_probes) and len(server.requests) == num_probes + NUM_REQUESTS
    assert count_kept(output) > 0  # of the others


def test_scored_again_only_if_the_server_is_another(server, num_probes, folder, tmp_path):
    notes, output, two = [], tmp_path / "out.json", define_protocol(tasks=["arc_easy", "boolq"])
    score(server, folder, output)
    count = len(server.requests)
    score(server, folder, output, note=notes.append)
    assert "on the same server; its weights are not known" in notes[0] and len(server.requests) == count + num_probes
    with pytest.raises(InputError, match=r"another protocol.*harness|another protocol.*dtype"):
        score_tasks([str(folder)], "embedded:sample", limit=2, output=output, definition=two)


def test_the_model_on_the_server(server, folder):
    assert find_served_model(str(folder), f"{server.url}/v1/completions").name == "tiny"
    server.names, server.context = ["first", "second"], {"max_model_len": 100}
    with pytest.raises(InputError, match=r"2 models: first, second\. Choose one with --server-model"):
        find_served_model(str(folder), server.url)
    with pytest.raises(InputError, match=r"--server-model 'seconds'.*did you mean 'second'"):
        find_served_model(str(folder), server.url, "seconds")
    found = find_served_model(str(folder), server.url, "second")
    assert (found.name, found.context_length, found.no_choices) == ("second", 100, "")
    server.context = {"meta": {"n_ctx": 90, "n_ctx_train": 1000}}  # of llama.cpp
    assert find_served_model(str(folder), server.url, "first").context_length == 90


def test_the_tokenizer_of_another_model(server, folder):
    server.extra_tokens = 7
    with pytest.raises(InputError, match="MODEL must have the tokenizer of the model on the server"):
        find_served_model(str(folder), server.url)


def test_no_weights_are_needed(server, folder, tmp_path):
    load_tokenizer(folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert find_served_model(str(tmp_path), server.url).no_choices == ""


def test_a_server_that_cannot_be_used(server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    server.key = "right"
    done = run_eval(server, folder, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "wrong" not in done.stderr
    assert 'status 401 Unauthorized ({"error": "a key is needed"}). Set the variable OPENAI_API_KEY' in done.stderr
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert find_served_model(str(folder), server.url).name == "tiny"
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/v1/models: cannot be reached .* Start the server"):
        find_served_model(str(folder), "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--server", "localhost:8000"), "--server localhost:8000: not the address"),
        (("--server", "http://u:secret@h"), "--server: remove user and password"),
        (("--server-model", "x"), "--server-model x: needs --server"),
        (("--server", "http://h", "--quantization", "nf4"), "--quantization: the model is loaded by --server"),
        (("--server", "http://h", "--device", "cpu", "--adapter", "a"), "--adapter, --device: the model is loaded"),
        (("other", "--server", "http://h"), "--server http://h: takes one MODEL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options(folder, tmp_path, options, message):
    options = tuple(folder if option == "other" else option for option in options)
    done = run_here("tinyllama-hf", "eval", "tasks", folder, *options, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_addresses():
    for given in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/completions"):
        assert api_address(given) == "http://h:1/v1"
    assert api_address("https://h/openai/v1") == "https://h/openai/v1"


def test_settings_that_cannot_be_sent_are_refused(server, folder):
    served = ServerHarness(find_served_model(str(folder), server.url), None, KeptAnswers("", {}, None))
    for settings, message in (({"num_beams": 4}, "num_beams not supported"), ({"max_gen_toks": 300}, "no room")):
        with pytest.raises(InputError, match=message):
            served.generate_until([Instance("generate_until", {}, ("Once", settings), 0, ("task", 0, 1))])
