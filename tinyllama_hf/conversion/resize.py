"""Changes the number of embedding rows, and the tokenizer with it."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from ..tokenization_tinyllama import TinyLlamaTokenizer
from .checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor


_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_SETTINGS = ("add_bos_token", "add_eos_token", "model_max_length", "padding_side")


def resize_vocabulary(checkpoint: Checkpoint, rows: int, folder: Path) -> None:
    """Changes the number of embedding rows of a checkpoint, for example from a chat model's 32003 to 32000.

    The last rows are removed, or rows with the mean of all rows are added. If tokens lose their rows, the tokenizer
    without them is saved to `folder`, and the checkpoint refers to it. Ids without a row in the configurations become
    Llama's.

    Raises:
        InputError: if `rows` is not positive, or smaller than the tokenizer's own vocabulary.
    """
    before = checkpoint.config.vocab_size
    if rows < 1:
        raise InputError(f"--vocab-rows {rows}: it must be at least 1")
    if rows == before:
        return
    for name in (EMBEDDING, OUTPUT):
        if name in checkpoint.tensors:
            checkpoint.tensors[name] = _resized(checkpoint.tensors[name], rows)
    checkpoint.config.vocab_size = rows
    checkpoint.notes.append(f"{before:,} embedding rows in the source, {rows:,} written")
    if rows < before:
        tokenizer = checkpoint.load_tokenizer()
        if tokenizer is not None and len(tokenizer) > rows:
            _trimmed(tokenizer, rows, checkpoint).save_pretrained(folder)
            checkpoint.tokenizer = folder
        llama = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        for name, value in llama.items():
            found = getattr(checkpoint.config, name)
            if _is_beyond(found, rows):
                setattr(checkpoint.config, name, value)
                checkpoint.notes.append(f"{name} {found} has no row; {value} was written")
            if checkpoint.generation and _is_beyond(checkpoint.generation.get(name), rows):
                checkpoint.generation[name] = 0 if name == "pad_token_id" else value


def _resized(tensor: LazyTensor, rows: int) -> LazyTensor:
    def resize(weight: torch.Tensor) -> torch.Tensor:
        if rows <= len(weight):
            return weight[:rows].clone()
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        return torch.cat([weight, mean.expand(rows - len(weight), -1)])

    return tensor.map(resize, (rows, tensor.shape[1]))


def _trimmed(tokenizer: PreTrainedTokenizerFast, rows: int, checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """Returns the tokenizer without the added tokens that lost their rows."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = 1 + max(state["model"]["vocab"].values())
    if own > rows:
        rule = "Only tokens that were added to it can be removed"
        raise InputError(f"--vocab-rows {rows}: the tokenizer's own vocabulary has {own:,} tokens. {rule}")
    gone = [token["content"] for token in state["added_tokens"] if token["id"] >= rows]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    if any(name in json.dumps(state["post_processor"], ensure_ascii=False) for name in gone):
        state["post_processor"] = None  # TinyLlamaTokenizer builds it from `add_bos_token`
    fallback = next((name for name in ("</s>", "<unk>") if name in tokenizer.vocab and name not in gone), None)
    roles = {role: fallback if (token := getattr(tokenizer, role)) in gone else token for role in _ROLES}
    settings = roles | {name: getattr(tokenizer, name, None) for name in _SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None}
    backend = Tokenizer.from_str(json.dumps(state))
    trimmed = type(tokenizer)(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    if isinstance(tokenizer, TinyLlamaTokenizer):
        trimmed.sentencepiece_model = tokenizer.sentencepiece_model
    checkpoint.notes.append(f"removed from the tokenizer: {', '.join(gone)}")
    if tokenizer.chat_template and any(name in tokenizer.chat_template for name in gone):
        checkpoint.notes.append("the chat template was removed, since it uses removed tokens")
    else:
        trimmed.chat_template = tokenizer.chat_template
    return trimmed


def _is_beyond(ids: int | list[int] | None, rows: int) -> bool:
    return any(i >= rows for i in ([ids] if isinstance(ids, int) else ids or []))
