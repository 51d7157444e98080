"""The architecture of a model by its name, without downloading weights."""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, refuse_damage
from ..files import read_json
from ..inference.load import model_folder
from ..presets import PRESETS
from ..quantization.quantized_model import saved_quantization
from ..released import find_repository, local_folder, tables


class Architecture(NamedTuple):
    """A model without its weights.

    Attributes:
        config (`TinyLlamaConfig`): its configuration.
        dtype (`torch.dtype`, *optional*): of the weights: from `config.json`, `None` if it has none, bf16 without a
            folder.
        source (`str`): where the configuration is from.
        quantization (`str`): of the saved weights, `"none"` if they are not quantized; details are in `config`.
    """

    config: TinyLlamaConfig
    dtype: torch.dtype | None
    source: str
    quantization: str = "none"


def find_architecture(name: str) -> Architecture:
    """Finds the configuration of a model.

    A released checkpoint is read from the Hub's cache if it was downloaded before. Otherwise it has the configuration
    that all TinyLlama checkpoints share, and nothing is downloaded. Of other models on the Hub only `config.json` is
    downloaded.

    Args:
        name (`str`): a folder, a released name, a preset of `TinyLlamaConfig`, or a Hub id.

    Raises:
        InputError: if the model does not exist, is not a Llama, or has a damaged configuration.
    """
    if Path(name).exists():
        return _of_folder(Path(name))
    if name in PRESETS:
        return Architecture(TinyLlamaConfig.preset(name), torch.bfloat16, f"preset {name}")
    if found := find_repository(name):
        repository, revision = found
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return _of_folder(Path(cached).parent)._replace(source="downloaded before")
        rows = {row["name"]: row["vocab_rows"] for row in tables()["chat"]["rows"]}
        config = TinyLlamaConfig.preset("1.1b", vocab_size=rows.get(name, 32000))
        return Architecture(config, torch.bfloat16, "preset 1.1b")
    try:
        return _of_folder(local_folder(name, only=("config.json",)))
    except InputError as error:
        raise InputError(f"{error}; or use a size: {', '.join(PRESETS)}") from error


def _of_folder(folder: Path) -> Architecture:
    folder = model_folder(folder, quantized=True)
    fields = read_json(folder / "config.json")
    saved = saved_quantization(fields, str(folder))
    with refuse_damage(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        skipped = saved != "none" and fields["quantization_config"].get("llm_int8_skip_modules")
        if skipped and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
            raise TypeError(f"llm_int8_skip_modules: {skipped!r} is not a list of names")
        return Architecture(TinyLlamaConfig.from_llama(config), config.dtype, "config.json", saved)
