"""Requests of clients, after they have been read and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Refusal(Exception):
    """An error response.

    Args:
        message (`str`): names the field, its value, the rule and the fix.
        status (`int`, *optional*, defaults to 400): HTTP status.
        code (`str`, *optional*): OpenAI's code of the error, such as `model_not_found`.
        param (`str`, *optional*): the refused field.
        headers (`dict`, *optional*): HTTP headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.code, self.param, self.headers = message, status, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as clients of OpenAI's API expect it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """One sequence to generate.

    Attributes:
        ids (`tuple[int, ...]`): tokens of the prompt.
        max_new_tokens (`int`): maximum number of new tokens; 0 to score the prompt only.
        temperature (`float`): 0 for greedy decoding.
        top_p, top_k, min_p, repetition_penalty: as in `generate`; 1, 0, 0 and 1 change nothing.
        presence_penalty, frequency_penalty (`float`): as OpenAI defines them, over the new tokens.
        logit_bias (`Mapping[int, float]`): value to add to the logit of each token.
        min_new_tokens (`int`): minimum number of new tokens.
        seed (`int`, *optional*): determines the random numbers, together with the place of the row in its call.
        place (`int`): place of the row in its call.
        stop_strings (`tuple[str, ...]`): texts that end the reply and are not part of it.
        top_logprobs (`int`, *optional*): number of most likely tokens to report with each token; `None` for no
            log-probabilities.
        scores_prompt (`bool`): whether to report log-probabilities of the prompt too.
        is_drafted (`bool`): whether the server's draft proposes tokens.
        grammar (`str`, *optional*): grammar that the reply must follow, in llguidance's form.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_new_tokens: int = 0
    seed: int | None = None
    place: int = 0
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int | None = None
    scores_prompt: bool = False
    is_drafted: bool = True
    grammar: str | None = None


class Call(NamedTuple):
    """A request of OpenAI's API.

    Attributes:
        kind (`str`): the endpoint.
        rows (`list[RowRequest]`): the replies to generate, `n` for each prompt in turn.
        prompt_tokens (`int`): tokens of all prompts; each prompt is counted once for any `n`.
        is_streamed (`bool`): whether to send each piece as soon as it is ready.
        has_usage (`bool`): whether the stream ends with the number of tokens.
        prompt_texts (`list[str]`): with `echo`, the text of each row's prompt, else empty.
        given (`dict`): the fields that an answer of `/v1/responses` returns unchanged.
    """

    kind: Literal["chat", "completion", "response"]
    rows: list[RowRequest]
    prompt_tokens: int
    is_streamed: bool = False
    has_usage: bool = False
    prompt_texts: list[str] = []
    given: Mapping[str, Any] = {}
