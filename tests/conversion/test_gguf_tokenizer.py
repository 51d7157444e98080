"""Round trips of both kinds of tokenizers through GGUF: same ids, and same file when written again."""

import json

import pytest
from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import SMOLLM2_GGUF
from tinyllama_hf import load_tokenizer
from tinyllama_hf.conversion.formats.gguf_write_tokenizer import add_tokenizer, derive_scores
from tinyllama_hf.errors import InputError
from tinyllama_hf.gguf.file import read_header
from tinyllama_hf.gguf.vocabulary import PRE_TOKENIZERS
from tinyllama_hf.tokenization_tinyllama import (
    encode_text,
    load_sentencepiece,
    merges_by_score,
    tokenizer_fingerprint,
)


TEXTS = [
    "Hello  world!\n\n1. x = 3.14\n\n\n  2024",
    "\tdef f(x):\n        return x\r\n",
    "naïve 中文 हिन्दी 👩‍🚀 ½ ٣",
    " a",
    "",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write(tokenizer, path, rows=None):
    """Writes a GGUF file with only the tokenizer; returns the tokenizer's metadata."""
    writer = GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer, rows or len(tokenizer))
    return finish(writer, path)


def finish(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    metadata = read_header(path).metadata
    return {k.removeprefix("tokenizer.").removeprefix("ggml."): v for k, v in metadata.items() if k[:3] == "tok"}


def byte_level(name, documents, size=600):
    """Trains a byte-level BPE tokenizer of this kind."""
    known = PRE_TOKENIZERS[name]
    state = json.loads(Tokenizer(models.BPE()).to_str())
    state |= {"pre_tokenizer": known.pre_tokenizer, "normalizer": known.normalizer}
    state["model"]["ignore_merges"] = known.ignore_merges
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.add_tokens([AddedToken("<tool> é", normalized=False)])
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


class TestSentencePiece:
    def test_equals_the_model(self, tokenizer_folder, tmp_path):
        tokenizer, reference = (
            load_tokenizer(tokenizer_folder),
            load_sentencepiece(tokenizer_folder / "tokenizer.model"),
        )
        metadata = write(tokenizer, tmp_path / "a.gguf")
        pieces = range(reference.get_piece_size())
        assert metadata["tokens"] == [reference.id_to_piece(i) for i in pieces]
        assert metadata["scores"] == [reference.get_score(i) for i in pieces]
        assert [i for i in pieces if metadata["token_type"][i] == BYTE] == [i for i in pieces if reference.is_byte(i)]
        assert metadata["token_type"][:3] == [UNKNOWN, CONTROL, CONTROL] and metadata["token_type"][-1] == NORMAL
        said = {k: metadata[k] for k in metadata if k.startswith(("add_", "model")) or k.endswith("_id")}
        assert said == {
            "model": "llama",
            "add_space_prefix": True,
            "add_bos_token": True,
            "add_eos_token": False,
            "unknown_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "padding_token_id": 0,
        }
        assert tokenizer_fingerprint(load_tokenizer(tmp_path / "a.gguf")) == tokenizer_fingerprint(tokenizer)

    @pytest.mark.parametrize("source", ["ours", "stories260K"])
    def test_scores_from_merges(self, tokenizer_folder, request, tmp_path, source):
        """Without `tokenizer.model`, the scores reproduce the merges in order, also on a second round trip."""
        folder = tokenizer_folder
        if source != "ours":
            folder = request.getfixturevalue("shared") / "data/models/stories260K"
        exact = load_tokenizer(folder / "tokenizer.model")
        exact.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
        assert tokenizer.sentencepiece_model is None
        first = write(tokenizer, tmp_path / "a.gguf")
        loaded = load_tokenizer(tmp_path / "a.gguf")
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(exact)
        loaded.save_pretrained(tmp_path / "again")
        assert write(load_tokenizer(tmp_path / "again"), tmp_path / "b.gguf") == first

    def test_merges_that_are_no_scores(self):
        merges = merges_by_score({"a": 0, "b": 0, "ab": -1, "abab": -3, "ba": -2})
        assert merges_by_score(derive_scores(merges, ["a", "b"])) == merges
        free = merges_by_score({"a": 0, "aa": -1, "aaa": -2})
        assert free == [("a", "a"), ("aa", "a"), ("a", "aa")]
        assert derive_scores(free[:1] + free[:0:-1], "a") == derive_scores(free, "a")  # transformers' order in a piece
        for wrong in (free[1:], [free[1], free[0], free[2]]):
            with pytest.raises(InputError, match=r"Add the tokenizer\.model"):
                derive_scores(wrong, ["a", "aa", "aaa"])

    def test_added_tokens_and_rows_without_token(self, tokenizer_folder, tmp_path):
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.add_tokens([AddedToken("<tool> é", normalized=False)])
        tokenizer.add_eos_token = True
        metadata = write(tokenizer, tmp_path / "a.gguf", rows=517)
        assert metadata["tokens"][511:] == [tokenizer.convert_ids_to_tokens(511), "<|im_start|>", "<tool> é",
                                            "[PAD514]", "[PAD515]", "[PAD516]"]  # fmt: skip
        assert metadata["token_type"][512:] == [CONTROL, USER_DEFINED, UNUSED, UNUSED, UNUSED]
        assert set(metadata["scores"][512:]) == {-1000.0}
        loaded = load_tokenizer(tmp_path / "a.gguf")
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer) and len(loaded) == 514
        for text in [*TEXTS, "a<|im_start|> b <tool> é"]:
            assert loaded(text).input_ids == tokenizer(text).input_ids


