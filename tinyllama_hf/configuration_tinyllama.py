"""`TinyLlamaConfig`: a Llama configuration with the TinyLlama presets, written as plain Llama unless asked otherwise."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig

from .errors import InputError, did_you_mean


# 1.1b and 120m are the published architectures. nano is for demonstrations and micro for tests: both keep
# grouped-query attention, and every width divides by 128, so that GGUF and AWQ blocks fit.
PRESETS: dict[str, dict[str, int]] = {
    "1.1b": {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
    "120m": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 1},
    "nano": {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2},
    "micro": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


# A subclass does not inherit `@strict`: without it, a field of a wrong type would be taken without a word.
@strict
class TinyLlamaConfig(LlamaConfig):
    """A Llama configuration with TinyLlama's defaults.

    Every field is `LlamaConfig`'s; the defaults are those of TinyLlama 1.1B. The padding token is not part of it: with
    `pad_token_id` set, the library freezes that embedding row and zeroes it.

    ```python
    >>> from tinyllama_hf import TinyLlamaConfig
    >>> TinyLlamaConfig.preset("1.1b").num_key_value_heads
    4
    ```
    """

    model_type = "tinyllama"

    num_hidden_layers: int = 22
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 4
    rms_norm_eps: float = 1e-5

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TinyLlamaConfig":
        """Returns the configuration of a named size.

        Args:
            name (`str`): `"1.1b"`, `"120m"`, `"nano"` or `"micro"`.
            **overrides: any field, for example `vocab_size` or `max_position_embeddings`.

        Raises:
            InputError: if there is no such preset, or no such field.
        """
        if name not in PRESETS:
            raise InputError(f"model preset {name!r} does not exist{did_you_mean(str(name), PRESETS)}")
        known = cls().to_dict().keys() | {"rope_theta", "attn_implementation"}  # taken under these names as well
        if unknown := sorted(overrides.keys() - known):
            raise InputError(
                f"{unknown[0]}={overrides[unknown[0]]!r}: no field of a Llama{did_you_mean(unknown[0], known)}"
            )
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_llama(cls, config: LlamaConfig) -> "TinyLlamaConfig":
        """Returns the same architecture as a TinyLlama configuration.

        Raises:
            InputError: if the model is of another family.
        """
        cls._check_family(config.model_type)
        return cls(**_architecture_fields(config))

    @classmethod
    def _check_family(cls, model_type: str | None) -> None:
        if model_type not in ("llama", cls.model_type):
            raise InputError(f"model_type {model_type!r} is not a Llama; tinyllama_hf loads Llama folders only")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, plain: bool = False, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; of a plain Llama file too, in which a missing field has Llama's default.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, a file, or a Hub id.
            plain (`bool`, *optional*, defaults to `False`): refuse weights that were saved quantized.

        Raises:
            InputError: if the model is of another family, or was saved quantized and must not be.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        cls._check_family(fields.get("model_type"))
        if plain:
            refuse_quantized(fields.get("quantization_config"), pretrained_model_name_or_path)
        if fields["model_type"] != cls.model_type:
            fields = cls.from_llama(LlamaConfig.from_dict(fields)).to_dict()
        return fields, kwargs

    def to_llama(self) -> LlamaConfig:
        """Returns the same architecture as a stock Llama configuration, whose file every Llama tool reads."""
        return _PlainLlamaConfig(**_architecture_fields(self))


def refuse_quantized(quantization_config: Any, name: str | os.PathLike | None) -> None:
    """Refuses weights that are or would be quantized.

    Raises:
        InputError: if there is a configuration of it, naming the function that loads them.
    """
    if quantization_config is not None:
        raise InputError(
            f"{name}: quantization_config is for tinyllama_hf.load(MODEL, quantization=...), which also loads folders "
            "that were saved quantized; some processors corrupt such weights otherwise"
        )


def _architecture_fields(config: LlamaConfig) -> dict[str, Any]:
    """Every field but those that name the class and the file it was read from."""
    named = ("model_type", "architectures", "transformers_version", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in named}


@strict
class _PlainLlamaConfig(LlamaConfig):
    """`LlamaConfig` as a file for every reader: the stock class name, and the rotary embedding in both spellings.

    transformers 5 writes only `rope_parameters`; mistral.rs then refuses the folder, and others take a wrong base or leave
    out the scaling.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        fields = super().to_diff_dict()
        scaling = {name: value for name, value in self.rope_parameters.items() if name != "rope_theta"}
        fields["rope_theta"] = self.rope_parameters["rope_theta"]
        if scaling.get("rope_type", "default") != "default":
            fields["rope_scaling"] = scaling
        fields["architectures"] = ["LlamaForCausalLM"]
        return fields


# Whoever has a configuration may hand it to the Auto classes, which then need to know model and tokenizer.
AutoConfig.register(TinyLlamaConfig.model_type, TinyLlamaConfig, exist_ok=True)
from . import modeling_tinyllama, tokenization_tinyllama  # noqa: E402, F401
