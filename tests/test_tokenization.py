"""The tokenizer compared with SentencePiece, for Llama 2's vocabulary and for one trained here."""

import gzip
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tinyllama_hf import load_tokenizer
from tinyllama_hf.data.sources import open_sources, read_texts
from tinyllama_hf.data.train_tokenizer import train_tokenizer, verify_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.tokenization_tinyllama import encode_text, load_sentencepiece, tokenizer_fingerprint


@pytest.fixture(scope="module")
def llama2_file(shared) -> Path:
    return shared / "data" / "tokenizer" / "llama2" / "tokenizer.model"


@pytest.fixture(scope="module")
def llama2(llama2_file):
    return load_tokenizer(llama2_file)


def strange_texts(count: int = 400) -> list[str]:
    """Returns random strings of what tokenizers get wrong: runs of spaces, scripts, emoji, control tokens, tags."""
    draw = random.Random(0)
    parts = [
        " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "a", "the ", "def ", "()", "::",
        "0123456789", "ﬁ", "é", "ß", "Ω", "ж", "עברית", "العربية", "हिन्दी", "ไทย", "中文字", "日本語",
        "한국어", "🙂", "👨‍👩‍👧", "🏳️‍🌈", "\u0301", "\u200b", "\u00a0", "\ufeff", "\x00", "\x1b", "</s>",
        "<s>", "<unk>", "<0x0A>", "<|im_start|>", "[INST]", "\U0001d518", "\U000e0001",
    ]  # fmt: skip
    return ["".join(draw.choices(parts, k=draw.randint(1, 40))) for _ in range(count)]


