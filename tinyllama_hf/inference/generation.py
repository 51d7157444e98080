"""Generating text from one prompt, shown as it appears."""

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..errors import InputError


DEFAULT_NEW_TOKENS = 256
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class ExactTextStreamer(TextStreamer):
    """Streams exactly the text that decoding all tokens at once would give.

    transformers' `TextStreamer` (5.23) forgets the tokens before each line break; decoding the rest by itself then
    strips the space that a Llama text begins with, so that every line loses one column of indentation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any] = sys.stdout.write):
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def put(self, value: torch.Tensor) -> None:
        """Takes the ids of the prompt, then of each new token; `[1, num_tokens]` or `[num_tokens]`."""
        self.token_cache.extend(value.reshape(-1).tolist())
        # A run of byte pieces becomes text only as a whole (one bad byte spoils its neighbours), and in byte-level
        # vocabularies an unfinished character decodes to U+FFFD: wait for the rest of both.
        settled = len(self.token_cache)
        while settled and self._is_byte(self.token_cache[settled - 1]):
            settled -= 1
        text = self.tokenizer.decode(self.token_cache[:settled], **self.decode_kwargs)
        self._show(text.rstrip("\ufffd"))

    def end(self) -> None:
        """Shows what was held back."""
        self._show(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))
        self.token_cache, self.print_len = [], 0

    def _is_byte(self, token: int) -> bool:
        piece = self.tokenizer.convert_ids_to_tokens(token)  # None for an id beyond the vocabulary
        return piece is not None and _BYTE_PIECE.fullmatch(piece) is not None

    def _show(self, text: str) -> None:
        if len(text) > self.print_len:
            self._write(text[self.print_len :])
            self.print_len = len(text)
            if self._write == sys.stdout.write:
                sys.stdout.flush()


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    streamer: TextStreamer | None = None,
) -> str:
    """Continues a prompt and returns prompt and continuation.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompt (`str`): plain text; empty starts from begin-of-sequence.
        max_new_tokens (`int`, *optional*): defaults to 256, or what is left of the context.
        temperature (`float`): 0 takes the most likely token each time.
        top_p (`float`): smallest set of tokens with this probability is drawn from.
        seed (`int`, *optional*): of the draws.
        streamer (`TextStreamer`, *optional*): shown the tokens as they appear.

    Raises:
        InputError: for values out of range, and a prompt that does not fit the context.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature {temperature}: must be 0 (always the most likely token) or above, and finite")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: must lie above 0 and up to 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True, verbose=False)
    if not inputs["input_ids"].numel():
        raise InputError("prompt: is empty, and this tokenizer has no begin-of-sequence to begin with; give a prompt")
    length, context = inputs["input_ids"].shape[-1], model.config.max_position_embeddings
    room = context - length
    if room < (max_new_tokens or 1):
        raise InputError(
            f"prompt of {length} tokens and {max_new_tokens or 1} new ones are longer than the model's context of "
            f"{context}; shorten the prompt{' or lower --max-new-tokens' if max_new_tokens else ''}"
        )
    sampling = (
        {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_p": top_p}
    )
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens or min(DEFAULT_NEW_TOKENS, room),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **({"top_k": 0} | sampling if temperature else sampling),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
