"""The outcome of every request of serving_hours.py, and the check of its reply."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving_clients import Reply
from serving_mix import LENGTH_FIELDS, Planned


_SAME_TEXT = {"stream", "stream_options", "logprobs", "top_logprobs", "n"}  # they do not change a greedy reply


@dataclass
class Ledger:
    """The outcome of every request.

    Attributes:
        outcomes (`Counter`): number of requests by kind and outcome: `"answered"`, `"refused"`, `"left"`, `"lost"`
            (no answer, or a stream without its end) and `"wrong"`.
        problems (`list[dict]`): the requests that were lost or answered wrongly, each with what is wrong.
        greedy (`dict`): the first reply to each greedy request.
        compared (`int`): number of greedy replies that were compared with the first.
        too_many (`int`): number of replies with status 429.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    greedy: dict[str, str] = field(default_factory=dict)
    compared: int = 0
    too_many: int = 0

    def add(self, planned: Planned, reply: Reply, is_ending: bool = False) -> None:
        """Enters a request with its reply; a server that ends may refuse it."""
        outcome, problem = self._outcome(planned, reply, is_ending)
        body = planned.body if isinstance(planned.body, bytes) else json.dumps(planned.body).encode()
        self._enter(planned.kind, planned.path, body, reply, outcome, problem)

    def add_hostile(self, name: str, path: str, body: bytes, reply: Reply) -> None:
        """Enters a body that may be refused, or answered if it is valid; `name` is what it tries."""
        outcome, problem = "wrong", f"{name}: neither an answer nor OpenAI's form of an error"
        if reply.has_left:
            outcome, problem = "left", ""
        elif 400 <= reply.status < 500 and reply.is_refusal:
            outcome, problem = "refused", ""
        elif reply.is_answered and reply.is_complete:
            outcome, problem = "answered", ""
        self._enter("hostile body", path, body, reply, outcome, problem)

    def _enter(self, kind: str, path: str, body: bytes, reply: Reply, outcome: str, problem: str) -> None:
        self.outcomes[kind, outcome] += 1
        self.too_many += reply.status == 429
        if problem:
            row = {"kind": kind, "outcome": outcome, "problem": problem, "status": reply.status, "error": reply.error,
                   "path": path, "body": body[:1000].decode(errors="replace"), "body_bytes": len(body),
                   "texts": {str(i): text[:500] for i, text in reply.texts.items()}}  # fmt: skip
            self.problems.append(row)

    def _outcome(self, planned: Planned, reply: Reply, is_ending: bool) -> tuple[str, str]:
        if reply.has_left:
            return "left", ""
        is_refused = reply.status in (200, 429, 503) and reply.is_refusal  # 200: an event of a stream
        if is_ending and (is_refused or reply.was_refused_connection):
            return "refused", ""
        if reply.status == 0:
            return "lost", "no answer"
        if reply.status == 429:
            is_right = (reply.retry_after or "").isdecimal() and reply.is_refusal
            return ("refused", "") if is_right else ("wrong", "status 429 without Retry-After or an error")
        if planned.is_bad:
            is_right = 400 <= reply.status < 500 and reply.is_refusal
            return ("refused", "") if is_right else ("wrong", "must be refused with OpenAI's form of an error")
        if reply.status != 200 or reply.is_refusal:
            return "wrong", "a valid request was refused"
        if reply.error or not reply.is_complete:
            return "lost", "the answer ends before its end"
        problem = problem_of(planned, reply) or self._difference(planned, reply)
        return ("wrong", problem) if problem else ("answered", "")

    def _difference(self, planned: Planned, reply: Reply) -> str:
        """Returns what is wrong if a greedy reply is not that to the same request before."""
        if planned.body.get("temperature") != 0:
            return ""
        kept = {name: value for name, value in planned.body.items() if name not in _SAME_TEXT}
        key = json.dumps([planned.path, kept], sort_keys=True)
        first = self.greedy.setdefault(key, reply.texts[0])
        self.compared += len(reply.texts)
        return "" if set(reply.texts.values()) == {first} else f"another reply before: {first[:500]!r}"


def problem_of(planned: Planned, reply: Reply) -> str:
    """Returns what is wrong with a complete reply to a valid request, or an empty string."""
    body, number = planned.body, planned.body.get("n", 1)
    most = body[LENGTH_FIELDS[planned.path]]
    if set(reply.texts) != set(range(number)) or set(reply.finish_reasons) != set(range(number)):
        return f"choices {sorted(reply.texts)} with finish_reason of {sorted(reply.finish_reasons)}, not {number}"
    if reply.whole_text not in (None, reply.texts[0]):
        return f"the deltas are not the whole text, {reply.whole_text[:500]!r}"
    if wrong := set(reply.finish_reasons.values()) - {"stop", "length"}:
        return f"finish_reason {sorted(wrong)}"
    has_usage = "stream_options" in body or not body.get("stream") or planned.path == "response"
    if (reply.tokens is not None) != has_usage:
        return f"{reply.tokens} tokens by its usage, which {'was' if has_usage else 'was not'} asked for"
    if has_usage and not 0 <= reply.tokens <= number * most:
        return f"{reply.tokens} tokens by its usage; at most {number} x {most} were asked for"
    stops = body.get("stop", ())
    for stop in (stops,) if isinstance(stops, str) else stops:
        if any(stop in text for text in reply.texts.values()):
            return f"the text has the stop string {stop!r}"
    if "logprobs" in body and not (reply.logprobs or not any(reply.texts.values())):
        return "no log-probabilities"
    return "" if all(value <= 1e-6 for value in reply.logprobs) else "a log-probability above 0"


def lines_of(ledger: Ledger) -> Sequence[str]:
    """Returns the summary: outcomes by kind, and a request for each problem."""
    kinds = sorted({kind for kind, _ in ledger.outcomes})
    names = ("answered", "refused", "left", "wrong", "lost")
    lines = [f"{'':<50}" + "".join(f"{name:>10}" for name in names)]
    lines += [f"{kind:<50}" + "".join(f"{ledger.outcomes[kind, name]:>10,}" for name in names) for kind in kinds]
    first = {problem["problem"]: problem for problem in reversed(ledger.problems)}
    for problem in first.values():
        lines.append(f"{problem['outcome']}: {problem['kind']}: {problem['problem']}; status {problem['status']}, "
                     f"{problem['error']}\n    {problem['path']} {problem['body'][:300]}")  # fmt: skip
    return lines
