"""A checkpoint as every layout is read into and every target is written from: tensors that are read when asked for."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, damaged, refuse_damage
from ..tokenization_tinyllama import load_tokenizer


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
# What some exporters save besides weights, computed from the configuration: "rotary_emb.inv_freq", Meta's "rope.freqs".
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs")
_FIRST_LAYER = "model.layers.0."
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
          "intermediate_size", "max_position_embeddings")  # fmt: skip
_MAX_BITS = {int: 31, float: 63}  # of sizes; of factors, among which are rotary bases of some billions


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

    def map(
        self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None
    ) -> "LazyTensor":
        """The tensor that `change` makes of this one when it is read, of the same shape unless another is given."""
        return LazyTensor(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()), self.source)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises an `InputError` unless the tensor has this shape."""
        if self.shape != shape:
            raise InputError(
                f"{self.source}: has the shape {list(self.shape)}, but the configuration says {list(shape)}"
            )


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
    _tokenizers: dict[Path, PreTrainedTokenizerFast] = field(default_factory=dict, repr=False)

    @property
    def num_bytes(self) -> int:
        """Of all tensors, as they would lie in memory."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def load_tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer, `None` without one. It is loaded once: with Llama 2's vocabulary that takes more than a second."""
        if self.tokenizer is None:
            return None
        if self.tokenizer not in self._tokenizers:
            self._tokenizers[self.tokenizer] = load_tokenizer(self.tokenizer)
        return self._tokenizers[self.tokenizer]

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
            reach = "which ends at 65504; use bf16" if dtype == torch.float16 else "whose range they exceed; use fp32"
            _check_finite(tensor, lazy.source, f"as {str(dtype)[6:]}, {reach}")
        self.advance(lazy.num_bytes)
        return tensor


def positive_number(fields: Mapping[str, Any], name: str, where: object, default: Any = None, kind: type = int) -> Any:
    """Returns a size or a factor of a configuration, as `kind`; `default` where it is missing.

    Raises:
        InputError: if it is no positive number, or larger than any model's.
    """
    value = default if fields.get(name) is None else fields[name]
    bits = _MAX_BITS[kind]
    # Infinity and NaN, which JSON of Python and YAML know, are not below the bound.
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**bits:
        # Python refuses to print a number of very many digits.
        is_long = isinstance(value, int) and value.bit_length() > 99
        shown = f"a number of {value.bit_length()} bits" if is_long else f"{value!r:.80}"
        raise InputError(f"{where}: {name} is {shown}; a positive number below 2**{bits} is needed")
    return kind(value)


def read_sizes(fields: Mapping[str, Any], names: Mapping[str, str], where: object) -> dict[str, Any]:
    """Sizes of a configuration under the names of `LlamaConfig`, `None` for a missing one that follows from the others.

    Args:
        names (`Mapping[str, str]`): names in `fields` to those of `LlamaConfig`.
    """
    optional = ("num_key_value_heads", "head_dim")
    return {
        ours: None if ours in optional and fields.get(name) is None else positive_number(fields, name, where)
        for name, ours in names.items()
    }


def require_values(fields: Mapping[str, Any], required: Mapping[str, Any], where: object, what: str) -> None:
    """Refuses fields with another value than the only one that is supported; a missing field is accepted.

    Args:
        what (`str`): does not support it, for the message.
    """
    for name, value in required.items():
        if fields.get(name, value) != value:
            raise InputError(f"{where}: {name} is {fields[name]!r}; the only value supported for {what} is {value!r}")


def plain_config(where: object = "the configuration", /, **fields: Any) -> LlamaConfig:
    """A Llama configuration with TinyLlama's values where no field is given, whose file every Llama tool reads.

    Raises:
        InputError: if the fields contradict each other; it names `where` they are from.
    """
    with refuse_damage(where):
        return TinyLlamaConfig(**fields).to_llama()


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model of this configuration has, in its order; no tied output."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1  # all are alike, and a damaged number must not take minutes
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(one).state_dict().items()}
    if config.tie_word_embeddings:
        del found[OUTPUT]
    layer = {name: shape for name, shape in found.items() if name.startswith(_FIRST_LAYER)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in found.items():
        if name not in layer:
            shapes[name] = shape
        elif name == next(iter(layer)):
            for i in range(config.num_hidden_layers):
                shapes |= {inside.replace(".0.", f".{i}.", 1): size for inside, size in layer.items()}
    return shapes


def complete(checkpoint: Checkpoint) -> Checkpoint:
    """Holds the tensors against the configuration and returns the checkpoint with them in the model's order.

    Raises:
        InputError: for a tensor that is missing, that a Llama does not have, of another shape, or of another kind of
            number.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    _check_config(checkpoint)
    if checkpoint.config.tie_word_embeddings and OUTPUT in tensors and EMBEDDING in tensors:
        if are_equal(tensors[OUTPUT], tensors[EMBEDDING]):
            del tensors[OUTPUT]
        else:  # as transformers does
            checkpoint.config.tie_word_embeddings = False
            checkpoint.notes.append(
                f"tie_word_embeddings is true, but {OUTPUT} is another tensor: both are kept, untied"
            )
    for name in [name for name in tensors if name.endswith(COMPUTED)]:
        del tensors[name]
    with refuse_damage(f"{path}: its configuration"):
        shapes = expected_shapes(checkpoint.config)
    if missing := [name for name in shapes if name not in tensors]:
        raise damaged(path, f"{len(missing)} tensors are missing, {missing[0]} first")
    if extra := [name for name in tensors if name not in shapes]:
        raise InputError(f"{path}: {tensors[extra[0]].source} belongs to no Llama of this configuration; {path} is damaged, "
                         "or of another architecture")  # fmt: skip
    for name, shape in shapes.items():
        found = tensors[name]
        found.check_shape(shape)
        if found.dtype not in FLOATING:
            raise InputError(f"{found.source}: holds {str(found.dtype)[6:]}; weights are float32, float16 or bfloat16")
    checkpoint.tensors = {name: tensors[name] for name in shapes}
    return checkpoint


def are_equal(a: LazyTensor | None, b: LazyTensor | None) -> bool:
    """Whether two tensors are the same bits."""
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().equal(b.read())


def _check_config(checkpoint: Checkpoint) -> None:
    """What stock code does not ask before it builds or runs a model."""
    config, path = checkpoint.config, checkpoint.path
    for name in _SIZES:
        positive_number({name: getattr(config, name)}, name, path)
    positive_number({"rms_norm_eps": config.rms_norm_eps}, "rms_norm_eps", path, kind=float)
    positive_number(config.rope_parameters, "rope_theta", path, kind=float)
    positive_number(config.rope_parameters, "factor", path, 1, float)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups or config.head_dim % 2:
        raise InputError(
            f"{path}: {heads} heads of width {config.head_dim} and {groups} key/value groups: the groups must divide the "
            "heads, and the width must be even"
        )
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise damaged(
            path,
            f"{len(checkpoint.tensors)} tensors, but the configuration says {config.num_hidden_layers} layers",
        )


def _check_finite(tensor: torch.Tensor, source: str, when: str = "") -> None:
    lowest, highest = torch.aminmax(tensor)  # both pass on a NaN
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        number = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{source}: {number} values are not finite{when and ' ' + when}; nothing was written")
