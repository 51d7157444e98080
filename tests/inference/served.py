"""What the tests of the server share: a process of it, and requests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


openai = pytest.importorskip("openai")

CONTEXT = 400


class Server:
    """`tinyllama-hf serve` on a free port; no cache of the Hub is there."""

    def __init__(self, folder: Path, cwd: Path, *options: str):
        command = [Path(sys.executable).parent / "tinyllama-hf", "serve", folder, "--port", "0", *options]
        self.process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"HF_HOME": str(cwd / "nowhere"), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.greeting = self.process.stdout.readline()
        assert self.greeting.startswith("serving "), self.greeting + self.process.communicate(timeout=60)[0]
        self.url = self.greeting.split()[3].rstrip(";")
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def stop(self, number: int = signal.SIGINT) -> str:
        """What it printed, once it has ended."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[0]


def chat(client, *contents, **options):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return client.chat.completions.create(**{"model": "my-model", "messages": messages, "temperature": 0, **options})


def complete(client, prompt, **options):
    return client.completions.create(**{"model": "my-model", "prompt": prompt, "temperature": 0, **options})
