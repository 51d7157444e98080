"""A model folder as it is published: which files belong to it, and whether all of it is there."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from ..errors import InputError
from ..pretrain.milestones import CONFIG_FILE
from ..provenance import read_json


PROVENANCE_FILE = "provenance.json"
# What may lie in a folder and is published; anything else in it (logs, held-out rows, temporary files) stays here.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    CONFIG_FILE,
    PROVENANCE_FILE,
)
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", CONFIG_FILE, PROVENANCE_FILE)
_INDEX_FILE = "model.safetensors.index.json"


class ModelFolder(NamedTuple):
    """A whole plain Llama folder.

    Attributes:
        path (`Path`): where it lies.
        files (`list[Path]`): what belongs to it.
        config (`dict`): its `config.json`.
        record (`dict`): its `provenance.json`.
        num_parameters (`int`): as the headers of the weights have them, a shared one counted once.
        given_name (`str`): where the folder does not bear its name yet.
    """

    path: Path
    files: list[Path]
    config: dict[str, Any]
    record: dict[str, Any]
    num_parameters: int
    given_name: str = ""

    @property
    def name(self) -> str:
        """Of the folder, which is that of the model in score files."""
        return self.given_name or self.path.resolve().name


def open_model_folder(folder: Path) -> ModelFolder:
    """Looks at every file that a stock loader reads; of the weights at their headers and sizes.

    Raises:
        InputError: if it is no plain Llama folder with provenance, or a part is missing or damaged.
    """
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise InputError(
            f"model {folder}: holds no {missing[0]}, so it is not whole; make it again with recipes/pretrain.py or "
            "recipes/sft.py, which write all of it"
        )
    config = read_json(folder / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "llama":
        raise InputError(
            f"{folder / 'config.json'}: model_type {model_type!r}, and only plain Llama folders (model_type "
            "'llama') are published, which everyone loads; save it with save_as_llama"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_json(folder / name)
    try:
        yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: damaged, not valid YAML; copy the model again") from error
    shapes: dict[str, list[int]] = {}
    for name in _weight_files(folder):
        shapes |= _shapes(folder / name)
    _check_shapes(folder, config, shapes)
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()})
    record = read_json(folder / PROVENANCE_FILE)
    if not record.keys() & {"tokens", "base_model"}:
        raise InputError(
            f"{folder / PROVENANCE_FILE}: tells neither of pretraining nor of fine-tuning, and the card is made from it; "
            "publish a run, a milestone or a fine-tuned model of this package"
        )
    return ModelFolder(folder, files, config, record, sum(map(math.prod, shapes.values())))


def _weight_files(folder: Path) -> list[str]:
    if not (folder / _INDEX_FILE).is_file():
        return ["model.safetensors"]
    return sorted(set(read_json(folder / _INDEX_FILE)["weight_map"].values()))


def _check_shapes(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Refuses weights that a stock loader would draw at random: tensors that are missing or of another shape."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    shared = {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # then stored once, as the embedding
    for name, tensor in model.state_dict().items():
        if name in shared and name not in shapes:
            continue
        if shapes.get(name) != list(tensor.shape):
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise InputError(
                f"model {folder}: weight {name} {found}, and config.json wants {list(tensor.shape)}; copy or make it again"
            )


def _shapes(weights: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, whose length must be what its header says."""
    if not weights.is_file():
        raise InputError(f"{weights}: does not exist, so the model is not whole; fetch or make it again")
    try:
        with safe_open(weights, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights}: damaged or cut off ({error}); fetch or make it again") from error
