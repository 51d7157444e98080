"""Reads requests of OpenAI's API: checks their fields, and encodes the prompt in each of its forms.

The fields are checked before the handlers of transformers (5.23) read them: these convert values without a check, and
answer with status 500 if that fails.
"""

import functools
import json
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import from_json
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..batch.prompts import chat_ids
from ..chat.messages import TEXT_PARTS, content_text
from ..errors import InputError, check_seed, did_you_mean
from ..text import check_text


# These fields do not change the answer.
_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier"}
_HARMLESS |= {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
# Unsupported fields, with the values that request the default behavior; `null` and empty values do so too.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# `name` is not given to the template; `type`, `id` and `status` come from answers that clients send back.
_MESSAGE_FIELDS = {"role", "content", "name", "type", "id", "status"}
_FORM = 'must be a list of {"role": "...", "content": "..."}'

_STOPS, _STOP_LENGTH = 4, 100  # the first limit is OpenAI's
_LEAST = 1e-6  # smallest divisor of logits that keeps them finite
_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(gt=0, le=1)]


class Limits(NamedTuple):
    """Limits on a request.

    Attributes:
        vocab_size (`int`): size of the model's vocabulary.
        context (`int`): the model's context in tokens.
        characters (`int`): most characters that fit the context. Longer prompts are refused before they are encoded,
            since encoding megabytes takes half a minute.
    """

    vocab_size: int
    context: int
    characters: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> "Limits":
        """Returns the limits of a model and its tokenizer."""
        context = model.config.max_position_embeddings
        return cls(model.config.vocab_size, context, context * max(map(len, tokenizer.get_vocab())))


class _Sampling(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float | None) -> float | None:
        if value and value < _LEAST:
            raise ValueError(f"must be 0 (always the most likely token) or at least {_LEAST}")
        return value


class _GenerationConfig(_Sampling):
    """The supported settings of `generation_config`, which transformers adds to the fields of OpenAI's API."""

    model_config = ConfigDict(extra="forbid")

    do_sample: bool | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(ge=_LEAST, le=1 / _LEAST)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: _Count | None = None
    transformers_version: str | None = Field(None, exclude=True)  # written by `GenerationConfig.to_json_string`


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted without effect


