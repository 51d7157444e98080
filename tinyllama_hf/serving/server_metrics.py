"""Metrics of the server, in Prometheus' format."""

import functools
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .answers import Answer
from .scheduler import Scheduler


_PREFIX = "tinyllama_hf"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """Metrics of one server, in a separate registry.

    Args:
        scheduler (`Scheduler`): its rows are counted when the metrics are read.
    """

    def __init__(self, scheduler: Scheduler):
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": _PREFIX, "registry": self._registry}
        self._answers = Counter("answers", "Complete answers, by endpoint.", ["endpoint"], **own)
        self._tokens = Counter("tokens", "Tokens of complete answers, by kind.", ["kind"], **own)
        self._seconds = Histogram("answer_seconds", "Time of a complete answer.", buckets=_SECONDS, **own)
        self.first_token = Histogram("first_token_seconds", "Time to the first text.", buckets=_SECONDS, **own)
        for name in ("running", "waiting"):
            gauge = Gauge(f"rows_{name}", f"Replies that are {name} now.", **own)
            gauge.set_function(functools.partial(getattr, scheduler, name))

    def finished(self, answer: Answer, seconds: float) -> None:
        """Counts a complete answer."""
        self._answers.labels(answer.call.kind).inc()
        self._seconds.observe(seconds)
        self._tokens.labels("prompt").inc(answer.call.prompt_tokens)
        for name in ("new", "drafted", "accepted"):
            self._tokens.labels(name).inc(sum(getattr(reply.counts, name) for reply in answer.replies))

    def text(self) -> str:
        """Returns all metrics."""
        return generate_latest(self._registry).decode()
