"""The card of a model folder, generated from its configuration, provenance and score files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..conversion.quantized.w4a16 import read_scheme
from ..conversion.reading.containers import open_safetensors
from ..evaluation.protocol import caveat
from ..evaluation.score_files import NO_SCORES, RunScores, TaskRow
from ..portable import portable
from ..pretrain.milestones import CONFIG_FILE
from ..quantization.names import GPU_CAPABILITIES
from ..quantization.quantized_model import saved_quantization
from ..report.jinja import render_template
from .card_file import write_card
from .model_folder import ADAPTER_WEIGHTS, ModelFolder, open_trained_folder
from .scores import eval_results


_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_PROVENANCE_FIELDS = {"code", "machine", "created", "python", "libraries"}


def model_card(
    repo: str,
    revision: str,
    model: ModelFolder,
    milestones: Sequence[ModelFolder] = (),
    scores: RunScores = NO_SCORES,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Returns the card of a revision. Equal inputs give equal text, without paths or dates of the call.

    Args:
        repo (`str`): `USER/NAME`.
        revision (`str`): `"main"` or the name of a milestone.
        model (`ModelFolder`): the model of this revision.
        milestones (`Sequence[ModelFolder]`): all milestones of the run in order; none for a single model.
        scores (`RunScores`): scores of the run or the model.
        license (`str`, *optional*): license identifier of the Hub.
        pictures (`Sequence[str]`, *optional*): PNG files of this revision.

    Returns:
        Markdown with metadata, as `huggingface_hub.ModelCard` reads it.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    title, metadata = repo.split("/")[1], _metadata(model, license)
    own = scores.of_model(model.name) if model.kind == "trained" else NO_SCORES
    if results := eval_results(own):
        metadata["model-index"] = eval_results_to_model_index(title, results)
    text = _text(
        model,
        title=title,
        repo=repo,
        revision="" if revision == "main" else revision,
        milestones=[(milestone, scores.of_model(milestone.name)) for milestone in milestones],
        pictures=pictures,
        scores=own,
        commonsense_before=_commonsense_before(model, scores),
    )
    return write_card(metadata, text)


def _commonsense_before(model: ModelFolder, scores: RunScores) -> TaskRow | None:
    """The scores of the base model of a fine-tuned one, if they are in the same file."""
    base = model.record.get("base_model", {}).get("path")
    rows = scores.commonsense.models if scores.commonsense and base else []
    return next((row for row in rows if base in (row.path, row.name)), None)


def milestone_card(folder: Path, name: str) -> str:
    """Returns the card of a milestone as training writes it. Publishing generates another one, with scores and
    pictures.

    Args:
        folder (`Path`): the complete milestone.
        name (`str`): final name of the folder.
    """
    model = open_trained_folder(folder)._replace(name=name)
    text = _text(model, title=name, repo=f"milestones/{name}", loss=model.record["validation_loss"])
    return write_card(_metadata(model), text)


def _text(model: ModelFolder, **values: Any) -> str:
    """The text of a card. `values` override the default values of the template."""
    defaults: dict[str, Any] = {"revision": "", "milestones": [], "pictures": []}
    defaults |= {"loss": None, "scores": NO_SCORES, "commonsense_before": None, "caveat": caveat}
    settings, files = None, [file.name for file in model.files]
    is_quantized = model.kind == "quantized"
    if model.kind == "trained":
        settings = portable(yaml.safe_load((model.path / CONFIG_FILE).read_text(encoding="utf-8")))
    return render_template(
        _TEMPLATE,
        model=model,
        config=model.config,
        record=model.record,
        files=files,
        gguf_file=next((name for name in files if name.endswith(".gguf")), None),
        settings=settings,
        configuration=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        quantization=saved_quantization(model.config, str(model.path)) if is_quantized else None,
        quantized_by=_quantized_by(model) if is_quantized else None,
        group_size=_group_size(model) if model.kind == "w4a16" else None,
        adapter=_adapter_settings(model.config) if model.kind == "adapter" else {},
        embedding_rows=_embedding_rows(model.path) if model.kind == "adapter" else None,
        has_provenance=model.kind == "trained" or model.record.keys() >= _PROVENANCE_FIELDS,
        **defaults | values,
    )


def _metadata(model: ModelFolder, license: str | None = None) -> dict[str, Any]:
    """The metadata of a card, in the order that the Hub uses."""
    is_quantized = model.kind in ("quantized", "awq", "w4a16", "gguf")
    method = model.kind
    if method == "quantized":
        method = _quantized_by(model)
    elif method == "w4a16":
        method = "compressed-tensors"
    elif method == "adapter":
        method = model.config.get("peft_type", "").lower()
    fields = {
        # For a GGUF file the Hub would show code for transformers.
        "library_name": {"gguf": None, "adapter": "peft"}.get(model.kind, "transformers"),
        "license": license,
        "pipeline_tag": "text-generation",
        "tags": ["llama", "tinyllama_hf", *([method] if method not in ("trained", "llama") else [])],
        "base_model": model.base and model.base.partition("@")[0],
    }
    if model.base and (is_quantized or model.kind == "adapter"):
        fields["base_model_relation"] = "quantized" if is_quantized else "adapter"
    return {name: value for name, value in fields.items() if value}


def _quantized_by(model: ModelFolder) -> str:
    """The library that a quantized folder needs."""
    kind = saved_quantization(model.config, str(model.path))
    return "torchao" if kind in GPU_CAPABILITIES else "bitsandbytes"


def _group_size(model: ModelFolder) -> int:
    return read_scheme(model.config["quantization_config"], str(model.path)).weights.group_size


def _adapter_settings(config: dict[str, Any]) -> dict[str, Any]:
    targets = config.get("target_modules") or ()
    if not isinstance(targets, str):
        targets = ", ".join(sorted({name.split(".")[-1] for name in targets}))
    return {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "layers": targets,
        "trained whole": ", ".join(config.get("modules_to_save") or ()),
    }


def _embedding_rows(folder: Path) -> int | None:
    """Rows of an embedding that the adapter saved in full. PEFT does not resize that of the base model."""
    tensors = open_safetensors(folder / ADAPTER_WEIGHTS)
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")), None)