class TestLlama2:
    def test_all_published_vectors(self, llama2, shared):
        lines = (shared / "data" / "tokenizer" / "llama2" / "vectors.jsonl").read_text(encoding="utf-8").splitlines()
        vectors = [json.loads(line) for line in lines if line]
        assert len(vectors) == 46
        for vector in vectors:
            assert encode_text(llama2, vector["text"]) == vector["ids_without_bos"], vector["text"]

    def test_as_llama_2_does(self, llama2):
        assert llama2("Hello").input_ids == [1, 15043]
        assert len(llama2) == 32000
        assert (llama2.pad_token, llama2.pad_token_id) == ("<unk>", 0)
        assert len(json.loads(llama2.backend_tokenizer.to_str())["model"]["merges"]) == 61_249

    def test_strange_texts(self, llama2, llama2_file):
        assert verify_tokenizer(llama2, llama2_file, strange_texts()).difference is None

    def test_very_long_input(self, llama2, llama2_file):
        text = "x" * 200_000 + " " * 50_000 + "\n" * 10_000 + "word " * 50_000
        assert verify_tokenizer(llama2, llama2_file, [text]).difference is None

    def test_a_file_of_every_corpus(self, llama2, llama2_file, shared):
        """The first documents of each file; the slow test below reads many."""
        for file in sorted((shared / "data" / "corpora").glob("*/validation.jsonl.gz")):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                texts = [json.loads(next(lines))["text"] for _ in range(2)]
            assert verify_tokenizer(llama2, llama2_file, texts).difference is None, file

    @pytest.mark.slow
    def test_every_fourth_document_of_every_corpus(self, llama2, llama2_file, shared):
        source = open_sources([str(shared / "data" / "corpora")])
        result = verify_tokenizer(llama2, llama2_file, itertools.islice(read_texts(source), 0, None, 4))
        assert result.difference is None, result
        assert result.characters > 15_000_000

    @pytest.mark.slow
    def test_the_standard_library(self, llama2, llama2_file):
        """Without its own tests, and without installed packages."""
        import sysconfig

        stdlib = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in sorted(stdlib.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*f.parts}]
        texts = []
        for file in files:
            try:
                texts.append(file.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue  # written in another encoding
        result = verify_tokenizer(llama2, llama2_file, texts)
        assert result.difference is None, result
        assert result.texts > 600

    def test_llama2_fixture_is_where_the_facts_say(self, llama2_file):
        import hashlib

        digest = hashlib.sha256(llama2_file.read_bytes()).hexdigest()
        assert digest == "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


@pytest.fixture(params=["llama2", "trained"])
def model_file(request, tokenizer_folder) -> Path:
    if request.param == "trained":
        return tokenizer_folder / "tokenizer.model"
    return request.getfixturevalue("llama2_file")


class TestFileForms:
    def test_saved_folder_is_stock(self, model_file, tmp_path):
        load_tokenizer(model_file).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.model").read_bytes() == model_file.read_bytes()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        stock = AutoTokenizer.from_pretrained(tmp_path)
        assert isinstance(stock, PreTrainedTokenizerFast) and "tinyllama" not in type(stock).__module__
        assert verify_tokenizer(stock, model_file, strange_texts()).difference is None
        assert stock("Hello").input_ids[0] == stock.bos_token_id
        assert (stock.pad_token, stock.pad_token_id) == ("<unk>", 0)

    @pytest.mark.parametrize("form", ["folder", "tokenizer.json", "folder without tokenizer.model", "gguf"])
    def test_every_form_gives_the_same_ids(self, model_file, tmp_path, form):
        original = load_tokenizer(model_file)
        original.save_pretrained(tmp_path)
        path = tmp_path
        if form == "tokenizer.json":
            path = tmp_path / "tokenizer.json"
        elif form == "folder without tokenizer.model":
            (tmp_path / "tokenizer.model").unlink()
        elif form == "gguf":
            path = write_gguf_vocabulary(model_file, tmp_path / "vocabulary.gguf")
        loaded = load_tokenizer(path)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(original)
        assert verify_tokenizer(loaded, model_file, strange_texts()).difference is None
        assert loaded("a").input_ids == original("a").input_ids

    def test_settings_survive(self, tokenizer_folder, tmp_path):
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.model_max_length = 77
        tokenizer.add_bos_token = False
        tokenizer.save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert (loaded.chat_template, loaded.model_max_length) == ("{{ messages }}", 77)
        assert (
            loaded("Hello").input_ids
            == tokenizer("Hello").input_ids
            == AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids
        )

    def test_tokens_added_behind_the_vocabulary_keep_their_ids(self, tokenizer_folder, tmp_path):
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [512, 513]
        assert loaded("<|im_start|>a").input_ids == tokenizer("<|im_start|>a").input_ids

    @pytest.mark.parametrize("home", ["added_tokens.json", "tokenizer_config.json"])
    def test_added_tokens_of_folders_without_tokenizer_json(self, tokenizer_folder, tmp_path, home):
        """As the slow tokenizers of transformers 4 wrote them."""
        shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
        added = {"<|im_start|>": 512, "<|im_end|>": 513}
        decoder = {str(i): {"content": name, "special": True} for name, i in added.items()}
        (tmp_path / home).write_text(
            json.dumps(added if home == "added_tokens.json" else {"added_tokens_decoder": decoder})
        )
        loaded = load_tokenizer(tmp_path)
        assert loaded.convert_tokens_to_ids(list(added)) == [512, 513]
        assert loaded("<|im_start|>").input_ids == [1, 512]

    @pytest.mark.parametrize(
        ("declared", "used"),
        [
            ("</s>", "<unk>"),
            ("<s>", "<unk>"),
            ("<no row>", "<unk>"),
            ("<pad>", "<pad>"),
            ({"content": "<pad>"}, "<pad>"),
        ],
        ids=str,
    )
    def test_padding_is_the_folders_unless_it_begins_or_ends_text(self, tokenizer_folder, tmp_path, declared, used):
        shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
        (tmp_path / "added_tokens.json").write_text('{"<pad>": 512}')
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": declared}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.pad_token == used and len(tokenizer) == 513
        tokenizer.save_pretrained(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").pad_token == used

    def test_begin_of_sequence_where_stock_llama_wrote_none(self, shared):
        """transformers 5.23 saved this folder with a post-processor that adds nothing, without being asked to."""
        folder = shared / "data" / "models" / "stories260K"
        assert "<s>" not in json.dumps(json.loads((folder / "tokenizer.json").read_text())["post_processor"])
        assert load_tokenizer(folder)("a").input_ids[0] == 1

    def test_two_tokenizers_in_one_folder_are_refused(self, tokenizer_folder, llama2, tmp_path):
        llama2.add_tokens(["<|im_start|>"])
        llama2.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
        with pytest.raises(InputError, match="different tokenizers"):
            load_tokenizer(tmp_path)

    def test_byte_level_vocabulary_is_left_to_stock(self, tmp_path):
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(["some text to learn from"] * 3, vocab_size=270)
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded("text").input_ids == AutoTokenizer.from_pretrained(tmp_path)("text").input_ids
        assert "ByteLevel" in loaded.backend_tokenizer.to_str()

    def test_real_folder(self, shared):
        folder = shared / "data" / "models" / "stories260K"
        result = verify_tokenizer(load_tokenizer(folder), folder / "tokenizer.model", strange_texts())
        assert result.difference is None


def write_gguf_vocabulary(model_file: Path, path: Path) -> Path:
    """Writes a GGUF file with only the vocabulary, as llama.cpp's converter does."""
    from gguf import GGUFWriter, TokenType

    processor = load_sentencepiece(model_file)
    pieces = range(processor.get_piece_size())
    kinds = [
        TokenType.UNKNOWN
        if processor.is_unknown(i)
        else TokenType.CONTROL
        if processor.is_control(i)
        else TokenType.BYTE
        if processor.is_byte(i)
        else TokenType.NORMAL
        for i in pieces
    ]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in pieces])
    writer.add_token_scores([processor.get_score(i) for i in pieces])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestControlTokens:
    """A literal `</s>` in text is text; for the saved stock tokenizer, called as stock, it is the control token."""

    def test_text(self, tokenizer_folder):
        tokenizer = load_tokenizer(tokenizer_folder)
        ids = encode_text(tokenizer, "a </s> b")
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == "a </s> b"
        assert ids == load_sentencepiece(tokenizer_folder / "tokenizer.model").encode("a </s> b")

    def test_stock_call(self, tokenizer_folder):
        assert AutoTokenizer.from_pretrained(tokenizer_folder)("a </s> b").input_ids.count(2) == 1