class TestByteLevel:
    @pytest.mark.parametrize("name", PRE_TOKENIZERS)
    def test_there_and_back(self, documents, tmp_path, name):
        tokenizer = byte_level(name, documents[:20])
        rows = len(tokenizer) + 2
        first = write(tokenizer, tmp_path / "a.gguf", rows)
        assert (first["model"], first["pre"], first["add_space_prefix"]) == ("gpt2", name, False)
        assert first["token_type"][0] == CONTROL and first["token_type"][-4:] == [
            CONTROL,
            USER_DEFINED,
            UNUSED,
            UNUSED,
        ]
        loaded = load_tokenizer(tmp_path / "a.gguf")
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        assert loaded.chat_template == "{{ messages }}"
        for text in [*TEXTS, "x <tool> é<|end|> y"]:
            assert loaded(text).input_ids == tokenizer(text).input_ids
            assert encode_text(loaded, text) == encode_text(tokenizer, text)
        loaded.save_pretrained(tmp_path / "again")
        assert write(load_tokenizer(tmp_path / "again"), tmp_path / "b.gguf", rows) == first

    def test_separators(self, documents, tmp_path):
        tokenizer = byte_level("gpt-2", documents[:1], size=300)
        tokenizer.add_bos_token, tokenizer.add_eos_token = True, True
        metadata = write(tokenizer, tmp_path / "a.gguf")
        assert metadata["add_bos_token"] and metadata["add_eos_token"]
        assert load_tokenizer(tmp_path / "a.gguf")("a b").input_ids == tokenizer("a b").input_ids

    @pytest.mark.slow
    def test_smollm2_is_written_as_llama_cpp_wrote_it(self, smollm2, tmp_path):
        path = smollm2.parent / SMOLLM2_GGUF
        original = {
            k.removeprefix("tokenizer.").removeprefix("ggml."): v for k, v in read_header(path).metadata.items()
        }
        loaded = load_tokenizer(path)
        loaded.save_pretrained(tmp_path)
        metadata = write(load_tokenizer(tmp_path), tmp_path / "a.gguf")
        assert metadata == {k: original.get(k, False) for k in metadata}  # add_eos_token is not in it

    @pytest.mark.slow
    def test_smollm2_as_its_own_tokenizer(self, smollm2):
        """The ids are those of `tokenizer.json`. transformers splits white space before a number like GPT-2; if this
        fails, its table contains smollm, and it could read byte-level vocabularies."""
        path = smollm2.parent / SMOLLM2_GGUF
        loaded = load_tokenizer(path)
        assert loaded("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]
        assert loaded("  multiple   spaces").input_ids == [216, 2701, 256, 5600]
        stock = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert loaded.tokenize("a\n\n1") == ["a", "ĊĊ", "1"] and stock.tokenize("a\n\n1") == ["a", "Ċ", "Ċ", "1"]


class TestRefusals:
    def test_an_unknown_pre_tokeniser_is_shown(self, documents, tmp_path):
        tokenizer = byte_level("gpt-2", documents[:1], size=300)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        with pytest.raises(InputError, match=r'"add_prefix_space": true.*gpt-2, smollm, llama-bpe, qwen2'):
            write(tokenizer, tmp_path / "a.gguf")
        tokenizer = byte_level("qwen2", documents[:1], size=300)
        tokenizer.backend_tokenizer.normalizer = None
        with pytest.raises(InputError, match='"normalizer": null'):
            write(tokenizer, tmp_path / "a.gguf")

    def test_what_gguf_cannot_say(self, documents, tokenizer_folder, tmp_path):
        tokenizer = byte_level("gpt-2", documents[:1], size=300)
        tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
        with pytest.raises(InputError, match=r"'<x>' has lstrip set"):
            write(tokenizer, tmp_path / "a.gguf")
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.add_tokens([AddedToken("<x>", normalized=True)])
        with pytest.raises(InputError, match=r"'<x>' is matched in normalized text"):
            write(tokenizer, tmp_path / "a.gguf")
        tokenizer = byte_level("gpt-2", documents[:1], size=300)
        tokenizer.backend_tokenizer.model.dropout = 0.1
        with pytest.raises(InputError, match=r"dropout 0\.1"):
            write(tokenizer, tmp_path / "a.gguf")

    GOOD = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "<e>"],
        "merges": ["a b"],
        "token_type": [1, 1, 1, 3],
        "eos_token_id": 3,
    }

    @pytest.mark.parametrize(
        "change, message",
        [
            ({}, None),
            ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
            ({"model": "none"}, "no tokenizer"),
            ({"model": 3}, "tokenizer.ggml.model is '3', not of type str"),
            ({"pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'; .* gpt-2, smollm, llama-bpe, qwen2"),
            ({"pre": None}, "tokenizer.ggml.pre is None"),
            ({"tokens": ["a", "b", "ab", "a"]}, "4 tokens .3 different"),
            ({"token_type": [1, 1, 1]}, "3 types"),
            ({"tokens": [1, 2]}, "tokens are not all of type str"),
            ({"merges": ["a c"]}, "the merge 'a c'"),
            ({"merges": ["a  b"]}, "the merge 'a  b'"),
            ({"eos_token_id": 4}, "eos_token_id is 4, but there are 4 tokens"),
            ({"model": "llama", "scores": [0.0] * 4, "add_space_prefix": False}, "add_space_prefix is false"),
        ],
    )
    def test_damaged_and_strange_files(self, tmp_path, change, message):
        writer = GGUFWriter(tmp_path / "a.gguf", "llama")
        for key, value in (self.GOOD | change).items():
            if value is not None:
                kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
                kinds[type(value)](f"tokenizer.ggml.{key}", value)
        finish(writer, tmp_path / "a.gguf")
        if message is None:
            assert load_tokenizer(tmp_path / "a.gguf")("abab<e>a").input_ids == [2, 2, 3, 0]
            return
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path / "a.gguf")
