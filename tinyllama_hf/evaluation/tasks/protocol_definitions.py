"""The protocols by name: their settings and tasks, and what their scores can be compared with.

- `published`: TinyLlama's table. The seven tasks, zero-shot, in fp32, without a begin-of-sequence token.
- `modern`: the defaults of the installed lm-eval, for any task. Number of examples from the task's definition (MMLU 0,
  GSM8K 5, BBH 3), dtype of the checkpoint, begin-of-sequence as the tokenizer's default.
- `olmes`: the forms of OLMES (Gu et al. 2024, arXiv:2406.08446) that lm-eval has, with 5 examples. Cloze: ARC, BoolQ,
  HellaSwag, OpenBookQA, PIQA, SocialIQA, WinoGrande and `mmlu_continuation`. Multiple choice: CommonsenseQA and
  `mmlu`. lm-eval 0.4.13 has neither the other form of these tasks nor OLMES's own examples, prompts, normalization by
  unconditional likelihood, and choice between both forms; examples are drawn from the training split with lm-eval's
  seed. Scores are not comparable with an OLMES table.
- `instruct`: InstructEval (declare-lab/instruct-eval, commit 49bbd2c), used for the second table on TinyLlama's EVAL
  page; see `eval/tasks/instruct/README.md`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError, did_you_mean
from ...released import tables
from ..protocol import TASKS
from .task_index import choose_tasks, index_tasks


PROTOCOLS = ("published", "modern", "olmes", "instruct")
OLMES_TASKS = (
    *("arc_challenge", "arc_easy", "boolq", "commonsense_qa", "hellaswag", "mmlu", "mmlu_continuation"),
    *("openbookqa", "piqa", "social_iqa", "winogrande"),
)
INSTRUCT_TASKS = ("instruct_mmlu", "instruct_bbh", "instruct_drop", "instruct_humaneval")
# Protocols with a fixed set of tasks. Under the others, every task is allowed.
_OWN_TASKS = {"published": TASKS, "olmes": OLMES_TASKS, "instruct": INSTRUCT_TASKS}
# Protocols that set the number of few-shot examples. In the others, the task's definition does.
_NUM_FEWSHOT = {"published": 0, "olmes": 5}


@dataclasses.dataclass(frozen=True)
class ProtocolDefinition:
    """The settings of a protocol that do not depend on a model or on data.

    Attributes:
        name (`str`): one of `PROTOCOLS`.
        dtype (`str`): `"float32"`, or `"auto"` for the dtype of the checkpoint.
        add_bos_token (`bool`, *optional*): whether each request starts with the begin-of-sequence token; `None` for
            the default of the tokenizer.
        apply_chat_template (`bool`): whether each question is formatted as a user turn.
        tasks (`tuple[str, ...]`): names of tasks and groups, as given by the user.
    """

    name: str
    dtype: str
    add_bos_token: bool | None
    apply_chat_template: bool
    tasks: tuple[str, ...]


_SETTINGS = {
    "published": ProtocolDefinition("published", "float32", False, False, TASKS),
    "modern": ProtocolDefinition("modern", "auto", None, False, TASKS),
    "olmes": ProtocolDefinition("olmes", "auto", None, False, OLMES_TASKS),
    # InstructEval loads weights without a dtype, which meant fp32, and its tokenizer adds the begin-of-sequence token.
    "instruct": ProtocolDefinition("instruct", "float32", None, False, INSTRUCT_TASKS),
}


def define_protocol(
    name: str = "published", tasks: Sequence[str] = (), include: Path | None = None
) -> ProtocolDefinition:
    """Returns a protocol with its own tasks, or with the given ones.

    Args:
        name (`str`, *optional*, defaults to `"published"`): one of `PROTOCOLS`.
        tasks (`Sequence[str]`, *optional*): names of tasks, groups and tags; by default those of the protocol. Those
            of `instruct` can be written without the prefix `instruct_`.
        include (`Path`, *optional*): folder with the user's own task definitions.

    Raises:
        InputError: for an unknown protocol or task (the message names the nearest one), for a task that is not in the
            protocol or is given twice, or if lm-eval is not installed.
    """
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name!r}: unknown protocol{did_you_mean(name, PROTOCOLS)}")
    settings = _SETTINGS[name]
    if tasks:
        chosen = tuple(tasks)
        if name == "instruct":
            chosen = tuple(task if task.startswith("instruct_") else f"instruct_{task}" for task in tasks)
        own = _OWN_TASKS.get(name)
        for task, full in zip(tasks, chosen, strict=True):
            if own and full not in own and not any(full.startswith(f"{group}_") for group in own):
                raise InputError(
                    f"--task {task!r} is not in --protocol {name}{did_you_mean(full, own)}. --protocol modern scores "
                    "every task of lm-eval"
                )
        settings = dataclasses.replace(settings, tasks=chosen)
    if name == "modern" or include:
        choose_tasks(settings.tasks, index_tasks(include))
    return settings


def fewshot_of(definition: ProtocolDefinition, settings: dict[str, Any]) -> int:
    """Returns the number of few-shot examples of a task with these settings."""
    return _NUM_FEWSHOT.get(definition.name, int(settings.get("num_fewshot") or 0))


def metric_of(definition: ProtocolDefinition, name: str, task: Any) -> str:
    """Returns the metric to report: that of the published table; else `acc_norm`, or the first one in the definition.

    If the definition has a filter, it is `"METRIC,FILTER"`, as in the results of lm-eval.
    """
    if definition.name == "published":
        return tables()["protocol"]["metric"][name]
    metrics = [str(metric) for metric in task.aggregation()]
    metric = "acc_norm" if "acc_norm" in metrics else metrics[0]
    filters = task.config.filter_list or [{"name": "none"}]
    first = filters[0]["name"]
    return metric if first == "none" else f"{metric},{first}"