class TestLibraryBugs:
    """Why this module exists. If one of these fails, transformers was fixed and this module can shrink."""

    def test_stock_llama_tokenizer_merges_by_id(self, llama2_file, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(llama2_file.read_bytes())
        stock = LlamaTokenizer.from_pretrained(tmp_path)
        text = "fashion.  Many"
        assert encode_text(stock, text) != load_sentencepiece(llama2_file).encode(text)

    def test_stock_llama_tokenizer_adds_no_begin_of_sequence(self, llama2_file, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(llama2_file.read_bytes())
        assert LlamaTokenizer.from_pretrained(tmp_path)("Hello").input_ids[0] != 1


class TestTraining:
    def test_same_texts_same_tokenizer(self, documents, tokenizer_folder, tmp_path):
        again = train_tokenizer(documents, 512, tmp_path / "again")
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(load_tokenizer(tokenizer_folder))

    def test_kind_of_llama_2(self, tokenizer_folder):
        processor = load_sentencepiece(tokenizer_folder / "tokenizer.model")
        assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
        assert all(processor.is_byte(i) for i in range(3, 259))
        assert processor.encode("1234", out_type=str)[-4:] == ["1", "2", "3", "4"]
        assert processor.encode("a", out_type=str) == ["▁a"]

    def test_settings_of_llama_2_show_in_the_pieces(self, tmp_path):
        """Digits are never merged, runs of spaces may be pieces, and text is not normalized."""
        text = "1234 1234 2024\n        return ﬁne  ① １"
        trained = train_tokenizer([text] * 99, 290, tmp_path / "trained")
        pieces = [piece.strip("▁") for piece in trained.get_vocab() if not piece.startswith("<")]
        assert not [piece for piece in pieces if len(piece) > 1 and any(map(str.isdigit, piece))]
        assert {"▁▁▁▁", "▁return"} <= trained.get_vocab().keys()
        assert trained.decode(encode_text(trained, text)) == text
        assert "ﬁ" in "".join(pieces) and "①" in pieces

    def test_refusals(self, documents, tokenizer_folder, tmp_path):
        with pytest.raises(InputError, match="exists already"):
            train_tokenizer(documents, 512, tokenizer_folder)
        with pytest.raises(InputError, match="above 259"):
            train_tokenizer(documents, 200, tmp_path / "small")
        with pytest.raises(
            InputError, match=r"--vocab-size 280 is too small for the characters .* Use at least \d{3}"
        ):
            train_tokenizer(documents, 280, tmp_path / "small")
        with pytest.raises(InputError, match="too large for the texts"):
            train_tokenizer(["only this"], 5000, tmp_path / "large")
        assert not any(tmp_path.iterdir())

    def test_overwrite_replaces_tokenizers_and_nothing_else(self, documents, tokenizer_folder, tmp_path):
        shutil.copytree(tokenizer_folder, tmp_path / "model")
        train_tokenizer(documents, 400, tmp_path / "model", overwrite=True)
        assert len(load_tokenizer(tmp_path / "model")) == 400
        (tmp_path / "model" / "config.json").write_text("{}")
        with pytest.raises(InputError, match=r"exists already.*\(config\.json\)"):
            train_tokenizer(documents, 400, tmp_path / "model", overwrite=True)
        assert (tmp_path / "model" / "config.json").exists()


class TestVerify:
    def test_finds_the_first_difference(self, tokenizer_folder, shared):
        ours = load_tokenizer(tokenizer_folder)
        other = shared / "data" / "models" / "stories260K" / "tokenizer.model"
        result = verify_tokenizer(ours, other, ["", "Once upon a time"])
        assert result.difference.text_number == 2 and result.difference.kind == "ids"

    def test_finds_a_text_that_does_not_come_back(self, tokenizer_folder):
        tokenizer = load_tokenizer(tokenizer_folder)
        from tokenizers import decoders

        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        result = verify_tokenizer(tokenizer, tokenizer_folder / "tokenizer.model", ["two words"])
        assert result.difference.kind == "decode"


class TestRefusals:
    def test_unigram_model(self, tmp_path, documents):
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(documents).split("\n")),
            model_prefix=str(tmp_path / "unigram"),
            model_type="unigram",
            vocab_size=400,
            minloglevel=2,
        )
        with pytest.raises(InputError, match="not a BPE model"):
            load_tokenizer(tmp_path / "unigram.model")

    def test_things_that_are_no_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match=r"neither tokenizer.model nor tokenizer.json"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
        with pytest.raises(InputError, match=r"^SentencePiece model .*damaged or incomplete"):
            load_tokenizer(tmp_path)
        (tmp_path / "x.gguf").write_bytes(b"GGUFnonsense")
        with pytest.raises(InputError, match="damaged or incomplete"):
            load_tokenizer(tmp_path / "x.gguf")
        with pytest.raises(InputError, match="no such folder"):
            load_tokenizer("nowhere/at/all")
