"""What a client asks for, after its request was read and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Refusal(Exception):
    """An answer with an error.

    Args:
        message (`str`): names the field, its value, the rule and the fix.
        status (`int`, *optional*, defaults to 400): HTTP status.
        code (`str`, *optional*): OpenAI's code of the error, such as `model_not_found`.
        param (`str`, *optional*): the field that is refused.
        headers (`dict`, *optional*): HTTP headers of the answer.
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
        max_new_tokens (`int`): maximum number of new tokens; 0 only scores the prompt.
        temperature (`float`): 0 always chooses the most likely token.
        top_p, top_k, min_p, repetition_penalty: as in `generate`; 1, 0, 0 and 1 change nothing.
        presence_penalty, frequency_penalty (`float`): as OpenAI defines them, over the new tokens.
        logit_bias (`Mapping[int, float]`): summand of the logit of each token.
        min_new_tokens (`int`): tokens before the row may end.
        seed (`int`, *optional*): with the place of the row in its call, determines the random numbers.
        place (`int`): place of the row in its call.
        stop_strings (`tuple[str, ...]`): texts that end the reply, and are not part of it.
        top_logprobs (`int`, *optional*): number of the most likely tokens to report with each token; `None` reports
            no log-probabilities.
        scores_prompt (`bool`): whether to report the log-probabilities of the prompt, too.
        is_drafted (`bool`): whether the server's draft proposes tokens.
        grammar (`str`, *optional*): llguidance's form of the grammar that the reply must follow.
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
        rows (`list[RowRequest]`): the replies to generate: of each prompt `n` in turn.
        prompt_tokens (`int`): tokens of all prompts; each is counted once, whatever `n` is.
        is_streamed (`bool`): whether the client wants each piece when it is ready.
        has_usage (`bool`): whether the stream ends with the number of tokens.
        prompt_texts (`list[str]`): with `echo`, the text of each row's prompt, else empty.
        given (`dict`): the fields that an answer of `/v1/responses` repeats.
    """

    kind: Literal["chat", "completion", "response"]
    rows: list[RowRequest]
    prompt_tokens: int
    is_streamed: bool = False
    has_usage: bool = False
    prompt_texts: list[str] = []
    given: Mapping[str, Any] = {}
