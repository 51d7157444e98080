"""Loading a model with its tokenizer for inference."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, one_line
from ..files import read_json
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..quantization.bitsandbytes import (
    QuantizedTinyLlama,
    cast_plain,
    check_name,
    check_quantization,
    chosen_quantization,
    make_safe,
    quantization_config,
    quantization_of,
)
from ..released import local_folder
from .adapters import adapter_folder, add_adapter, tokenizer_with


def load(
    path_or_name: str | os.PathLike,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quantization: str = "none",
    *,
    double_quantization: bool = True,
    compute_dtype: str | torch.dtype = "auto",
    adapter: str | os.PathLike | None = None,
    trainable: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode, with its tokenizer.

    Args:
        path_or_name (`str` or `os.PathLike`): a folder, a name of the released ladder, or a Hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` takes the file's.
        device (`str`, *optional*, defaults to `"auto"`): `"auto"` takes a GPU where there is one.
        quantization (`str`, *optional*, defaults to `"none"`): `"int8"` or `"nf4"` (4 bit), through bitsandbytes. A folder that was saved quantised is loaded as it is, whether its kind is given or not.
        double_quantization (`bool`, *optional*, defaults to `True`): quantise the scales of nf4 too; a folder that
            was saved quantised has what it has.
        compute_dtype (`torch.dtype`, *optional*, defaults to `"auto"`): of products with the dequantised weights of nf4; `"auto"` takes the folder's, or the fastest here. The library's kernel for CPUs with AVX512_BF16 computes in
            bf16 whatever this says.
        adapter (`str` or `os.PathLike`, *optional*): a PEFT adapter to put on top: its folder, or a Hub id. A tokenizer and a
            chat template that are saved with it replace the model's.
        trainable (`bool`, *optional*, defaults to `False`): return the class that TRL, PEFT and Trainer know by name, to train
            an adapter on it; `adapter` is trained on.

    Returns:
        `(model, tokenizer)`: a `TinyLlamaForCausalLM`; if `trainable` a `LlamaForCausalLM`, in PEFT's wrapper if with adapter.

    Raises:
        InputError: if it is no model folder, is no Llama, is damaged or incomplete, or quantised by other means; if the
            adapter is for another model; or if the device or a package is not there.
    """
    device = choose_device(device)
    check_name(quantization)
    check_quantization(quantization)
    folder, saved = _open_folder(path_or_name)
    kind = chosen_quantization(quantization, saved, str(folder))
    check_quantization(kind, double_quantization, compute_dtype)
    adapter = adapter and adapter_folder(adapter)
    tokenizer = tokenizer_with(adapter, folder)
    options = {"config": _config(folder, compute_dtype if saved != "none" else "auto", trainable)}
    if kind != saved:
        options["quantization_config"] = quantization_config(kind, device, double_quantization, compute_dtype)
    own = TinyLlamaForCausalLM if kind == "none" else QuantizedTinyLlama
    model = _load_weights(LlamaForCausalLM if trainable else own, folder, dtype, device, kind != "none", **options)
    if adapter:
        model = add_adapter(model, adapter, len(tokenizer), trainable)
    return model, tokenizer


def load_stock(
    folder: Path, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a folder with stock transformers alone, as somebody without this package would; errors as [`load`].

    Weights that were saved quantised stay so, and safe (see `repacking`).
    """
    device = choose_device(device)
    folder, kind = _open_folder(folder)
    check_quantization(kind)
    # Stated, since `attn_implementation` in a folder's config.json may name a kernel on the Hub, which would be fetched and run.
    with _reading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"config": config, "trust_remote_code": False, "attn_implementation": "sdpa"}
    model = _load_weights(AutoModelForCausalLM, folder, dtype, device, kind != "none", **options)
    return model, stock_tokenizer(folder)


def stock_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that stock transformers makes of a folder.

    Raises:
        InputError: if it is missing or damaged.
    """
    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _config(folder: Path, compute_dtype: str | torch.dtype, trainable: bool) -> LlamaConfig:
    """The configuration of a folder, with another type for products with 4-bit weights unless it is `"auto"`."""
    with _reading(folder):
        config = TinyLlamaConfig.from_llama(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if compute_dtype != "auto":
        config.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    return config.to_llama() if trainable else config


def _load_weights(
    kind: type, folder: Path, dtype: str | torch.dtype, device: str, quantized: bool, **options: Any
) -> PreTrainedModel:
    """Loads every weight; the library would draw a missing one at random, and only mention it."""
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():  # the library would load the model that it names, from the Hub as well
        base = read_json(adapter_config).get("base_model_name_or_path")
        raise InputError(
            f"model {folder}: holds adapter_config.json, an adapter for {base!r}; give that model, and this folder as the "
            "adapter, or remove the file"
        )
    if quantized:
        options["device_map"] = device
    with _reading(folder):
        model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {folder}: {len(missing)} weights are missing, {missing[0]} first; fetch or make it again"
        )
    if not quantized:
        return model.to(device).eval()
    make_safe(model, str(folder))
    if dtype != "auto":  # the library (5.23) leaves what is plain of weights that were saved quantised
        cast_plain(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model.eval()


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Says of a folder that the libraries cannot read it, in place of what they say."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {folder}: cannot be loaded ({one_line(error)}); fetch or make it again") from error


def model_folder(path_or_name: str | os.PathLike, quantized: bool = False) -> Path:
    """Returns the folder of a model after a look at its `config.json`.

    Args:
        quantized (`bool`, *optional*, defaults to `False`): weights that were saved quantised will do.

    Raises:
        InputError: if it holds no Llama, or weights quantised by other means than bitsandbytes.
    """
    folder, saved = _open_folder(path_or_name)
    if saved != "none" and not quantized:
        raise InputError(f"{folder / 'config.json'}: the weights are quantised already; give the unquantised model")
    return folder


def _open_folder(path_or_name: str | os.PathLike) -> tuple[Path, str]:
    """The folder of a model, and the quantisation that its weights were saved with."""
    folder = local_folder(str(path_or_name))
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"model {folder}: holds no config.json, so it is no model folder{_milestones_hint(folder)}")
    fields = read_json(config)
    model_type = fields.get("model_type")
    if model_type not in ("llama", TinyLlamaConfig.model_type):
        raise InputError(f"{config}: model_type {model_type!r} is not a Llama; tinyllama_hf loads Llama folders only")
    return folder, quantization_of(fields, str(config))


def _milestones_hint(folder: Path) -> str:
    inside = sorted(path.parent for path in folder.glob("milestones/*/config.json")) if folder.is_dir() else []
    return f"; did you mean {inside[-1]}?" if inside else ""


def choose_device(device: str) -> str:
    """Turns `"auto"` into the best device here, and refuses one that is not there.

    Raises:
        InputError: if the name is no device, or none of that kind exists.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"--device {device!r}: no device; use auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this machine has no GPU that torch can use; use cpu or auto")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: is not supported; use auto, cpu, cuda or cuda:N")
    return device
