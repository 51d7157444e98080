"""Cuts a text that arrives in parts before its first stop string."""

from collections.abc import Callable, Sequence
from typing import Any


class StopStrings:
    """Writes a text up to its first stop string. An end that may be the start of a stop string is held back.

    Args:
        texts (`Sequence[str]`): the stop strings, none of them empty.
        write (`Callable`): called with each part of the text.
    """

    def __init__(self, texts: Sequence[str], write: Callable[[str], Any]):
        self.texts, self.is_found = tuple(texts), False
        self._write, self._held = write, ""

    def put(self, text: str) -> None:
        """Receives the next part of the text; what follows a stop string is ignored."""
        if self.is_found:
            return
        text = self._held + text
        place = self._place(text)
        self.is_found = place is not None
        end = len(text) - self._num_open(text) if place is None else place
        self._held = text[end:]
        if end:
            self._write(text[:end])

    def end(self) -> None:
        """Writes what was held back, unless a stop string was found."""
        if not self.is_found and self._held:
            self._write(self._held)
        self._held = ""

    def is_complete_with(self, text: str) -> bool:
        """Whether a stop string was found, or is found if the text ends with this part."""
        return self.is_found or self._place(self._held + text) is not None

    def _place(self, text: str) -> int | None:
        """Returns the start of the stop string that ends first, so that the split into parts makes no difference."""
        found = [(place + len(stop), place) for stop in self.texts if (place := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_open(self, text: str) -> int:
        """Returns the length of the longest suffix of a text that is a prefix of a stop string."""
        lengths = range(max(map(len, self.texts), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.texts) and n <= len(text)), 0)
