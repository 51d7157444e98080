"""Runs lm-eval's evaluation with a model, and returns its results in the form of score files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..score_files import MetricScore, TaskScore
from ..score_metrics import is_wrong, metric_scale
from ..scored_items import ScoredItem
from ..tasks.suite import FEWSHOT_SEED, Suite, quiet_harness, right_choices


_SHOWN = 10  # number of wrong answers per task with texts
_LONGEST_QUESTION = 2000  # characters of it, from the end
_BOOTSTRAP = 1000  # resamples of lm-eval for metrics that are not means


class TaskResults(NamedTuple):
    """Scores by task and by group of tasks, and all items."""

    results: dict[str, TaskScore]
    groups: dict[str, TaskScore]
    items: list[ScoredItem]


class RequestsOfTasks:
    """Makes tasks keep the requests that they build for the first model, since most do not depend on the model.

    Some tasks in `eval/tasks/` fit their examples into a number of tokens. Their requests are rebuilt for another
    tokenizer.

    Args:
        suite (`Suite`): the opened tasks.
        apply_chat_template (`bool`): whether all requests depend on the tokenizer.
    """

    def __init__(self, suite: Suite, apply_chat_template: bool = False):
        self._all_depend = apply_chat_template
        self._built = [_Built(task) for task in suite.tasks.values()]
        for built in self._built:
            built.task.build_all_requests = built

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Prepares the tasks for a model with a tokenizer, which is identified by `name`."""
        for built in self._built:
            if hasattr(built.task, "count_tokens"):
                built.task.count_tokens = lambda text: len(tokenizer(text)["input_ids"])
            if self._all_depend or hasattr(built.task, "count_tokens"):
                built.tokenizer = name


class _Built:
    """Replaces the method of a task that builds its requests."""

    def __init__(self, task: Any):
        self.task, self.build = task, task.build_all_requests
        self.tokenizer = ""  # if requests depend on it
        self.built_for: str | None = None

    def __call__(self, **options: Any) -> None:
        if self.built_for != self.tokenizer:
            self.task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples each time
            self.build(**options)
            self.built_for = self.tokenizer
        for request in self.task.instances:  # without the answers of the previous model
            request.resps, request.filtered_resps = [], {}


