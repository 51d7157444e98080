"""Writes a tokenizer into the metadata of a GGUF file, so that llama.cpp gives the same ids.

llama.cpp joins the pair whose union has the best score (SentencePiece), or the pair of the earliest merge (byte-level
BPE). What its metadata cannot say is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sentencepiece
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ...errors import InputError
from ...gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    ROLES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    padding_token,
    pre_tokenizer_name,
)
from ...tokenization_tinyllama import TinyLlamaTokenizer, merges_by_score


if TYPE_CHECKING:
    from gguf import GGUFWriter

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BEHIND = -1000.0  # llama.cpp's score for tokens that were added behind a SentencePiece vocabulary


def add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, rows: int) -> list[str]:
    """Adds tokens, merges or scores, special ids and chat template.

    Args:
        rows (`int`): of the model's embedding; rows without a token get one that is marked as unused.

    Returns:
        Lines for the user: what llama.cpp will do differently.

    Raises:
        InputError: if there are more tokens than rows, or if llama.cpp has no such tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, kinds = _tokens_and_kinds(tokenizer, state, rows)
    lines = []
    if isinstance(tokenizer, TinyLlamaTokenizer):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokenizer, state["model"], tokens, kinds))
    else:
        name = _byte_level_name(state)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
        if state["normalizer"]:
            lines.append(f"llama.cpp leaves out this tokenizer's normalisation ({state['normalizer']['type']}): text that "
                         "is not in that form gets other ids there")  # fmt: skip
    writer.add_add_space_prefix(isinstance(tokenizer, TinyLlamaTokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for role, name in ROLES.items():
        if (i := getattr(tokenizer, f"{role}_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    add_bos, add_eos = _separators(tokenizer)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    template = tokenizer.chat_template
    if template:
        named = (
            [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else []
        )
        writer.add_chat_template(named or template)
    return lines


def derived_scores(merges: Sequence[Sequence[str]], pieces: Sequence[str]) -> dict[str, float]:
    """Scores that make SentencePiece's rule, the best union first, follow a list of merges.

    Args:
        merges: pairs of pieces, the first to be made first.
        pieces: every piece that text is made of.

    Returns:
        A score for each piece: minus its place among the pieces that merges make, below all of them for the others.

    Raises:
        InputError: if no scores can: if the merges make a piece, then another, then the first again, or leave out a
            way to make one.
    """
    made = dict.fromkeys(left + right for left, right in merges)
    scores = dict.fromkeys(pieces, float(-len(made))) | {piece: float(-rank) for rank, piece in enumerate(made)}
    rebuilt = merges_by_score(scores)
    # Within one piece the order is free: among equal scores the leftmost pair is joined, whichever stands first here.
    same_order = [left + right for left, right in rebuilt] == [left + right for left, right in merges]
    if not same_order or set(rebuilt) != set(map(tuple, merges)):
        raise InputError("the merges of this tokenizer.json are not those of a SentencePiece vocabulary, which GGUF holds "
                         "as one score for each piece; put the tokenizer.model beside it")  # fmt: skip
    return scores


def _tokens_and_kinds(
    tokenizer: PreTrainedTokenizerFast, state: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= rows:
        raise InputError(f"the tokenizer has ids up to {max(ids.values())}, the model {rows} rows; give the tokenizer that "
                         "the model was trained with")  # fmt: skip
    tokens, kinds = [padding_token(i) for i in range(rows)], [UNUSED] * rows
    for token, i in ids.items():
        kinds[i] = UNUSED if token == tokens[i] else NORMAL
        tokens[i] = token
    for added in state["added_tokens"]:
        if flag := next((flag for flag in ("lstrip", "rstrip", "single_word") if added[flag]), None):
            raise InputError(
                f"the added token {added['content']!r} has {flag} set, which GGUF cannot say; add it without"
            )
        if added["normalized"] and state["normalizer"]:
            raise InputError(f"the added token {added['content']!r} is looked for in normalised text, which llama.cpp does "
                             "not do; add it with normalized=False")  # fmt: skip
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _scores(
    tokenizer: TinyLlamaTokenizer, model: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> list[float]:
    """Scores of a SentencePiece vocabulary; corrects the kinds of its own pieces."""
    vocabulary = model["vocab"]
    kinds[vocabulary[model["unk_token"]]] = UNKNOWN
    for piece, i in vocabulary.items():
        if kinds[i] == NORMAL and _BYTE_PIECE.fullmatch(piece):
            kinds[i] = BYTE
    scores = [0.0 if token in vocabulary else _BEHIND for token in tokens]
    if tokenizer.sentencepiece_model is not None:
        reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.sentencepiece_model)
        for i in range(reference.get_piece_size()):
            scores[i] = reference.get_score(i)
            kinds[i] = UNUSED if reference.is_unused(i) else kinds[i]
        return scores
    pieces = [token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL and token in vocabulary]
    for piece, score in derived_scores(model["merges"], pieces).items():
        scores[vocabulary[piece]] = score
    return scores


def _byte_level_name(state: Mapping[str, Any]) -> str:
    model, name = state["model"], pre_tokenizer_name(state)
    if model["type"] != "BPE" or name is None:
        shown = json.dumps({key: state[key] for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)[:600]
        raise InputError(
            f"llama.cpp has no name that is known here for this tokenizer ({model['type']}, ignore_merges "
            f"{model.get('ignore_merges')}, {shown}); known are SentencePiece's with a dummy prefix and, of byte-level "
            f"BPE, {', '.join(PRE_TOKENIZERS)}. Convert such a model with llama.cpp's own converter"
        )
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if missing and model["unk_token"]:
        raise InputError(f"this tokenizer makes {model['unk_token']!r} of {len(missing)} bytes that have no token; "
                         "llama.cpp leaves them out")  # fmt: skip
    if key := next(
        (key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model[key]), None
    ):
        raise InputError(f"this tokenizer's BPE has {key} {model[key]!r}, which GGUF cannot say")
    return name


def _separators(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Whether begin- and end-of-sequence are put round a text, seen from one."""
    text, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if framed == [tokenizer.bos_token_id] * add_bos + text + [tokenizer.eos_token_id] * add_eos:
            return add_bos, add_eos
    raise InputError(f"the tokenizer makes {framed} of 'a', which is not {text} between begin- and end-of-sequence; GGUF "
                     "has no other template")  # fmt: skip
