"""Many clients at once on any server with OpenAI's API: tokens/s, time to the first token and per token, by clients.

    python benchmarks/serving_load.py ours=http://127.0.0.1:8000/v1 llama.cpp=http://127.0.0.1:8001/v1 \\
        --start "ours=tinyllama-hf serve MODEL --dtype fp32 --port 8000" \\
        --start "llama.cpp=python benchmarks/peers/serve_gguf.py MODEL.gguf --port 8001" \\
        --clients 1 2 4 8 --requests 32 --max-tokens 64 --check MODEL [--api completion] [--prompts FILE.jsonl]

Greedy streaming requests; each client sends its next request when its last one is answered. Servers and numbers of
clients take turns, and figures are medians of the rounds. `--start` starts a server, measures its highest resident set
(child processes included) and ends it; other servers must be running. `--check` compares each reply with that of
the package's `generate` alone, in fp32. Tokens are those of the server's usage, or pieces of its streams if it sends
none. `token` is the time per token after the first, for each reply; `wait` is the time between two pieces.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientSession
from server_process import ServerProcess
from serving_clients import PATHS, Reply, model_name, percentile, send, session


# 32 short questions.
TOPICS = ("the moon", "bread", "a river", "the heart", "rice", "a bicycle", "snow", "music")
QUESTIONS = ("What is {}?", "Write two sentences about {}.", "Why do people like {}?", "Tell me a fact about {}.")
# Title, figure, decimals.
COLUMNS = (
    ("requests/s", "requests_per_second", 2),
    ("tokens/s", "tokens_per_second", 1),
    ("times one client", "ratio", 2),
    ("first p50", "first_p50", 0),
    ("first p95", "first_p95", 0),
    ("token p50", "token_p50", 0),
    ("token p95", "token_p95", 0),
    ("wait p95", "wait_p95", 0),
    ("errors", "errors", 0),
    ("differ", "differing", 0),
)
SUMS = ("errors", "differing", "without_usage", "without_done")
NOTES = {
    "without_usage": "sends no usage; its tokens are the pieces of its streams",
    "without_done": "its streams end without [DONE]",
}
_MEMORY_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL", help="the URL ends in /v1")
    parser.add_argument("--start", action="append", default=[], metavar="NAME=COMMAND", help="starts this server")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL", help="default: the first listed")
    parser.add_argument("--api", choices=("chat", "completion"), default="chat")
    parser.add_argument("--prompts", type=Path, help='JSON lines with "messages" or "prompt"; default: 32 questions')
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=32, help="in each round of each number of clients")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="the model, to generate each reply alone")
    parser.add_argument("--name", default="serving_load", help="of the file of results")
    arguments = parser.parse_args()
    from common import save

    figures = asyncio.run(measure(arguments))
    print(f"wrote {os.path.relpath(save(arguments.name, figures))}")


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds and prints the table; returns the figures."""
    urls, commands, models = (pairs(given) for given in (arguments.servers, arguments.start, arguments.model))
    prompts = read_prompts(arguments.prompts, arguments.api)[: arguments.requests]
    expected = texts_alone(arguments.check, prompts, arguments.max_tokens) if arguments.check else None
    started: dict[str, ServerProcess] = {}
    try:
        for name, command in commands.items():  # one by one, so that those before one that fails are ended
            started[name] = ServerProcess(command, urls[name])
        async with session() as client, asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(server.watch_memory(_MEMORY_SECONDS)) for server in started.values()]
            models = {name: models.get(name) or await model_name(client, url) for name, url in urls.items()}
            bodies = {name: requests(prompts, models[name], arguments) for name in urls}
            rounds = await run_rounds(client, urls, bodies, expected, arguments)
            for task in watching:
                task.cancel()
        own = {
            name: {
                "start": re.sub(r"(?<![\w.])/\S*/", "", commands[name]),  # without the folders of this machine
                "start_seconds": round(server.start_seconds, 1),
                "peak_megabytes": round(max(rss for _, rss, _ in server.samples)),
                "exit_status": server.end(),
            }
            for name, server in started.items()
        }
    finally:
        for server in started.values():
            server.kill()
    rows = table_rows(rounds)
    print_table(rows, own)
    settings = {name: getattr(arguments, name) for name in ("api", "clients", "requests", "max_tokens", "rounds")}
    return {**settings, "prompts": len(prompts), "servers": own, "rows": rows}


