"""Generating text from one prompt, shown as it appears."""

import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..decoding.proposals import Proposer
from ..decoding.speculative import speculative_generate
from ..errors import InputError, check_seed
from ..text import check_text
from .drafts import SEEDED_DRAFT_LENGTH


DEFAULT_NEW_TOKENS = 256
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_UNFINISHED = "\ufffd"  # what a byte-level vocabulary makes of a character's first bytes, at the end of a text
_KEPT_TOKENS = 7  # up to 3 with a character's first bytes, and up to 4 with the whole character before it


class ExactTextStreamer(TextStreamer):
    """Streams exactly the text that decoding all tokens at once would give.

    transformers' `TextStreamer` (5.23) forgets the tokens before each line break; decoding the rest by itself then
    strips the space that a Llama text begins with, so that every line loses one column of indentation. Here each token is
    decoded with the few before it, so that a text of N tokens costs N short calls.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        write (`Callable`): is given the pieces of the text.
        skip_prompt (`bool`, *optional*, defaults to `False`): show only what is generated.
        hidden (`Collection[int]`, *optional*): ids that are not shown, beside those of control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], Any] = sys.stdout.write,
        skip_prompt: bool = False,
        hidden: Collection[int] = (),
    ):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=True)
        self._write = write
        # Control tokens too: they have no text, and bytes on both sides of one are decoded as one run.
        self._hidden = {*hidden, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self._begin()

    def put(self, value: torch.Tensor) -> None:
        """Takes the ids of the prompt, then of each new token; `[1, num_tokens]` or `[num_tokens]`."""
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._take(token)
        self._show_closed()

    def end(self) -> None:
        """Shows what was held back."""
        self._show(self._decode(self._window))
        self._begin()
        self.next_tokens_are_prompt = True

    def _begin(self) -> None:
        self._window: list[int] = []  # the last tokens of the text shown, then those that are not shown yet
        self._num_shown = 0  # characters of the window's text
        self._num_closed = 0  # tokens of the window before an unfinished run of byte pieces

    def _take(self, token: int) -> None:
        piece = self.tokenizer.convert_ids_to_tokens(token)  # None for an id beyond the vocabulary
        if piece is None or token in self._hidden:
            return
        self._window.append(token)
        # A run of byte pieces becomes text only as a whole: one bad byte spoils its neighbors.
        if _BYTE_PIECE.fullmatch(piece) is None:
            self._num_closed = len(self._window)

    def _show_closed(self) -> None:
        """Shows the text up to an open run of bytes, and keeps the tokens that decide how the next ones are decoded."""
        closed = self._window[: self._num_closed]
        self._show(self._decode(closed).removesuffix(_UNFINISHED))
        kept = closed[-_KEPT_TOKENS:]
        self._num_shown = len(self._decode(kept).removesuffix(_UNFINISHED))
        self._window = kept + self._window[self._num_closed :]
        self._num_closed = len(kept)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs)

    def _show(self, text: str) -> None:
        if len(text) > self._num_shown:
            self._write(text[self._num_shown :])
            self._num_shown = len(text)
            if self._write == sys.stdout.write:
                sys.stdout.flush()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the fields are the commands' options.

    Attributes:
        temperature (`float`): 0 takes the most likely token each time.
        top_p (`float`): the smallest set of tokens with this probability is drawn from.
        max_new_tokens (`int`, *optional*): defaults to 256, or what is left of the context.

    Raises:
        InputError: for a value out of range, by the name of the command's option.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"--temperature {self.temperature}: must be 0 (always the most likely token) or above, and finite"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: must lie above 0 and up to 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")

    def arguments(self) -> dict[str, Any]:
        """As `generate` takes them."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Context:
    """The tokens that a prompt and its continuation may have together.

    Attributes:
        tokens (`int`): the limit.
        owner (`str`): has that limit: `"model"`, or `"draft"` where its context is shorter.
    """

    tokens: int
    owner: str = "model"

    @classmethod
    def of(cls, model: PreTrainedModel, draft: Proposer | None = None) -> "Context":
        """The context of a model that generates, with a draft or without."""
        tokens = model.config.max_position_embeddings
        return cls(draft.context, "draft") if draft and draft.context < tokens else cls(tokens)

    def new_tokens(self, length: int, max_new_tokens: int | None = None, name: str = "prompt") -> int:
        """The number of tokens to generate: `max_new_tokens`, or by default 256 or what is left.

        Args:
            length (`int`): tokens of the prompt.
            max_new_tokens (`int`, *optional*): as in [`Sampling`].
            name (`str`, *optional*, defaults to `"prompt"`): begins the message.

        Raises:
            InputError: if the prompt is empty, or does not fit with the new tokens, or with one.
        """
        if not length:
            raise InputError(
                f"{name}: is empty, and this tokenizer has no begin-of-sequence to begin with; give a prompt"
            )
        room = self.tokens - length
        if room < (max_new_tokens or 1):
            raise InputError(
                f"{name}: {length} tokens and {max_new_tokens or 1} new ones are longer than the {self.owner}'s context of "
                f"{self.tokens}; shorten it{' or lower --max-new-tokens' if max_new_tokens else ''}"
            )
        return max_new_tokens or min(DEFAULT_NEW_TOKENS, room)


def stop_tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence of the tokenizer and those that the model's folder names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    streamer: TextStreamer | None = None,
    draft: Proposer | None = None,
) -> str:
    """Continues a prompt and returns prompt and continuation.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompt (`str`): plain text; empty starts from begin-of-sequence.
        max_new_tokens (`int`, *optional*): see [`Sampling`].
        temperature (`float`): see [`Sampling`].
        top_p (`float`): see [`Sampling`].
        seed (`int`, *optional*): of the draws.
        streamer (`TextStreamer`, *optional*): shown the tokens as they appear.
        draft (`Proposer`, *optional*): proposes tokens; its `statistics` tell what that was worth.

    Raises:
        InputError: for values out of range, and a prompt that is not text or does not fit the context.
    """
    sampling = Sampling(temperature, top_p, max_new_tokens)
    check_text(prompt, "prompt")
    ids = tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
    num_new = Context.of(model, draft).new_tokens(len(ids), max_new_tokens)
    if seed is not None:
        torch.manual_seed(check_seed(seed))
    new = generate_ids(model, tokenizer, ids, num_new, sampling, streamer, draft, seeded=seed is not None)
    return tokenizer.decode(ids + new, skip_special_tokens=True)


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
    draft: Proposer | None = None,
    seeded: bool = False,
    **options: Any,
) -> list[int]:
    """Continues the ids of one prompt and returns the new ones; `options` go to `generate`.

    With a draft, `seeded` makes the draws depend on the seed alone, and not on how long passes take.
    """
    inputs = torch.tensor([ids], device=model.device)
    arguments = {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "streamer": streamer,
        **sampling.arguments(),
        **options,
    }
    if draft:
        output = speculative_generate(model, draft, draft_length=SEEDED_DRAFT_LENGTH if seeded else None, **arguments)
    else:
        output = model.generate(**arguments)
    return output[0, len(ids) :].tolist()
