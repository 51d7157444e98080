"""The architecture behind the name of a model, for which no weights are fetched."""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..configuration_tinyllama import PRESETS, TinyLlamaConfig
from ..errors import InputError, one_line
from ..files import read_json
from ..inference.load import model_folder
from ..quantization.bitsandbytes import saved_quantization
from ..released import intermediate_checkpoint, local_folder, released, tables


class Architecture(NamedTuple):
    """A model without its weights.

    Attributes:
        config (`TinyLlamaConfig`): its configuration.
        dtype (`torch.dtype`, *optional*): of the weights: what their folder says, `None` if it does not, bf16 without one.
        source (`str`): where the configuration is from.
        quantization (`str`): that the weights were saved with, `"none"` if they were not; its details are in `config`.
    """

    config: TinyLlamaConfig
    dtype: torch.dtype | None
    source: str
    quantization: str = "none"


def find_architecture(name: str) -> Architecture:
    """Finds the configuration of a model.

    A released checkpoint that was fetched before is read from the Hub's cache; else it is TinyLlama's, the same for all,
    and nothing is fetched. Of another model on the Hub `config.json` alone is fetched.

    Args:
        name (`str`): a folder, a released name, a preset of `TinyLlamaConfig`, or a Hub id.

    Raises:
        InputError: if there is no such model, it is no Llama, or its configuration is damaged.
    """
    if Path(name).exists():
        return _of_folder(Path(name))
    if name in PRESETS:
        return Architecture(TinyLlamaConfig.preset(name), torch.bfloat16, f"preset {name}")
    published = {model.name: (model.hub, model.revision) for model in released() if model.kind != "peer"}
    if found := published.get(name) or intermediate_checkpoint(name):
        repository, revision = found
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return _of_folder(Path(cached).parent)._replace(source="fetched before")
        rows = {row["name"]: row["vocab_rows"] for row in tables()["chat"]["rows"]}
        config = TinyLlamaConfig.preset("1.1b", vocab_size=rows.get(name, 32000))
        return Architecture(config, torch.bfloat16, "preset 1.1b")
    try:
        return _of_folder(local_folder(name, only=("config.json",)))
    except InputError as error:
        raise InputError(f"{error}; or give a size: {', '.join(PRESETS)}") from error


def _of_folder(folder: Path) -> Architecture:
    folder = model_folder(folder, quantized=True)
    fields = read_json(folder / "config.json")
    saved = saved_quantization(fields, str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        plain = saved != "none" and fields["quantization_config"].get("llm_int8_skip_modules")
        if plain and not (isinstance(plain, list) and all(isinstance(name, str) for name in plain)):
            raise TypeError(f"llm_int8_skip_modules: {plain!r} is no list of names")
        return Architecture(TinyLlamaConfig.from_llama(config), config.dtype, "config.json", saved)
    except (OSError, ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise InputError(f"{folder / 'config.json'}: describes no model ({one_line(error)})") from error
