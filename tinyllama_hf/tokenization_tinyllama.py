"""The exact Llama 2 tokenizer, from any of its files: SentencePiece BPE with byte fallback and a dummy prefix.

The tokenizer that transformers 5.23 creates from a `tokenizer.model` gives other ids: it orders the merges by id
instead of piece score, adds the dummy prefix only to text that does not begin with a space, and adds no
begin-of-sequence (tests/test_tokenization.py checks this, so that this module can shrink once it is fixed). Here the
merges follow the scores, and a tokenizer from a `tokenizer.model` is compared with SentencePiece before it is
returned.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .configuration_tinyllama import TinyLlamaConfig
from .errors import InputError, did_you_mean, one_line, refuse_damage
from .files import read_json
from .gguf.vocabulary import TokenType, byte_level_tokenizer, read_vocabulary
from .released import TOKENIZER_FILES, local_folder
from .text import read_text


if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

DUMMY_PREFIX = "\u2581"  # a space in pieces
# The settings of a tokenizer_config.json that are used. Everything else in it is state of the library.
_CARRIED_SETTINGS = (
    *("add_bos_token", "add_eos_token", "model_max_length", "padding_side", "truncation_side"),
    *("bos_token", "eos_token", "unk_token"),
)
# Arguments of AutoTokenizer that have no effect here.
_AUTO_ARGUMENTS = ("config", "use_fast", "trust_remote_code")
# Texts on which implementations of this tokenizer differ: runs of spaces, spaces at the ends, bytes, control tokens.
_PROBES = (
    *("", " ", "  ", "   a", "a   ", "\n", " \n\n \t\t", "    def f(x):\n        return x\n"),
    *("Hello  world   !", "3.14 1000000", "\x00\x7f\ufffd", "<s></s><unk><0x0A>", "\r\n\u00a0\u2028", "ﬁ Å ①"),
    "\u00e9\u00df\u4e2d\u6587\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f680\U0001f468\u200d\U0001f469",
)


class TinyLlamaTokenizer(PreTrainedTokenizerFast):
    """A `PreTrainedTokenizerFast` that saves a stock tokenizer with the same ids.

    `save_pretrained` writes a class name that every version of transformers supports and, if the SentencePiece model
    is available, `tokenizer.model` in addition to `tokenizer.json`, since GGUF converters need it.
    """

    sentencepiece_model: bytes | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # further positional arguments have no effect here
        cls, pretrained_model_name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any
    ) -> PreTrainedTokenizerFast:
        """Loads with [`load_tokenizer`], so that `AutoTokenizer` returns the exact tokenizer for TinyLlama folders.

        Args:
            revision (`str`, *optional*): revision of a Hub repository.
            **kwargs: settings of the tokenizer, such as `padding_side` or `model_max_length`.

        Raises:
            InputError: for an unknown setting.
        """
        name = str(pretrained_model_name_or_path)
        settings = {
            key: value for key, value in kwargs.items() if not key.startswith("_") and key not in _AUTO_ARGUMENTS
        }
        if unknown := sorted(set(settings) - set(_CARRIED_SETTINGS)):
            raise InputError(
                f"{name}: unknown setting {unknown[0]!r} of a tokenizer{did_you_mean(unknown[0], _CARRIED_SETTINGS)}"
            )
        tokenizer = load_tokenizer(name if revision is None or Path(name).exists() else f"{name}@{revision}")
        for key, value in settings.items():
            setattr(tokenizer, key, value)
        return tokenizer

    def _save_pretrained(
        self, save_directory: str | os.PathLike, file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        saved = super()._save_pretrained(save_directory, file_names, *args, **kwargs)
        config_file = Path(file_names[0])
        config = read_json(config_file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.sentencepiece_model is None:
            return saved
        model_file = Path(save_directory) / "tokenizer.model"
        model_file.write_bytes(self.sentencepiece_model)
        return (*saved, str(model_file))


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Loads a tokenizer: the exact Llama 2 tokenizer for SentencePiece BPE vocabularies, the stock one for others.

    Args:
        path (`str` or `os.PathLike`): a folder, a `tokenizer.model`, a `tokenizer.json`, a GGUF file, the name of a
            released checkpoint or a Hub id.

    Returns:
        A tokenizer that adds begin-of-sequence as Llama 2 does, unless its folder disables it, and pads with `<unk>`,
        or with the folder's padding token unless that is begin- or end-of-sequence. Encode text that is not a chat
        with `split_special_tokens=True`, so that a literal `</s>` stays text.

    Raises:
        InputError: if there is no tokenizer, it is another kind of SentencePiece model, a file is damaged, or it needs
            code from its folder.
    """
    path = Path(path)
    if not path.exists():
        path = local_folder(str(path), TOKENIZER_FILES)
    with _translate_errors(path):
        tokenizer = _load(path)
        tokenizer("")  # a setting of a wrong type, such as a length that is a string, fails at the first call only
    return tokenizer


