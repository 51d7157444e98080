"""Answers in the form of OpenAI's API, whole or as a stream of events: chat completions and completions."""

import abc
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from .call import Call, Refusal
from .row_text import Counts, Piece, TokenScore


class Reply:
    """The text generated so far for one row."""

    def __init__(self) -> None:
        self.text, self.finish_reason, self.counts = "", "length", Counts()
        self.scores: list[TokenScore] = []


class Answer(abc.ABC):
    """The answer to a call, from the pieces of its rows.

    Args:
        call (`Call`): the call.
        model (`str`): name of the model.
        vocabulary (`LLTokenizer`): returns the bytes of tokens.
    """

    prefix, kind = "", ""  # prefix of the id, and type of the object

    def __init__(self, call: Call, model: str, vocabulary: Any):
        self.call, self.model, self._vocabulary = call, model, vocabulary
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.replies = [Reply() for _ in call.rows]

    def begin(self) -> Iterable[str]:
        """Yields the events before the first piece."""
        return ()

    @abc.abstractmethod
    def events(self, piece: Piece) -> Iterable[str]:
        """Yields the events of a piece that was added."""

    @abc.abstractmethod
    def end(self) -> Iterable[str]:
        """Yields the events after the last piece."""

    @abc.abstractmethod
    def whole(self) -> dict[str, Any]:
        """Returns the complete answer."""

    def failed(self, refusal: Refusal) -> Iterable[str]:
        """Yields the events for an error after the stream has started."""
        yield event(refusal.body)

    def add(self, piece: Piece) -> None:
        """Receives a piece.

        Raises:
            Refusal: if the row failed.
        """
        if piece.error is not None:
            raise piece.error
        reply = self.replies[piece.place]
        reply.text += piece.text
        reply.scores += piece.scores
        if piece.is_last:
            reply.finish_reason, reply.counts = piece.finish_reason or "", piece.counts

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts, with those of a draft in OpenAI's fields for predicted tokens."""
        new, drafted, accepted = (
            sum(counts) for counts in zip(*(reply.counts for reply in self.replies), strict=True)
        )
        prompt = self.call.prompt_tokens
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        if drafted:
            details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
            usage["completion_tokens_details"] = details
        return usage

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of a token, which may be a part of a character."""
        return self._vocabulary.decode_bytes([token])


class _Completion(Answer):
    """Shared by both kinds of completions."""

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        with_usage = {"usage": usage} if self.call.has_usage else {}
        return event({**self._head(self.stream_kind), "choices": choices, **with_usage})

    stream_kind = ""

    def end(self) -> Iterable[str]:
        if self.call.has_usage:
            yield self.chunk([], self.usage)
        yield "data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        choices = [self.choice(place, reply) for place, reply in enumerate(self.replies)]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage}

    @abc.abstractmethod
    def choice(self, place: int, reply: Reply) -> dict[str, Any]:
        """Returns the complete reply of a row."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatAnswer(_Completion):
    """The answer of `/v1/chat/completions`."""

    prefix, kind, stream_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> Iterable[str]:
        for place in range(len(self.replies)):
            yield self._delta(place, {"role": "assistant", "content": ""})

    def events(self, piece: Piece) -> Iterable[str]:
        if piece.text or piece.scores:
            yield self._delta(piece.place, {"content": piece.text}, self._logprobs(piece.scores))
        if piece.is_last:
            yield self._delta(piece.place, {}, finish_reason=piece.finish_reason)

    def choice(self, place: int, reply: Reply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        wanted = self.call.rows[place].top_logprobs is not None
        logprobs = self._logprobs(reply.scores) if wanted else None
        return {"index": place, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def _delta(self, place: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: Any = None) -> str:
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.chunk([choice])

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        content = [
            {**self._scored(each.token, each.logprob), "top_logprobs": [self._scored(*top) for top in each.top]}
            for each in scores
        ]
        return {"content": content, "refusal": None} if content else None

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_bytes(token)
        return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}


class TextAnswer(_Completion):
    """The answer of `/v1/completions`."""

    prefix, kind, stream_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: Call, model: str, vocabulary: Any):
        super().__init__(call, model, vocabulary)
        self._echoes = dict(enumerate(call.prompt_texts))
        self._num_scored = [0] * len(call.rows)  # tokens
        self._offset = [0] * len(call.rows)  # characters of the tokens of the prompt so far

    def events(self, piece: Piece) -> Iterable[str]:
        text = self._echoes.pop(piece.place, "") + piece.text
        if text or piece.scores or piece.is_last:
            yield self.chunk([self._choice(piece.place, text, piece.scores, piece.finish_reason)])

    def choice(self, place: int, reply: Reply) -> dict[str, Any]:
        text = self._echoes.get(place, "") + reply.text
        return self._choice(place, text, reply.scores, reply.finish_reason)

    def _choice(
        self, place: int, text: str, scores: Sequence[TokenScore], finish_reason: str | None
    ) -> dict[str, Any]:
        wanted = self.call.rows[place].top_logprobs is not None
        logprobs = self._logprobs(place, scores) if wanted else None
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, place: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        row, tops = self.call.rows[place], []
        for each in scores:
            top = [*each.top, (each.token, each.logprob)]
            # Tokens may have equal text; the more likely one is reported.
            tops.append({self._text(token): logprob for token, logprob in reversed(top)} if each.top else None)
        return {
            "tokens": [self._text(each.token) for each in scores],
            "token_logprobs": [each.logprob for each in scores],
            "top_logprobs": tops,
            "text_offset": [self._place_in_text(place, each, len(row.ids)) for each in scores],
        }

    def _place_in_text(self, place: int, score: TokenScore, num_prompt_tokens: int) -> int:
        """Returns the offset of a token in the text, including the prompt if it is echoed."""
        is_prompt = self.call.rows[place].scores_prompt and self._num_scored[place] < num_prompt_tokens
        self._num_scored[place] += 1
        if not is_prompt:
            return self._offset[place] + score.offset
        offset = self._offset[place]
        self._offset[place] += len(self._text(score.token))
        return offset

    def _text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")


def event(data: dict[str, Any], name: str | None = None) -> str:
    """Returns a server-sent event."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {json.dumps(data, ensure_ascii=False)}\n\n"
