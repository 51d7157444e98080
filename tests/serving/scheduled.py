"""Helpers of the scheduler's tests: rows, and what is delivered of them."""

import queue

from tinyllama_hf.serving.call import RowRequest
from tinyllama_hf.serving.row_text import Piece


class Delivered:
    """Submits the rows of one call and keeps what is delivered of them."""

    def __init__(self, scheduler, *requests: RowRequest):
        self._pieces: queue.Queue[Piece] = queue.Queue()
        self.pieces: list[Piece] = []
        self._left = len(requests)
        self.rows = scheduler.submit(requests, self._pieces.put)

    def next(self) -> Piece:
        piece = self._pieces.get(timeout=60)
        self.pieces.append(piece)
        self._left -= piece.is_last
        return piece

    def wait(self) -> "Delivered":
        while self._left:
            self.next()
        return self

    def nothing_more(self) -> bool:
        return self._pieces.empty()

    def text(self, place: int = 0) -> str:
        return "".join(piece.text for piece in self.wait().pieces if piece.place == place)

    def scores(self, place: int = 0) -> list:
        return [score for piece in self.wait().pieces if piece.place == place for score in piece.scores]

    def last(self, place: int = 0) -> Piece:
        return next(piece for piece in self.wait().pieces if piece.place == place and piece.is_last)


def row(tokenizer, text: str, max_new_tokens: int = 12, **settings) -> RowRequest:
    settings = {"temperature": 0.0, **settings}
    return RowRequest(tuple(tokenizer(text)["input_ids"]), max_new_tokens, **settings)
