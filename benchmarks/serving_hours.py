"""Mixed load for a long time: is every request answered, does memory grow, and does the server end in order?

    python benchmarks/serving_hours.py http://127.0.0.1:8000/v1 --minutes 30 \\
        --start "tinyllama-hf serve MODEL --port 8000" [--clients 12] [--burst 200] [--bodies 2000] [--signal INT]

Clients send chats, completions and responses, streaming and whole, with different lengths, sampling, stop strings, `n`
and log-probabilities. Some leave before the first token or after a few, and some send bad bodies. Bursts exceed the
queue, where status 429 with Retry-After is right. Greedy replies must equal the first one to the same request. Then
hostile bodies are sent one at a time, each with the processor time of the server's main thread, where its event loop
runs. Meanwhile `/health` is requested ten times a second. At the end the server gets a signal with requests under way:
each must be finished or refused, and the exit status must be 0. Without `--start`, for a server that is already
running, memory, processor time and the end are not observed. The exit status is 1 if anything is wrong.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession
from server_process import ServerProcess
from serving_clients import PATHS, Reply, model_name, percentile, send, session
from serving_ledger import Ledger, lines_of
from serving_mix import Planned, greedy, plan


MAX_GROWTH = 0.05  # of memory, from a sixth of the time to its end
MAX_BODY_MS = 100  # of the main thread's processor time
SECONDS_TO_ANSWER = 300
PAUSE_SECONDS = 0.5  # of a client after status 429, or without an answer
BODY_SECONDS = 3  # the client leaves if a hostile body is valid and its reply long
BURSTS = 10
END_TOKENS = 256  # of each reply that is under way at the end
_SAMPLES = 360  # of memory: each 5 seconds in 30 minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the API, ending in /v1")
    parser.add_argument("--start", metavar="COMMAND", help="starts the server")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--burst", type=int, default=200, help="requests at once, ten times")
    parser.add_argument("--bodies", type=int, default=2000, help="hostile bodies")
    parser.add_argument("--long-words", type=int, default=400, help="of one prompt in eight; it must fit the context")
    parser.add_argument("--signal", choices=("INT", "TERM"), default="INT", help="which ends the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="serving_hours", help="of the file of results")
    arguments = parser.parse_args()
    from common import save

    server = ServerProcess(arguments.start, arguments.url) if arguments.start else None
    try:
        figures, wrong = asyncio.run(Hours(arguments, server).run())
    finally:
        if server:
            server.kill()
    print(f"wrote {os.path.relpath(save(arguments.name, figures))}")
    if wrong:
        sys.exit("wrong: " + "; ".join(wrong))


class Health:
    """Requests to `/health`, ten times a second.

    Attributes:
        seconds (`list[float]`): time of each.
        failed (`int`): number of those without status 200.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failed = 0

    async def watch(self, client: ClientSession, url: str) -> None:
        """Requests it until the task is canceled."""
        while True:
            began = time.perf_counter()
            try:
                async with client.get(f"{url.removesuffix('/v1')}/health") as response:
                    self.failed += response.status != 200
            except (ClientError, TimeoutError):
                self.failed += 1
            self.seconds.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)

    def figures(self) -> dict[str, float]:
        """Returns number and percentiles."""
        times = {f"health_p{p}_ms": round(1e3 * percentile(self.seconds, p / 100), 1) for p in (50, 95, 100)}
        return {"health_requests": len(self.seconds), "health_failed": self.failed, **times}


