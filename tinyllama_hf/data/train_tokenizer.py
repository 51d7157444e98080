"""Trains small tokenizers like that of Llama 2, and verifies tokenizers against SentencePiece."""

import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError
from ..files import new_folder
from ..tokenization_tinyllama import DUMMY_PREFIX, encode_text, load_sentencepiece, load_tokenizer


# 256 bytes and three control tokens, in addition to the learned tokens.
_FIXED_TOKENS = 259
_MAX_LINE_BYTES = 1 << 16
# The files that training writes and may replace.
_FILES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: str | os.PathLike, overwrite: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a SentencePiece BPE tokenizer with Llama 2's settings and saves it as a stock tokenizer folder.

    It has byte fallback, a dummy prefix, split digits and no normalization; `<unk>`, `<s>`, `</s>` are 0, 1, 2. The
    same texts give the same tokenizer.

    Args:
        texts (`Iterable[str]`): training texts.
        vocab_size (`int`): number of ids, including 256 bytes and three control tokens.
        output (`str` or `os.PathLike`): folder to write.
        overwrite (`bool`, *optional*, defaults to `False`): replace an existing tokenizer.

    Raises:
        InputError: if the folder exists and may not be replaced, or the vocabulary is too small or too large for the
            texts.
    """
    output = Path(output)
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    replaces = overwrite and bool(found) and found <= _FILES
    if output.is_file():
        raise InputError(f"--output {output} is a file. Choose a folder")
    if output.exists() and not replaces:
        fix = f"since it holds other files ({sorted(found - _FILES)[0]})" if found - _FILES else "or pass --overwrite"
        raise InputError(f"--output {output} exists already. Choose another folder, {fix}")
    if vocab_size <= _FIXED_TOKENS:
        raise InputError(
            f"--vocab-size {vocab_size} must be above {_FIXED_TOKENS}, the number of bytes and control tokens"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain.from_iterable(text.split("\n") for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.99995,
            max_sentence_length=_MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise InputError("The sources contain no text. Give other sources") from error
        if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"--vocab-size {vocab_size} is too small for the characters of the texts. Use at least {needed[1]}"
            ) from error
        limit = re.search(r"value <= (\d+)", str(error))
        fix = f"Use at most {limit[1]}" if limit else str(error).strip()
        raise InputError(f"--vocab-size {vocab_size} is too large for the texts. {fix}") from error
    with new_folder(output, overwrite=replaces) as temporary:
        (temporary / "tokenizer.model").write_bytes(model.getvalue())
        load_tokenizer(temporary / "tokenizer.model").save_pretrained(temporary)
    return load_tokenizer(output)


class Difference(NamedTuple):
    """The first difference between two tokenizations, or between a text and its decoded tokens."""

    text_number: int
    kind: str  # "ids" or "decode"
    character: int
    context: str
    ours: list
    reference: list


class TokenizerVerification(NamedTuple):
    """Result of a verification: counts, and the first difference, if any."""

    texts: int
    characters: int
    tokens: int
    difference: Difference | None


def verify_tokenizer(
    tokenizer: PreTrainedTokenizerBase, reference: str | os.PathLike, texts: Iterable[str]
) -> TokenizerVerification:
    """Compares a tokenizer with a SentencePiece model on texts, and checks that decoding restores every text.

    Control tokens in a text are encoded as text. U+2581 may decode to a space, as in SentencePiece.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any transformers tokenizer.
        reference (`str` or `os.PathLike`): a `tokenizer.model`.
        texts (`Iterable[str]`): texts to compare.

    Returns:
        `TokenizerVerification`: the counts up to the first text that differs, inclusive.
    """
    processor = load_sentencepiece(reference)
    number = characters = tokens = 0
    for number, text in enumerate(texts, start=1):
        ours, theirs = encode_text(tokenizer, text), processor.encode(text)
        characters, tokens = characters + len(text), tokens + len(ours)
        if ours != theirs:
            place = _first_difference(ours, theirs)
            character = len(processor.decode(theirs[:place]))
            around = slice(max(place - 2, 0), place + 4)
            here = list(zip(ours[around], tokenizer.convert_ids_to_tokens(ours[around]), strict=True))
            there = [(i, processor.id_to_piece(i)) for i in theirs[around]]
            context = text[max(character - 20, 0) : character + 20]
            return TokenizerVerification(
                number, characters, tokens, Difference(number, "ids", character, context, here, there)
            )
        back, wanted = tokenizer.decode(ours, skip_special_tokens=False), text.replace(DUMMY_PREFIX, " ")
        if back != wanted:
            character = _first_difference(back, wanted)
            around = slice(max(character - 20, 0), character + 20)
            difference = Difference(number, "decode", character, text[around], [back[around]], [wanted[around]])
            return TokenizerVerification(number, characters, tokens, difference)
    return TokenizerVerification(number, characters, tokens, None)


def _first_difference(a: Sequence, b: Sequence) -> int:
    """The first index at which two sequences differ, or the length of the shorter one."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
