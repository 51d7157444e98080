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
from ..files import read_json, write_text
from ..inference.adapters import adapter_folder
from ..inference.load import choose_device, context_length
from ..progress import progress_bar
from ..provenance import file_sha256
from ..quantization.names import arithmetic_dtype
from ..tokenization_tinyllama import tokenizer_fingerprint
from .harness.kept_answers import AnswerFile, KeptAnswers, open_answers
from .harness.served_model import ServedModel
from .models import list_eval_models, load_eval_model
from .protocol import TASKS
from .score_files import Protocol, ScoredModel, TaskRow, TaskScoreFile, read_scores, replace_rows, write_scores
from .score_metrics import average_standard_error, commonsense_average
from .scored_items import ScoredItem, items_file_name, read_scored_items, write_scored_items
from .tasks.protocol_definitions import ProtocolDefinition, define_protocol
from .tasks.suite import Suite, open_suite, quiet_harness, task_files


if TYPE_CHECKING:
    from .harness.harness_results import TaskResults


# The files that affect scores: stock transformers loads no others.
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")

Place = str | ServedModel  # where a model runs: a device, or its server
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
) -> ScoredTasks:
    """Scores models under a protocol. Models that are in the output file are not scored again.

    Args:
        models (`Sequence[str]`): model folders or names; or one run, for all its milestones.
        data (`str`, *optional*): folder with the tasks' rows, or `"embedded:sample"`. By default they are downloaded
            from the Hub.
        limit (`int`, *optional*): number of items per task; by default all.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        output (`Path`, *optional*): JSON file, written after each model. Other models in it keep their scores. The
            items are in files next to it, and so are the answers of a model that is not complete.
        samples (`Path`, *optional*): JSON lines file for the items of all models, written after each model.
        note (`Callable`): called with a message about a model that is skipped or resumed, or truncated requests.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. Folders that were
            saved quantized keep their own.
        adapter (`str`, *optional*): folder or Hub id of an adapter on top of each model.
        definition (`ProtocolDefinition`, *optional*): tasks and settings; by default the published protocol.
        include (`Path`, *optional*): folder with task definitions.
        run_code (`bool`, *optional*, defaults to `False`): allow tasks that run code written by the model.
        with_items (`bool`, *optional*, defaults to `False`): return items also of models that are not scored again.
        server (`ServedModel`, *optional*): the model behind a server, in the place of `models`.

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
        conditions = _conditions(chosen, definition.dtype)
    file = read_scores(output, TaskScoreFile)
    if file and definition.name == "published" and file.protocol.name == "published":
        # Checked as far as possible before the tasks are opened, which takes up to a minute.
        files = {name: path for name, path in task_files(data).items() if name in definition.tasks} if data else {}
        rows_of = {name: file_sha256(path) for name, path in files.items()} or file.protocol.data
        _check_protocol(output, file, dataclasses.replace(file.protocol, **conditions, limit=limit, data=rows_of))
    with open_answers(output) as answers, open_suite(data, definition, include, run_code) as suite:
        file = read_scores(output, TaskScoreFile)  # again, since another process may have written before the lock
        if server:
            server.check_tasks({name: task.OUTPUT_TYPE for name, task in suite.tasks.items()})
            suite = suite._replace(harness=server.harness(suite.harness))
        protocol = _protocol(suite, definition, limit, conditions)
        file = file or TaskScoreFile(task=_kind(definition.name), protocol=protocol, models=[])
        _check_protocol(output, file, protocol)
        scoring = _Scoring(suite, protocol, server or device, answers, note)
        rows: list[TaskRow] = []
        items: list[list[ScoredItem]] = []
        for model in chosen:
            row, own = _score_or_find(model, scoring, file, output, with_items or samples is not None)
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
        raise InputError(f"--samples {samples} is also the output. Name two files")


def _conditions(models: Sequence[ScoredModel], dtype: str) -> dict[str, Any]:
    """Returns the fields of a `Protocol` that the models decide, which must be the same for all."""
    return {
        "context_length": _common("contexts", {model.path: context_length(model.folder) for model in models}),
        "dtype": _common("dtypes", {model.path: _dtype(model, dtype) for model in models}),
    }


def _common(what: str, values: dict[str, Any]) -> Any:
    if len(set(values.values())) > 1:
        raise InputError(
            f"the {what} of the models differ ({', '.join(f'{path}: {v}' for path, v in values.items())}). A protocol "
            "has one; score the models one at a time, each with its own --output"
        )
    return next(iter(values.values()))


def _dtype(model: ScoredModel, wanted: str) -> str:
    """Returns torch's name of the dtype that a model is scored in; `"auto"` is the one of its folder."""
    if wanted == "auto":
        fields = read_json(model.folder / "config.json")
        wanted = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return arithmetic_dtype(model.quantization, wanted)


