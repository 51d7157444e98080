"""When each new token came."""

import time
from typing import Any

from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Wall and CPU time of the prompt and of each step after it; a streamer of `generate`, for any number of rows.

    `generate` copies the tokens of a step to the CPU before it hands them over, so that a GPU has done its work by then.
    """

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def put(self, value: Any) -> None:
        """Takes the time; called with the prompt first."""
        self.times.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        """Nothing to do."""

    def steps(self) -> tuple[int, float, float]:
        """Steps after the first, which reads the prompt; their seconds, and their CPU-seconds of the whole process."""
        (began, cpu), (ended, cpu_ended) = self.times[1], self.times[-1]
        return len(self.times) - 2, ended - began, cpu_ended - cpu
