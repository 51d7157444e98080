"""Our model for lm-eval: `tinyllama`, for any causal Llama that [`load`] reads.

lm-eval defines prompts, choices and metrics. This model tokenizes each string once, reads shared prefixes once (see
`prefix_tree`), generates with the engine of this package, and keeps its answers, so that a resumed evaluation repeats
no request. Its answers equal those of lm-eval's own `hf` model.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...batch.generate_many import Request, generate_many
from ...errors import InputError
from ...inference.options import Sampling
from ..models import describe_model, load_eval_model, model_folder
from .kept_answers import KeptAnswers, repeated_keys, request_key
from .prefix_tree import EncodedRequest, LikelihoodAnswer, score_requests


_WINDOWS = 64  # of `loglikelihood_rolling`, read together
_GENERATED_TOGETHER = 16
_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
_SEED = 1234  # lm-eval's own for torch


class EncodedTexts:
    """Tokens of strings, which are encoded once for all models with the same tokenizer and begin-of-sequence."""

    def __init__(self) -> None:
        self._ids: dict[str, list[int]] = {}

    def encode(self, texts: Iterable[str], encode_all: Callable[[list[str]], list[list[int]]]) -> dict[str, list[int]]:
        """Returns the tokens of all strings so far; `encode_all` is called for new ones."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._ids]:
            self._ids.update(zip(new, encode_all(new), strict=True))
        return self._ids


