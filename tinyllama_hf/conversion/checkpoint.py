"""The form that all layouts are read into and all formats are written from: a configuration and lazy tensors."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, damaged, refuse_damage
from ..tokenization_tinyllama import load_tokenizer


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
# Tensors that some exporters save although they are computed from the configuration.
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
          "intermediate_size", "max_position_embeddings")  # fmt: skip
_MAX_BITS: dict[type, int] = {int: 31, float: 63}  # of sizes and of factors; rotary bases can be several billion


class LazyTensor(NamedTuple):
    """A tensor in a file.

    `read` returns the tensor in newly allocated memory, with this shape and dtype. `source` is the file and the key,
    for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    source: str

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None) -> Self:
        """Applies `change` to the tensor when it is read; `shape` is that of the result, by default this tensor's."""
        return self._replace(shape=self.shape if shape is None else shape, read=lambda: change(self.read()))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises an `InputError` unless the tensor has this shape."""
        if self.shape != shape:
            raise InputError(f"{self.source}: shape {list(self.shape)}; the configuration requires {list(shape)}")


@dataclass
class Checkpoint:
    """A Llama in files: its configuration, and its tensors under the names of `LlamaForCausalLM`.

    Args:
        path (`Path`): the file or folder that was opened.
        layout (`str`): description of the detected layout.
        config (`LlamaConfig`): plain Llama configuration. When saved, it has the rotary base in both spellings.
        tensors (`dict[str, LazyTensor]`): the tensors by name, without `lm_head.weight` if it is tied to the
            embedding.
        tokenizer (`Path`, *optional*): a path for `load_tokenizer`; `None` if the source has no tokenizer.
        generation (`dict`, *optional*): fields of `generation_config.json`.
        provenance (`dict`, *optional*): `provenance.json` of the source.
        notes (`list[str]`): remarks about the source for the user.
        advance (`Callable[[int], None]`): called with the number of bytes of every tensor that is read.
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
        """Size of all tensors in memory."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def load_tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Returns the tokenizer, or `None`. It is loaded once, since loading Llama 2's takes more than a second."""
        if self.tokenizer is None:
            return None
        if self.tokenizer not in self._tokenizers:
            self._tokenizers[self.tokenizer] = load_tokenizer(self.tokenizer)
        return self._tokenizers[self.tokenizer]

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads one tensor.

        Args:
            dtype (`torch.dtype`, *optional*): the dtype to cast to.

        Raises:
            InputError: if the file is damaged, or if values are not finite before or after the cast.
        """
        lazy = self.tensors[name]
        tensor = lazy.read()
        assert tuple(tensor.shape) == lazy.shape and tensor.dtype == lazy.dtype, lazy.source
        check_finite(tensor, lazy.source)
        if dtype is not None and dtype != tensor.dtype:
            tensor = tensor.to(dtype)
            fix = " (maximum 65504). Use bf16" if dtype == torch.float16 else ". Use fp32"
            check_finite(tensor, lazy.source, f" as {str(dtype)[6:]}{fix}")
        self.advance(lazy.num_bytes)
        return tensor


def positive_number(fields: Mapping[str, Any], name: str, where: object, default: Any = None, kind: type = int) -> Any:
    """Returns a size or factor of a configuration as `kind`, or `default` if it is missing.

    Raises:
        InputError: if it is not a positive number or is larger than in any model.
    """
    value = default if fields.get(name) is None else fields[name]
    bits = _MAX_BITS[kind]
    # The bound also refuses infinity and NaN, which Python's JSON and YAML readers accept.
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 2**bits:
        # Python refuses to print integers with thousands of digits.
        is_long = isinstance(value, int) and value.bit_length() > 99
        shown = f"a number of {value.bit_length()} bits" if is_long else f"{value!r:.80}"
        raise InputError(f"{where}: {name} is {shown}; it must be a positive number below 2**{bits}")
    return kind(value)


def read_sizes(fields: Mapping[str, Any], names: Mapping[str, str], where: object) -> dict[str, Any]:
    """Returns sizes under the names of `LlamaConfig`.

    A missing size is `None` if `LlamaConfig` has a default for it, otherwise an `InputError`.

    Args:
        names (`Mapping[str, str]`): maps names in `fields` to names of `LlamaConfig`.
    """
    optional = ("num_key_value_heads", "head_dim")
    missing = {ours for name, ours in names.items() if ours in optional and fields.get(name) is None}
    return {ours: None if ours in missing else positive_number(fields, name, where) for name, ours in names.items()}


def require_values(fields: Mapping[str, Any], required: Mapping[str, Any], where: object, what: str) -> None:
    """Raises an `InputError` for a field with another value than the supported one; missing fields are accepted.

    Args:
        what (`str`): the format or model with this restriction, for the message.
    """
    for name, value in required.items():
        if fields.get(name, value) != value:
            raise InputError(f"{where}: {name} is {fields[name]!r}; {what} supports only {value!r}")


def plain_config(where: object = "the configuration", /, **fields: Any) -> LlamaConfig:
    """Returns a plain Llama configuration, with TinyLlama's values for fields that are not given.

    Raises:
        InputError: naming `where`, if the fields contradict each other.
    """
    with refuse_damage(where):
        return TinyLlamaConfig(**fields).to_llama()


def rope_parameters(config: LlamaConfig) -> dict[str, Any]:
    """Returns the rotary parameters, which transformers declares as optional."""
    return dict(config.rope_parameters or {})


def head_sizes(config: LlamaConfig) -> tuple[int, int, int]:
    """Returns the number of heads, the number of key/value heads and the head size."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, config.head_dim or config.hidden_size // heads


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of a model's tensors in the model's order, without a tied `lm_head.weight`."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1  # all layers are alike, and building a damaged number of them could take minutes
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(one).state_dict().items()}
    if config.tie_word_embeddings:
        del found[OUTPUT]
    layer = {name: found.pop(name) for name in list(found) if name.startswith("model.layers.0.")}
    shapes = {EMBEDDING: found.pop(EMBEDDING)}
    for i in range(config.num_hidden_layers):
        shapes |= {name.replace(".0.", f".{i}.", 1): shape for name, shape in layer.items()}
    return shapes | found


