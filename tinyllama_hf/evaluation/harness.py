"""Scores a model on a commonsense task through lm-eval's Python API.

lm-eval defines prompts, choices, tokenization and log-likelihoods. This module passes it a loaded model and a
[`Protocol`], and reads the results.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .score_files import Protocol, TaskScore
from .suite import Suite, quiet_harness, right_choice


BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of a task as it is written to a samples file: log-likelihoods in nats, chosen and right choice."""

    task: str
    index: int
    log_likelihoods: list[float]
    chosen: int
    gold: int


def run_task(harness_model: Any, name: str, suite: Suite, protocol: Protocol) -> tuple[TaskScore, list[Item], int]:
    """Scores a model on one task.

    Args:
        harness_model (`Any`): from [`wrap_model`].
        name (`str`): name of the task.
        suite (`Suite`): the opened tasks.
        protocol (`Protocol`): the settings of the evaluation.

    Returns:
        `tuple`: the score, all items, and the number of requests that were truncated to the context.

    Raises:
        InputError: if a log-likelihood is not finite, or a choice is longer than the context.
    """
    # Not `simple_evaluate`, which runs git and nvidia-smi to describe the machine, and sets all seeds.
    from lm_eval import evaluate

    task, metric = suite.tasks[name], protocol.metrics[name]
    task.set_config("num_fewshot", protocol.num_fewshot)
    with quiet_harness():
        output = evaluate(
            lm=harness_model,
            task_dict={"tasks": {name: task}},
            limit=protocol.limit,
            log_samples=True,
            apply_chat_template=protocol.apply_chat_template,
        )
    samples, scores = output["samples"][name], output["results"][name]
    score = TaskScore(
        metric=metric,
        score=100 * scores[f"{metric},none"],
        standard_error=100 * scores[f"{metric}_stderr,none"] or None,
        items=len(samples),
        version=suite.versions[name],
    )
    return score, [_item(name, task, metric, sample) for sample in samples], harness_model.num_cut


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    batch_size: int,
    update: Callable[..., Any],
) -> Any:
    """Wraps a loaded model in lm-eval's own `hf` model, with checks of requests and log-likelihoods.

    Args:
        model (`PreTrainedModel`): a causal language model in the dtype of the protocol.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        protocol (`Protocol`): the settings of the evaluation.
        batch_size (`int`): rows per forward pass. Does not change scores in fp32.
        update (`Callable`): called with `completed` and `total` numbers of requests, as `rich.Progress.update`.
    """
    from lm_eval.models.huggingface import HFLM

    class CheckedHFLM(HFLM):
        num_cut = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            update(completed=0, total=len(requests))  # they are tokenized first, which takes a while
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            longest = max(len(continuation) for _, _, continuation in requests)
            if longest > self.max_length:
                raise InputError(
                    f"the model's context of {self.max_length} tokens is too short for a choice of {longest} tokens. "
                    "Score a model with a longer context"
                )
            # A request may have one token more than the context, since the last token is predicted but not read.
            self.num_cut = sum(len(c) + len(k) > self.max_length + 1 for _, c, k in requests)
            self.set_cache_hook(_Counter(len(requests), update))
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
            if bad := [
                request for request, answer in zip(requests, answers, strict=True) if not math.isfinite(answer[0])
            ]:
                raise InputError(
                    f"{len(bad)} of {len(requests)} log-likelihoods are not finite, first that of {bad[0][0][1]!r}. "
                    "The weights are damaged or the training diverged; score another checkpoint"
                )
            return answers

    with quiet_harness():
        return CheckedHFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=protocol.context_length,
            add_bos_token=protocol.add_bos_token,
        )


class _Counter:
    """Counts finished requests, in place of lm-eval's cache hook, which is called after each request."""

    def __init__(self, total: int, update: Callable[..., Any]):
        self.completed, self.total, self.update = 0, total, update

    def add_partial(self, *answer: Any) -> None:
        self.completed += 1
        self.update(completed=self.completed, total=self.total)


def _item(name: str, task: Any, metric: str, sample: dict[str, Any]) -> Item:
    likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
    lengths = [len(choice) if metric == "acc_norm" else 1 for choice in task.doc_to_choice(sample["doc"])]
    return Item(
        task=name,
        index=sample["doc_id"],
        log_likelihoods=likelihoods,
        chosen=int(np.argmax(np.array(likelihoods) / np.array(lengths))),
        gold=right_choice(task, sample["doc"]),
    )
