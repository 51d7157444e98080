"""Generates for all clients in one thread: rows join the running batch between rounds and leave when they end."""

import collections
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..decoding.acceptance import MostLikelyToken
from ..decoding.engine import Decoding
from ..decoding.proposals import Proposer
from ..decoding.rows import RowPlan
from ..errors import one_line
from ..inference.generation import SEEDED_DRAFT_LENGTH, stop_token_ids
from .call import Refusal, RowRequest
from .response_formats import GrammarProcessor
from .row_processors import CountPenalty, TokenBias
from .row_text import Counts, Piece, RowText, TokenScore, token_scores


logger = logging.getLogger(__name__)
_RETRY_SECONDS = 5
# Tokens of prompts that are read between two rounds, so that a long prompt does not delay the other rows.
_PIECE, _PIECE_ON_CPU = 512, 64


class Row:
    """A row and its state in the server.

    Args:
        key (`int`): identifies it.
        request (`RowRequest`): what to generate.
        text (`RowText`): its reply.
        deliver (`Callable`): called in the generating thread with each [`Piece`].
        deadline (`float`): time at which it is ended, by `time.monotonic`.
    """

    def __init__(
        self, key: int, request: RowRequest, text: RowText, deliver: Callable[[Piece], None], deadline: float
    ):
        self.key, self.request, self.text, self.deadline = key, request, text, deadline
        self.is_cancelled = self.has_ended = False
        self.decoding: Decoding | None = None  # while the prompt is read
        self.grammar: GrammarProcessor | None = None
        self.num_read = 0  # tokens of the prompt whose successors have been scored
        self._deliver = deliver

    def receive(self, ids: Sequence[int], logits: torch.Tensor | None) -> None:
        """Delivers the next tokens."""
        self.text.add(ids, logits)
        if self.text.finish_reason is None:
            text, scores = self.text.take()
            if text or scores:
                self._deliver(Piece(self.request.place, text, scores))

    def deliver_scores(self, scores: Sequence[TokenScore]) -> None:
        """Delivers log-probabilities of the prompt."""
        self._deliver(Piece(self.request.place, scores=scores))

    def end(self, drafted: int = 0, accepted: int = 0, error: Refusal | None = None) -> None:
        """Delivers the last piece, once."""
        if self.has_ended:
            return
        self.has_ended = True
        if error is None:
            self.text.cut()  # no effect if it has already ended
            text, scores = self.text.take()
            counts = Counts(self.text.num_tokens, drafted, accepted)
            self._deliver(Piece(self.request.place, text, scores, self.text.finish_reason, counts))
        elif not self.is_cancelled:
            self._deliver(Piece(self.request.place, error=error))


