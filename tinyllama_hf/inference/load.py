"""Loads a model with its tokenizer, and its draft, for inference."""

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
    PreTrainedTokenizerFast,
)

from ..configuration_tinyllama import TinyLlamaConfig
from ..decoding.proposals import ModelProposer, PromptLookup, Proposer, first_layers
from ..decoding.speculative import check_vocabulary_size
from ..devices import check_device
from ..errors import InputError, one_line
from ..files import read_json
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..quantization.bitsandbytes import quantization_config
from ..quantization.names import GPU_CAPABILITIES, check_quantization_name
from ..quantization.quantized_model import (
    QuantizedTinyLlama,
    cast_unquantized,
    check_loaded,
    check_quantization,
    choose_quantization,
    saved_quantization,
)
from ..quantization.torchao import check_layers, torchao_config
from ..released import local_folder, read_llama_fields
from ..tokenization_tinyllama import tokenizer_fingerprint
from .adapters import adapter_folder, add_adapter, load_adapted_tokenizer
from .options import LOOKUP, draft_layers


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
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a model in evaluation mode, with its tokenizer.

    Args:
        path_or_name (`str` or `os.PathLike`): a folder, the name of a released checkpoint, or a Hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): dtype of the weights; `"auto"` keeps the
            saved one.
        device (`str`, *optional*, defaults to `"auto"`): where the model runs; `"auto"` is a GPU if there is one.
        quantization (`str`, *optional*, defaults to `"none"`): `"int8"` or `"nf4"` (4 bit), through bitsandbytes;
            `"int4"` or `"fp8"`, through torchao on an NVIDIA GPU, for weights in bf16. A folder that was saved
            quantized keeps its quantization, with or without this argument.
        double_quantization (`bool`, *optional*, defaults to `True`): also quantize the scales of nf4. No effect on a
            folder that was saved quantized.
        compute_dtype (`torch.dtype`, *optional*, defaults to `"auto"`): dtype of the products with dequantized nf4
            weights; `"auto"` is the folder's, or the fastest on this hardware. The library's kernel for CPUs with
            AVX512_BF16 always computes in bf16.
        adapter (`str` or `os.PathLike`, *optional*): folder or Hub id of a PEFT adapter to load on top of the model. A
            tokenizer and a chat template in its folder replace the model's.
        trainable (`bool`, *optional*, defaults to `False`): return the class that TRL, PEFT and Trainer recognize by
            name, to train an adapter on it. Training continues `adapter` if one is given.

    Returns:
        `(model, tokenizer)`: a `TinyLlamaForCausalLM`, or with `trainable` a `LlamaForCausalLM`, wrapped by PEFT if
        there is an adapter.

    Raises:
        InputError: if the folder is not a Llama model, is damaged or incomplete, or was quantized by another library;
            if the adapter does not fit the model; or if the device or a package is not available.
    """
    device = choose_device(device)
    check_quantization_name(quantization)
    check_quantization(quantization, device=device)
    folder, saved = _open_folder(path_or_name)
    kind = choose_quantization(quantization, saved, str(folder))
    check_quantization(kind, double_quantization, compute_dtype, device)
    if kind in GPU_CAPABILITIES and (adapter or trainable):
        what = f"--adapter {adapter}" if adapter else "trainable=True"
        raise InputError(f"{what}: {kind} weights take no adapters and are not trained. Use nf4, or merge the adapter")
    on_top = adapter_folder(adapter) if adapter else None
    tokenizer = load_adapted_tokenizer(on_top, folder)
    with _reading(folder):
        config = TinyLlamaConfig.from_llama(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if saved != "none" and compute_dtype != "auto":
        config.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    options = {"config": config.to_llama() if trainable else config}
    if kind in GPU_CAPABILITIES:
        options |= _torchao_options(kind, config, dtype)
    elif kind != saved:
        options["quantization_config"] = quantization_config(kind, device, double_quantization, compute_dtype)
    own = TinyLlamaForCausalLM if kind == "none" else QuantizedTinyLlama
    model = _load_weights(LlamaForCausalLM if trainable else own, folder, dtype, device, kind != "none", **options)
    if on_top:
        model = add_adapter(model, on_top, len(tokenizer), trainable)
    return model, tokenizer


def _torchao_options(kind: str, config: TinyLlamaConfig, dtype: str | torch.dtype) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that quantize to int4 or fp8; none for weights that already are.

    Raises:
        InputError: if dtype or layers do not fit.
    """
    wanted: Any = config.dtype if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    check_layers(kind, config, wanted)
    is_saved = getattr(config, "quantization_config", None) is not None
    return {} if is_saved else {"quantization_config": torchao_config(kind, config)}