@register_model("tinyllama")
class TinyLlamaHarness(HFLM):
    """The model `tinyllama`. lm-eval's command line creates it from `--model_args`.

    Args:
        pretrained (`str` or `PreTrainedModel`): a folder, name or Hub id; or a loaded model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a loaded model.
        adapter (`str`, *optional*): folder or Hub id of an adapter.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading.
        dtype (`str`, *optional*, defaults to `"auto"`): dtype of the weights; `"auto"` is the saved one.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        add_bos_token (`bool`, *optional*): whether requests start with the begin-of-sequence token; by default that of
            the tokenizer.
        max_length (`int`, *optional*): context in tokens; by default the model's.
        encoded (`EncodedTexts`, *optional*): shared by models with the same tokenizer.
        kept (`KeptAnswers`, *optional*): answers of an interrupted evaluation; new ones are added.
        update (`Callable`, *optional*): called with `completed` and `total` numbers of requests.
        batch_size, max_batch_size: ignored, for lm-eval's command line. Batches are sized by tokens.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: str | None = None,
        quantization: str = "none",
        dtype: str = "auto",
        device: str = "auto",
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        encoded: EncodedTexts | None = None,
        kept: KeptAnswers | None = None,
        update: Callable[..., Any] = lambda **fields: None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ):
        model: Any = pretrained
        if isinstance(pretrained, str):
            described = describe_model(model_folder(pretrained, quantized=True), quantization, adapter=adapter)
            model, tokenizer = load_eval_model(described, device or "auto", _torch_dtype(dtype))
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=_WINDOWS,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )
        self.encoded = EncodedTexts() if encoded is None else encoded
        self.kept = KeptAnswers("", {}, None) if kept is None else kept
        self.update, self.num_cut = update, 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answers requests for the log-likelihood of a continuation after a context."""
        pairs = [request.args for request in requests]
        keys = [request_key("loglikelihood", pair) for pair in pairs]
        encoded = self._encode_pairs(pairs)
        self.num_cut += sum(self._is_too_long(request) for request in encoded)
        missing = [number for number, key in enumerate(keys) if key not in self.kept]
        names = [keys[number] for number in missing]
        self.update(completed=len(keys) - len(missing), total=len(keys))
        self._score([encoded[number] for number in missing], [pairs[number][1] for number in missing], names)
        return [(float(answer[0]), bool(answer[1])) for answer in map(self.kept.__getitem__, keys)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Answers requests for the log-likelihood of whole texts, without lm-eval's own bar."""
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Answers tokenized requests: the windows of `loglikelihood_rolling`."""
        windows = [EncodedRequest(context, continuation) for _, context, continuation in requests]
        keys = [request_key("window", window) for window in windows]
        missing = {key: window for key, window in zip(keys, windows, strict=True) if key not in self.kept}
        self.update(completed=len(keys) - len(missing), total=len(keys))
        texts = [self.tok_decode(list(window.continuation)) for window in missing.values()]
        self._score([*missing.values()], texts, [*missing])
        return [(float(answer[0]), bool(answer[1])) for answer in map(self.kept.__getitem__, keys)]

    def _score(self, encoded: Sequence[EncodedRequest], texts: Sequence[str], keys: Sequence[str]) -> None:
        def answered(answers: list[tuple[int, LikelihoodAnswer]], num_tokens: int) -> None:
            if bad := [number for number, answer in answers if not math.isfinite(answer.log_likelihood)]:
                raise InputError(
                    f"{len(bad)} of {len(answers)} log-likelihoods are not finite, the first for {texts[bad[0]]!r}. "
                    "The weights are damaged or the training diverged; score another checkpoint"
                )
            self.kept.add({keys[number]: list(answer) for number, answer in answers})
            self.update(advance=len(answers))

        score_requests(self.model, [fit_request(request, self.max_length) for request in encoded], answered)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedRequest]:
        """Returns the tokens of contexts and continuations, divided as lm-eval does (`TemplateLM._encode_pair`).

        Spaces at the end of a context belong to the continuation, and the two are tokenized together.
        """
        stripped = [context.rstrip() for context, _ in pairs]
        wholes = [context + continuation for context, continuation in pairs]
        ids = self.encoded.encode([*filter(None, stripped), *wholes], self._encode_all)
        found = []
        for (context, continuation), start, whole in zip(pairs, stripped, wholes, strict=True):
            if context == "":
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                has_prefix = tokens[:1] == [self.prefix_token_id]
                found.append(EncodedRequest([self.prefix_token_id], tokens[1:] if has_prefix else tokens))
            else:
                length = len(ids[start]) if start else len(self.tok_encode(""))
                found.append(EncodedRequest(ids[whole][:length], ids[whole][length:]))
        return found

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in texts if not has_bos_prefix(text, bos)]
        tokens = (
            self.tokenizer(plain, add_special_tokens=self.add_bos_token is not False)["input_ids"] if plain else []
        )
        ids = dict(zip(plain, tokens, strict=True))
        return [ids[text] if text in ids else self.tok_encode(text) for text in texts]

    def _is_too_long(self, request: EncodedRequest) -> bool:
        # A request may have one token more than the context, since the last token is predicted but not read.
        return len(request.context) + len(request.continuation) > self.max_length + 1

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers requests for generated text, up to the first stop string."""
        arguments = [request.args for request in requests]
        keys = repeated_keys("generate_until", arguments)
        self.update(completed=sum(key in self.kept for key in keys), total=len(keys))
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(arguments):
            groups.setdefault(repr(settings), []).append(number)
        for numbers in groups.values():
            prompts = {number: arguments[number][0] for number in numbers}
            missing = {number for number in numbers if keys[number] not in self.kept}
            for number, text in self._generate(prompts, missing, arguments[numbers[0]][1]):
                self.kept.add({keys[number]: text})
                self.update(advance=1)
        return [str(self.kept[key]) for key in keys]

    def _generate(
        self, prompts: dict[int, str], missing: Collection[int], settings: dict[str, Any]
    ) -> Iterable[tuple[int, str]]:
        """Yields number and text of each prompt without an answer, as soon as it is finished.

        All prompts that do not fit in the context are counted.
        """
        wanted = generation_settings(settings, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = [text for text in handle_stop_sequences(wanted["until"], eos=eos) if text]
        room = prompt_room(self.max_length, wanted["max_gen_toks"])
        encoded = {number: self.tok_encode(text) for number, text in prompts.items()}
        self.num_cut += sum(len(tokens) > room for tokens in encoded.values())
        chosen = [Request(number, encoded[number][-room:], wanted["max_gen_toks"]) for number in sorted(missing)]
        sampling = Sampling(wanted["temperature"] if wanted["do_sample"] else 0, wanted.get("top_p", 1.0))
        for done in generate_many(
            self.model, self.tokenizer, chosen, _GENERATED_TOGETHER, sampling, _SEED, stop_strings=until
        ):
            text = self.tok_decode(done.ids, skip_special_tokens=True)
            yield done.key, postprocess_generated_text(text, until, None)


def generation_settings(settings: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """Returns the generation settings of a task in lm-eval's normalized form.

    Raises:
        InputError: for settings that would be ignored.
    """
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, max_gen_toks))
    if unknown := sorted(set(wanted) - _SETTINGS):
        raise InputError(
            f"generation_kwargs of a task: {', '.join(unknown)} not supported. Supported: "
            f"{', '.join(sorted(_SETTINGS))}"
        )
    return wanted


def fit_request(request: EncodedRequest, max_length: int) -> EncodedRequest:
    """Truncates a request from the left, so that a model with a context of `max_length` tokens can answer it.

    Raises:
        InputError: if the continuation alone is longer, or context or continuation is empty.
    """
    context, continuation = request
    if len(continuation) > max_length:
        raise InputError(
            f"the model's context of {max_length} tokens is too short for a choice of {len(continuation)} tokens. "
            "Score a model with a longer context"
        )
    if not context or not continuation:
        raise InputError(
            f"a request has {len(context)} tokens of context and {len(continuation)} to score. It needs at least one "
            "of each; fix the task, or its rows"
        )
    return EncodedRequest(context[-(max_length + 1 - len(continuation)) :], continuation)


def prompt_room(max_length: int, max_gen_toks: int) -> int:
    """Returns the maximum number of prompt tokens that fit in the context with the generated tokens.

    Raises:
        InputError: if no prompt fits.
    """
    if max_length - max_gen_toks < 1:
        raise InputError(
            f"max_gen_toks: {max_gen_toks} of a task leaves no room for a prompt in the context of {max_length} "
            "tokens. Score a model with a longer context"
        )
    return max_length - max_gen_toks


def _torch_dtype(name: str) -> torch.dtype | None:
    """Returns a dtype by its name, `None` for `"auto"`.

    Raises:
        InputError: if torch has no such floating-point type.
    """
    dtype = None if name == "auto" else getattr(torch, str(name), None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype={name}: unknown. Use auto, float32, bfloat16 or float16")
    return dtype
