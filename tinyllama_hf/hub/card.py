"""The card of a model folder: what it is, from its configuration, provenance and score files alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..conversion.reading.containers import open_safetensors
from ..evaluation.protocol import caveat
from ..portable import portable
from ..pretrain.milestones import CONFIG_FILE
from ..quantization.bitsandbytes import quantization_of
from ..report.jinja import render_template
from .card_file import write_card
from .model_folder import ADAPTER_WEIGHTS, ModelFolder, open_trained_folder
from .scores import NO_SCORES, Scores, average_of, eval_results, row_of


_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_ORIGIN = {"code", "machine", "created", "python", "libraries"}  # of a record that this package wrote


def model_card(
    repo: str,
    revision: str,
    model: ModelFolder,
    ladder: Sequence[ModelFolder] = (),
    scores: Scores = NO_SCORES,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Writes the card of one revision. Equal inputs give equal text: nothing of the machine or the hour is in it.

    Args:
        repo (`str`): `USER/NAME`.
        revision (`str`): `"main"` or the name of a milestone.
        model (`ModelFolder`): what lies in this revision.
        ladder (`Sequence[ModelFolder]`): the milestones of the run in their order; none for a model folder.
        scores (`Scores`): of the run or the model.
        license (`str`, *optional*): an identifier that the Hub knows.
        pictures (`Sequence[str]`, *optional*): PNG files in this revision.

    Returns:
        Markdown with metadata, which `huggingface_hub.ModelCard` reads.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    title, metadata = repo.split("/")[1], _metadata(model, license)
    if model.kind == "trained" and (results := eval_results(model.name, scores)):
        metadata["model-index"] = eval_results_to_model_index(title, results)
    text = _text(
        model,
        title=title,
        repo=repo,
        revision="" if revision == "main" else revision,
        ladder=_ladder(ladder, scores),
        pictures=pictures,
        **(_sections(model, scores) if model.kind == "trained" else {}),
    )
    return write_card(metadata, text)


def milestone_card(folder: Path, name: str) -> str:
    """Writes the card that lies in a milestone's folder from the start. It stays there: publishing makes another, with
    scores and pictures.

    Args:
        folder (`Path`): holds the whole milestone already.
        name (`str`): that the folder is to have.
    """
    model = open_trained_folder(folder)._replace(given_name=name)
    text = _text(model, title=name, repo=f"milestones/{name}", loss=model.record["validation_loss"])
    return write_card(_metadata(model), text)


def _text(model: ModelFolder, **values: Any) -> str:
    """The text of a card; `values` replace the defaults of the template's names."""
    defaults = {
        "revision": "",
        "loss": None,
        "ladder": [],
        "pictures": [],
        "bits": None,
        "commonsense": None,
        "replies": None,
    }
    settings, files = None, [file.name for file in model.files]
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
        quantization=quantization_of(model.config, str(model.path)) if model.kind == "quantized" else None,
        adapter=_adapter_settings(model.config) if model.kind == "adapter" else {},
        embedding_rows=_embedding_rows(model.path) if model.kind == "adapter" else None,
        origin=model.kind == "trained" or model.record.keys() >= _ORIGIN,
        **defaults | values,
    )


def _metadata(model: ModelFolder, license: str | None = None) -> dict[str, Any]:
    """The metadata of a card, in the order of the Hub's own."""
    is_quantized = model.kind in ("quantized", "awq", "gguf")
    method = {"quantized": "bitsandbytes", "adapter": model.config.get("peft_type", "").lower()}.get(
        model.kind, model.kind
    )
    fields = {
        # Of a GGUF file the Hub would show code for transformers.
        "library_name": {"gguf": None, "adapter": "peft"}.get(model.kind, "transformers"),
        "license": license,
        "pipeline_tag": "text-generation",
        "tags": ["llama", "tinyllama_hf", *([method] if method not in ("trained", "llama") else [])],
        "base_model": model.base and model.base.partition("@")[0],
    }
    if model.base and (is_quantized or model.kind == "adapter"):
        fields["base_model_relation"] = "quantized" if is_quantized else "adapter"
    return {name: value for name, value in fields.items() if value}


def _ladder(ladder: Sequence[ModelFolder], scores: Scores) -> list[dict[str, Any]]:
    """A row of the table of revisions for each milestone."""
    rows = []
    for model in ladder:
        bits, answered = row_of(model.name, scores.bits_per_byte), row_of(model.name, scores.commonsense)
        rows.append(
            {
                "name": model.name,
                **{key: model.record[key] for key in ("step", "tokens", "validation_loss")},
                "bits_per_byte": bits and bits["bits_per_byte"],
                "average": answered and average_of(answered)["average"],
                "is_partial": bool(answered and caveat(scores.commonsense["protocol"], answered["results"])),
            }
        )
    return rows


def _sections(model: ModelFolder, scores: Scores) -> dict[str, Any]:
    """What the sections on scores tell of a model; `None` for those that it has none for."""
    bits, answered = row_of(model.name, scores.bits_per_byte), row_of(model.name, scores.commonsense)
    return {
        "bits": bits
        and {
            "row": bits,
            "texts": scores.bits_per_byte["data"],
            "scored_with": bits.get(
                "scored_with", scores.bits_per_byte["provenance"]["libraries"]
            ),  # old rows lack it
        },
        "commonsense": answered
        and {
            "protocol": scores.commonsense["protocol"],
            "results": answered["results"],
            "average": average_of(answered),
            "caveat": caveat(scores.commonsense["protocol"], answered["results"]),
        },
        "replies": row_of(model.name, scores.replies),
    }


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
    """Rows of an embedding that is saved whole: the base may have another number, and PEFT does not change it."""
    tensors = open_safetensors(folder / ADAPTER_WEIGHTS)
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")), None)
