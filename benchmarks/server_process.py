"""A server as a child process: start, memory, processor time and end."""

import asyncio
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import psutil


class ServerProcess:
    """A server that was started by a command and answers.

    Args:
        command (`str`): words as in a shell, without its other syntax; `env NAME=VALUE COMMAND` sets variables.
        url (`str`): address of the API, ending in `/v1`.
        seconds (`float`, *optional*, defaults to 600): time limit of the start.

    Attributes:
        samples (`list[tuple[float, float, float]]`): seconds since the start, and megabytes of the resident set and of
            the memory that is not shared with other processes, from [`watch_memory`].
    """

    def __init__(self, command: str, url: str, seconds: float = 600):
        self.command, self.url = command, url
        self._output = tempfile.TemporaryFile("w+", errors="replace")
        self._popen = subprocess.Popen(shlex.split(command), stdout=self._output, stderr=subprocess.STDOUT)
        self.process, self.samples, self._began = psutil.Process(self._popen.pid), [], time.perf_counter()
        while not _answers(url):
            if self._popen.poll() is not None or time.perf_counter() - self._began > seconds:
                self.kill()
                raise SystemExit(f"{command}: did not answer at {url}\n{self.output()[-2000:]}")
            time.sleep(0.2)
        self.start_seconds = time.perf_counter() - self._began

    def output(self) -> str:
        """Returns what the server has written."""
        self._output.seek(0)
        return self._output.read()

    def memory(self) -> tuple[float, float]:
        """Returns megabytes of the server and its child processes: resident, and not shared with other processes."""
        infos = [process.memory_full_info() for process in (self.process, *self.process.children(recursive=True))]
        return sum(info.rss for info in infos) / 1e6, sum(info.uss for info in infos) / 1e6

    async def watch_memory(self, every_seconds: float) -> None:
        """Adds to `samples` until it is canceled, or the server has ended."""
        while self._popen.poll() is None:
            try:
                self.samples.append((time.perf_counter() - self._began, *self.memory()))
            except psutil.Error:  # a process ended meanwhile
                pass
            await asyncio.sleep(every_seconds)

    def main_thread_seconds(self) -> float:
        """Returns the processor time of the main thread, where uvicorn runs its event loop; in steps of 10 ms."""
        times = next(thread for thread in self.process.threads() if thread.id == self.process.pid)
        return times.user_time + times.system_time

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Sends a signal and returns the exit status."""
        self._popen.send_signal(number)
        return self.wait(seconds)

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        self._popen.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """Returns the exit status; a server that has not ended in time is killed, with status -9."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._popen.wait()

    def kill(self) -> None:
        """Kills the server and its child processes, if they are still running."""
        try:
            for process in (*self.process.children(recursive=True), self.process):
                process.kill()
        except psutil.NoSuchProcess:
            pass


def _answers(url: str) -> bool:
    """Returns whether a server is ready, by `/health`, or by the list of models if it has no `/health`."""
    for path in (f"{url.removesuffix('/v1')}/health", f"{url}/models"):
        try:
            with urllib.request.urlopen(path, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            if error.code != 404:
                return False
        except OSError:
            return False
    return False
