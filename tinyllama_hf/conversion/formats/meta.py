"""The layouts that rotate neighbouring rows: Meta's `consolidated.*.pth` with `params.json`, and llama2.c's file."""

import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ...errors import InputError
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, complete, plain_config, positive_number
from ..reading.containers import damaged, open_torch_archive, read_fields, state_dict
from .rotary import to_half_split


OUTER = {"tok_embeddings.weight": EMBEDDING, "norm.weight": "model.norm.weight", "output.weight": OUTPUT}
INSIDE = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_BLOCK = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.([a-z_.0-9]+)\.weight")
# Along which dimension each kind is cut over the model-parallel shards; norms lie in each shard whole.
_BY_ROWS = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output")
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")
_LLAMA2C_HEADER = struct.Struct("<7i")


def layout(names: Mapping[str, Any]) -> bool:
    """Whether the keys are Meta's."""
    return any(re.fullmatch(r"layers\.\d+\.attention\.wq\.weight", name) for name in names)


def read_meta(folder: Path) -> Checkpoint:
    """Opens a folder of `consolidated.*.pth` and `params.json`; model-parallel shards in the order of their numbers.

    The files do not say for which context a model was trained: the configuration gets Llama 2's 4096, and a note says so.

    Raises:
        InputError: if a file is missing or damaged, or the shards do not make one model.
    """
    files = sorted(folder.glob("consolidated.*.pth"), key=_number)
    numbers = [_number(file) for file in files]
    if numbers != list(range(len(files))):
        raise InputError(f"{folder}: holds the shards {numbers} of consolidated.*.pth, but they are counted from 0 without a "
                         "gap; fetch the missing ones")  # fmt: skip
    params_file = folder / "params.json"
    if not params_file.is_file():
        raise InputError(
            f"{params_file}: is missing; it lies beside Meta's files, and the heads cannot be told without it"
        )
    params = read_fields(params_file)
    shards = [state_dict(open_torch_archive(file), file) for file in files]
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise InputError(f"{folder}: its shards hold different tensors; they are not of one model, fetch them again")
    hidden = _positive(params, "dim", params_file)
    merged = {name: _merge(name, [shard[name] for shard in shards], hidden) for name in shards[0]}
    config = _config(params, params_file, merged)
    tokenizer = next((p for p in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if p.is_file()), None)
    extra = []
    if tokenizer is not None and tokenizer.read_bytes()[:1] != b"\n":  # with which every SentencePiece model begins
        tokenizer = None
        extra = ["tokenizer.model is no SentencePiece model (Llama 3 has tiktoken's format): take tokenizer.json from the Hugging "
                 "Face folder of that model"]  # fmt: skip
    notes = [*extra, "Meta's files do not say the context length: 4096 is written, as for Llama 2; change max_position_embeddings in "
             "config.json if it is another"]  # fmt: skip
    return complete(Checkpoint(folder, f"Meta, {len(files)} file(s)", config, to_hugging_face(merged, config), tokenizer,
                               notes=notes))  # fmt: skip


def _number(file: Path) -> int:
    digits = file.name.split(".")[1]
    if not digits.isdecimal():
        raise InputError(f"{file}: no shard of Meta's, whose names are consolidated.00.pth and on")
    return int(digits)


def _positive(params: Any, name: str, where: Path, default: Any = None, kind: type = int) -> Any:
    value = params.get(name)
    return positive_number(default if value is None else value, name, where, kind)


def _config(params: Mapping[str, Any], where: Path, tensors: Mapping[str, LazyTensor]) -> LlamaConfig:
    if params.get("use_scaled_rope"):
        raise InputError(f"{where}: use_scaled_rope: the scaling of Llama 3.1 and later is not in this file; convert from the "
                         "Hugging Face folder of that model")  # fmt: skip
    heads = _positive(params, "n_heads", where)
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors or not tensors[name].shape:
            raise InputError(f"{where.parent}: {name} is missing or has no rows; fetch or make it again")
    return plain_config(
        where, vocab_size=tensors["tok_embeddings.weight"].shape[0], hidden_size=_positive(params, "dim", where),
        num_hidden_layers=_positive(params, "n_layers", where), num_attention_heads=heads,
        num_key_value_heads=_positive(params, "n_kv_heads", where, heads),
        intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0], max_position_embeddings=4096,
        rms_norm_eps=_positive(params, "norm_eps", where, 1e-5, float),
        rope_parameters={"rope_type": "default", "rope_theta": _positive(params, "rope_theta", where, 10000.0, float)},
        tie_word_embeddings="output.weight" not in tensors,
    )  # fmt: skip


