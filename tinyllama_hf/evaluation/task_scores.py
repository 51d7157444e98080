"""Scores models, or all milestones of a run, on tasks of lm-eval, and writes the score file and the items."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import provenance
from ..errors import InputError
from ..files import write_text
from ..inference.load import choose_device
from ..progress import progress_bar
from ..provenance import file_sha256
from ..tokenization_tinyllama import tokenizer_fingerprint
from .harness.kept_answers import AnswerFile, KeptAnswers, open_answers
from .harness.served_model import ServedModel
from .known_rows import find_rows, is_row_of, model_fingerprints
from .models import list_eval_models, load_eval_model
from .protocol import TASKS
from .score_files import Protocol, ScoredModel, TaskRow, TaskScoreFile, read_scores, replace_rows, write_scores
from .score_metrics import average_standard_error, commonsense_average
from .scored_items import ScoredItem, items_file_name, read_scored_items, write_scored_items
from .task_protocol import check_protocol, model_conditions, suite_protocol
from .tasks.protocol_definitions import ProtocolDefinition, define_protocol
from .tasks.suite import Suite, open_suite, quiet_harness, task_files


if TYPE_CHECKING:
    from .harness.harness_results import TaskResults


Place = str | ServedModel  # where a model runs: a device or its server
Note = Callable[[str], Any]


class ScoredTasks(NamedTuple):
    """The contents of the score file with only the given models, and the items of each of them."""

    file: TaskScoreFile
    items: list[list[ScoredItem]]


def score_tasks(
    models: Sequence[str],
    data: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    output: Path | None = None,
    samples: Path | None = None,
    note: Callable[[str], Any] = lambda line: None,
    quantization: str = "none",
    adapter: str | None = None,
    definition: ProtocolDefinition | None = None,
    include: Path | None = None,
    run_code: bool = False,
    with_items: bool = False,
    server: ServedModel | None = None,
    rescore: bool = False,
) -> ScoredTasks:
    """Scores models under a protocol. Models that are in the output file are not scored again.

    Args:
        models (`Sequence[str]`): model folders or names; or one run, for all its milestones.
        data (`str`, *optional*): folder with the tasks' rows, or `"embedded:sample"`. By default they are downloaded
            from the Hub.
        limit (`int`, *optional*): number of items per task; by default all.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        output (`Path`, *optional*): JSON file, written after each model. Other models in it keep their scores. The
            items are in files next to it, and so are the answers of an incomplete model.
        samples (`Path`, *optional*): JSON lines file for the items of all models, written after each model.
        note (`Callable`): called with messages about skipped and resumed models, and truncated requests.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. Folders that were
            saved quantized keep their own.
        adapter (`str`, *optional*): folder or Hub id of an adapter on top of each model.
        definition (`ProtocolDefinition`, *optional*): tasks and settings; by default the published protocol.
        include (`Path`, *optional*): folder with task definitions.
        run_code (`bool`, *optional*, defaults to `False`): allow tasks that run code written by the model.
        with_items (`bool`, *optional*, defaults to `False`): also return items of models that are not scored again.
        server (`ServedModel`, *optional*): the model behind a server, instead of `models`.
        rescore (`bool`, *optional*, defaults to `False`): score all models again. Their rows in the output file are
            removed first, so that a call without `rescore` resumes an interrupted one.

    Raises:
        InputError: for missing or contradictory input, before the first model is loaded.
    """
    definition = definition or define_protocol()
    _check_options(limit, output, samples)
    if server:
        chosen, conditions, definition = [server.description], server.conditions, server.define(definition)
    else:
        device = choose_device(device)
        chosen = list_eval_models(models, quantization, adapter)
        conditions = model_conditions(chosen, definition.dtype)
    file = read_scores(output, TaskScoreFile)
    if file and definition.name == "published" and file.protocol.name == "published":
        # Checked as far as possible now, since opening the tasks takes up to a minute.
        files = {name: path for name, path in task_files(data).items() if name in definition.tasks} if data else {}
        rows_of = {name: file_sha256(path) for name, path in files.items()} or file.protocol.data
        check_protocol(output, file, dataclasses.replace(file.protocol, **conditions, limit=limit, data=rows_of))
    with open_answers(output) as answers, open_suite(data, definition, include, run_code) as suite:
        file = read_scores(output, TaskScoreFile)  # again, since another process may have written before the lock
        if server:
            server.check_tasks({name: task.OUTPUT_TYPE for name, task in suite.tasks.items()})
            suite = suite._replace(harness=server.harness(suite.harness))
        protocol = suite_protocol(suite, definition, limit, conditions)
        file = file or TaskScoreFile(task=_kind(definition.name), protocol=protocol, models=[])
        check_protocol(output, file, protocol)
        # Files of early versions have no hashes of definitions. The current ones are added, to detect later changes.
        file.protocol = protocol
        if rescore:
            file.models = [row for row in file.models if not any(is_row_of(row, model) for model in chosen)]
            write_scores(output, file)
        scoring = _Scoring(suite, protocol, server or device, answers, note)
        rows: list[TaskRow] = []
        items: list[list[ScoredItem]] = []
        for model in chosen:
            row, own = _score_or_find(model, scoring, file, output, with_items or samples is not None, rescore)
            rows.append(row)
            items.append(own)
            if samples:
                samples.parent.mkdir(parents=True, exist_ok=True)
                write_text(samples, "".join(_sample_lines(rows, items)))
    return ScoredTasks(dataclasses.replace(file, models=rows), items)


def _kind(protocol: str) -> str:
    """Returns the kind of a score file, as it is written in it."""
    return "commonsense" if protocol == "published" else "tasks"


def _check_options(limit: int | None, output: Path | None, samples: Path | None) -> None:
    if limit is not None and limit < 2:
        raise InputError(f"--limit {limit}: must be at least 2, to have a standard error")
    if samples and samples.is_dir():
        raise InputError(f"--samples {samples} is a folder. Name a file")
    if output and output == samples:
        raise InputError(f"--samples {samples} is also the --output file. Name two files")


class _Scoring:
    """Scores models one after another on opened tasks."""

    def __init__(self, suite: Suite, protocol: Protocol, place: Place, answers: AnswerFile, note: Note):
        from .harness.harness_results import RequestsOfTasks
        from .harness.local_harness import EncodedTexts

        self.suite, self.protocol, self.place, self.answers, self.note = suite, protocol, place, answers, note
        self._encoded: dict[str, EncodedTexts] = {}  # by tokenizer
        self._requests = RequestsOfTasks(suite, protocol.apply_chat_template)

    def answers_key(self, model: ScoredModel, fingerprint: str) -> str:
        """Returns the hash of everything that affects an answer, apart from the request."""
        protocol = self.protocol
        own = [fingerprint, model.quantization, protocol.dtype, protocol.add_bos_token, protocol.context_length]
        return provenance.fingerprint(own)[:16]

    def score(self, model: ScoredModel, fingerprint: str) -> tuple[TaskRow, list[ScoredItem]]:
        """Returns the scores of a model, and all items."""
        from .harness.harness_results import run_tasks

        began, protocol = time.perf_counter(), self.protocol
        kept = self.answers.of_model(self.answers_key(model, fingerprint))
        if len(kept):
            self.note(f"{model.name}: {len(kept)} requests were answered before the interruption")
        with progress_bar(f"{model.name}: loading", "requests") as update, quiet_harness():
            harness_model = self._harness_model(model, kept, update)
            update(description=model.name)
            found = run_tasks(harness_model, self.suite, protocol.limit, protocol.apply_chat_template)
        if num_cut := harness_model.num_cut:
            self.note(
                f"{model.name}: {num_cut} requests are longer than the context of {protocol.context_length} "
                "tokens and were truncated from the left"
            )
        seconds = round(time.perf_counter() - began, 1)
        return _row(model, fingerprint, found, num_cut, seconds, protocol.name == "published"), found.items

    def _harness_model(self, model: ScoredModel, kept: KeptAnswers, update: Callable[..., Any]) -> Any:
        """Returns the model for lm-eval, on a server or loaded here."""
        protocol = self.protocol
        if isinstance(self.place, ServedModel):
            from .harness.server_harness import ServerHarness

            served = ServerHarness(self.place, protocol.add_bos_token, kept, update, self.note)
            self._requests.use_tokenizer(served.tokenizer, self.place.tokenizer)
            return served
        from .harness.local_harness import EncodedTexts, TinyLlamaHarness

        loaded, tokenizer = load_eval_model(model, self.place, getattr(torch, protocol.dtype))
        # The fingerprint covers the ids of a text, without the special tokens that the tokenizer adds.
        name = f"{tokenizer_fingerprint(tokenizer)} {tokenizer('')['input_ids']}"
        self._requests.use_tokenizer(tokenizer, name)
        return TinyLlamaHarness(
            loaded,
            tokenizer,
            add_bos_token=protocol.add_bos_token,
            max_length=protocol.context_length,
            encoded=self._encoded.setdefault(name, EncodedTexts()),
            kept=kept,
            update=update,
        )


def _row(
    model: ScoredModel, fingerprint: str, found: "TaskResults", num_cut: int, seconds: float, is_published: bool
) -> TaskRow:
    scores = found.results
    is_whole = is_published and sorted(scores) == sorted(TASKS)
    errors = [scores[task].standard_error for task in TASKS] if is_whole else []
    known = [error for error in errors if error is not None]
    return TaskRow(
        **vars(model),
        fingerprint=fingerprint,
        results=scores,
        groups=found.groups,
        average=commonsense_average([scores[task].score for task in TASKS], TASKS) if is_whole else None,
        average_standard_error=average_standard_error(known) if len(known) == len(TASKS) else None,
        cut_requests=num_cut,
        seconds=seconds,
    )


def _score_or_find(
    model: ScoredModel,
    scoring: _Scoring,
    file: TaskScoreFile,
    output: Path | None,
    needs_items: bool,
    rescore: bool,
) -> tuple[TaskRow, list[ScoredItem]]:
    """Returns and writes row and items of a model. A model with the same weights is not scored again."""
    with progress_bar(f"{model.name}: reading the weights"):
        server = scoring.place if isinstance(scoring.place, ServedModel) else None
        fingerprints = [server.fingerprint] if server else model_fingerprints(model)
    known, replaced = find_rows(file.models, model, fingerprints)
    items = None if rescore else _known_items(model, known, output, needs_items, scoring.note)
    if known and items is not None:
        same = "on the same server; its weights are not known" if server else "with the same weights"
        scoring.note(f"{model.name}: already scored under this protocol, {same}")
        row = dataclasses.replace(known, **vars(model), fingerprint=fingerprints[0])
    else:
        row, items = scoring.score(model, fingerprints[0])
        if output:
            row = dataclasses.replace(row, items_file=items_file_name(output, row))
            write_scored_items(output.parent / str(row.items_file), items)
    replace_rows(file.models, replaced, row)
    write_scores(output, file)
    scoring.answers.discard([scoring.answers_key(model, fingerprints[0])])
    return row, items


def _known_items(
    model: ScoredModel, row: TaskRow | None, output: Path | None, needs_items: bool, note: Note
) -> list[ScoredItem] | None:
    """Returns the items of a row, or `[]` if they are not needed; `None` if the model must be scored.

    A row with lost items is scored again, since it cannot be compared item by item. Early versions wrote no items.
    """
    if row is None or output is None:
        return None
    if row.items_file is None and not needs_items:
        return []
    try:
        items = read_scored_items(output, row)
    except InputError:
        where = f" ({output.parent / row.items_file})" if row.items_file else ""
        note(f"{model.name}: scored again, since its items{where} are missing or damaged")
        return None
    return items if needs_items else []


def _sample_lines(rows: Sequence[TaskRow], items: Sequence[Sequence[ScoredItem]]) -> Iterator[str]:
    for row, own in zip(rows, items, strict=True):
        about = {"model": row.path, "quantization": row.quantization}
        yield from (json.dumps({**about, **item.to_json()}) + "\n" for item in own)
