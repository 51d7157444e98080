"""Reads requests of OpenAI's API: checks names, types and ranges of their fields, and encodes the prompts."""

import functools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, from_json
from transformers import PreTrainedTokenizerFast

from ..errors import check_seed
from ..inference.options import Sampling
from .call import Call, Refusal, RowRequest
from .prompt_reading import TOO_LONG, Limits, encode_prompts, quoted, refused, refusing
from .response_formats import grammar_of


Kind = Literal["chat", "completion", "response"]
_PROMPT_FIELDS: dict[Kind, str] = {"chat": "messages", "completion": "prompt", "response": "input"}
# These fields do not change the answer.
_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier"}
_HARMLESS |= {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
# Unsupported fields, with the values that request the default behavior; `null` and empty values do so too.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
_INSTEAD = {"generation_config": "send top_k, min_p, repetition_penalty and min_tokens as fields of the request"}
# Fields of a request, with the name of each in `RowRequest` where it differs.
_ROW_FIELDS = {"min_tokens": "min_new_tokens", "stop": "stop_strings", "draft": "is_drafted"} | {
    name: name
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logit_bias")
    + ("presence_penalty", "frequency_penalty")
}
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_REPEATED = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens", "text")
_STOPS, _STOP_LENGTH = 4, 100  # the first limit is OpenAI's
_LEAST = 1e-6  # the smallest divisor that keeps logits finite


def _read_temperature(value: float) -> float:
    if 0 < value < _LEAST:
        raise ValueError(f"must be 0 (always the most likely token) or at least {_LEAST}")
    return value


def _read_stops(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a non-empty string or a list of non-empty strings")
    if len(texts) > _STOPS or any(len(text) > _STOP_LENGTH for text in texts):
        raise ValueError(f"must be at most {_STOPS} strings of at most {_STOP_LENGTH} characters")
    return tuple(texts)


def _read_biases(value: dict[str, Any], info: ValidationInfo) -> dict[int, float]:
    assert isinstance(info.context, Limits)
    last = info.context.vocab_size - 1
    for key, bias in value.items():
        if not (key.isdecimal() and int(key) <= last):
            raise ValueError(f"{quoted(key)} must be a token id from 0 to {last}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _read_n(value: int, info: ValidationInfo) -> int:
    assert isinstance(info.context, Limits)
    if not 1 <= value <= info.context.n:
        raise ValueError(f"must be from 1 to {info.context.n}")
    return value


_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TopLogprobs = Annotated[int, Field(ge=0, le=20)]


class _Fields(BaseModel):
    """The fields of all endpoints; `top_k` and the ones after it are not OpenAI's."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: "_StreamOptions | None" = None
    parallel_tool_calls: bool | None = None  # accepted without effect
    seed: Annotated[int, AfterValidator(functools.partial(check_seed, name=""))] | None = None
    temperature: Annotated[float, Field(ge=0), AfterValidator(_read_temperature)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=-1), AfterValidator(lambda k: max(k, 0))] | None = None  # 0 and -1: all tokens
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(ge=_LEAST, le=1 / _LEAST)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    draft: bool | None = None  # false turns the draft of this server off


class _StreamOptions(BaseModel):
    model_config = _Fields.model_config

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted without effect


class _SampledFields(_Fields):
    n: Annotated[int, AfterValidator(_read_n)] | None = None
    stop: Annotated[Any, AfterValidator(_read_stops)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, Any], AfterValidator(_read_biases)] | None = None


class _ChatFields(_SampledFields):
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _TopLogprobs | None = None
    response_format: Any = None


class _CompletionFields(_SampledFields):
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: _TopLogprobs | None = None


class _ResponseText(BaseModel):
    model_config = _Fields.model_config

    format: Any = None
    verbosity: Literal["medium"] | None = None


_Name = Annotated[str, Field(max_length=64)]  # this limit and the next two are OpenAI's
_Value = Annotated[str, Field(max_length=512)]


class _ResponseFields(_Fields):
    instructions: str | None = None
    max_output_tokens: _Count | None = None
    metadata: Annotated[dict[_Name, _Value], Field(max_length=16)] | None = None
    text: _ResponseText | None = None


_FIELDS: dict[Kind, type[_Fields]] = {
    "chat": _ChatFields,
    "completion": _CompletionFields,
    "response": _ResponseFields,
}
_KNOWN = {*_PROMPT_FIELDS.values()}.union(*(fields.model_fields for fields in _FIELDS.values()))


class RequestReader:
    """Reads the bodies of requests. Not thread-safe, since calling a tokenizer changes its settings.

    Args:
        name (`str`): name of the model in requests, which may omit it.
        tokenizer (`PreTrainedTokenizerFast`): the model's tokenizer; chat needs its chat template.
        limits (`Limits`): limits on a request.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast, limits: Limits):
        self._name, self._tokenizer, self._limits = name, tokenizer, limits

    def read(self, kind: Kind, body: bytes) -> Call:
        """Returns the call that a request body, in JSON, describes.

        Raises:
            Refusal: if it is invalid; names the field, its value, the rule and the fix.
        """
        whole, field = _parse(body), _PROMPT_FIELDS[kind]
        given = _check_fields(whole, kind, self._limits)
        if (model := given.get("model", self._name)) != self._name:
            message = f"model {quoted(model)}: not served here; the only model is {self._name!r}"
            raise Refusal(message, 404, "model_not_found", "model")
        settings = _row_settings(given)
        if whole.get(field) is None:
            raise refused(field, f"{field}: missing")
        prompts = encode_prompts(whole[field], field, given.get("instructions"), self._tokenizer, self._limits)
        lengths = [self._num_new_tokens(len(prompt.ids), field, given) for prompt in prompts]
        n, is_streamed = given.get("n", 1), given.get("stream", False)
        rows = [
            RowRequest(tuple(prompt.ids), length, place=place * n + copy, **settings)
            for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            for copy in range(n)
        ]
        texts = [prompt.text(self._tokenizer) for prompt in prompts for _ in range(n)] if given.get("echo") else []
        repeated = {name: whole[name] for name in _REPEATED if name in given} if kind == "response" else {}
        has_usage = is_streamed and _asks_for_usage(given)
        return Call(kind, rows, sum(len(prompt.ids) for prompt in prompts), is_streamed, has_usage, texts, repeated)

    def _num_new_tokens(self, length: int, field: str, given: dict[str, Any]) -> int:
        """Returns the maximum number of new tokens, by default the rest of the context."""
        if not length:
            raise refused(field, f"{field}: empty, and this tokenizer has no begin-of-sequence token to start with")
        context, most = self._limits.context, self._limits.new_tokens
        wanted = next((given[name] for name in _LENGTHS if name in given), most)
        if length + min(wanted, 1) > context:
            message = f"{field}: {length} tokens plus {min(wanted, 1)} new tokens exceed the context of {context}"
            raise refused(field, f"{message}; shorten it", TOO_LONG)
        return min(wanted, context - length, most)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        whole = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise refused(None, "body: nested too deeply") from error
        hint = "; unpaired surrogates are not valid text" if "hex escape" in str(error) else ""
        raise refused(None, f"body: not valid JSON ({error}{hint})") from error
    if not isinstance(whole, dict):
        raise refused(None, "body: must be a JSON object")
    return whole


def _check_fields(whole: dict[str, Any], kind: Kind, limits: Limits) -> dict[str, Any]:
    """Checks names, types and ranges; returns the fields that are not `null`, without the prompt."""
    fields = _FIELDS[kind]
    own = whole.keys() & fields.model_fields.keys()
    for name in sorted(whole.keys() - own - _HARMLESS - {_PROMPT_FIELDS[kind]}):
        if not _is_default(name, whole[name]):
            place = "endpoint" if name in _KNOWN else "server"
            raise refused(name, f"{name}: not supported by this {place}; {_INSTEAD.get(name, 'leave it out')}")
    try:
        checked = fields.model_validate({name: whole[name] for name in own}, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise refused(str(first["loc"][0]), _describe(first)) from error
    given = {name: value for name, value in checked if value is not None}
    _check_combinations(given)
    return given


def _is_default(name: str, value: Any) -> bool:
    """Whether an unsupported field has its default value: `n: 1` is accepted, `n: 0` and `n: true` are not."""
    if isinstance(value, bool):
        return not value
    return value in _DEFAULTS.get(name, ()) or (not value and not isinstance(value, (int, float)))


def _describe(error: ErrorDetails) -> str:
    rule = error["msg"].removeprefix("Value error, ").replace("input should", "must").replace("Input should", "must")
    if error["type"] == "extra_forbidden":
        rule = "not supported by this server; leave it out"
    return f"{'.'.join(map(str, error['loc']))} {quoted(error['input'])}: {rule}"


def _check_combinations(given: dict[str, Any]) -> None:
    if given.keys() >= {"max_tokens", "max_completion_tokens"}:
        raise refused("max_tokens", "max_tokens, max_completion_tokens: both limit the reply; give only one")
    if given.get("max_tokens") == 0 and not given.get("echo"):
        raise refused("max_tokens", "max_tokens 0: only valid with echo: true; must be at least 1 otherwise")
    if _asks_for_usage(given) and not given.get("stream"):
        raise refused("stream_options", "stream_options.include_usage True: only valid with stream: true; set it")
    if "best_of" in given and given["best_of"] != (n := given.get("n", 1)):
        raise refused("best_of", f"best_of {given['best_of']}: must be equal to n, {n}")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise refused("top_logprobs", f"top_logprobs {given['top_logprobs']}: only valid with logprobs: true; set it")


def _asks_for_usage(given: dict[str, Any]) -> bool:
    return "stream_options" in given and bool(given["stream_options"].include_usage)


def _row_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `RowRequest` apart from the prompt and its length."""
    settings: dict[str, Any] = {"temperature": Sampling.temperature, "top_p": Sampling.top_p}
    settings |= {row_name: given[name] for name, row_name in _ROW_FIELDS.items() if name in given}
    top = given.get("logprobs")
    settings["scores_prompt"] = bool(given.get("echo")) and top is not None
    settings["top_logprobs"] = (given.get("top_logprobs", 0) if top else None) if isinstance(top, bool) else top
    form = given["text"].format if "text" in given else given.get("response_format")
    field = "text" if "text" in given else "response_format"
    with refusing(field):
        settings["grammar"] = grammar_of(form, "text.format" if field == "text" else field)
    if settings["grammar"] and given.get("min_tokens"):
        raise refused("min_tokens", "min_tokens: not valid with a JSON format, which decides when a reply may end")
    return settings
