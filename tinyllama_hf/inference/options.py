"""Options of generation, checked without importing torch: sampling settings and names of drafts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversion.arguments import check_output
from ..errors import InputError
from ..files import read_json
from ..released import check_model, find_model, read_llama_fields


LOOKUP, LAYERS = "lookup", "layers:"  # drafts without a model of their own


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the fields are options of the commands.

    Attributes:
        temperature (`float`, *optional*, defaults to 0.8): 0 always takes the most likely token.
        top_p (`float`, *optional*, defaults to 0.95): sample from the smallest set of tokens with this total
            probability.
        max_new_tokens (`int`, *optional*): defaults to 256, or less if the context is nearly full.

    Raises:
        InputError: if a value is out of range, with the name of the command's option.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"--temperature {self.temperature}: must be finite, and 0 (always the most likely token) or larger"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `generate` in transformers."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def draft_layers(name: str) -> int | None:
    """Returns N of a draft named `layers:N`, `None` for other drafts.

    Raises:
        InputError: if N is not a number of layers.
    """
    if not name.startswith(LAYERS):
        return None
    number = name.removeprefix(LAYERS)
    if not number.isdecimal() or not int(number):
        raise InputError(f"--draft {name}: {LAYERS} needs a number of layers, such as {LAYERS}4")
    return int(number)


def check_draft(name: str, model: str) -> None:
    """Checks the name of a draft: `lookup`, `layers:N` or a model. N is compared with the layers of a local model.

    Raises:
        InputError: as [`draft_layers`] and [`check_model`], or if the model has too few layers.
    """
    number = draft_layers(name)
    if number is None:
        if name != LOOKUP:
            check_model(name)
        return
    place = find_model(model)
    layers = read_llama_fields(place).get("num_hidden_layers") if isinstance(place, Path) else None
    if isinstance(layers, int) and number >= layers:
        raise InputError(f"--draft {name}: the model has {layers} layers. Use fewer")


def check_merge(base: str, adapter: str, output: Path, overwrite: bool) -> None:
    """Checks the arguments of `merge_adapter` as far as that needs neither torch nor a download.

    Raises:
        InputError: if a model is missing, the base is not a Llama or is quantized, or the output cannot be written.
    """
    for name in (base, adapter):
        place = find_model(name)
        check_output(output, name, overwrite, "merge", "--overwrite")
        if name == base and isinstance(place, Path):
            check_plain(place)


def check_plain(base: Path) -> None:
    """Refuses a base with quantized weights; names the model that they were made from if the folder records it.

    Raises:
        InputError: as described, or if the folder is not a Llama.
    """
    fields = read_llama_fields(base)
    if fields.get("quantization_config") is None:
        return
    file = base / "provenance.json"
    record = read_json(file) if file.is_file() else {}
    original = fields.get("_name_or_path") or record.get("conversion", {}).get("source")
    raise InputError(
        f"model {base}: its weights are quantized, and an adapter is merged into plain weights only, since the sum "
        f"would be rounded again. Give the model that was quantized{f', {original}' if original else ''}"
    )