def _protocol(suite: Suite, definition: ProtocolDefinition, limit: int | None, conditions: dict[str, Any]) -> Protocol:
    shots = suite.num_fewshot
    return Protocol(
        harness=suite.harness,
        task_versions=suite.versions,
        metrics=suite.metrics,
        num_fewshot=next(iter(shots.values())) if len(set(shots.values())) == 1 else shots,
        add_bos_token=definition.add_bos_token,
        apply_chat_template=definition.apply_chat_template,
        **conditions,
        limit=limit,
        data=suite.data,
        sample=suite.sample,
        name=definition.name,
    )


def _check_protocol(output: Path | None, file: TaskScoreFile, protocol: Protocol) -> None:
    if differences := protocol.differences(file.protocol):
        raise InputError(
            f"--output {output} has scores of another protocol (different: {'; '.join(differences)}). A file has "
            "one protocol. Choose another --output, or remove this file"
        )


def _fingerprint(model: ScoredModel) -> str:
    folders = [model.folder, *([adapter_folder(model.adapter)] if model.adapter else [])]
    files = {f"{n}/{file.name}": file for n, f in enumerate(folders) for p in MODEL_FILES for file in f.glob(p)}
    if model.adapter:
        files["adapter_config.json"] = folders[1] / "adapter_config.json"
    # As before for a model without an adapter, so that its row in an existing file is found.
    names = {name if model.adapter else file.name: file for name, file in files.items()}
    return provenance.fingerprint({name: file_sha256(file) for name, file in names.items()})


class _Scoring:
    """Scores one model after the other on opened tasks."""

    def __init__(self, suite: Suite, protocol: Protocol, place: Place, answers: AnswerFile, note: Note):
        from .harness.harness_results import RequestsOfTasks
        from .harness.local_harness import EncodedTexts

        self.suite, self.protocol, self.place, self.answers, self.note = suite, protocol, place, answers, note
        self._encoded: dict[str, EncodedTexts] = {}  # by tokenizer
        self._requests = RequestsOfTasks(suite, protocol.apply_chat_template)

    def answers_key(self, model: ScoredModel, fingerprint: str) -> str:
        """Returns the hash of everything that decides an answer, apart from the request."""
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
        # The fingerprint is that of the ids of a text, without the special tokens that the tokenizer adds.
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
    model: ScoredModel, scoring: _Scoring, file: TaskScoreFile, output: Path | None, needs_items: bool
) -> tuple[TaskRow, list[ScoredItem]]:
    """Returns row and items of a model, and writes them. A model with the same weights is not scored again."""
    with progress_bar(f"{model.name}: reading the weights"):
        server = scoring.place if isinstance(scoring.place, ServedModel) else None
        fingerprint = server.fingerprint if server else _fingerprint(model)
    kind = (model.quantization, model.adapter)
    own = [row for row in file.models if (row.quantization, row.adapter) == kind]
    own = [row for row in own if row.path == model.path or row.fingerprint == fingerprint]
    before = next((row for row in own if row.fingerprint == fingerprint), None)
    has_items = bool(before and before.items_file and output and (output.parent / before.items_file).is_file())
    if before and output and (has_items or not needs_items):
        same = "on the same server; its weights are not known" if server else "with the same weights"
        scoring.note(f"{model.name}: already scored under this protocol, {same}")
        row = dataclasses.replace(before, **vars(model))
        items = read_scored_items(output, row) if needs_items else []
    else:
        row, items = scoring.score(model, fingerprint)
        if output:
            row = dataclasses.replace(row, items_file=items_file_name(output, row))
            write_scored_items(output.parent / str(row.items_file), items)
    replace_rows(file.models, own, row)
    write_scores(output, file)
    scoring.answers.discard([scoring.answers_key(model, fingerprint)])
    return row, items


def _sample_lines(rows: Sequence[TaskRow], items: Sequence[Sequence[ScoredItem]]) -> Iterator[str]:
    for row, own in zip(rows, items, strict=True):
        about = {"model": row.path, "quantization": row.quantization}
        yield from (json.dumps({**about, **item.to_json()}) + "\n" for item in own)