async def run_rounds(
    client: ClientSession,
    urls: dict[str, str],
    bodies: dict[str, list[dict[str, Any]]],
    expected: Sequence[str] | None,
    arguments: argparse.Namespace,
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Returns the figures of each round, by server and number of clients."""
    addresses = {name: f"{url}/{PATHS[arguments.api]}" for name, url in urls.items()}
    most = max(arguments.clients)
    for name, address in addresses.items():  # the first requests also allocate memory and select kernels
        await replies_to(client, address, bodies[name][:most], most)
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {
        (name, clients): [] for name in urls for clients in arguments.clients
    }
    for _ in range(arguments.rounds):
        for clients in arguments.clients:
            for name, address in addresses.items():
                replies, seconds = await replies_to(client, address, bodies[name], clients)
                row = summary(replies, seconds, expected)
                rounds[name, clients].append(row)
                print(f"  {name}, {clients} clients: {row['tokens_per_second']:.1f} tokens/s", flush=True)
                for reply in [reply for reply in replies if not reply.is_answered][:1]:
                    print(f"    status {reply.status}: {reply.error or 'the stream ends without a finish_reason'}")
    return rounds


def requests(prompts: Sequence[dict[str, Any]], model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the bodies of a round."""
    options = {"model": model, "max_tokens": arguments.max_tokens, "temperature": 0}
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    return [prompts[number % len(prompts)] | options for number in range(arguments.requests)]


def pairs(given: Sequence[str]) -> dict[str, str]:
    """Returns `NAME=VALUE` words as a dictionary."""
    for word in given:
        if "=" not in word:
            raise SystemExit(f"{word}: must be NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in given)}


def read_prompts(path: Path | None, api: str) -> list[dict[str, Any]]:
    """Returns the fields of each request that hold its prompt."""
    key = {"chat": "messages", "completion": "prompt"}[api]
    if path is not None:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if missing := [number for number, line in enumerate(lines, 1) if key not in line]:
            raise SystemExit(f"{path}, line {missing[0]}: has no {key!r}, which --api {api} needs")
        return [{key: line[key]} for line in lines]
    questions = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    return [
        {"prompt": q} if api == "completion" else {"messages": [{"role": "user", "content": q}]} for q in questions
    ]


def texts_alone(folder: Path, prompts: Sequence[dict[str, Any]], max_tokens: int) -> list[str]:
    """Returns the text that `generate` gives for each prompt alone, greedily and in fp32."""
    from tinyllama_hf import load
    from tinyllama_hf.batch.prompts import chat_ids
    from tinyllama_hf.inference.generation import generate_ids, stop_token_ids
    from tinyllama_hf.inference.options import Sampling
    from tinyllama_hf.text import decode_text

    model, tokenizer = load(folder, "float32", "cpu")
    stop, texts = stop_token_ids(model, tokenizer), []
    for prompt in prompts:
        is_chat = "messages" in prompt
        ids = chat_ids(prompt["messages"], tokenizer) if is_chat else tokenizer(prompt["prompt"])["input_ids"]
        new = generate_ids(model, tokenizer, ids, max_tokens, Sampling(0, 1.0), eos_token_id=stop or None)
        new = [token for token in new if token not in stop]
        before = [] if is_chat else ids
        texts.append(decode_text(tokenizer, [*before, *new])[len(decode_text(tokenizer, before)) :])
    return texts


async def replies_to(
    client: ClientSession, url: str, bodies: Sequence[Any], clients: int
) -> tuple[list[Reply], float]:
    """Sends requests from a number of clients; returns the replies in order, and the seconds they took."""
    replies: list[Reply] = [Reply()] * len(bodies)
    ahead = iter(range(len(bodies)))

    async def one_client() -> None:
        for number in ahead:
            replies[number] = await send(client, url, bodies[number])

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    return replies, time.perf_counter() - began


def summary(replies: Sequence[Reply], seconds: float, expected: Sequence[str] | None) -> dict[str, float]:
    """Returns the figures of one round, times in milliseconds."""
    complete = [reply for reply in replies if reply.is_answered]
    tokens = sum(reply.num_tokens for reply in complete)
    with_text = [reply.arrivals for reply in complete if reply.arrivals]
    firsts = [arrivals[0] for arrivals in with_text]
    per_token = [
        (reply.arrivals[-1] - reply.arrivals[0]) / (reply.num_tokens - 1)
        for reply in complete
        if reply.num_tokens > 1 and reply.arrivals
    ]
    waits = [b - a for arrivals in with_text for a, b in itertools.pairwise(arrivals)]
    times = {"first": firsts, "token": per_token, "wait": waits}
    row = {"requests_per_second": len(complete) / seconds, "tokens_per_second": tokens / seconds}
    row |= {f"{name}_p{p}": 1e3 * percentile(values, p / 100) for name, values in times.items() for p in (50, 95)}
    row |= {"tokens": tokens, "errors": len(replies) - len(complete)}
    row |= {"without_usage": sum(reply.tokens is None for reply in complete)}
    row |= {"without_done": sum(not reply.is_complete for reply in complete)}
    if expected is not None:
        pairs_of_texts = [(r.texts.get(0, ""), expected[i % len(expected)]) for i, r in enumerate(replies)]
        row["differing"] = sum(text != other for text, other in pairs_of_texts)
    return row


def table_rows(rounds: dict[tuple[str, int], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Returns a row for each server and number of clients: medians of the rounds, and sums of what went wrong."""
    rows = []
    for (name, clients), found in rounds.items():
        row = {key: round(statistics.median(r[key] for r in found), 2) for key in found[0]}
        row |= {key: sum(r[key] for r in found) for key in SUMS if key in row}
        fewest = min(other for server, other in rounds if server == name)
        pairs_of_rows = zip(found, rounds[name, fewest], strict=True)
        ratios = [r["tokens_per_second"] / (one["tokens_per_second"] or math.nan) for r, one in pairs_of_rows]
        rows.append({"server": name, "clients": clients, **row, "ratio": round(statistics.median(ratios), 2)})
    return rows


def print_table(rows: Sequence[dict[str, Any]], own: dict[str, dict[str, Any]]) -> None:
    """Prints the rows as Markdown; times are in milliseconds."""
    columns = [column for column in COLUMNS if column[1] in rows[0]]
    print("| server | clients | " + " | ".join(title for title, _, _ in columns) + " |")
    print("|---|--:|" + "--:|" * len(columns))
    for row in rows:
        shown = (f"{row[key]:,.{decimals}f}" for _, key, decimals in columns)
        print(f"| {row['server']} | {row['clients']} | " + " | ".join(shown) + " |")
    for key, note in NOTES.items():
        for name in sorted({row["server"] for row in rows if row[key]}):
            print(f"{name}: {note}")
    for name, server in own.items():
        print(f"{name}: highest resident set {server['peak_megabytes']:,} MB, exit status {server['exit_status']}")


if __name__ == "__main__":
    main()
