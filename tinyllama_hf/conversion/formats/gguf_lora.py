"""Writes a LoRA adapter of PEFT as a GGUF file, which llama.cpp adds to a base model while it computes."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from ...errors import InputError, damaged, require
from ...files import new_file
from ...gguf.file import read_header, read_values
from ..checkpoint import OUTPUT, LazyTensor, check_finite, expected_shapes
from ..reading.containers import as_state_dict, open_safetensors, open_torch_archive, read_fields
from .gguf_read import NAMES
from .layout import rotated_heads, to_half_split, to_pairwise


_CONFIG = "adapter_config.json"
ADAPTER_FILES = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin", "chat_template.jinja")
# Fields of an adapter's configuration that do not change what it computes, or that are handled here. Any other field
# must be empty.
_HANDLED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Others change the weights of the base when PEFT loads the adapter.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter in a folder: its configuration, and the pair of matrices A `[rank, in]` and B `[out, rank]` of
    each weight, by its name in `LlamaForCausalLM`.
    """

    folder: Path
    config: dict[str, Any]
    matrices: dict[str, tuple[LazyTensor, LazyTensor]]

    @property
    def trained_on(self) -> str | None:
        """The base model that the adapter names."""
        return self.config.get("base_model_name_or_path")

    @property
    def alpha(self) -> float:
        """The number that llama.cpp divides by the rank of each pair, to get the factor of their product.

        Raises:
            InputError: if the factors of the pairs do not follow from one number.
        """
        given = {self.config["lora_alpha"], *(self.config.get("alpha_pattern") or {}).values()}
        ranks = {a.shape[0] for a, _ in self.matrices.values()}
        # With rsLoRA, the factor is alpha / sqrt(rank).
        alphas = {a * math.sqrt(rank) if self.config.get("use_rslora") else a for a in given for rank in ranks}
        if len(alphas) > 1 or 0 in alphas:  # llama.cpp reads 0 as a factor of 1
            found = ", ".join(f"{a:g}" for a in sorted(alphas))
            raise _refusal(self.folder, f"needs alpha {found} for different layers, where one above 0 is possible")
        return float(np.float32(alphas.pop()))


def open_lora(folder: Path) -> LoraAdapter:
    """Opens a LoRA adapter that llama.cpp can compute with.

    Raises:
        InputError: if it is damaged, or of another kind; names what the format cannot hold.
    """
    weights = next((folder / name for name in ADAPTER_FILES[1:3] if (folder / name).is_file()), None)
    if weights is None or not (folder / _CONFIG).is_file():
        raise InputError(
            f"adapter {folder}: holds no {_CONFIG}, or no {ADAPTER_FILES[1]}. Give the folder of an adapter"
        )
    config = read_fields(folder / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise _refusal(folder, f"is of the kind {config.get('peft_type')!r}, not 'LORA'")
    other = [name for name, value in config.items() if name not in _HANDLED and value not in (None, False, "none", {})]
    if config.get("init_lora_weights", True) not in _INITIALIZATIONS:
        other.append("init_lora_weights")
    if other:
        found = ", ".join(f"{name} {config[name]!r:.80}" for name in sorted(other))
        raise _refusal(folder, f"has {found} in {_CONFIG}")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise damaged(folder / _CONFIG, f"lora_alpha is {config.get('lora_alpha')!r}")
    adapter = LoraAdapter(folder, config, _pairs(folder, weights))
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for a, _ in adapter.matrices.values():
        if a.shape[0] not in ranks:
            raise damaged(a.source, f"its rank is {a.shape[0]}, and {_CONFIG} has {sorted(ranks)}")
    return adapter


def _pairs(folder: Path, file: Path) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    is_pickled = file.suffix == ".bin"
    tensors = as_state_dict(open_torch_archive(file), file) if is_pickled else open_safetensors(file)
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise _refusal(folder, f"holds {name}, which is not of a pair of matrices of a linear layer")
        found.setdefault(f"{layer}.weight", {})[part[0]] = tensor
    for name, pair in found.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[-1]:
            raise damaged(folder, f"lora_A and lora_B of {name} do not match")
    if not found:
        raise damaged(folder, "it holds no matrices")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def write_lora(adapter: LoraAdapter, base: LlamaConfig, output: Path) -> None:
    """Writes the matrices in float32, and reads them back before the file gets its name.

    Raises:
        InputError: if the adapter does not fit the base, or its values are not finite.
    """
    require("gguf", "gguf", "writing a GGUF file")
    _check_shapes(adapter, base)
    alpha = adapter.alpha
    with tempfile.TemporaryDirectory(prefix="tinyllama-hf-") as scratch:
        path = Path(scratch) / "lora.gguf"
        _write(adapter, base, alpha, path, output.stem)
        _check_written(adapter, base, alpha, path)
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output) as file:
            file.write(path.read_bytes())


def _check_shapes(adapter: LoraAdapter, base: LlamaConfig) -> None:
    shapes = expected_shapes(base)
    for name, (a, b) in adapter.matrices.items():
        found = (b.shape[0], a.shape[-1])
        if name == OUTPUT and base.tie_word_embeddings:
            raise _refusal(adapter.folder, f"changes {OUTPUT}, which is the embedding of this base too")
        if shapes.get(name) != found:
            expected = f"{list(shapes[name])} in this base" if name in shapes else "not a matrix of this base"
            raise InputError(
                f"adapter {adapter.folder}: {name} is {list(found)}, {expected}. Give the model that it was trained "
                f"on ({adapter.trained_on!r}) with --base"
            )


def _write(adapter: LoraAdapter, base: LlamaConfig, alpha: float, path: Path, name: str) -> None:
    from gguf import GGUFWriter, Keys

    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for name, (a, b) in adapter.matrices.items():
        stored = NAMES.from_llama(name)
        heads, rows = rotated_heads(base, name), _read(b)
        writer.add_tensor(f"{stored}.lora_a", _read(a).numpy())
        writer.add_tensor(f"{stored}.lora_b", (to_pairwise(rows, heads) if heads else rows).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(matrix: LazyTensor) -> torch.Tensor:
    values = matrix.read().float()
    check_finite(values, matrix.source)
    return values.contiguous()


def _check_written(adapter: LoraAdapter, base: LlamaConfig, alpha: float, path: Path) -> None:
    """Reads a file back and compares it with the adapter, bit for bit."""
    header = read_header(path)
    assert header.metadata["adapter.lora.alpha"] == alpha and len(header.tensors) == 2 * len(adapter.matrices)
    for name, pair in adapter.matrices.items():
        for part, matrix in zip("ab", pair, strict=True):
            stored = header.tensors[f"{NAMES.from_llama(name)}.lora_{part}"]
            found, heads = torch.from_numpy(read_values(path, stored)), rotated_heads(base, name)
            if part == "b" and heads:
                found = to_half_split(found, heads)
            assert found.equal(_read(matrix)), stored.name


def _refusal(folder: Path, found: str) -> InputError:
    return InputError(
        f"adapter {folder}: {found}. llama.cpp's format for adapters cannot hold this. Merge it and convert the "
        f"result: tinyllama-hf merge BASE {folder} --output MERGED, then convert MERGED --to gguf-f16"
    )