class Scheduler:
    """The rows of all clients and the thread that generates them.

    Args:
        model (`PreTrainedModel`): the model.
        tokenizer (`PreTrainedTokenizerFast`): its tokenizer.
        draft (`Proposer`, *optional*): proposes tokens for all rows.
        max_rows (`int`, *optional*, defaults to 16): maximum number of rows generated together.
        max_waiting (`int`, *optional*, defaults to 64): maximum number of waiting rows.
        row_seconds (`float`, *optional*, defaults to 600): maximum time of a row, waiting included. A running row
            then ends as if it had reached its token limit.
        vocabulary (`LLTokenizer`, *optional*): llguidance's form of the tokenizer, for grammars.

    Attributes:
        running, waiting (`int`): numbers of rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        draft: Proposer | None = None,
        max_rows: int = 16,
        max_waiting: int = 64,
        row_seconds: float = 600,
        vocabulary: Any = None,
    ):
        self._model, self._tokenizer, self._draft, self._vocabulary = model, tokenizer, draft, vocabulary
        self._max_rows, self._max_waiting, self._row_seconds = max_rows, max_waiting, row_seconds
        self._stop_tokens = stop_token_ids(model, tokenizer)
        self._piece = _PIECE_ON_CPU if model.device.type == "cpu" else _PIECE
        self._keys = itertools.count()
        self._changed = threading.Condition()
        self._waiting: collections.deque[Row] = collections.deque()
        self._reading: list[Row] = []
        self._rows: dict[int, Row] = {}  # in the running batch
        self._batch: Decoding | None = None
        self._end_time: float | None = None
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._reading) + len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[RowRequest], deliver: Callable[[Piece], None]) -> list[Row]:
        """Adds rows to the queue.

        Args:
            requests (`Sequence[RowRequest]`): the rows of one call.
            deliver (`Callable`): called in another thread with the pieces of all of them.

        Raises:
            Refusal: if the queue is full, or the server is shutting down.
        """
        deadline = time.monotonic() + self._row_seconds
        rows = [
            Row(next(self._keys), each, RowText(each, self._tokenizer, self._stop_tokens), deliver, deadline)
            for each in requests
        ]
        with self._changed:
            if self._end_time is not None:
                raise shutting_down()
            if len(self._waiting) >= self._max_waiting:
                raise queue_full(len(self._waiting))
            self._waiting.extend(rows)
            self._changed.notify()
        return rows

    def cancel(self, rows: Sequence[Row]) -> None:
        """Ends the rows of a disconnected client. Nothing more is delivered."""
        with self._changed:
            for row in rows:
                row.is_cancelled = True
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Refuses new and waiting rows, and gives running ones some time to finish. Returns at once."""
        with self._changed:
            if self._end_time is None:
                self._end_time = time.monotonic() + seconds
            self._changed.notify()

    def join(self) -> None:
        """Waits until all rows have ended after [`close`]."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                if not self._wait_for_rows():
                    return
                self._remove_ended()
                self._read_prompts()
                self._generate()
            except Exception as error:  # such as out of memory: clients must not wait forever
                logger.exception("generation failed")
                refusal = Refusal(f"generation failed: {one_line(error)}", 500)
                self._refuse([*self._reading, *self._rows.values()], refusal)
                self._reading, self._rows, self._batch = [], {}, None

    def _wait_for_rows(self) -> bool:
        """Waits for work and moves waiting rows to free places; returns whether to continue."""
        with self._changed:
            while not (self._waiting or self._reading or self._rows):
                if self._end_time is not None:
                    return False
                self._changed.wait()
            gone = [row for row in self._waiting if row.is_cancelled]
            late = [row for row in self._waiting if row.deadline < time.monotonic()]
            closed = list(self._waiting) if self._end_time is not None else []
            for row in {*gone, *late, *closed}:
                self._waiting.remove(row)
            while self._waiting and self.running < self._max_rows:
                self._reading.append(self._waiting.popleft())
        self._refuse(closed, shutting_down())
        self._refuse(late, Refusal(f"the reply did not begin within {self._row_seconds:.0f} seconds", 503))
        return True

    def _remove_ended(self) -> None:
        """Removes rows that were canceled or are past their deadline."""
        now = time.monotonic()
        is_over = self._end_time is not None and now > self._end_time
        for row in [*self._reading, *self._rows.values()]:
            if is_over:
                self._refuse([row], shutting_down())
            elif row.is_cancelled or row.deadline < now:
                row.end()
        self._reading = [row for row in self._reading if not row.has_ended]
        self._leave([row for row in self._rows.values() if row.has_ended])

    def _read_prompts(self) -> None:
        """Reads some tokens of the oldest prompts, and adds complete ones to the batch."""
        room = self._piece
        while self._reading and room > 0:
            row = self._reading[0]
            try:
                room -= self._read(row, room)
            except Exception as error:
                if row.key in self._rows:
                    raise  # it was joining the batch, which may be inconsistent now
                logger.exception("row %d failed", row.key)
                self._refuse([row], Refusal(f"the prompt failed: {one_line(error)}", 500))
            if row.has_ended or row.key in self._rows:
                self._reading.pop(0)

    def _read(self, row: Row, room: int) -> int:
        """Reads up to `room` tokens of a prompt, and adds the row to the batch after the last one."""
        request, length = row.request, len(row.request.ids)
        decoding = row.decoding = row.decoding or self._begin(row)
        left = length - row.num_read
        if request.scores_prompt and not row.num_read:
            row.deliver_scores([TokenScore(request.ids[0], 0, None, [])])  # no token predicts the first one
        if left > room or (request.scores_prompt and left > 1):
            logits = decoding.read_piece(min(room, left - 1), request.scores_prompt)
            assert logits is not None
            taken = min(room, left - 1)
            if request.scores_prompt:
                following = request.ids[row.num_read + 1 : row.num_read + 1 + taken]
                row.deliver_scores(token_scores(logits[0], following, request.top_logprobs or 0))
            row.num_read += taken
            return taken
        row.decoding = None
        if not request.max_new_tokens:
            row.end()
            return left
        if request.top_logprobs is not None:
            decoding.token_scores["logits"] = {row.key: []}
        appended = decoding.start()
        self._rows[row.key] = row
        self._deliver(decoding, appended)
        if row.has_ended:
            del self._rows[row.key]
        elif self._batch is None:
            self._batch = decoding
        else:
            self._batch.join(decoding)
        return left

    def _generate(self) -> None:
        if self._batch is None:
            return
        self._deliver(self._batch, self._batch.round())
        self._leave([row for row in self._rows.values() if row.has_ended])

    def _deliver(self, decoding: Decoding, appended: dict[int, list[int]]) -> None:
        """Passes new tokens to their rows."""
        decoding.rows.take_finished()
        collected = decoding.token_scores.get("logits", {})
        for key, ids in appended.items():
            row = self._rows.get(key)
            if row is None or row.has_ended:
                continue
            logits = torch.cat(collected[key]) if collected.get(key) else None
            if key in collected:
                collected[key] = []
            row.receive(ids, logits)
            if row.grammar is not None and row.grammar.error:
                message = f"response_format: the schema cannot be followed any further ({row.grammar.error})"
                row.end(error=Refusal(message, param="response_format"))
            elif row.text.finish_reason is not None:
                row.end(*decoding.draft_counts[key])

    def _leave(self, rows: Sequence[Row]) -> None:
        """Removes rows from the batch; frees it with the last one."""
        if self._batch is None or not rows:
            return
        keys = {row.key for row in rows}
        self._batch.cancel(keys)
        for key in keys:
            del self._rows[key]
            self._batch.draft_counts.pop(key, None)
            self._batch.token_scores.get("logits", {}).pop(key, None)
        if not self._rows:
            self._batch.close()
            self._batch = None

    def _refuse(self, rows: Sequence[Row], refusal: Refusal) -> None:
        for row in rows:
            row.end(error=refusal)

    def _begin(self, row: Row) -> Decoding:
        """Prepares a row; nothing is read yet."""
        request, device = row.request, self._model.device
        ids = torch.tensor([request.ids], device=device)
        num_new = max(1, request.max_new_tokens)
        seed = secrets.randbits(128) if request.seed is None else request.seed
        draws = torch.from_numpy(np.random.default_rng([seed, request.place]).random((3, num_new)))
        is_fixed = (
            self._draft is not None and request.is_drafted and request.seed is not None and request.temperature > 0
        )
        plan = RowPlan(row.key, num_new, draws, SEEDED_DRAFT_LENGTH if is_fixed else None, request.is_drafted)
        arguments = _sampling(request) | {
            "max_new_tokens": num_new,
            "pad_token_id": 0,  # rows have no padding
            "eos_token_id": self._stop_tokens or None,
            "logits_processor": self._processors(row),
        }
        return Decoding(self._model, self._draft, None, ids, torch.ones_like(ids), [plan], **arguments)

    def _processors(self, row: Row) -> list[Any]:
        processors: list[Any] = []
        request, length = row.request, len(row.request.ids)
        if request.presence_penalty or request.frequency_penalty:
            processors.append(CountPenalty(request.presence_penalty, request.frequency_penalty, length))
        if request.logit_bias:
            processors.append(TokenBias(request.logit_bias, self._model.device))
        if request.grammar is not None:
            row.grammar = GrammarProcessor(self._vocabulary, request.grammar, length)
            processors.append(row.grammar)
        if not request.temperature:
            processors.append(MostLikelyToken())
        return processors


def _sampling(request: RowRequest) -> dict[str, Any]:
    """Returns arguments of `generate`; all rows of a batch sample, see [`~decoding.acceptance.MostLikelyToken`]."""
    arguments: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    if request.temperature:
        arguments |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        arguments |= {"min_p": request.min_p} if request.min_p else {}
    if request.repetition_penalty != 1:
        arguments["repetition_penalty"] = request.repetition_penalty
    if request.min_new_tokens:
        arguments["min_new_tokens"] = request.min_new_tokens
    return arguments


def queue_full(waiting: int) -> Refusal:
    """Returns the answer to requests beyond the limit on waiting ones."""
    message = f"{waiting} replies are waiting; try again in {_RETRY_SECONDS} seconds"
    return Refusal(message, 429, "rate_limit_exceeded", headers={"Retry-After": str(_RETRY_SECONDS)})


def shutting_down() -> Refusal:
    """Returns the answer to requests during shutdown."""
    return Refusal("the server is shutting down", 503)