class Hours:
    """The load on one server.

    Args:
        arguments (`Namespace`): of the command.
        server (`ServerProcess`, *optional*): the server, if it was started here.
    """

    def __init__(self, arguments: argparse.Namespace, server: ServerProcess | None):
        self.arguments, self.server, self.ledger = arguments, server, Ledger()
        self.url, self.model, self.health = arguments.url, "", Health()

    async def run(self) -> tuple[dict[str, Any], list[str]]:
        """Returns the figures, and what is wrong."""
        wanted = ("minutes", "clients", "burst", "bodies", "long_words", "signal", "seed")
        figures: dict[str, Any] = {name: getattr(self.arguments, name) for name in wanted}
        async with session(SECONDS_TO_ANSWER) as self.client:
            self.model = await model_name(self.client, self.url)
            figures["load"] = await self._with_health(self._mixed_load())
            figures["bodies"] = await self._with_health(self._hostile_bodies())
            if self.server:
                figures["end"] = await self._end(self.server)
        wrong = problems_in(figures, self.ledger)
        print("\n".join([json.dumps(figures, indent=1), *lines_of(self.ledger)]))
        counts = [
            {"kind": kind, "outcome": outcome, "requests": number}
            for (kind, outcome), number in sorted(self.ledger.outcomes.items())
        ]
        return {**figures, "wrong": wrong, "outcomes": counts, "problems": self.ledger.problems[:100]}, wrong

    async def _with_health(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        self.health = Health()
        watching = asyncio.create_task(self.health.watch(self.client, self.url))
        figures = await work
        watching.cancel()
        return figures | self.health.figures()

    async def _mixed_load(self) -> dict[str, Any]:
        seconds, began = 60 * self.arguments.minutes, time.perf_counter()
        server, seed = self.server, self.arguments.seed
        watching = asyncio.create_task(server.watch_memory(seconds / _SAMPLES)) if server else None
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.arguments.clients):
                tasks.create_task(self._one_client(random.Random(f"{seed} {number}"), began + seconds))
            for number in range(BURSTS):
                tasks.create_task(
                    self._burst(random.Random(f"{seed} burst {number}"), seconds * (number + 0.5) / BURSTS)
                )
        if watching:
            watching.cancel()
        figures = {
            "requests": self.ledger.outcomes.total(),
            "status_429": self.ledger.too_many,
            "greedy_requests": len(self.ledger.greedy),
            "greedy_replies": self.ledger.compared,
        }
        return figures | (growth(server.samples) if server else {})

    async def _one_client(self, draw: random.Random, end: float) -> None:
        while time.perf_counter() < end:
            await self._request(plan(draw, self.model, self.arguments.long_words))

    async def _burst(self, draw: random.Random, after_seconds: float) -> None:
        await asyncio.sleep(after_seconds)
        planned = [greedy(draw, "burst", self.model, 4) for _ in range(self.arguments.burst)]
        await asyncio.gather(*(self._request(one) for one in planned))

    async def _request(self, planned: Planned, is_ending: bool = False) -> None:
        reply = await self._send(planned.path, planned.body, planned.leave_seconds, planned.leave_after)
        self.ledger.add(planned, reply, is_ending)
        if reply.status in (0, 429) and not reply.has_left:
            await asyncio.sleep(PAUSE_SECONDS)

    async def _send(self, path: str, body: Any, leave_seconds: float | None, leave_after: int | None = None) -> Reply:
        try:
            async with asyncio.timeout(leave_seconds):
                return await send(self.client, f"{self.url}/{PATHS[path]}", body, leave_after)
        except TimeoutError:
            return Reply(has_left=True, seconds=leave_seconds or 0.0)

    async def _hostile_bodies(self) -> dict[str, Any]:
        """Sends each body alone; one that is valid after all may be answered, and the client leaves after a time."""
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.serving.hostile_bodies import hostile_bodies

        rows: list[dict[str, Any]] = []
        for name, path, body in hostile_bodies(self.arguments.bodies, self.arguments.seed):
            before = self.server.main_thread_seconds() if self.server else 0.0
            already = len(self.health.seconds)
            reply = await self._send(path, body, BODY_SECONDS)
            after = self.server.main_thread_seconds() if self.server else 0.0
            self.ledger.add_hostile(name, path, body, reply)
            row = {"body": f"{path}, {name}, {len(body):,} bytes", "ms": round(1e3 * reply.seconds)}
            row["main_thread_ms"] = round(1e3 * (after - before))
            row["health_ms"] = round(1e3 * max(self.health.seconds[already:], default=0))
            rows.append(row)
        keys = ("ms", "health_ms", *(["main_thread_ms"] if self.server else []))
        means = {f"{key}_mean": round(statistics.fmean(row[key] for row in rows), 2) for key in keys}
        return means | {f"{key}_largest": sorted(rows, key=lambda row, k=key: -row[k])[:5] for key in keys}

    async def _end(self, server: ServerProcess) -> dict[str, Any]:
        """Sends the signal while replies are generated, and a few requests after it."""
        draw = random.Random(f"{self.arguments.seed} end")
        long = [greedy(draw, "at the end", self.model, END_TOKENS) for _ in range(self.arguments.clients)]
        under_way = [asyncio.create_task(self._request(one, is_ending=True)) for one in long]
        await asyncio.sleep(0.05)
        number = sum(not task.done() for task in under_way)
        began = time.perf_counter()
        server.send_signal(signal.Signals[f"SIG{self.arguments.signal}"])
        late = [greedy(draw, "after the signal", self.model, 4) for _ in range(4)]
        await asyncio.gather(*under_way, *(self._request(one, is_ending=True) for one in late))
        status = await asyncio.to_thread(server.wait)
        seconds = round(time.perf_counter() - began, 2)
        return {"requests_under_way": number, "exit_status": status, "seconds": seconds}


def growth(samples: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """Returns the memory that is not shared after a sixth of the time and at its end, in megabytes, and the growth."""
    begin, window = len(samples) // 6, max(1, len(samples) // 20)
    unique = [sample[2] for sample in samples]
    before, after = statistics.median(unique[begin : begin + window]), statistics.median(unique[-window:])
    figures = {"memory_before": before, "memory_after": after, "memory_peak": max(sample[1] for sample in samples)}
    return {name: round(value, 1) for name, value in figures.items()} | {"growth": round(after / before - 1, 4)}


def problems_in(figures: dict[str, Any], ledger: Ledger) -> list[str]:
    """Returns what must not be."""
    wrong = [f"{len(ledger.problems)} requests were lost or answered wrongly"] if ledger.problems else []
    if (grown := figures["load"].get("growth", 0)) > MAX_GROWTH:
        wrong.append(f"memory grew by {grown:.1%}, more than {MAX_GROWTH:.0%}")
    largest = figures["bodies"].get("main_thread_ms_largest", [])
    wrong += [
        f"{row['main_thread_ms']} ms of the main thread for {row['body']}"
        for row in largest
        if row["main_thread_ms"] > MAX_BODY_MS
    ]
    failed = sum(figures[part]["health_failed"] for part in ("load", "bodies"))
    wrong += [f"{failed} requests for /health failed"] if failed else []
    status = figures.get("end", {}).get("exit_status", 0)
    return [*wrong, *([f"exit status {status}"] if status else [])]


if __name__ == "__main__":
    main()
