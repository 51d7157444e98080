"""Records when each new token arrives."""

import time
from typing import Any

from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer for `generate` that records wall and CPU time of the prompt and of each step, for any number of rows.

    `generate` copies the tokens of a step to the CPU before it calls a streamer, so a GPU has finished the step.
    """

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def put(self, value: Any) -> None:
        """Records the time; the first call is for the prompt."""
        self.times.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        """Nothing to do."""

    def steps(self) -> tuple[int, float, float]:
        """Returns the number of steps after the first, which reads the prompt, with their seconds and CPU seconds."""
        (began, cpu), (ended, cpu_ended) = self.times[1], self.times[-1]
        return len(self.times) - 2, ended - began, cpu_ended - cpu
