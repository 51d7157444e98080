"""A checkpoint as every layout is read into and every target is written from: tensors that are read when asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
# What some exporters save besides weights, computed from the configuration: "rotary_emb.inv_freq", Meta's "rope.freqs".
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs")


class LazyTensor(NamedTuple):
    """A tensor that lies in a file.

    `source` names file and key for messages; `read` returns the tensor, of this shape and dtype, in memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    source: str

    @property
    def num_bytes(self) -> int:
        """Of the tensor in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Checkpoint:
    """A Llama that lies in files: its configuration, and its tensors under the names of `LlamaForCausalLM`.

    Args:
        path (`Path`): the file or folder that was given.
        layout (`str`): what it was recognised as, for people.
        config (`LlamaConfig`): the plain one, with the rotary base in both spellings in its file.
        tensors (`dict[str, LazyTensor]`): without `lm_head.weight` where the output is the tied input embedding.
        tokenizer (`Path`, *optional*): what `load_tokenizer` takes; `None` if the source has none.
        generation (`dict`, *optional*): fields of a `generation_config.json`.
        provenance (`dict`, *optional*): `provenance.json` of the source, where it has one.
        notes (`list[str]`): what a user should know of how it was read.
        advance (`Callable[[int], None]`): is told the bytes of every tensor that was read.
    """

    path: Path
    layout: str
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    tokenizer: Path | None = None
    generation: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    advance: Callable[[int], None] = lambda num_bytes: None

    @property
    def num_bytes(self) -> int:
        """Of all tensors, as they would lie in memory."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads one tensor.

        Args:
            dtype (`torch.dtype`, *optional*): cast to it.

        Raises:
            InputError: if it has values that are not finite, or gets them by the cast, or its file is damaged.
        """
        lazy = self.tensors[name]
        tensor = lazy.read()
        assert tuple(tensor.shape) == lazy.shape and tensor.dtype == lazy.dtype, lazy.source
        _check_finite(tensor, lazy.source)
        if dtype is not None and dtype != tensor.dtype:
            tensor = tensor.to(dtype)
            if dtype == torch.float16:
                _check_finite(tensor, lazy.source, "as float16, which ends at 65504; use bf16")
        self.advance(lazy.num_bytes)
        return tensor


def plain_config(**fields: Any) -> LlamaConfig:
    """A Llama configuration with TinyLlama's values where no field is given, whose file every Llama tool reads."""
    return TinyLlamaConfig(**fields).to_llama()


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model of this configuration has, in its order; no tied output."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[OUTPUT]
    return shapes


def complete(checkpoint: Checkpoint) -> Checkpoint:
    """Holds the tensors against the configuration and returns the checkpoint with them in the model's order.

    Raises:
        InputError: for a tensor that is missing, that a Llama does not have, of another shape, or of another kind of
            number.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    if checkpoint.config.tie_word_embeddings:
        tensors.pop(OUTPUT, None)
    for name in [name for name in tensors if name.endswith(COMPUTED)]:
        del tensors[name]
    shapes = expected_shapes(checkpoint.config)
    if missing := [name for name in shapes if name not in tensors]:
        raise InputError(f"{path}: {len(missing)} tensors are missing, {missing[0]} first; fetch or make it again")
    if extra := [name for name in tensors if name not in shapes]:
        raise InputError(f"{path}: {tensors[extra[0]].source} belongs to no Llama of this configuration; {path} is damaged, "
                         "or of another architecture")  # fmt: skip
    for name, shape in shapes.items():
        found = tensors[name]
        if found.shape != shape:
            raise InputError(
                f"{found.source}: has the shape {list(found.shape)}, but the configuration says {list(shape)}"
            )
        if found.dtype not in FLOATING:
            raise InputError(f"{found.source}: holds {str(found.dtype)[6:]}; weights are float32, float16 or bfloat16")
    checkpoint.tensors = {name: tensors[name] for name in shapes}
    return checkpoint


def _check_finite(tensor: torch.Tensor, source: str, when: str = "") -> None:
    lowest, highest = torch.aminmax(tensor)  # both pass on a NaN
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        number = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{source}: {number} values are not finite{when and ' ' + when}; nothing was written")