def run_tasks(harness_model: Any, suite: Suite, limit: int | None, apply_chat_template: bool = False) -> TaskResults:
    """Scores a model on the tasks of a suite.

    Args:
        harness_model (`Any`): a model of lm-eval.
        suite (`Suite`): the opened tasks.
        limit (`int`, *optional*): number of items per task, in order.
        apply_chat_template (`bool`): whether each question is formatted as a user turn.
    """
    # Not `simple_evaluate`, which runs git and nvidia-smi to describe the machine, and sets all seeds.
    from lm_eval import evaluate

    with quiet_harness():
        output: Any = evaluate(
            lm=harness_model,
            task_dict={"tasks": suite.tasks, "groups": suite.groups},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=suite.runs_code,
        )
    results, items = {}, []
    for name, task in suite.tasks.items():
        own = _items(name, task, suite.metrics[name], output["samples"][name])
        metrics = {**_metrics(output["results"][name]), **_bits(own)}
        results[name] = _score(suite.metrics[name], metrics, len(own), suite.versions[name])
        items += own
    groups = {}
    for name, values in output.get("groups", {}).items():
        if metrics := _metrics(values):
            count = sum(len(output["samples"][task]) for task in _leaves(name, output["group_subtasks"]))
            groups[name] = _score(next(iter(metrics)), metrics, count, output["versions"].get(name, "none"))
    return TaskResults(results, groups, items)


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the tasks of a group and of the groups in it."""
    return [leaf for child in children[name] for leaf in _leaves(child, children)] if name in children else [name]


def _score(metric: str, metrics: dict[str, MetricScore], items: int, version: int | float | str) -> TaskScore:
    return TaskScore(metric, metrics[metric].score, metrics[metric].standard_error, items, version, metrics)


def _metrics(values: Mapping[str, Any]) -> dict[str, MetricScore]:
    """Returns the metrics of a task or group; lm-eval names them `acc,none` and `acc_stderr,none`."""
    found = {}
    for key, value in values.items():
        metric, comma, selection = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{selection}")
        scale = metric_scale(metric)
        # lm-eval gives 0 if all or no items are right, although the score is uncertain.
        known = error if isinstance(error, int | float) and error > 0 else None
        found[_name(metric, selection)] = MetricScore(scale * float(value), known and scale * float(known))
    return found


def _name(metric: str, selection: str) -> str:
    return metric if selection == "none" else f"{metric},{selection}"


def _bits(items: Sequence[ScoredItem]) -> dict[str, MetricScore]:
    """Returns the bits per byte of the right choice, averaged over the items."""
    bits = [item.metrics["bits_per_byte"] for item in items if "bits_per_byte" in item.metrics]
    if not bits:
        return {}
    error = float(np.std(bits, ddof=1)) / math.sqrt(len(bits)) if len(bits) > 1 else None
    return {"bits_per_byte": MetricScore(math.fsum(bits) / len(bits), error)}


def _items(name: str, task: Any, metric: str, samples: Sequence[Mapping[str, Any]]) -> list[ScoredItem]:
    """Returns the items of a task; lm-eval has a sample for each item and each filter."""
    by_number: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_number.setdefault(sample["doc_id"], []).append(sample)
    items: list[ScoredItem] = []
    num_shown = 0
    for number, own in by_number.items():
        values = {
            _name(key, sample["filter"]): float(sample[key])
            for sample in own
            for key in sample["metrics"]
            if isinstance(sample[key], int | float | np.number | np.bool_)
        }
        is_choice = task.OUTPUT_TYPE == "multiple_choice"
        fields: dict[str, Any] = {"replies": _replies(own[0])}
        if is_choice:
            fields = _choice_fields(task, metric, own[0])
            values |= _right_choice_bits(fields, own[0])
        item = ScoredItem(task=name, index=number, doc=own[0]["doc_hash"][:16], metrics=values, **fields)
        if is_wrong(item, metric) and num_shown < _SHOWN:
            item, num_shown = dataclasses.replace(item, **_texts(own[0])), num_shown + 1
        items.append(item)
    return items


def _choice_fields(task: Any, metric: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
    document, choices = sample["doc"], task.doc_to_choice(sample["doc"])
    likelihoods = likelihoods[: len(choices)]  # with acc_mutual_info, those without a context follow
    lengths = [len(choice) if metric == "acc_norm" else 1 for choice in choices]
    gold, *also_right = right_choices(task, document, choices)
    return {
        "log_likelihoods": likelihoods,
        "chosen": int(np.argmax(np.array(likelihoods) / np.array(lengths))),
        "gold": gold,
        "also_right": also_right,
    }


def _right_choice_bits(fields: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, float]:
    """Returns the bits per UTF-8 byte of the text of the right choice, without the space before it."""
    gold = fields["gold"]
    text = sample["arguments"][gold][1].strip()
    return {"bits_per_byte": -fields["log_likelihoods"][gold] / math.log(2) / len(text.encode())} if text else {}


def _replies(sample: Mapping[str, Any]) -> list[str]:
    """Returns the generated texts of an item."""
    return [text for texts in sample["resps"] for text in texts if isinstance(text, str)]


def _texts(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns question and choices as they are shown. WinoGrande's choices are contexts of one continuation."""
    arguments = sample["arguments"]
    contexts = list(dict.fromkeys(str(pair[0]) for pair in arguments))
    if len(contexts) == 1:
        choices = [pair[1] for pair in arguments if isinstance(pair[1], str)]
        return {"question": contexts[0][-_LONGEST_QUESTION:], "choices": choices}
    return {"question": str(arguments[0][1]), "choices": contexts}
