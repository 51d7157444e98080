"""Runs the application of a server on a socket."""

import gc
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import InputError


_SECONDS_TO_SEND = 5  # for answers that have ended


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket before the model is loaded; connections are refused until it listens.

    Args:
        host (`str`): name or address of this machine.
        port (`int`): 0 chooses a free one.

    Raises:
        InputError: if the address is invalid or not available.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port}: must be between 0 (any free port) and {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"--host {host}: not an address of this machine ({error.strerror})") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"--host {host} --port {port}: not available ({error.strerror}). Choose another port, or 0 for a free one"
        ) from error
    return bound


def run_server(app: FastAPI, bound: socket.socket, seconds: float) -> None:
    """Serves until Ctrl-C or SIGTERM. Running replies have some seconds to finish; a second signal does not wait.

    Args:
        app (`FastAPI`): from `build_app`.
        bound (`socket.socket`): from [`bind`], listening.
        seconds (`float`): time for running replies to finish; waiting and new ones are refused.
    """
    scheduler = app.state.service.scheduler
    # The libraries have a million objects, which garbage collection would traverse while a large body is parsed.
    gc.collect()
    gc.freeze()

    class Server(uvicorn.Server):
        # uvicorn's own method raises the signal again at the end, so the exit status would not be 0.
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            scheduler.close(0 if self.should_exit else seconds)
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=int(seconds) + _SECONDS_TO_SEND)).run(
        sockets=[bound]
    )