def load_draft(
    name: str,
    target: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
) -> Proposer:
    """Loads a draft by name: a model, `lookup`, or `layers:N` for the target's own first layers.

    Raises:
        InputError: if the name is unknown, or the draft does not match the target.
    """
    if name == LOOKUP:
        return PromptLookup()
    if num_layers := draft_layers(name):
        return ModelProposer(first_layers(target, num_layers))
    model, tokenizer = load(name, dtype, device)
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(target_tokenizer):
        raise InputError(
            f"--draft {name}: its tokenizer has {len(tokenizer)} tokens, the target's {len(target_tokenizer)}, and "
            "they differ. A draft must have the target's own tokenizer"
        )
    check_vocabulary_size(target, model, "--draft")
    return ModelProposer(model)


def load_stock(
    folder: Path, device: str = "auto", dtype: str | torch.dtype = torch.float32, quantization: str = "none"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a folder with stock transformers, as a user without this package would; errors as in [`load`].

    Weights that were saved quantized stay quantized, and are made safe (see `repacking`). Others can be quantized to
    `"int4"` or `"fp8"`.
    """
    device = choose_device(device)
    folder, saved = _open_folder(folder)
    kind = choose_quantization(quantization, saved, str(folder))
    check_quantization(kind, device=device)
    # Given explicitly: `attn_implementation` in a config.json may name a Hub kernel, which would be downloaded and
    # run.
    with _reading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"config": config, "trust_remote_code": False, "attn_implementation": "sdpa"}
    if kind in GPU_CAPABILITIES:
        options |= _torchao_options(kind, TinyLlamaConfig.from_llama(config), dtype)
    model = _load_weights(AutoModelForCausalLM, folder, dtype, device, kind != "none", **options)
    return model, stock_tokenizer(folder)


def stock_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that stock transformers loads from a folder.

    Raises:
        InputError: if it is missing or damaged.
    """
    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load_weights(
    kind: type[PreTrainedModel | AutoModelForCausalLM],
    folder: Path,
    dtype: str | torch.dtype,
    device: str,
    quantized: bool,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model and checks that no weight is missing; transformers would only warn, and use random values."""
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():  # transformers would load the model it names, possibly from the Hub
        base = read_json(adapter_config).get("base_model_name_or_path")
        raise InputError(
            f"model {folder}: contains adapter_config.json, an adapter for {base!r}. Give that model, and this folder "
            "as the adapter; or remove the file"
        )
    if quantized:
        options["device_map"] = device
    with _reading(folder):
        loaded: Any = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {folder}: {len(missing)} weights are missing, the first is {missing[0]}; download it again"
        )
    if not quantized:
        return model.to(device).eval()
    check_loaded(model, str(folder))
    if dtype != "auto":  # transformers (5.23) ignores it for the plain weights of a quantized folder
        cast_unquantized(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model.eval()


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Translates errors of the libraries into an `InputError` that names the folder."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {folder}: cannot be loaded ({one_line(error)}); download it again") from error


def model_folder(path_or_name: str | os.PathLike, quantized: bool = False) -> Path:
    """Returns the folder of a model after checking its `config.json`.

    Args:
        path_or_name (`str` or `os.PathLike`): as in [`load`].
        quantized (`bool`, *optional*, defaults to `False`): accept weights that were saved quantized.

    Raises:
        InputError: if it is not a Llama, or its weights were quantized by a library that is not supported.
    """
    folder, saved = _open_folder(path_or_name)
    if saved != "none" and not quantized:
        raise InputError(f"{folder / 'config.json'}: the weights are already quantized; give the unquantized model")
    return folder


def context_length(folder: Path) -> int:
    """Returns the context of a model folder in tokens: that of its `config.json`, or Llama's default.

    Raises:
        InputError: if it is not a Llama, or the context is not an integer.
    """
    context = read_llama_fields(folder).get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    if not isinstance(context, int):
        raise InputError(
            f"{folder / 'config.json'}: max_position_embeddings {context!r} is not an integer. Download it again"
        )
    return context


def _open_folder(path_or_name: str | os.PathLike) -> tuple[Path, str]:
    """Returns the folder of a model and the quantization that its weights were saved with."""
    folder = local_folder(str(path_or_name))
    return folder, saved_quantization(read_llama_fields(folder), str(folder / "config.json"))


def choose_device(device: str) -> str:
    """Returns the device for a name; `"auto"` is a GPU if there is one, else the CPU.

    Raises:
        InputError: if the name is not a device, or this machine does not have it.
    """
    check_device(device)
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    if device != "cpu" and not has_gpu:
        raise InputError(f"--device {device}: this machine has no GPU that torch can use; use cpu or auto")
    return device
