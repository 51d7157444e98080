"""Runs the local Hub: `python -m tests.local_hub --storage FOLDER [-- COMMAND...]`.

With a command it serves until the command ends, and exits with its status. The command gets the Hub in its
environment.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from .accounts import READ_TOKEN, USER, WRITE_TOKEN
from .server import LocalHub


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.local_hub", description="A small local Hub.")
    parser.add_argument(
        "--storage", type=Path, required=True, help="folder for repositories and objects; created if missing"
    )
    parser.add_argument("command", nargs="*", help="run this with HF_ENDPOINT, HF_TOKEN and DEMO_HUB set, then stop")
    arguments = parser.parse_args()
    with LocalHub(arguments.storage).serving() as hub:
        if arguments.command:
            return run(arguments.command, hub)
        print(f"{hub.endpoint} serves {arguments.storage} until Ctrl-C; user {USER}")
        print(f"  export HF_HUB_DISABLE_XET=1 HF_ENDPOINT={hub.endpoint} HF_TOKEN={WRITE_TOKEN}")
        print(f"  read-only token: {READ_TOKEN}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0


def run(command: list[str], hub: LocalHub) -> int:
    """Runs a command with the Hub in its environment. Returns the exit status of the command."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": WRITE_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "DEMO_HUB": hub.endpoint,
    }
    with subprocess.Popen(command, env=environment) as process:
        # The terminal sends Ctrl-C to the command too, which decides when to end. SIGTERM is passed on to it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
