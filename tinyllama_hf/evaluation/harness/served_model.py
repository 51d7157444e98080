"""A model behind an OpenAI-compatible server: its name, and the requests that the server supports."""

import asyncio
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import provenance
from ...errors import InputError, did_you_mean
from ...inference.load import context_length, stock_tokenizer
from ...released import TOKENIZER_FILES, local_folder
from ...tokenization_tinyllama import tokenizer_fingerprint
from ..score_files import SERVER_DTYPE, ScoredModel
from ..tasks.protocol_definitions import ProtocolDefinition
from .server_requests import ServerFailure, api_address, open_session, request_json, single_completion


if TYPE_CHECKING:
    from aiohttp import ClientSession
    from transformers import PreTrainedTokenizerBase


# Its number of tokens differs between most vocabularies.
_TOKENIZER_TEXT = "In 1969, the café sold 1,234 rolls — naïve prices!\n\n    def f(x):\n\treturn {x: 'déjà vu'}  #"
_PROMPTS = ("The capital of France is", "Once upon a time, there was", "1, 2, 3, 4, 5,")
_TOLERANCE = 1e-2  # nats between two log-probabilities of one token; in bf16 they vary with the batch
_CERTAIN = -0.05  # a token above this cannot be used for the check: a server could answer 0 for all
_MOST_TOKENS = 4  # with the same text
_REFUSED = (400, 415, 422, 500, 501)  # by servers that accept only text, for a prompt of token ids


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model on a server.

    Attributes:
        address (`str`): the API, `http://host:8000/v1`.
        name (`str`): name of the model on the server.
        folder (`Path`): folder with its tokenizer and `config.json`.
        tokenizer (`str`): fingerprint of the tokenizer.
        context_length (`int`): context in tokens, the smaller of the model's and the server's.
        takes_tokens (`bool`): whether prompts can be token ids. Otherwise, text is sent, and the server decides on
            begin-of-sequence.
        no_choices (`str`): why the server cannot score multiple choice, or `""`.
    """

    address: str
    name: str
    folder: Path
    tokenizer: str
    context_length: int
    takes_tokens: bool
    no_choices: str

    @property
    def description(self) -> ScoredModel:
        """The model as it is written to a score file. The path is its address."""
        return ScoredModel(name=f"{self.name} (server)", path=f"{self.address}/models/{self.name}")

    @property
    def fingerprint(self) -> str:
        """Hash of the known properties of the model. The weights are not known."""
        known = [self.address, self.name, self.tokenizer, self.takes_tokens]
        return provenance.fingerprint(["server", *known])

    @property
    def conditions(self) -> dict[str, Any]:
        """The fields of a `Protocol` that the server determines."""
        return {"context_length": self.context_length, "dtype": SERVER_DTYPE}

    def harness(self, harness: str) -> str:
        """Returns the name of the harness for a `Protocol`."""
        return f"{harness} local-completions, {'token' if self.takes_tokens else 'text'} prompts"

    def define(self, definition: ProtocolDefinition) -> ProtocolDefinition:
        """Returns a protocol without the settings that the server determines."""
        return definition if self.takes_tokens else dataclasses.replace(definition, add_bos_token=None)

    def check_tasks(self, kinds: Mapping[str, str]) -> None:
        """Checks that the server can answer the requests of tasks, given their `OUTPUT_TYPE` in lm-eval.

        Raises:
            InputError: if it cannot; the message names the tasks.
        """
        affected = [task for task, kind in kinds.items() if kind != "generate_until"]
        if affected and self.no_choices:
            raise InputError(
                f"{', '.join(affected)}: multiple choice needs log-probabilities of the prompt, which this server "
                f"does not return (llama.cpp's server does not; vLLM does). {self.address}: {self.no_choices}. Use "
                "another server, score the folder itself, or choose tasks that generate text with --task"
            )


def find_served_model(model: str, server: str, server_model: str | None = None) -> ServedModel:
    """Finds a model on a server, and the requests that the server supports.

    Args:
        model (`str`): folder, released name or Hub id, for tokenizer and configuration. It needs no weights.
        server (`str`): address of the server.
        server_model (`str`, *optional*): name of the model on the server; by default the only one.

    Raises:
        InputError: if the server does not answer, has no such model, or has another tokenizer.
    """
    address = api_address(server)
    folder = local_folder(model, (*TOKENIZER_FILES, "config.json"))
    context, tokenizer = context_length(folder), stock_tokenizer(folder)
    return asyncio.run(_probe(address, folder, tokenizer, context, server_model))


async def _probe(
    address: str, folder: Path, tokenizer: "PreTrainedTokenizerBase", context: int, wanted: str | None
) -> ServedModel:
    async with open_session(1) as session:
        listed = await request_json(session, f"{address}/models")
        name, limit = _choose_model(listed, address, wanted)
        probe = _Probe(session, address, name, tokenizer)
        await probe.check_tokenizer(str(folder))
        takes_tokens = await probe.takes_tokens()
        no_choices = await probe.why_no_choices() if takes_tokens else "it does not accept token ids as a prompt"
    fingerprint, context = tokenizer_fingerprint(tokenizer), min(context, limit or context)
    return ServedModel(address, name, folder, fingerprint, context, takes_tokens, no_choices)


def _choose_model(answer: Mapping[str, Any], address: str, wanted: str | None) -> tuple[str, int | None]:
    """Returns the name of the model, and its context if the list has it, as in vLLM (0.32) and llama.cpp."""
    rows = answer.get("data")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows):
        raise InputError(f"{address}/models: has no list of models. --server must be an OpenAI-compatible API")
    names = {row["id"]: row for row in rows}
    if wanted is None and len(names) != 1:
        listed = f"{len(names)} models{': ' if names else ''}{', '.join(names)}"
        raise InputError(f"{address} has {listed}. Choose one with --server-model")
    name = wanted if wanted is not None else next(iter(names))
    if name not in names:
        raise InputError(f"--server-model {name!r}: {address} does not have it{did_you_mean(name, names)}")
    meta = names[name].get("meta")
    limits = [names[name].get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None]
    return name, next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


class _Probe:
    """Short requests to a model, each for one or two tokens."""

    def __init__(self, session: "ClientSession", address: str, name: str, tokenizer: "PreTrainedTokenizerBase"):
        self.session, self.url, self.name, self.tokenizer = session, f"{address}/completions", name, tokenizer

    async def ask(self, prompt: str | list[int], **settings: Any) -> tuple[dict[str, Any], int | None]:
        """Returns the completion of a prompt, and the number of prompt tokens if the server reports it."""
        payload = {"model": self.name, "prompt": prompt, "max_tokens": 1, "temperature": 0, **settings}
        answer = await request_json(self.session, self.url, payload)
        usage = answer.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return single_completion(self.url, answer), count if isinstance(count, int) else None

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def check_tokenizer(self, model: str) -> None:
        _, count = await self.ask(_TOKENIZER_TEXT)
        own = len(self.encode(_TOKENIZER_TEXT))
        if count is not None and count not in (own, own + 1):  # with or without begin-of-sequence
            raise InputError(
                f"{self.url}: the server counts {count} tokens in a text that has {own} with that of {model}. "
                "MODEL must have the tokenizer of the model on the server"
            )

    async def takes_tokens(self) -> bool:
        """Returns whether the prompt can be token ids."""
        ids = self.encode(_PROMPTS[0])
        try:
            _, count = await self.ask(ids)
        except ServerFailure as failure:
            if failure.status not in _REFUSED:
                raise
            return False
        return count in (None, len(ids))

    async def why_no_choices(self) -> str:
        """Returns why the log-probabilities of a prompt cannot be used, or `""`.

        A token that the model generates must have the same log-probability at the end of an echoed prompt.
        """
        try:
            for prompt in _PROMPTS:
                ids = self.encode(prompt)
                generated, _ = await self.ask(ids, logprobs=1)
                (known,) = prompt_log_probabilities(generated, 1)
                tokens = self._find_tokens(ids, generated.get("text"))
                if not 0 < len(tokens) <= _MOST_TOKENS or known > _CERTAIN:
                    continue
                found = []
                for token in tokens:
                    echoed, _ = await self.ask([*ids, token], logprobs=1, echo=True)
                    found.append(prompt_log_probabilities(echoed, len(ids) + 1)[-1])
                    if abs(found[-1] - known) <= _TOLERANCE:
                        return ""
                return f"a token has log-probability {known:.3f} when generated, {found[0]:.3f} in an echoed prompt"
            return f"its next tokens after {', '.join(map(repr, _PROMPTS))} cannot be used to check this"
        except NoLogProbabilities as problem:
            return str(problem)
        except ServerFailure as failure:
            if failure.status not in _REFUSED:
                raise
            return f"it refuses to echo a prompt with log-probabilities (status {failure.status})"

    def _find_tokens(self, ids: list[int], text: Any) -> list[int]:
        """Returns the tokens that add this text after other tokens, also those with a space that servers remove."""
        if not isinstance(text, str) or not text:
            return []
        wanted = self._decode(ids) + text
        tokens = range(len(self.tokenizer))
        added = [token for token in tokens if self._decode([*ids, token]) == wanted]
        return added + [token for token in tokens if token not in added and self._decode([token]) == text]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class NoLogProbabilities(ValueError):
    """A completion does not have the log-probabilities that were requested."""


def prompt_log_probabilities(choice: Mapping[str, Any], count: int) -> list[float]:
    """Returns the log-probabilities of the tokens of a prompt; 0 for the first of several, which has none.

    Args:
        choice (`dict`): the completion, with `echo`, or without it for the only token of the completion.
        count (`int`): number of tokens. A completion may have one more, generated after the prompt.

    Raises:
        NoLogProbabilities: if they are missing, too few or too many, or not numbers.
    """
    fields = choice.get("logprobs")
    values, tops = ((fields or {}).get(key) for key in ("token_logprobs", "top_logprobs"))
    if not isinstance(values, list) or not isinstance(tops, list):
        raise NoLogProbabilities("its answer has no logprobs.token_logprobs and top_logprobs")
    if not count <= len(values) == len(tops) <= count + 1:
        raise NoLogProbabilities(f"it returns {len(values)} log-probabilities for {count} tokens")
    first = [0.0] if count > 1 else []
    rest, tops = values[len(first) : count], tops[len(first) : count]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in rest):
        raise NoLogProbabilities("some of its log-probabilities are not finite numbers")
    if not all(isinstance(top, dict) and top for top in tops):
        raise NoLogProbabilities("some of its tokens have no top_logprobs")
    return [*first, *map(float, rest)]