class _Fields(_Sampling):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    instructions: str | None = None
    suffix: str | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    max_output_tokens: _Count | None = None
    parallel_tool_calls: bool | None = None
    seed: Annotated[int, AfterValidator(functools.partial(check_seed, name=""))] | None = None
    # transformers adds 1 to get its repetition penalty, which must be positive; the upper limit is OpenAI's.
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Any = None
    generation_config: _GenerationConfig | None = None

    @field_validator("generation_config", mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        """Accepts an object, and JSON in a string as the server of transformers does."""
        return from_json(value) if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        assert isinstance(info.context, Limits)
        size = info.context.vocab_size
        if bad := [key for key in value or () if not (key.isdecimal() and int(key) < size)]:
            raise ValueError(f"{bad[0]!r} must be a token id from 0 to {size - 1}")
        return value

    @field_validator("stop")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError("must be a non-empty string or a list of non-empty strings")
        if len(texts) > _STOPS or any(len(text) > _STOP_LENGTH for text in texts):
            raise ValueError(f"must be at most {_STOPS} strings of at most {_STOP_LENGTH} characters")
        return value


def check_fields(body: dict[str, Any], needed: str, limits: Limits) -> dict[str, Any]:
    """Checks the names, types and ranges of the fields of a request.

    Args:
        body (`dict`): the request, with fields of OpenAI's API only.
        needed (`str`): name of the field with the prompt, which is not checked here.
        limits (`Limits`): limits of the model.

    Returns:
        The fields that affect the generation, without those that are `null` or empty; `generation_config` is a
        dictionary.

    Raises:
        InputError: naming the field, its value and the rule.
    """
    for name in sorted(body.keys() - _Fields.model_fields.keys() - _HARMLESS - {needed}):
        if not _is_default(name, body[name]):
            raise InputError(f"{name}: not supported by this server; leave it out")
    check_text(json.dumps(body, ensure_ascii=False), "body")
    try:
        known = _Fields.model_validate(body, context=limits)
    except ValidationError as error:
        raise InputError(_describe(error)) from error
    checked = {name: value for name, value in known.model_dump(exclude_none=True).items() if value not in ([], {})}
    if checked.keys() >= {"max_tokens", "max_completion_tokens"}:
        raise InputError("max_tokens, max_completion_tokens: both limit the reply; give only one")
    if "stream_options" in checked and not checked.get("stream"):
        raise InputError(
            f"stream_options {checked['stream_options']}: only valid with stream: true; set it or leave them out"
        )
    return checked


def _is_default(name: str, value: Any) -> bool:
    """Whether an unsupported field has its default value: `n: 1` is accepted, `n: 0` and `n: true` are not."""
    if isinstance(value, bool):
        return not value
    return value in _DEFAULTS.get(name, ()) or (not value and not isinstance(value, (int, float)))


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        section, key = first["loc"]
        known = (_StreamOptions if section == "stream_options" else _GenerationConfig).model_fields
        valid = did_you_mean(str(key), known.keys() - {"transformers_version"})
        return f"{name} {first['input']!r}: not supported by this server{valid}"
    rule = first["msg"].removeprefix("Value error, ").replace("input should", "must").replace("Input should", "must")
    return f"{name} {first['input']!r}: {rule}"


def prompt_ids(
    body: dict[str, Any], field: str, instructions: str | None, tokenizer: PreTrainedTokenizerFast, limits: Limits
) -> list[int]:
    """Returns the tokens of the prompt of a request; control tokens that are spelled out in its text stay text.

    Args:
        body (`dict`): the request.
        field (`str`): name of the field with the prompt: `"prompt"`, `"messages"` or `"input"`.
        instructions (`str`, *optional*): the system message.
        tokenizer (`PreTrainedTokenizerFast`): the model's tokenizer.
        limits (`Limits`): limits of the model.

    Raises:
        InputError: if the field is missing, malformed, or longer than the context.
    """
    given = body.get(field)
    if given is None:
        raise InputError(f"{field}: missing")
    if field == "prompt":
        return _ids_of_text(given, tokenizer, limits)
    if isinstance(given, str) and field == "input":
        messages = [{"role": "user", "content": given}]
    else:
        messages = _conversation(given, field, limits)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    _check_length((message["content"] for message in messages), limits)
    return chat_ids(messages, tokenizer)


def _ids_of_text(prompt: Any, tokenizer: PreTrainedTokenizerFast, limits: Limits) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        _check_length([prompt], limits)
        return tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
    ids = range(limits.vocab_size)
    if not prompt or not isinstance(prompt, list) or not all(type(item) is int and item in ids for item in prompt):
        raise InputError(
            f"prompt: must be a string or a list of token ids from 0 to {limits.vocab_size - 1}. Send one request "
            "per prompt"
        )
    return prompt


def _check_length(texts: Iterable[str], limits: Limits) -> None:
    """Refuses text that cannot fit the context, before it is encoded."""
    if (length := sum(map(len, texts))) > limits.characters:
        raise InputError(
            f"prompt: {length} characters; must be at most {limits.characters}, since the model's context has "
            f"{limits.context} tokens. Shorten it"
        )


def _conversation(given: Any, field: str, limits: Limits) -> list[dict[str, Any]]:
    """Returns messages with role and text only; roles are checked when the conversation is rendered."""
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InputError(f"{field}: {_FORM}")
    if len(given) > limits.context:  # each message has at least one token
        raise InputError(
            f"{field}: {len(given)} messages; must be at most {limits.context}, the model's context in tokens"
        )
    if field == "input" and given and all("role" not in item and item.get("type") in TEXT_PARTS for item in given):
        return [{"role": "user", "content": content_text(given, field)}]  # the parts of one message
    return [_message(item, f"{field}, message {number}") for number, item in enumerate(given)]


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        raise InputError(f"{where}: type {item['type']!r} not supported by this server; leave it out")
    if unknown := sorted(key for key, value in item.items() if value and key not in _MESSAGE_FIELDS):
        raise InputError(f"{where}: {unknown[0]} not supported by this server; leave it out")
    if "role" not in item:
        raise InputError(f"{where}: has no role; {_FORM}")
    role = "system" if item["role"] == "developer" else item["role"]  # OpenAI's newer name of the role
    return {"role": role, "content": content_text(item.get("content"), where)}
