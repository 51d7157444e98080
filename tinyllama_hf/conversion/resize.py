"""Fewer or more embedding rows than a checkpoint has, and a tokenizer that goes with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from ..tokenization_tinyllama import TinyLlamaTokenizer
from .checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor


_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def resize_vocabulary(checkpoint: Checkpoint, rows: int, folder: Path) -> None:
    """Gives a checkpoint another number of embedding rows, for example 32000 to a chat model with 32003.

    The last rows go; new ones are the mean of those that were there, so that no new token stands out. A tokenizer loses
    the tokens that lost their rows; it is written into `folder`, and the checkpoint then refers to it.

    Raises:
        InputError: if the number makes no sense, or the tokenizer's own vocabulary has more tokens.
    """
    before = checkpoint.config.vocab_size
    if rows < 1:
        raise InputError(f"--vocab-rows {rows}: must be at least 1")
    if rows == before:
        return
    for name in (EMBEDDING, OUTPUT):
        if name in checkpoint.tensors:
            checkpoint.tensors[name] = _resized(checkpoint.tensors[name], rows)
    checkpoint.config.vocab_size = rows
    checkpoint.notes.append(f"{before:,} embedding rows, {rows:,} written")
    if rows < before:
        tokenizer = checkpoint.load_tokenizer()
        if tokenizer is not None and len(tokenizer) > rows:
            _trimmed(tokenizer, rows, checkpoint).save_pretrained(folder)
            checkpoint.tokenizer = folder
        _reset_special_ids(checkpoint, rows)


def _resized(tensor: LazyTensor, rows: int) -> LazyTensor:
    def resize(weight: torch.Tensor) -> torch.Tensor:
        if rows <= len(weight):
            return weight[:rows].clone()
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        return torch.cat([weight, mean.expand(rows - len(weight), -1)])

    return tensor.map(resize, (rows, tensor.shape[1]))


def _trimmed(tokenizer: PreTrainedTokenizerFast, rows: int, checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer without the added tokens that have no rows any more."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = 1 + max(state["model"]["vocab"].values())
    if own > rows:
        raise InputError(
            f"--vocab-rows {rows}: the tokenizer's own vocabulary has {own:,} tokens; only tokens added to it can be left out"
        )
    gone = [token["content"] for token in state["added_tokens"] if token["id"] >= rows]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    if any(name in json.dumps(state["post_processor"], ensure_ascii=False) for name in gone):
        state["post_processor"] = None  # TinyLlamaTokenizer makes its own from `add_bos_token`
    roles = {role: _kept(getattr(tokenizer, role), gone, tokenizer.vocab) for role in _ROLES}
    settings = {key: value for key in ("add_bos_token", "add_eos_token", "model_max_length", "padding_side")
                if (value := getattr(tokenizer, key, None)) is not None}  # fmt: skip
    kind: Callable[..., Any] = type(tokenizer)
    trimmed = kind(tokenizer_object=Tokenizer.from_str(json.dumps(state)), clean_up_tokenization_spaces=False,
                   **{role: token for role, token in roles.items() if token}, **settings)  # fmt: skip
    if isinstance(tokenizer, TinyLlamaTokenizer):
        trimmed.sentencepiece_model = tokenizer.sentencepiece_model
    checkpoint.notes.append(f"the tokenizer lost {', '.join(gone)}")
    if tokenizer.chat_template and any(name in tokenizer.chat_template for name in gone):
        checkpoint.notes.append("the chat template is left out: it is written with tokens that are gone")
    else:
        trimmed.chat_template = tokenizer.chat_template
    return trimmed


def _kept(token: str | None, gone: list[str], vocabulary: dict[str, int]) -> str | None:
    """A special token, or Llama's for one that is gone: `</s>` at the end, `<unk>` for padding."""
    if token not in gone:
        return token
    return next((known for known in ("</s>", "<unk>") if known in vocabulary and known not in gone), None)


def _reset_special_ids(checkpoint: Checkpoint, rows: int) -> None:
    """Ids in the configurations that have no row any more become Llama's."""
    llama = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    for name, value in llama.items():
        found = getattr(checkpoint.config, name)
        if _is_beyond(found, rows):
            setattr(checkpoint.config, name, value)
            checkpoint.notes.append(f"{name} {found} has no row any more: {value} is written")
        if checkpoint.generation and _is_beyond(checkpoint.generation.get(name), rows):
            checkpoint.generation[name] = 0 if name == "pad_token_id" else value


def _is_beyond(ids: int | list[int] | None, rows: int) -> bool:
    return any(i >= rows for i in ([ids] if isinstance(ids, int) else ids or []))
