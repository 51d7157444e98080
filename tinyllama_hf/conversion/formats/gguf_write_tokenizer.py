"""Writes a tokenizer to the metadata of a GGUF file, so that llama.cpp gives the same ids.

llama.cpp merges the pair with the best score of the result (SentencePiece) or with the earliest merge (byte-level
BPE). Tokenizers that the metadata cannot describe are refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sentencepiece
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ...errors import InputError
from ...gguf.vocabulary import PADDING, PRE_TOKENIZERS, ROLES, TokenType, pre_tokenizer_name
from ...tokenization_tinyllama import TinyLlamaTokenizer, merges_by_score


if TYPE_CHECKING:
    from gguf import GGUFWriter

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BEHIND = -1000.0  # llama.cpp's score for tokens added after a SentencePiece vocabulary


def add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, rows: int) -> list[str]:
    """Adds tokens, merges or scores, special ids and chat template.

    Args:
        rows (`int`): rows of the model's embedding, one for every token. Other rows get a token marked as unused.

    Returns:
        Notes for the user about differences in llama.cpp.

    Raises:
        InputError: if llama.cpp does not support the tokenizer.
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
            name = state["normalizer"]["type"]
            lines.append(f"llama.cpp skips the normalizer {name}, so text that is not normalized gets other ids there")
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
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return lines


def derive_scores(merges: Sequence[Sequence[str]], pieces: Sequence[str]) -> dict[str, float]:
    """Returns scores with which SentencePiece's rule, best result first, follows a list of merges.

    Args:
        merges: pairs of pieces, in the order in which they are merged.
        pieces: all normal pieces of the vocabulary.

    Returns:
        For a piece made by merges, minus its rank among them; for the others, a lower score.

    Raises:
        InputError: if there are no such scores: the merges of a piece are not consecutive, or some are missing.
    """
    made = dict.fromkeys(left + right for left, right in merges)
    scores = dict.fromkeys(pieces, float(-len(made))) | {piece: float(-rank) for rank, piece in enumerate(made)}
    rebuilt = merges_by_score(scores)
    # The order within one piece does not matter: among equal scores the leftmost pair is merged.
    same_order = [left + right for left, right in rebuilt] == [left + right for left, right in merges]
    if not same_order or set(rebuilt) != set(map(tuple, merges)):
        found = "the merges in tokenizer.json do not follow from one score per piece, which GGUF stores"
        raise InputError(f"{found}. Add the tokenizer.model to the folder")
    return scores


def _tokens_and_kinds(
    tokenizer: PreTrainedTokenizerFast, state: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    tokens, kinds = [PADDING.format(i) for i in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, i in tokenizer.get_vocab().items():
        kinds[i] = TokenType.UNUSED if token == tokens[i] else TokenType.NORMAL
        tokens[i] = token
    for added in state["added_tokens"]:
        if flag := next((flag for flag in ("lstrip", "rstrip", "single_word") if added[flag]), None):
            raise InputError(f"the added token {added['content']!r} has {flag} set, which GGUF cannot store. Unset it")
        if added["normalized"] and state["normalizer"]:
            found = f"the added token {added['content']!r} is matched in normalized text, unlike in llama.cpp"
            raise InputError(f"{found}. Add it with normalized=False")
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, kinds


def _scores(
    tokenizer: TinyLlamaTokenizer, model: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> list[float]:
    """Returns the scores of a SentencePiece vocabulary, and corrects the kinds of its pieces."""
    vocabulary = model["vocab"]
    kinds[vocabulary[model["unk_token"]]] = TokenType.UNKNOWN
    for piece, i in vocabulary.items():
        if kinds[i] == TokenType.NORMAL and _BYTE_PIECE.fullmatch(piece):
            kinds[i] = TokenType.BYTE
    scores = [0.0 if token in vocabulary else _BEHIND for token in tokens]
    if tokenizer.sentencepiece_model is not None:
        reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.sentencepiece_model)
        for i in range(reference.get_piece_size()):
            scores[i] = reference.get_score(i)
            kinds[i] = TokenType.UNUSED if reference.is_unused(i) else kinds[i]
        return scores
    rows = zip(tokens, kinds, strict=True)
    pieces = [token for token, kind in rows if kind == TokenType.NORMAL and token in vocabulary]
    for piece, score in derive_scores(model["merges"], pieces).items():
        scores[vocabulary[piece]] = score
    return scores


def _byte_level_name(state: Mapping[str, Any]) -> str:
    model, name = state["model"], pre_tokenizer_name(state)
    if model["type"] != "BPE" or name is None:
        shown = json.dumps({key: state[key] for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)[:600]
        found = f"{model['type']} with ignore_merges {model.get('ignore_merges')} and {shown} is not supported"
        known = f"Supported are SentencePiece BPE and the byte-level {', '.join(PRE_TOKENIZERS)}"
        raise InputError(f"{found}. {known}. Use llama.cpp's own converter")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if missing and model["unk_token"]:
        found = f"{len(missing)} bytes without a token become {model['unk_token']!r}"
        raise InputError(f"{found}, while llama.cpp drops them. Use llama.cpp's own converter")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise InputError(f"the tokenizer's model has {key} {model[key]!r}, which GGUF cannot store")
    return name


def _separators(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Returns whether begin- and end-of-sequence tokens are added, as observed on a text."""
    text, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if framed == [tokenizer.bos_token_id] * add_bos + text + [tokenizer.eos_token_id] * add_eos:
            return add_bos, add_eos
    found = f"'a' becomes {framed}, which is not {text} with begin- or end-of-sequence tokens"
    raise InputError(f"{found}. GGUF supports no other template")