@contextlib.contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Turns the many kinds of errors from damaged files into one; for reading files and creating tokenizers only."""
    try:
        yield
    # No narrower class: tokenizers raises `Exception` itself, or a Rust panic, which is not an `Exception` and cannot
    # be imported; and fields that are missing or of a wrong type cause almost any error, here and in transformers.
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, InputError | MemoryError) or not (panic or isinstance(error, Exception)):
            raise
        fix = "Install it" if isinstance(error, ImportError) else "Download or create it again"
        raise InputError(f"tokenizer {path}: cannot be loaded ({one_line(error)}). {fix}") from error


def _load(path: Path) -> PreTrainedTokenizerFast:
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    folder = path if path.is_dir() else path.parent
    model_file = path if path.suffix == ".model" else folder / "tokenizer.model"
    json_file = path if path.suffix == ".json" else folder / "tokenizer.json"
    if path.is_file() and path not in (model_file, json_file):
        raise InputError(
            f"{path}: is not a tokenizer. Give a folder, a tokenizer.model, a tokenizer.json or a .gguf file"
        )
    if path.suffix != ".json" and model_file.is_file():
        return _from_sentencepiece(model_file, folder if path.is_dir() else None)
    if json_file.is_file():
        return _from_tokenizer_json(json_file, folder if path.is_dir() else None)
    raise InputError(f"{folder}: holds neither tokenizer.model nor tokenizer.json. Give the folder of a model")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of everything that token ids depend on: equal fingerprints mean equal ids for any text."""
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # as all from `load_tokenizer`
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text without begin-of-sequence; control tokens spelled in it stay text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _from_sentencepiece(model_file: Path, folder: Path | None) -> TinyLlamaTokenizer:
    reference = load_sentencepiece(model_file)
    special_ids = {"unk_token": reference.unk_id(), "bos_token": reference.bos_id(), "eos_token": reference.eos_id()}
    if min(special_ids.values()) < 0:
        raise InputError(
            f"{model_file}: has no begin- or end-of-sequence token, and Llama's has both. Use AutoTokenizer for it"
        )
    pieces = [reference.id_to_piece(i) for i in range(reference.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = {role: pieces[i] for role, i in special_ids.items()}
    control = [piece for i, piece in enumerate(pieces) if reference.is_control(i)]
    scores = {
        piece: reference.get_score(i)
        for i, piece in enumerate(pieces)
        if not (reference.is_control(i) or reference.is_unknown(i) or reference.is_byte(i))
    }
    tokenizer = _wrap(_pipeline(vocabulary, merges_by_score(scores), special["unk_token"], control), special, folder)
    tokenizer.sentencepiece_model = model_file.read_bytes()
    characters = "".join(scores).replace(DUMMY_PREFIX, " ")
    for text in (*_PROBES, *(characters[i : i + 4096] for i in range(0, len(characters), 4096))):
        if encode_text(tokenizer, text) != reference.encode(text):
            raise InputError(
                f"{model_file}: SentencePiece and the Llama 2 tokenizer give different ids for {text[:40]!r}. It is "
                "not a BPE model with byte fallback, a dummy prefix and no normalization. Use AutoTokenizer for it"
            )
    return tokenizer


def _from_tokenizer_json(json_file: Path, folder: Path | None) -> PreTrainedTokenizerFast:
    state = read_json(json_file)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(
            f"{json_file}: is not a valid tokenizer.json, since it has no 'model'. Give the folder of a tokenizer"
        )
    model = state["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not _has_dummy_prefix(state):
        return _load_stock(folder) if folder else PreTrainedTokenizerFast(tokenizer_file=str(json_file))
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in pairs]
    vocabulary = model["vocab"]
    added = (token["content"] for token in state["added_tokens"] if token["special"])
    special = {"unk_token": model.get("unk_token") or "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if not vocabulary.keys() >= {*special.values()}:
        raise InputError(f"{json_file}: its vocabulary has no <unk>, <s> or </s>, and Llama's has all three")
    control = [token for token in added if token in vocabulary]
    return _wrap(_pipeline(vocabulary, merges, special["unk_token"], control), special, folder)


def _load_stock(folder: Path) -> PreTrainedTokenizerFast:
    """Returns the stock tokenizer, without running code of the folder or asking on the terminal to do so."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"{folder}: its tokenizer needs code from the folder (auto_map in tokenizer_config.json), which is "
            "never run. If tokenizer.json is complete without it, remove auto_map; otherwise use another model"
        ) from error
    return tokenizer


def _has_dummy_prefix(state: Mapping[str, Any]) -> bool:
    text = json.dumps([state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False)
    return '{"type": "Prepend"' in text or ('"Metaspace"' in text and '"prepend_scheme": "never"' not in text)


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    vocabulary = read_vocabulary(path)
    if vocabulary.model == "gpt2":
        return byte_level_tokenizer(vocabulary)
    if not vocabulary.add_space_prefix:
        raise InputError(
            f"{path}: tokenizer.ggml.add_space_prefix is false, and Llama 2's tokenizer has a dummy prefix"
        )
    rows = zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
    pieces = {token: score for token, score, kind in rows if kind in (TokenType.NORMAL, TokenType.UNUSED)}
    special = {role: vocabulary.special[role] for role in ("unk_token", "bos_token", "eos_token")}
    backend = _pipeline(vocabulary.ids(), merges_by_score(pieces), special["unk_token"], ())
    backend.add_tokens(vocabulary.added())
    settings: dict[str, Any] = {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos}
    settings |= _padding(vocabulary.special.get("pad_token"), backend, special)
    tokenizer = _wrap(backend, special, None, settings)
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns BPE merges with the order of SentencePiece: best score first, and for equal scores the longer left part.

    SentencePiece always joins the pair with the best score of the joined piece, the leftmost of equal ones. A run of
    equal pieces (spaces) therefore grows from its left end, which the second and third sort key reproduce.
    """
    merges = [
        (score, i, len(piece) - i, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _pipeline(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str, control: Iterable[str]
) -> Tokenizer:
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(DUMMY_PREFIX), normalizers.Replace(" ", DUMMY_PREFIX)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(DUMMY_PREFIX, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = sorted({unknown, *control}, key=vocabulary.__getitem__)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def _wrap(
    backend: Tokenizer, special: dict[str, str], folder: Path | None, settings: dict[str, Any] | None = None
) -> TinyLlamaTokenizer:
    """Returns the transformers tokenizer, with the settings and added tokens of the folder."""
    settings = {"add_bos_token": True, **special, "pad_token": special["unk_token"], **(settings or {})}
    config = _read_optional(folder, "tokenizer_config.json")
    state = _read_optional(folder, "tokenizer.json")
    if folder:
        _add_tokens(_added_tokens(folder, state, config), backend, folder)
    # From 5.0 on, transformers stores in the post-processor only whether begin- and end-of-sequence are added. That of
    # its LlamaTokenizer is wrong: it is saved without begin-of-sequence by default (5.23).
    if not config.get("tokenizer_class", "Llama").startswith("Llama"):
        settings.update(_separators(state.get("post_processor"), settings))
    for name in _CARRIED_SETTINGS:
        if config.get(name) is not None:
            value = config[name]
            settings[name] = value["content"] if isinstance(value, dict) else value
    settings.update(_padding(declared_padding(config), backend, settings))
    tokenizer = TinyLlamaTokenizer(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    if folder and (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_text(folder / "chat_template.jinja")
    elif config.get("chat_template"):
        tokenizer.chat_template = config["chat_template"]
    return tokenizer


def _read_optional(folder: Path | None, name: str) -> dict[str, Any]:
    return read_json(folder / name) if folder and (folder / name).is_file() else {}


def declared_padding(config: Mapping[str, Any]) -> str | None:
    """Returns the padding token of a `tokenizer_config.json`."""
    padding = config.get("pad_token")
    return padding.get("content") if isinstance(padding, dict) else padding


def _padding(declared: str | None, backend: Tokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the declared padding token as a setting, if it has an id and does not begin or end text."""
    if declared is None or backend.token_to_id(declared) is None:
        return {}
    # Trainers mask padding in labels: with end-of-sequence as padding, a model would not learn to stop.
    return {} if declared in (settings["bos_token"], settings["eos_token"]) else {"pad_token": declared}


def _separators(post_processor: dict[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, bool]:
    """Returns which of begin- and end-of-sequence a saved post-processor adds."""
    if not post_processor or post_processor["type"] != "TemplateProcessing":
        return {}
    added = {part["SpecialToken"]["id"] for part in post_processor["single"] if "SpecialToken" in part}
    return {f"add_{name}": settings[name] in added for name in ("bos_token", "eos_token")}


def _added_tokens(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the added tokens of a folder, from the first of three possible files."""
    if state:
        return state["added_tokens"]
    if decoder := config.get("added_tokens_decoder"):
        return [{"id": int(i), **token} for i, token in decoder.items()]
    added = _read_optional(folder, "added_tokens.json")
    return [{"id": i, "content": name, "special": True} for name, i in added.items()]


def _add_tokens(tokens: list[dict[str, Any]], backend: Tokenizer, folder: Path) -> None:
    """Adds the tokens of a fine-tuned model that follow the vocabulary (`<|im_start|>`), with the same ids."""
    for token in sorted(tokens, key=lambda t: t["id"]):
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        options = {"normalized": False} | {name: token[name] for name in names if name in token}
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([AddedToken(token["content"], **options)])
        if (found := backend.token_to_id(token["content"])) != token["id"]:
            raise InputError(
                f"{folder}: token {token['content']!r} has the id {token['id']}, but {found} in the vocabulary. The "
                "files are from different tokenizers. Remove one"
            )


def load_sentencepiece(model_file: str | os.PathLike) -> "SentencePieceProcessor":
    """Opens a SentencePiece model.

    Raises:
        InputError: if the file is not a SentencePiece model.
    """
    import sentencepiece  # pretraining runs without it

    with refuse_damage(f"SentencePiece model {model_file}"):
        return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


AutoTokenizer.register(TinyLlamaConfig, fast_tokenizer_class=TinyLlamaTokenizer, exist_ok=True)
