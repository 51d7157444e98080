"""Replies in JSON: the grammar of a requested format, and the logits processor that enforces it."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from ..errors import InputError, require
from ..inference.generation import stop_token_ids


if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Fields of each type; in `/v1/responses`, those of the inner object are in the outer one.
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}
_FORM_FIELDS = {"text": set(), "json_object": set(), "json_schema": {"json_schema", *_SCHEMA_FIELDS}}
# White space as `json.dumps` writes it. By default any amount is allowed, and small models repeat line breaks
# endlessly. These options override those of a schema's `x-guidance`.
_JSON_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # refuse keywords that cannot be enforced
}


def grammar_of(form: Any, where: str) -> str | None:
    """Returns the grammar of a response format for [`GrammarProcessor`], `None` for text.

    Args:
        form (`Any`): the field `response_format`, or `text.format` of `/v1/responses`. A schema is enforced whether
            `strict` is true or not.
        where (`str`): name of the field in error messages.

    Raises:
        InputError: if the format is unknown, or the schema is invalid or has unsupported keywords.
    """
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if not isinstance(kind, str) or kind not in _FORM_FIELDS:
        raise InputError(f'{where}: its type must be "text", "json_object" or "json_schema"')
    if unknown := sorted(form.keys() - {"type"} - _FORM_FIELDS[kind]):
        raise InputError(f"{where}.{unknown[0]}: not supported with type {kind!r}; leave it out")
    if kind == "text":
        return None
    inner = form.get("json_schema", form)
    schema = {"type": "object"} if kind == "json_object" else inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise InputError(f"{where}: has no schema; add the JSON schema as an object")
    return _compile(schema, where)


def _compile(schema: dict[str, Any], where: str) -> str:
    matcher = require("llguidance", "serving", where).LLMatcher
    try:
        grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        reason = matcher.validate_grammar(grammar)
    except ValueError as error:
        reason = str(error)
    if reason:
        raise InputError(f"{where}: the JSON schema cannot be enforced ({_brief(reason)}). Change or remove this part")
    return grammar


def _brief(reason: str) -> str:
    """Returns an error message of llguidance without its parser state."""
    return " ".join(reason.partition("<state>")[0].split())[:300]


def grammar_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> "LLTokenizer":
    """Returns llguidance's form of a tokenizer, which takes a second for a large vocabulary.

    Raises:
        InputError: if the model has no stop token.
    """
    from llguidance.hf import from_tokenizer

    stops = stop_token_ids(model, tokenizer)
    if not stops:
        raise InputError(
            "model: replies would never end, since it has no end-of-sequence token. Set eos_token_id in its "
            "generation_config.json"
        )
    return from_tokenizer(tokenizer, n_vocab=model.config.vocab_size, eos_token=stops)


class GrammarProcessor(LogitsProcessor):
    """Allows the tokens that the grammar permits next, and stop tokens where the text may end; for one row.

    It may be called with any continuation of the prompt in any order, such as drafted tokens that are rejected later.

    Args:
        tokenizer (`LLTokenizer`): from [`grammar_tokenizer`].
        grammar (`str`): from [`grammar_of`].
        num_prompt_tokens (`int`): tokens before the reply.

    Attributes:
        error (`str`): why the grammar cannot be followed any further, such as its size; empty if it can. After an
            error, only stop tokens are allowed, and the reply is incomplete.
    """

    def __init__(self, tokenizer: "LLTokenizer", grammar: str, num_prompt_tokens: int):
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._num_prompt_tokens = num_prompt_tokens
        self._consumed: list[int] = []  # the tokens that determine the matcher's state
        self.error = ""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masks scores `[1, vocab_size]` after `[1, length]` tokens.

        They are returned unchanged after a reply that does not follow the grammar or has ended: such drafted tokens
        are rejected, but all scores must be finite.
        """
        is_valid = self._follow(input_ids[0, self._num_prompt_tokens :].tolist())
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.error = _brief(self._matcher.get_error())
        elif not is_valid:
            return scores
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[-1]].astype(bool)
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def _follow(self, tokens: list[int]) -> bool:
        """Moves the matcher to the state after these tokens; returns whether the grammar allows them."""
        same = len(self._consumed)
        while self._consumed[:same] != tokens[:same]:
            same -= 1
        self._matcher.rollback(len(self._consumed) - same)
        self._consumed = tokens[: same + self._matcher.try_consume_tokens(tokens[same:])]
        return len(self._consumed) == len(tokens)