def validate(checkpoint: Checkpoint) -> Checkpoint:
    """Checks the tensors against the configuration and returns the checkpoint with the tensors in the model's order.

    Raises:
        InputError: if a tensor is missing, unknown, or has a wrong shape or dtype.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    _check_config(checkpoint)
    if checkpoint.config.tie_word_embeddings and OUTPUT in tensors and EMBEDDING in tensors:
        if are_equal(tensors[OUTPUT], tensors[EMBEDDING]):
            del tensors[OUTPUT]
        else:  # as transformers does
            checkpoint.config.tie_word_embeddings = False
            checkpoint.notes.append(f"tie_word_embeddings is true, but {OUTPUT} differs; both are kept, untied")
    with refuse_damage(f"{path}: its configuration"):
        shapes = expected_shapes(checkpoint.config)
    if missing := [name for name in shapes if name not in tensors]:
        raise damaged(path, f"{len(missing)} tensors are missing, such as {missing[0]}")
    if extra := [name for name in tensors if name not in shapes and not name.endswith(COMPUTED)]:
        raise InputError(f"{tensors[extra[0]].source}: a Llama with this configuration has no such tensor")
    for name, shape in shapes.items():
        found = tensors[name]
        found.check_shape(shape)
        if found.dtype not in FLOATING:
            raise InputError(f"{found.source}: dtype {str(found.dtype)[6:]}; it must be float32, float16 or bfloat16")
    checkpoint.tensors = {name: tensors[name] for name in shapes}
    return checkpoint


def are_equal(a: LazyTensor | None, b: LazyTensor | None) -> bool:
    """Whether two tensors have the same bits."""
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().equal(b.read())


def _check_config(checkpoint: Checkpoint) -> None:
    """Checks what transformers does not check before it builds or runs a model."""
    config, path = checkpoint.config, checkpoint.path
    for name in _SIZES:
        positive_number(vars(config), name, path)
    positive_number(vars(config), "rms_norm_eps", path, kind=float)
    positive_number(rope_parameters(config), "rope_theta", path, kind=float)
    positive_number(rope_parameters(config), "factor", path, 1, float)
    heads, groups, width = head_sizes(config)
    if heads % groups or width % 2:
        found = f"{heads} heads of size {width} and {groups} key/value heads"
        raise InputError(f"{path}: {found}. The key/value heads must divide the heads, and the size must be even")
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise damaged(path, f"{len(checkpoint.tensors)} tensors, but num_hidden_layers is {config.num_hidden_layers}")


def check_finite(tensor: torch.Tensor, source: str, when: str = "") -> None:
    """Raises an `InputError` if a tensor has values that are not finite."""
    lowest, highest = torch.aminmax(tensor)  # both are NaN if any value is
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        number = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{source}: {number} values are not finite{when}. Nothing was written")