def _merge(name: str, parts: list[LazyTensor], hidden: int) -> LazyTensor:
    """One tensor of its model-parallel parts."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kind = (_BLOCK.fullmatch(name) or [None, None, name.removesuffix(".weight")])[2]
    if kind == "tok_embeddings":  # Llama 1 and 2 cut its columns, Llama 3 its rows
        dim = 0 if first.shape[-1:] == (hidden,) else 1
    elif kind in _BY_ROWS + _BY_COLUMNS:
        dim = int(kind in _BY_COLUMNS)
    else:
        return LazyTensor(first.shape, first.dtype, lambda: _same_in_all(parts), first.source)
    if len(first.shape) != 2 or any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
        raise InputError(f"{first.source}: the shards hold parts of different shapes or types; fetch them again")
    shape = (
        (first.shape[0] * len(parts), first.shape[1]) if dim == 0 else (first.shape[0], first.shape[1] * len(parts))
    )
    return LazyTensor(shape, first.dtype, lambda: torch.cat([part.read() for part in parts], dim), first.source)


def _same_in_all(parts: list[LazyTensor]) -> torch.Tensor:
    """What every shard holds whole."""
    whole = parts[0].read()
    if other := next((part for part in parts[1:] if not part.read().equal(whole)), None):
        raise InputError(
            f"{other.source}: differs from {parts[0].source}; the shards are not of one model, fetch them again"
        )
    return whole


def to_hugging_face(tensors: Mapping[str, LazyTensor], config: LlamaConfig) -> dict[str, LazyTensor]:
    """Meta's tensors under Hugging Face's names, q and k in its order of rows; keys of no layout keep theirs."""
    found = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        kind = match[2] if match else ""
        heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}.get(kind)
        if heads:
            tensor = _half_split(tensor, heads)
        known = f"model.layers.{int(match[1])}.{INSIDE[kind]}.weight" if kind in INSIDE else OUTER.get(name, name)
        found[known] = tensor
    return found


def _half_split(tensor: LazyTensor, heads: int) -> LazyTensor:
    if len(tensor.shape) != 2 or tensor.shape[0] % (2 * heads):
        raise InputError(f"{tensor.source}: has the shape {list(tensor.shape)}, which {heads} heads do not divide")
    return LazyTensor(
        tensor.shape, tensor.dtype, lambda: to_half_split(tensor.read(), heads).contiguous(), tensor.source
    )


def is_llama2c(path: Path) -> bool:
    """Whether a file has a plausible header of llama2.c's first format, and exactly the size that follows from it."""
    header = _llama2c_header(path)
    return header is not None and path.stat().st_size == _LLAMA2C_HEADER.size + 4 * _llama2c_numbers(header)


def _llama2c_header(path: Path) -> tuple[int, ...] | None:
    with path.open("rb") as file:
        data = file.read(_LLAMA2C_HEADER.size)
    if len(data) < _LLAMA2C_HEADER.size:
        return None
    hidden, inner, layers, heads, groups, vocab, context = header = _LLAMA2C_HEADER.unpack(data)
    plausible = (
        all(0 < n < 2**20 for n in (hidden, inner, layers, heads, groups, abs(vocab), context)) and layers < 2**10
    )
    if not plausible or hidden % heads or heads % groups or hidden // heads % 2:
        return None
    return header


def _llama2c_parts(header: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Kinds of tensors and their shapes, in the order of the file; those of the layers lie together by kind."""
    hidden, inner, layers, heads, groups, vocab, context = header
    key = hidden // heads * groups
    return [
        ("tok_embeddings", (abs(vocab), hidden)), ("attention_norm", (layers, hidden)),
        ("attention.wq", (layers, hidden, hidden)), ("attention.wk", (layers, key, hidden)),
        ("attention.wv", (layers, key, hidden)), ("attention.wo", (layers, hidden, hidden)),
        ("ffn_norm", (layers, hidden)), ("feed_forward.w1", (layers, inner, hidden)),
        ("feed_forward.w2", (layers, hidden, inner)), ("feed_forward.w3", (layers, inner, hidden)), ("norm", (hidden,)),
        ("rope.freqs", (2, context, hidden // heads // 2)), *([("output", (-vocab, hidden))] if vocab < 0 else []),
    ]  # fmt: skip


def _llama2c_numbers(header: tuple[int, ...]) -> int:
    return sum(math.prod(shape) for _, shape in _llama2c_parts(header))


def read_llama2c(path: Path) -> Checkpoint:
    """Opens a file of llama2.c's first format: seven integers, then float32 tensors; a negative vocabulary is untied.

    Raises:
        InputError: if it is none.
    """
    if not is_llama2c(path):
        raise damaged(path, "no file of llama2.c's: its size is not the one that its header gives")
    header = _llama2c_header(path)
    hidden, inner, layers, heads, groups, vocab, context = header
    tensors: dict[str, LazyTensor] = {}
    position = _LLAMA2C_HEADER.size
    for kind, shape in _llama2c_parts(header):
        of_layers = kind in INSIDE
        one = shape[1:] if of_layers else shape
        for layer in range(layers if of_layers else 1):
            name = f"layers.{layer}.{kind}.weight" if of_layers else kind if kind == "rope.freqs" else f"{kind}.weight"
            tensors[name] = LazyTensor(one, torch.float32, _reader(path, position, one), f"{path}: {name}")
            position += 4 * math.prod(one)
    config = plain_config(
        path, vocab_size=abs(vocab), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=context, tie_word_embeddings=vocab > 0,
    )  # fmt: skip
    beside = path.with_name("tokenizer.model")
    return complete(
        Checkpoint(path, "llama2.c", config, to_hugging_face(tensors, config), beside if beside.is_file() else None)
    )


def _reader(path: Path, position: int, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        data = bytearray(4 * math.prod(shape))
        with path.open("rb") as file:
            file.seek(position)
            if file.readinto(data) != len(data):
                raise damaged(path, "ends early")
        return torch.frombuffer(data, dtype=torch.float32).view(shape)

    return read
