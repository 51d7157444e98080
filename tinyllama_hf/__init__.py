"""Tools for the whole life of a small Llama, as thin layers over the Hugging Face libraries.

Importing this package registers `model_type: tinyllama` with the Auto classes. Everything else, including torch and
transformers, is imported on first use, so that the import is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_model_type

# Not lazy: a later import of the module would replace the function of the same name.
from .released import released


if TYPE_CHECKING:
    from .configuration_tinyllama import TinyLlamaConfig
    from .conversion.convert import convert
    from .conversion.verify import verify
    from .decoding.speculative import speculative_generate
    from .inference.load import load
    from .modeling_tinyllama import TinyLlamaForCausalLM
    from .tokenization_tinyllama import TinyLlamaTokenizer, load_tokenizer

_MODULES = {
    "TinyLlamaConfig": ".configuration_tinyllama",
    "TinyLlamaForCausalLM": ".modeling_tinyllama",
    "TinyLlamaTokenizer": ".tokenization_tinyllama",
    "convert": ".conversion.convert",
    "load": ".inference.load",
    "speculative_generate": ".decoding.speculative",
    "load_tokenizer": ".tokenization_tinyllama",
    "verify": ".conversion.verify",
}

__all__ = [
    "TinyLlamaConfig",
    "TinyLlamaForCausalLM",
    "TinyLlamaTokenizer",
    "convert",
    "load",
    "load_tokenizer",
    "released",
    "speculative_generate",
    "verify",
]

register_model_type()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
