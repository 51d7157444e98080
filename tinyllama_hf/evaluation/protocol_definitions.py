"""The protocols by name: settings and tasks of each, and what its scores can be compared with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, did_you_mean
from .protocol import TASKS


PROTOCOLS = ("published", "modern", "olmes", "instruct")


@dataclasses.dataclass(frozen=True)
class ProtocolDefinition:
    """The settings of a protocol that do not depend on a model or on data.

    Attributes:
        name (`str`): one of `PROTOCOLS`.
        dtype (`str`): `"float32"`, or `"auto"` for the dtype of the checkpoint.
        add_bos_token (`bool`, *optional*): whether each request starts with the begin-of-sequence token; `None` for
            what the tokenizer does.
        apply_chat_template (`bool`): whether each question is formatted as a user turn.
        tasks (`tuple[str, ...]`): names of tasks and groups, as a user writes them.
    """

    name: str
    dtype: str
    add_bos_token: bool | None
    apply_chat_template: bool
    tasks: tuple[str, ...]


def define_protocol(
    name: str = "published", tasks: Sequence[str] = (), include: Path | None = None
) -> ProtocolDefinition:
    """Returns a protocol with its own tasks, or with the given ones.

    Args:
        name (`str`, *optional*, defaults to `"published"`): one of `PROTOCOLS`.
        tasks (`Sequence[str]`, *optional*): names of tasks and groups; by default those of the protocol.
        include (`Path`, *optional*): folder with the user's own task definitions.

    Raises:
        InputError: for an unknown protocol or task; names the nearest one.
    """
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name!r}: unknown protocol{did_you_mean(name, PROTOCOLS)}")
    if name != "published":
        raise InputError(f"--protocol {name}: not available yet")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(
            f"--task {unknown[0]!r}: unknown task of --protocol published{did_you_mean(unknown[0], TASKS)}"
        )
    return ProtocolDefinition("published", "float32", False, False, tuple(tasks) or TASKS)
