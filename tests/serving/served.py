"""Helpers of the server tests: a server process, and requests to it or to the application in this process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


openai = pytest.importorskip("openai")

CONTEXT = 400


class Server:
    """`tinyllama-hf serve` on a free port, without a Hub cache."""

    def __init__(self, folder: Path, cwd: Path, *options: str):
        command = [Path(sys.executable).parent / "tinyllama-hf", "serve", folder, "--port", "0", *options]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"HF_HOME": str(cwd / "nowhere"), "PYTHONUNBUFFERED": "1"},
        )
        lines = [self.process.stdout.readline()]
        while not lines[-1].startswith("serving "):  # on a busy machine, after a note that libraries are loading
            assert lines[-1], "".join(lines)  # it ended
            lines.append(self.process.stdout.readline())
        self.greeting = lines[-1]
        self.url = self.greeting.split()[3].rstrip(";")
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def stop(self, number: int = signal.SIGINT) -> str:
        """Waits for the end and returns the output."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[0]


def chat(client, *contents, **options):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return client.chat.completions.create(**{"model": "my-model", "messages": messages, "temperature": 0, **options})


def complete(client, prompt, **options):
    return client.completions.create(**{"model": "my-model", "prompt": prompt, "temperature": 0, **options})


GENERATING = ("completions", "chat/completions", "responses")
_PROMPTS = {"chat/completions": {"messages": [{"role": "user", "content": "x"}]}, "responses": {"input": "x"}}


def post(client, body, path):
    """Posts a body, and adds the prompt of the endpoint if the body is an object without one."""
    whole = {**_PROMPTS.get(path, {"prompt": "x"}), **body} if isinstance(body, dict) else body
    data = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
    return client.post(f"/v1/{path}", content=data, headers={"Content-Type": "application/json"})


def ask(client, body, path="completions"):
    """Returns status and answer, or error, of a request; also of requests that the `openai` client cannot make."""
    answer = post(client, body, path)
    return answer.status_code, answer.json() if answer.is_success else answer.json()["error"]


def stream(client, body, path="completions"):
    """Returns the events of a stream: objects, and the text of the last one."""
    lines = post(client, {"stream": True, **body}, path).text.splitlines()
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in found]


def text_of(answer):
    """Returns the generated text of an answer of any endpoint."""
    if "output" in answer:
        return answer["output"][-1]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]
