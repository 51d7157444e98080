"""The answer of `/v1/responses`: one message, whole or as events. Nothing is stored."""

import itertools
import secrets
from collections.abc import Iterable
from typing import Any

from .answers import Answer, event
from .call import Call, Refusal
from .row_text import Piece


class ResponseAnswer(Answer):
    """See [`Answer`]."""

    prefix = "resp"

    def __init__(self, call: Call, model: str, vocabulary: Any):
        super().__init__(call, model, vocabulary)
        self._item_id = f"msg-{secrets.token_hex(12)}"
        self._numbers = itertools.count()

    def begin(self) -> Iterable[str]:
        response = self._response("in_progress", [])
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._in_part("response.content_part.added", part=_part(""))

    def events(self, piece: Piece) -> Iterable[str]:
        if piece.text:
            yield self._in_part("response.output_text.delta", delta=piece.text, logprobs=[])

    def end(self) -> Iterable[str]:
        whole, text = self.whole(), self.replies[0].text
        yield self._in_part("response.output_text.done", text=text, logprobs=[])
        yield self._in_part("response.content_part.done", part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, refusal: Refusal) -> Iterable[str]:
        yield self._event("error", **refusal.body["error"])

    def whole(self) -> dict[str, Any]:
        (reply,) = self.replies
        status = "completed" if reply.finish_reason == "stop" else "incomplete"
        return self._response(status, [self._item(status, [_part(reply.text)])])

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        response: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **self.call.given,
        }
        if output:
            used = self.usage
            response["usage"] = {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            }
        return response

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _in_part(self, name: str, **fields: Any) -> str:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> str:
        return event({**fields, "type": name, "sequence_number": next(self._numbers)}, name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
