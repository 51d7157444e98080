"""Generates text from one prompt, and streams it."""

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
from ..text import check_text, decode_text
from .options import Sampling


DEFAULT_NEW_TOKENS = 256
# With a seed, the number of drafted tokens must not depend on measured times, or the samples would.
SEEDED_DRAFT_LENGTH = 4
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Decoded from the first bytes of a character at the end of a text, with a byte-level vocabulary.
_UNFINISHED = "\ufffd"
_KEPT_TOKENS = 7  # up to 3 for the first bytes of a character, and up to 4 for the complete character before it


class ExactTextStreamer(TextStreamer):
    """Streams exactly the text that decoding all tokens at once gives.

    `TextStreamer` of transformers (5.23) discards the tokens before each line break. Decoding the rest separately
    strips the space that a Llama text begins with, so every line loses one column of indentation. Here each token is
    decoded together with the few tokens before it, which takes N short calls for a text of N tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        write (`Callable`, *optional*): called with each part of the text; standard output by default.
        skip_prompt (`bool`, *optional*, defaults to `False`): stream only the generated text.
        hidden (`Collection[int]`, *optional*): ids of tokens to skip, in addition to control tokens.
    """

    _window: list[int]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], Any] | None = None,
        skip_prompt: bool = False,
        hidden: Collection[int] = (),
    ):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=True)
        self._write = write or sys.stdout.write
        # Includes control tokens: they have no text, and byte tokens on both sides of one are decoded as one run.
        self._hidden = {*hidden, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self._begin()

    def put(self, value: torch.Tensor) -> None:
        """Receives the ids of the prompt, then each new token; `[1, num_tokens]` or `[num_tokens]`."""
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        for token in value.reshape(-1).tolist():
            piece = self.tokenizer.convert_ids_to_tokens(token)  # `None` for an id beyond the vocabulary
            if not isinstance(piece, str) or token in self._hidden:
                continue
            self._window.append(token)
            # A run of byte tokens is decoded as a whole: an invalid byte changes the text of its neighbors.
            if _BYTE_PIECE.fullmatch(piece) is None:
                self._num_closed = len(self._window)
        closed = self._window[: self._num_closed]
        self._show(decode_text(self.tokenizer, closed).removesuffix(_UNFINISHED))
        kept = closed[-_KEPT_TOKENS:]  # they affect how the next tokens are decoded
        self._num_shown = len(decode_text(self.tokenizer, kept).removesuffix(_UNFINISHED))
        self._window = kept + self._window[self._num_closed :]
        self._num_closed = len(kept)

    def held_back(self) -> str:
        """Returns the text that [`end`] would write."""
        return decode_text(self.tokenizer, self._window)[self._num_shown :]

    def end(self) -> None:
        """Writes the text that was held back."""
        self._show(decode_text(self.tokenizer, self._window))
        self._begin()
        self.next_tokens_are_prompt = True

    def _begin(self) -> None:
        self._window = []  # the last tokens of the written text, then those that are not written yet
        self._num_shown = 0  # characters of the window's text that are written
        self._num_closed = 0  # tokens of the window before an unfinished run of byte tokens

    def _show(self, text: str) -> None:
        if len(text) > self._num_shown:
            self._write(text[self._num_shown :])
            self._num_shown = len(text)
            if self._write == sys.stdout.write:
                sys.stdout.flush()


@dataclass(frozen=True)
class Context:
    """The maximum length of a prompt and its continuation together.

    Attributes:
        tokens (`int`): the length in tokens.
        owner (`str`, *optional*, defaults to `"model"`): `"model"`, or `"draft"` if the draft has the shorter context.
    """

    tokens: int
    owner: str = "model"

    @classmethod
    def of(cls, model: PreTrainedModel, draft: Proposer | None = None) -> "Context":
        """Returns the context of a model, or of a model and its draft."""
        tokens = model.config.max_position_embeddings
        return cls(draft.context, "draft") if draft and draft.context < tokens else cls(tokens)

    def new_tokens(self, length: int, max_new_tokens: int | None = None, name: str = "prompt") -> int:
        """Returns the number of tokens to generate, after checking that they fit.

        Args:
            length (`int`): length of the prompt in tokens.
            max_new_tokens (`int`, *optional*): as in [`Sampling`].
            name (`str`, *optional*, defaults to `"prompt"`): name of the prompt in error messages.

        Raises:
            InputError: if the prompt is empty, or too long for `max_new_tokens`, or for one new token by default.
        """
        if not length:
            raise InputError(
                f"{name}: empty, and this tokenizer has no begin-of-sequence token to start with; give a prompt"
            )
        room = self.tokens - length
        if room < (max_new_tokens or 1):
            raise InputError(
                f"{name}: {length} tokens plus {max_new_tokens or 1} new tokens exceed the {self.owner}'s context of "
                f"{self.tokens}; shorten it{' or lower --max-new-tokens' if max_new_tokens else ''}"
            )
        return max_new_tokens or min(DEFAULT_NEW_TOKENS, room)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the end-of-sequence tokens of the tokenizer and of the model's generation settings."""
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
    """Generates a continuation; returns the prompt with it.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompt (`str`, *optional*, defaults to `""`): plain text; with an empty one, generation starts from the
            begin-of-sequence token.
        max_new_tokens (`int`, *optional*): see [`Sampling`].
        temperature (`float`, *optional*, defaults to 0.8): see [`Sampling`].
        top_p (`float`, *optional*, defaults to 0.95): see [`Sampling`].
        seed (`int`, *optional*): seed of the random generator.
        streamer (`TextStreamer`, *optional*): receives the tokens as they are generated.
        draft (`Proposer`, *optional*): proposes tokens; its `statistics` are set.

    Raises:
        InputError: if a value is out of range, or the prompt is not valid text or does not fit the context.
    """
    sampling = Sampling(temperature, top_p, max_new_tokens)
    check_text(prompt, "prompt")
    ids = tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
    num_new = Context.of(model, draft).new_tokens(len(ids), max_new_tokens)
    if seed is not None:
        torch.manual_seed(check_seed(seed))
    new = generate_ids(model, tokenizer, ids, num_new, sampling, streamer, draft, seeded=seed is not None)
    return decode_text(tokenizer, ids + new)


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
    """Generates from the token ids of one prompt; returns the new ids. `options` are passed to `generate`.

    With a draft, `seeded` fixes the draft length, so that the samples depend only on the seed, not on measured times.
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
        output = model.generate(**arguments)  # type: ignore[operator]  # of GenerationMixin, unknown to PreTrainedModel
    return output[0, len(ids) :].tolist()
