"""The protocol of task scores, from the models, the tasks and the options, and its comparison with that of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from ..inference.load import context_length
from ..quantization.names import arithmetic_dtype
from .score_files import Protocol, ScoredModel, TaskScoreFile
from .tasks.protocol_definitions import ProtocolDefinition
from .tasks.suite import Suite


def model_conditions(models: Sequence[ScoredModel], dtype: str) -> dict[str, Any]:
    """Returns the fields of a `Protocol` that depend on the models, which must agree."""
    return {
        "context_length": _common("contexts", {model.path: context_length(model.folder) for model in models}),
        "dtype": _common("dtypes", {model.path: _dtype(model, dtype) for model in models}),
    }


def _common(what: str, values: dict[str, Any]) -> Any:
    if len(set(values.values())) > 1:
        raise InputError(
            f"the {what} of the models differ ({', '.join(f'{path}: {v}' for path, v in values.items())}). A protocol "
            "has only one; score the models separately, each with its own --output"
        )
    return next(iter(values.values()))


def _dtype(model: ScoredModel, wanted: str) -> str:
    """Returns torch's name of the dtype that a model is scored in; `"auto"` is that of its folder."""
    if wanted == "auto":
        fields = read_json(model.folder / "config.json")
        wanted = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return arithmetic_dtype(model.quantization, wanted)


def suite_protocol(
    suite: Suite, definition: ProtocolDefinition, limit: int | None, conditions: dict[str, Any]
) -> Protocol:
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
        definitions=suite.definitions,
        sample=suite.sample,
        name=definition.name,
    )


def check_protocol(output: Path | None, file: TaskScoreFile, protocol: Protocol) -> None:
    if differences := protocol.differences(file.protocol):
        raise InputError(
            f"--output {output} has scores of another protocol (different: {'; '.join(differences)}). A file has "
            "one protocol. Choose another --output, or remove this file"
        )
