"""Reads tokenizers from GGUF files: vocabularies of all kinds, and complete byte-level BPE tokenizers.

`tokenizer.ggml.pre` names the pre-tokenizer, which splits the text before merging. transformers 5.23 supports some
names and splits like GPT-2 for all others, among them SmolLM2's. White space before a number then gets other tokens
(shown in tests/conversion/test_gguf_tokenizer.py). Here unknown names are refused.
"""

import enum
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ..errors import InputError, damaged
from .file import GGUFHeader, read_header


# llama.cpp's token types, which are SentencePiece's.
TokenType = enum.IntEnum("TokenType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
NO_TOKENIZER = ("none", "no_vocab")  # tokenizer models of files without a tokenizer
ROLES = {"unk_token": "unknown", "bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
PADDING = "[PAD{}]"  # llama.cpp's placeholder for an embedding row without a token, which is marked as unused
# llama.cpp's defaults for a SentencePiece vocabulary.
_LLAMA_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}


class PreTokenizer(NamedTuple):
    """The steps before merging, as in `tokenizer.json`."""

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False  # a piece that is a token is not split


_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False}
_QWEN2 = _LLAMA3 | {"pattern": {"Regex": _PATTERN.replace("{1,3}", "")}}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
_SEQUENCE = {"type": "Sequence"}
# Copied from the models' tokenizer.json (GPT-2, SmolLM, Llama 3, Qwen 2). llama.cpp's llama-vocab.cpp splits the same
# way under these names; tests/conversion/test_gguf_peer.py compares the ids. Its qwen2 does not normalize: text that
# is not in form NFC gets other ids there.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_GPT2),
    "smollm": PreTokenizer(_SEQUENCE | {"pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}),
    "llama-bpe": PreTokenizer(_SEQUENCE | {"pretokenizers": [_LLAMA3, _BYTES]}, ignore_merges=True),
    "qwen2": PreTokenizer(_SEQUENCE | {"pretokenizers": [_QWEN2, _BYTES]}, normalizer={"type": "NFC"}),
}


class Vocabulary(NamedTuple):
    """The tokenizer in a GGUF file."""

    path: Path
    model: str
    pre: str | None
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, str]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    def ids(self) -> dict[str, int]:
        """Returns the ids of the tokens, without those added after the vocabulary."""
        last = max((i for i, kind in enumerate(self.kinds) if kind not in _ADDED), default=-1)
        return {token: i for i, token in enumerate(self.tokens[: last + 1])}

    def added(self) -> list[AddedToken]:
        """Returns the control and user-defined tokens in the order of their ids."""
        rows = [row for row in zip(self.tokens, self.kinds, strict=True) if row[1] in _ADDED]
        return [AddedToken(token, special=kind == TokenType.CONTROL, normalized=False) for token, kind in rows]


def read_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """Reads the tokenizer of a GGUF file without the placeholders of the model's last rows.

    Raises:
        InputError: if there is no tokenizer, it is neither SentencePiece nor byte-level BPE, or it is damaged.
    """
    header = read_header(path)
    model, pre = header.value("tokenizer.ggml.model", str), header.value("tokenizer.ggml.pre", str)
    if model in (None, *NO_TOKENIZER):
        raise InputError(f"{path}: no tokenizer (tokenizer.ggml.model is {model!r}). Pass the model's own tokenizer")
    if model not in ("llama", "gpt2"):
        known = "supported are llama (SentencePiece) and gpt2 (byte-level BPE)"
        raise InputError(f"{path}: tokenizer.ggml.model is {model!r}; {known}. Pass the model's own tokenizer")
    is_llama = model == "llama"
    tokens = header.array("tokenizer.ggml.tokens", str)
    kinds = header.array("tokenizer.ggml.token_type", int) or [TokenType.NORMAL] * len(tokens)
    scores = header.array("tokenizer.ggml.scores", float) or [0.0] * len(tokens)
    if not tokens or not len(set(tokens)) == len(tokens) == len(kinds) == len(scores):
        numbers = f"{len(tokens)} tokens ({len(set(tokens))} different), {len(kinds)} types and {len(scores)} scores"
        raise damaged(path, f"its tokenizer has {numbers}")
    used = [kind != TokenType.UNUSED or tokens[i] != PADDING.format(i) for i, kind in enumerate(kinds)]
    size = max((i + 1 for i, is_used in enumerate(used) if is_used), default=0)
    vocabulary = Vocabulary(
        path=header.path,
        model=model,
        pre=pre,
        tokens=tokens[:size],
        kinds=kinds[:size],
        scores=scores[:size],
        merges=header.array("tokenizer.ggml.merges", str),
        special=_special_tokens(header, tokens[:size], _LLAMA_IDS if is_llama else {}),
        add_bos=header.value("tokenizer.ggml.add_bos_token", bool, is_llama or pre == "llama-bpe"),
        add_eos=header.value("tokenizer.ggml.add_eos_token", bool, False),
        add_space_prefix=header.value("tokenizer.ggml.add_space_prefix", bool, is_llama),
        chat_template=header.value("tokenizer.chat_template", str),
    )
    if is_llama and vocabulary.special["unk_token"] not in vocabulary.ids():
        raise damaged(path, "its unknown token is not in the vocabulary")
    return vocabulary


def _special_tokens(header: GGUFHeader, tokens: list[str], defaults: dict[str, int]) -> dict[str, str]:
    found = {}
    for role, name in ROLES.items():
        key = f"tokenizer.ggml.{name}_token_id"
        i = header.value(key, int, defaults.get(role))
        if i is not None and not 0 <= i < len(tokens):
            raise damaged(header.path, f"{key} is {i}, but there are {len(tokens)} tokens")
        if i is not None:
            found[role] = tokens[i]
    return found


def byte_level_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Builds the stock tokenizer of a byte-level BPE vocabulary.

    Raises:
        InputError: if the pre-tokenizer is unknown, or the merges do not match the tokens.
    """
    path = vocabulary.path
    if vocabulary.pre not in PRE_TOKENIZERS:
        known = f"supported are {', '.join(PRE_TOKENIZERS)}"
        raise InputError(f"{path}: tokenizer.ggml.pre is {vocabulary.pre!r}; {known}. Pass the model's own tokenizer")
    steps = PRE_TOKENIZERS[vocabulary.pre]
    ids = vocabulary.ids()
    merges = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if " " in right or not {left, right, left + right} <= ids.keys():
            raise damaged(path, f"the merge {merge!r} does not join two tokens into one")
        merges.append((left, right))
    state = json.loads(Tokenizer(models.BPE()).to_str())
    state |= {"pre_tokenizer": steps.pre_tokenizer, "normalizer": steps.normalizer}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.model = models.BPE(vocab=ids, merges=merges, ignore_merges=steps.ignore_merges)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(vocabulary.added())
    settings = {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos, **vocabulary.special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer


def pre_tokenizer_name(state: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name for the steps before merging in a `tokenizer.json`, or `None` if it is unknown."""
    model = state["model"]
    found = PreTokenizer(state["pre_tokenizer"], state["normalizer"], bool(model.get("ignore_merges")))
    return next((name for name, known in PRE_TOKENIZERS.items() if _decisive(known) == _decisive(found)), None)


def _decisive(step: Any) -> Any:
    """Returns a step without `trim_offsets`, which only affects offsets."""
    if isinstance(step, list | tuple):
        return [_decisive(item) for item in step]
    if isinstance(step, dict):
        return {key: _decisive(item) for key, item in step.items() if key != "trim_offsets"}
    return step
