"""lm-eval model for an OpenAI-compatible server, based on lm-eval's `local-completions`.

lm-eval creates the requests and reads the answers. This model tokenizes as lm-eval's `hf` model does, checks every
answer, reports failures in one message, and keeps its answers, so that a resumed evaluation repeats no request.
"""

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_exponential

from ...inference.load import stock_tokenizer
from .kept_answers import KeptAnswers, repeated_keys, request_key
from .local_harness import fit_request, generation_settings, prompt_room
from .prefix_tree import EncodedRequest
from .served_model import NoLogProbabilities, ServedModel, prompt_log_probabilities
from .server_requests import ServerFailure, open_session, request_json, single_completion


if TYPE_CHECKING:
    from aiohttp import ClientSession


NUM_CONCURRENT = 8
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each later one
_MAX_GEN_TOKS = 256  # lm-eval's default
_SEED = 1234  # lm-eval's own


class ServerHarness(LocalCompletionsAPI):
    """The model behind a server.

    Args:
        served (`ServedModel`): the model on its server.
        add_bos_token (`bool`, *optional*): whether requests start with the begin-of-sequence token; by default that of
            the tokenizer.
        kept (`KeptAnswers`): answers of an interrupted evaluation; new ones are added.
        update (`Callable`): called with `completed` and `total` numbers of requests.
        note (`Callable`): called with messages about failed requests that are sent again.
    """

    def __init__(
        self,
        served: ServedModel,
        add_bos_token: bool | None,
        kept: KeptAnswers,
        update: Callable[..., Any] = lambda **fields: None,
        note: Callable[[str], Any] = lambda line: None,
    ):
        super().__init__(
            base_url=f"{served.address}/completions",
            model=served.name,
            tokenizer_backend="none",  # lm-eval would load another kind of tokenizer
            max_length=served.context_length,  # lm-eval subtracts the token that a server generates after the prompt
            num_concurrent=NUM_CONCURRENT,
        )
        self.tokenizer_backend, self.tokenizer = "huggingface", stock_tokenizer(served.folder)
        self.tokenized_requests = served.takes_tokens
        self.add_bos_token, self.kept, self.update, self.note = add_bos_token, kept, update, note
        self.num_cut = 0
        self._noted: set[str] = set()
        self._names: dict[str, str] = {}  # keys of answers, by keys of the requests with the server's settings

    def tok_encode(self, string: Any, left_truncate_len: Any = None, add_special_tokens: Any = None, **_: Any) -> Any:
        """Returns the tokens of a string, or of each of several, as lm-eval's `hf` model does."""
        if not isinstance(string, str):
            return [self.tok_encode(text) for text in string]
        if add_special_tokens is None:
            has_bos = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = self.add_bos_token is not False and not has_bos
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation. lm-eval's own returns no text if requests are not tokenized."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answers requests for the log-likelihood of a continuation after a context, without lm-eval's own bar."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Answers requests for the log-likelihood of whole texts, without lm-eval's own bar."""
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        """Answers tokenized requests for log-likelihoods. lm-eval calls it for all kinds of them."""
        waiting, keys = {}, []
        for pair, context, continuation in requests:
            # A window of `loglikelihood_rolling` has no pair of strings.
            key = request_key("loglikelihood", pair) if pair else request_key("window", (context, continuation))
            keys.append(key)
            self.num_cut += len(context) + len(continuation) > self.max_length
            if key not in self.kept:
                waiting[key] = fit_request(EncodedRequest(context, continuation), self.max_length - 1)
        self.update(completed=len(keys) - len(waiting), total=len(keys))
        if waiting:
            super()._loglikelihood_tokens([(key, *request) for key, request in waiting.items()])
        return [(float(answer[0]), bool(answer[1])) for answer in map(self.kept.__getitem__, keys)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers requests for generated text, up to the first stop string."""
        keys = repeated_keys("generate_until", [request.args for request in requests])
        self.update(completed=sum(key in self.kept for key in keys), total=len(keys))
        asked = []
        for key, request in zip(keys, requests, strict=True):
            text, given = request.args
            settings = generation_settings(given, _MAX_GEN_TOKS)
            settings["until"] = [stop for stop in settings["until"] if stop]
            # Each sample of a request has its own seed.
            settings["seed"] = _SEED + int(key.partition("/")[2] or 0)
            room = prompt_room(self.max_length, settings["max_gen_toks"])
            self.num_cut += self.tokenized_requests and len(self.tok_encode(text)) > room
            if key not in self.kept:
                self._names[request_key("generate_until", (text, settings))] = key
                asked.append(dataclasses.replace(request, arguments=(text, settings)))
        if asked:
            super().generate_until(asked)
        return [str(self.kept[key]) for key in keys]

    async def get_batched_requests(
        self,
        requests: Sequence[Any],
        cache_keys: Sequence[Any],
        *,
        generate: bool = True,
        ctxlens: Sequence[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> list[list[Any]]:
        """Sends requests and returns their answers. Replaces lm-eval's method, which hides errors.

        Raises:
            ServerFailure: for the first request that fails in all attempts. The other answers are kept.
        """
        lengths = ctxlens or [0] * len(requests)
        limit = asyncio.Semaphore(NUM_CONCURRENT)
        send = retry(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=FIRST_WAIT),
            retry=retry_if_exception(lambda error: isinstance(error, ServerFailure) and error.may_pass),
            before_sleep=self._note_failure,
            reraise=True,
        )(self._send)

        async def answer(number: int, session: "ClientSession") -> list[Any]:
            async with limit:
                found = await send(session, requests[number], lengths[number], gen_kwargs if generate else None)
            key = cache_keys[number]
            name = self._names[request_key("generate_until", key)] if generate else key
            self.kept.add({name: found if isinstance(found, str) else list(found)})
            self.update(advance=1)
            return [found]

        try:
            async with open_session(NUM_CONCURRENT) as session, asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(number, session)) for number in range(len(requests))]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _send(
        self, session: "ClientSession", prompt: Any, context_length: int, settings: dict[str, Any] | None
    ) -> str | tuple[float, bool]:
        """Returns the answer to a request: the text if there are generation settings, else the log-likelihood."""
        payload = self._create_payload(
            prompt,
            generate=settings is not None,
            gen_kwargs=copy.deepcopy(settings),  # the method removes fields
            seed=_SEED,
            eos=self.eos_string,
        )
        url = self.base_url
        output = await request_json(session, url, payload)
        choice = single_completion(url, output)
        if settings is not None:
            if not isinstance(text := choice.get("text"), str):
                raise ServerFailure(f"{url}: a completion has no text. Check the log of the server", may_pass=False)
            return str(postprocess_generated_text(text, settings["until"], None))
        try:
            prompt_log_probabilities(choice, len(prompt))
        except NoLogProbabilities as problem:
            raise ServerFailure(
                f"{url}: a request of {len(prompt)} tokens: {problem}. Check the log of the server", may_pass=False
            ) from None
        for name, values in choice["logprobs"].items():
            if isinstance(values, list) and len(values) == len(prompt):  # the generated end-of-sequence is missing
                choice["logprobs"][name] = [*values, None]  # lm-eval removes the last one
        likelihood, is_greedy = self.parse_logprobs([output], ctxlens=[context_length])[0]
        return float(likelihood), bool(is_greedy)

    def _note_failure(self, state: RetryCallState) -> None:
        """Reports a failed attempt, once for all requests that fail at the same time."""
        failure = state.outcome.exception() if state.outcome else None
        line = f"{failure}; attempt {state.attempt_number} of {ATTEMPTS} failed, sending it again"
        if line not in self._noted:
            self._noted.add(line)
            self.note(line)
