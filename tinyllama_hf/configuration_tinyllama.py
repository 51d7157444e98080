"""`TinyLlamaConfig`: a Llama configuration with TinyLlama's presets."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from .errors import InputError, did_you_mean
from .presets import PRESETS


# 1.1b and 120m are the published architectures. nano is for demonstrations, micro for tests: both have grouped-query
# attention, and all sizes are multiples of 128, as blocks of GGUF and AWQ need.


# A subclass does not inherit `@strict`. Without it, fields of a wrong type would be accepted.
@strict
class TinyLlamaConfig(LlamaConfig):
    """A Llama configuration with TinyLlama's defaults.

    The fields are those of `LlamaConfig`, the defaults those of TinyLlama 1.1B. `pad_token_id` is not set, since
    transformers would freeze that embedding row at zero.

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
            **overrides: any field, such as `vocab_size` or `max_position_embeddings`.

        Raises:
            InputError: if the preset or a field is unknown.
        """
        if name not in PRESETS:
            raise InputError(f"model preset {name!r} does not exist{did_you_mean(str(name), PRESETS)}")
        known = cls().to_dict().keys() | {"rope_theta", "attn_implementation"}  # not fields, but valid arguments
        if unknown := sorted(overrides.keys() - known):
            raise InputError(
                f"{unknown[0]}={overrides[unknown[0]]!r}: unknown field of a Llama{did_you_mean(unknown[0], known)}"
            )
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_llama(cls, config: PreTrainedConfig) -> "TinyLlamaConfig":
        """Returns the same architecture as a TinyLlama configuration.

        Raises:
            InputError: if the model is not a Llama.
        """
        cls._check_family(config.model_type)
        return cls(**_architecture_fields(config))

    @classmethod
    def _check_family(cls, model_type: str | None) -> None:
        if model_type not in ("llama", cls.model_type):
            raise InputError(f"model_type {model_type!r} is not a Llama. tinyllama_hf supports Llama models only")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, plain: bool = False, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; also reads plain Llama files, in which a missing field has Llama's default.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, a file, or a Hub id.
            plain (`bool`, *optional*, defaults to `False`): refuse quantized weights.

        Raises:
            InputError: if the model is not a Llama, or is quantized although `plain` is set.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        cls._check_family(fields.get("model_type"))
        if plain:
            refuse_quantized(fields.get("quantization_config"), pretrained_model_name_or_path)
        if fields["model_type"] != cls.model_type:
            fields = cls.from_llama(LlamaConfig.from_dict(fields)).to_dict()
        return fields, kwargs

    def to_llama(self) -> LlamaConfig:
        """Returns the same architecture as a stock Llama configuration; every Llama tool can read its file."""
        return _PlainLlamaConfig(**_architecture_fields(self))


def refuse_quantized(quantization_config: Any, name: str | os.PathLike | None) -> None:
    """Refuses weights that are or would be quantized.

    Raises:
        InputError: if a quantization is configured.
    """
    if quantization_config is not None:
        raise InputError(
            f"{name}: quantization_config is for tinyllama_hf.load(MODEL, quantization=...), which also loads "
            "quantized folders. Without its fix, some processors corrupt such weights"
        )


def _architecture_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns all fields except those that name the class and the source file."""
    named = ("model_type", "architectures", "transformers_version", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in named}


@strict
class _PlainLlamaConfig(LlamaConfig):
    """`LlamaConfig` with a file for every reader: stock class name, and rotary settings in both spellings.

    transformers 5 writes `rope_parameters` only. mistral.rs refuses such a folder, and other tools use a wrong base or
    ignore the scaling.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        fields = super().to_diff_dict()
        scaling: dict[str, Any] = dict(self.rope_parameters or {})
        fields["rope_theta"] = scaling.pop("rope_theta")
        if scaling.get("rope_type", "default") != "default":
            fields["rope_scaling"] = scaling
        fields["architectures"] = ["LlamaForCausalLM"]
        return fields


# A configuration may be given to the Auto classes, which then need the model and the tokenizer.
AutoConfig.register(TinyLlamaConfig.model_type, TinyLlamaConfig, exist_ok=True)
from . import modeling_tinyllama, tokenization_tinyllama  # noqa: E402, F401
