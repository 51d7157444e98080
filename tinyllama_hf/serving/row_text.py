"""The text of one generated row: its tokens as text, up to a stop string, with their log-probabilities."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..inference.generation import ExactTextStreamer
from .call import Refusal, RowRequest
from .stop_strings import StopStrings


class TokenScore(NamedTuple):
    """The log-probability of a token, in nats, from the logits of the model before any sampling setting.

    Attributes:
        token (`int`): the token.
        offset (`int`): number of characters of the text before it.
        logprob (`float`, *optional*): `None` for the first token of a prompt.
        top (`list[tuple[int, float]]`): the most likely tokens at its place.
    """

    token: int
    offset: int
    logprob: float | None
    top: list[tuple[int, float]]


class Counts(NamedTuple):
    """Numbers of tokens of a finished row: new (with its stop token), drafted, and accepted drafted ones."""

    new: int = 0
    drafted: int = 0
    accepted: int = 0


class Piece(NamedTuple):
    """The next part of a row.

    Attributes:
        place (`int`): place of the row in its call.
        text (`str`): the next part of the reply.
        scores (`Sequence[TokenScore]`): of the tokens that begin in this part, if requested.
        finish_reason (`str`, *optional*): with the last piece, `"stop"` or `"length"`.
        counts (`Counts`): with the last piece.
        error (`Refusal`, *optional*): ends the row instead of a finish reason.
    """

    place: int
    text: str = ""
    scores: Sequence[TokenScore] = ()
    finish_reason: str | None = None
    counts: Counts = Counts()
    error: Refusal | None = None

    @property
    def is_last(self) -> bool:
        """Whether the row has ended."""
        return self.finish_reason is not None or self.error is not None


class RowText:
    """Receives the tokens of a row.

    Args:
        request (`RowRequest`): the row.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        stop_tokens (`Collection[int]`): tokens that end the row and have no text.

    Attributes:
        num_tokens (`int`): number of tokens so far.
        finish_reason (`str`, *optional*): why the row has ended, `"stop"` or `"length"`.
    """

    def __init__(self, request: RowRequest, tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int]):
        self._request, self._stop_tokens = request, stop_tokens
        self._parts: list[str] = []
        self._stops = StopStrings(request.stop_strings, self._parts.append)
        self._streamer = ExactTextStreamer(tokenizer, self._receive_text)
        self._num_characters = 0  # of the text before a stop string is cut
        self._num_sent = 0  # characters
        self._scores: list[TokenScore] = []  # of tokens whose text has not been sent yet
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def add(self, ids: Sequence[int], logits: torch.Tensor | None) -> None:
        """Receives the next tokens and, if their log-probabilities are wanted, the logits `[tokens, vocab_size]`."""
        rows = [] if logits is None else token_scores(logits, ids, self._request.top_logprobs or 0)
        for place, token in enumerate(ids):
            if self.finish_reason is not None:
                return
            self.num_tokens += 1
            if token in self._stop_tokens:
                self._end("stop")
                return
            if rows:
                self._scores.append(rows[place]._replace(offset=self._num_characters))
            self._streamer.put(torch.tensor([token]))
            if self._stops.texts and self._stops.is_complete_with(self._streamer.held_back()):
                self._end("stop")
            elif self.num_tokens == self._request.max_new_tokens:
                self._end("length")

    def take(self) -> tuple[str, list[TokenScore]]:
        """Returns the text since the last call, and the scores of the tokens that begin in it."""
        text = "".join(self._parts)
        self._parts.clear()
        self._num_sent += len(text)
        is_whole = self.finish_reason is not None and not self._stops.is_found
        taken = [score for score in self._scores if is_whole or score.offset < self._num_sent]
        del self._scores[: len(taken)]
        return text, taken

    def cut(self) -> None:
        """Ends the row early."""
        if self.finish_reason is None:
            self._end("length")

    def _end(self, reason: str) -> None:
        self.finish_reason = reason
        self._streamer.end()
        self._stops.end()

    def _receive_text(self, text: str) -> None:
        self._num_characters += len(text)
        self._stops.put(text)


def token_scores(logits: torch.Tensor, ids: Sequence[int], num_top: int) -> list[TokenScore]:
    """Returns the log-probabilities of tokens, with offset 0.

    Args:
        logits (`torch.Tensor`): `[tokens, vocab_size]`.
        ids (`Sequence[int]`): the tokens.
        num_top (`int`): number of the most likely tokens to return with each.
    """
    scores = logits.float().log_softmax(dim=-1)
    chosen = scores.gather(1, torch.tensor(list(ids), device=scores.device)[:, None])[:, 0].tolist()
    values, tokens = (each.tolist() for each in scores.topk(num_top, dim=-1))
    return [
        TokenScore(token, 0, logprob, list(zip(*top, strict=True)))
        for token, logprob, *top in zip(ids, chosen, tokens, values, strict=True)
    ]
