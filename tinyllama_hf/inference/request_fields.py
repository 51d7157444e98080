"""The fields of a server's requests that decide what is generated, checked before transformers' handlers (5.23) read them.

These convert what they are given, and answer with status 500 where that fails.
"""

import json
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, ValidationInfo, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import InputError, did_you_mean


_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_MEDIA = ("image", "audio", "video", "file")
_CALLS = ("function_call", "function_call_output")
# What does not decide the answers, and numbers that ask for what there is.
_HARMLESS = {"stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"}
_HARMLESS |= {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
_DEFAULTS = {"n": 1, "best_of": 1, "presence_penalty": 0, "top_logprobs": 0}
# Before each request the library compares the stop strings with the whole vocabulary: seconds at these limits.
_STOPS, _STOP_LENGTH = 4, 100
_LEAST = 1e-6  # of what logits are divided by, which have to stay finite
_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(gt=0, le=1)]


class Limits(NamedTuple):
    """What a request has to keep to.

    Attributes:
        vocab_size (`int`): of the model.
        context (`int`): of the model, in tokens.
        characters (`int`): that the context can hold; to make tokens of megabytes takes half a minute.
    """

    vocab_size: int
    context: int
    characters: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> "Limits":
        """Those of a model and its tokenizer."""
        context = model.config.max_position_embeddings
        return cls(model.config.vocab_size, context, context * max(map(len, tokenizer.get_vocab())))


class _Sampling(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: _Share | None = None

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float | None) -> float | None:
        if value and value < _LEAST:
            raise ValueError(f"must be 0 (always the most likely token) or at least {_LEAST}")
        return value


class _GenerationConfig(_Sampling):
    """What `generation_config` may hold: transformers' settings of sampling that OpenAI has no field for, and those it has."""

    model_config = ConfigDict(extra="forbid")

    do_sample: bool | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(ge=_LEAST, le=1 / _LEAST)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: _Count | None = None
    transformers_version: str | None = Field(None, exclude=True)  # which `GenerationConfig.to_json_string` writes


class _Fields(_Sampling):
    model: str | None = None
    stream: bool | None = None
    instructions: str | None = None
    suffix: str | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    max_output_tokens: _Count | None = None
    parallel_tool_calls: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    # The repetition penalty is 1 more, and has to be above 0; OpenAI's upper limit.
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Any = None
    generation_config: Json[_GenerationConfig] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        size = info.context.vocab_size
        if bad := [key for key in value or () if not (key.isdecimal() and int(key) < size)]:
            raise ValueError(f"{bad[0]!r} must be the id of a token, 0 to {size - 1}")
        return value

    @field_validator("stop")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError("must be a text or a list of texts, none of them empty")
        if len(texts) > _STOPS or any(len(text) > _STOP_LENGTH for text in texts):
            raise ValueError(f"must be up to {_STOPS} texts of up to {_STOP_LENGTH} characters")
        return value


def check_fields(body: dict[str, Any], needed: str, limits: Limits) -> dict[str, Any]:
    """Checks which fields there are, and their values by type and range.

    Args:
        body (`dict`): of a request, with fields that OpenAI's interface has.
        needed (`str`): the field that holds the prompt, which is not checked here.
        limits (`Limits`): of the model.

    Returns:
        The body without what is `null` or empty, with `generation_config` as a dictionary.

    Raises:
        InputError: naming the field, its value and the rule.
    """
    for name in sorted(body.keys() - _Fields.model_fields.keys() - _HARMLESS - {needed}):
        if not _says_nothing(name, body[name]):
            raise InputError(f"{name}: is not supported by this server; leave it out")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"body: holds half of a surrogate pair, which is no text ({error.reason})") from error
    try:
        known = _Fields.model_validate(body, context=limits)
    except ValidationError as error:
        raise InputError(_in_words(error)) from error
    checked = body | known.model_dump(exclude_none=True)
    return {name: value for name, value in checked.items() if value not in (None, [], {})}


def _says_nothing(name: str, value: Any) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == _DEFAULTS.get(name)
    return not value


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        valid = did_you_mean(key, _GenerationConfig.model_fields.keys() - {"transformers_version"})
        return f"{name} {first['input']!r}: is not supported by this server{valid}"
    rule = first["msg"].removeprefix("Value error, ").replace("input should", "must").replace("Input should", "must")
    return f"{name} {first['input']!r}: {rule}"


def check_length(texts: Any, limits: Limits) -> None:
    """Refuses what cannot fit the context, before its tokens are read.

    Args:
        texts (`Any`): a text, messages, parts of them, or lists of these.
        limits (`Limits`): of the model.

    Raises:
        InputError: if together they have more characters than the context can hold.
    """
    if (length := _length(texts)) > limits.characters:
        raise InputError(
            f"a prompt of {length} characters; must be at most {limits.characters}, as the model's context of "
            f"{limits.context} tokens holds no more"
        )


def _length(value: Any) -> int:
    if isinstance(value, dict):
        value = value.get("content", value.get("text"))
    return len(value) if isinstance(value, str) else sum(map(_length, value)) if isinstance(value, list) else 0


def check_messages(value: Any, name: str) -> None:
    """Checks the form of a conversation, or of the parts of one message; roles are checked where it is rendered.

    Args:
        value (`Any`): of `messages` or `input`; `null` or empty tool calls in it, as clients send them back, are removed.
        name (`str`): of the field.

    Raises:
        InputError: if it has another form, or parts that are no text.
    """
    _check_media(value, name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f'{name}: must be a list of {{"role": "...", "content": "..."}}')
    if name == "input" and all(map(_is_text, value)):
        return  # the parts of one message
    for number, message in enumerate(value):
        where = f"{name}, message {number}"
        if message.get("tool_calls") or message.get("type") in _CALLS:
            raise InputError(f"{where}: calls of tools are not supported; leave them out")
        if message.get("type", "message") != "message":
            raise InputError(f"{where}: type {message['type']!r} is not supported; leave it out")
        message.pop("tool_calls", None)
        if "role" not in message:
            raise InputError(
                f'{name}: must be a list of {{"role": "...", "content": "..."}}, and message {number} has no role'
            )
        content = message.get("content")
        if not isinstance(content, str) and not (isinstance(content, list) and all(map(_is_text, content))):
            raise InputError(f'{where}: content must be a text, or a list of {{"type": "text", "text": "..."}}')


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)


def _check_media(value: Any, name: str) -> None:
    """Refuses parts that are no text, wherever they stand."""
    if isinstance(value, dict):
        kind = str(value.get("type", "text"))
        if any(medium in kind for medium in _OTHER_MEDIA):
            raise InputError(f"{name}: holds a part of type {kind!r}, and this model reads text alone")
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        _check_media(part, f"{name}, part")
