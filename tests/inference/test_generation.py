"""Generation from a real checkpoint, and exact streaming."""

import random

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, TextStreamer

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.generation import ExactTextStreamer, generate_text


STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def stories(shared):
    return load(shared / "data" / "models" / "stories260K")


@pytest.fixture(scope="module")
def random_model(tokenizer_folder):
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64)).eval()
    model.generation_config.eos_token_id = None
    return model, load_tokenizer(tokenizer_folder)


def test_the_known_story(stories):
    assert generate_text(*stories, temperature=0, max_new_tokens=60).startswith(STORY)


@pytest.mark.slow
def test_the_command_tells_it(shared, run_command, tmp_path):
    folder = shared / "data" / "models" / "stories260K"
    done = run_command("tinyllama-hf", "generate", folder, "--temperature", "0", cwd=tmp_path)
    assert done.stdout.startswith(STORY), done.stderr
    assert "Traceback" not in done.stderr and "warning" not in done.stderr.lower()


def test_seed_decides(stories):
    texts = [generate_text(*stories, "Tom", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("Tom")


class Recorder:
    def __init__(self):
        self.pieces = []

    def __call__(self, text):
        self.pieces.append(text)


class TestStreaming:
    @pytest.mark.parametrize("seed", range(5))
    def test_shows_exactly_the_text(self, random_model, seed):
        """Random tokens: broken characters, line breaks, runs of spaces."""
        model, tokenizer = random_model
        recorder = Recorder()
        streamer = ExactTextStreamer(tokenizer, write=recorder)
        text = generate_text(
            model, tokenizer, "def f():\n", 50, temperature=2.0, top_p=1.0, seed=seed, streamer=streamer
        )
        assert "".join(recorder.pieces) == text
        assert len(recorder.pieces) > 10, "it must be shown as it appears"

    def test_indentation_after_a_line_break(self, tokenizer_folder):
        """The streamer of transformers loses a space there. If this test fails, `ExactTextStreamer` can go."""
        tokenizer = load_tokenizer(tokenizer_folder)
        text = "class A:\n    x = 1\n    y = 2\n"
        shown = {}
        for kind in (ExactTextStreamer, TextStreamer):
            recorder = Recorder()
            streamer = kind(tokenizer, write=recorder) if kind is ExactTextStreamer else kind(tokenizer)
            if kind is TextStreamer:
                streamer.on_finalized_text = lambda piece, stream_end=False, out=recorder: out(piece)
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                streamer.put(torch.tensor([token]))
            streamer.end()
            shown[kind] = "".join(recorder.pieces)
        assert shown[ExactTextStreamer] == text
        assert shown[TextStreamer] != text


WRITTEN = (
    "\U0001f680\U0001f469\u200d\U0001f4bb caf\u00e9 \u4e2d\u6587\u5b57\n\n    def f(x):\n\t"
    "return  x \ufffd\ufffd a</s>b  "
)


@pytest.fixture(scope="module", params=["llama", "byte-level"])
def vocabulary(request, tokenizer_folder, documents):
    """A tokenizer with byte tokens for rare characters, and a byte-level one."""
    if request.param == "llama":
        return load_tokenizer(tokenizer_folder)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [*documents[:3], WRITTEN], vocab_size=400, show_progress=False, special_tokens=["</s>"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="</s>")


class Counting:
    """A tokenizer that counts the decoded ids."""

    def __init__(self, tokenizer):
        self.tokenizer, self.num_decoded = tokenizer, 0

    def decode(self, ids, **options):
        self.num_decoded += len(ids)
        return self.tokenizer.decode(ids, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def kinds_of_ids(tokenizer, draw):
    """Text with characters of several tokens, and random ids: broken characters, control tokens, unknown ids."""
    written = tokenizer(WRITTEN * 3, add_special_tokens=False)["input_ids"]
    size = len(tokenizer)
    bytes_alone = [i for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(size))) if len(piece) in (1, 6)]
    rocket = tokenizer("\U0001f680", add_special_tokens=False)["input_ids"]
    spaces = tokenizer("  " * 9, add_special_tokens=False)["input_ids"]
    for _ in range(12):
        yield written[draw.randrange(len(written)) :]
        yield draw.choices(range(size + 3), k=60)
        yield draw.choices(bytes_alone, k=60)
        yield draw.choices([*bytes_alone, *written, tokenizer.eos_token_id], k=60)
        yield [tokenizer.eos_token_id, *spaces, *written]
    yield [i for byte in written[:20] + rocket * 3 for i in (byte, tokenizer.eos_token_id)]


class TestEveryText:
    """The streamed text equals the text of all tokens at once, and the work grows linearly."""

    @pytest.mark.parametrize("with_prompt", [False, True])
    def test_however_the_tokens_come(self, vocabulary, with_prompt):
        draw = random.Random(0)
        hidden = 5
        for ids in kinds_of_ids(vocabulary, draw):
            recorder = Recorder()
            streamer = ExactTextStreamer(vocabulary, recorder, skip_prompt=not with_prompt, hidden=[hidden])
            for _ in range(2):  # it is reusable after `end`
                recorder.pieces.clear()
                streamer.put(torch.tensor([ids[:20]]))
                position = 20
                while position < len(ids):
                    step = draw.choice([1, 1, 1, 2, 7])
                    streamer.put(torch.tensor(ids[position : position + step]))
                    position += step
                streamer.end()
                shown = [i for i in ids[0 if with_prompt else 20 :] if i != hidden]
                assert "".join(recorder.pieces) == vocabulary.decode(shown, skip_special_tokens=True), ids

    def test_each_token_is_shown_when_it_comes(self, vocabulary):
        """Except for text that the next token may change: an unfinished run of bytes, or the start of a character."""
        ids = vocabulary(WRITTEN.replace("\ufffd", "") * 2, add_special_tokens=False)["input_ids"]
        recorder = Recorder()
        streamer = ExactTextStreamer(vocabulary, recorder)
        for number, token in enumerate(ids, start=1):
            streamer.put(torch.tensor([token]))
            if not vocabulary.convert_ids_to_tokens(token).startswith("<0x"):
                text = vocabulary.decode(ids[:number], skip_special_tokens=True)
                assert "".join(recorder.pieces) == text.removesuffix("\ufffd")

    @pytest.mark.parametrize("kind", ["text", "line breaks", "broken characters", "control tokens"])
    def test_the_work_grows_with_the_text(self, vocabulary, kind):
        rocket = vocabulary("\U0001f680", add_special_tokens=False)["input_ids"]
        repeated = {
            "text": vocabulary(WRITTEN, add_special_tokens=False)["input_ids"],
            "line breaks": vocabulary("\n", add_special_tokens=False)["input_ids"][-1:],
            "broken characters": rocket[-1:],
            "control tokens": [vocabulary.eos_token_id],
        }[kind]
        counting = Counting(vocabulary)
        streamer = ExactTextStreamer(counting, write=lambda piece: None)
        length = 600
        for token in (repeated * length)[:length]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert counting.num_decoded <= 20 * length


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -1}, "--temperature -1"),
            ({"top_p": 0}, "--top-p 0"),
            ({"max_new_tokens": 0}, "--max-new-tokens 0"),
            ({"seed": -1}, "--seed -1"),
            ({"seed": 2**64}, "--seed 18446744073709551616"),
            ({"max_new_tokens": 100}, "exceed the model's context of 64"),
            ({"prompt": "word " * 200}, "exceed the model's context of 64"),
        ],
    )
    def test_values(self, random_model, options, message):
        with pytest.raises(InputError, match=message):
            generate_text(*random_model, **options)

    def test_default_length_fits_the_context(self, random_model):
        model, tokenizer = random_model
        streamer = ExactTextStreamer(tokenizer, write=lambda text: None)
        taken, put = [], streamer.put
        streamer.put = lambda ids: (taken.append(ids.numel()), put(ids))
        generate_text(model, tokenizer, "x", temperature=0, streamer=streamer)
        assert sum(taken) == 64

    def test_folders_and_devices(self, tmp_path):
        with pytest.raises(InputError, match="no such folder, and no released model; did you mean 'step-480k-1T'"):
            load("step-480k-1")
        with pytest.raises(InputError, match=r"holds no config\.json"):
            load(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        with pytest.raises(InputError, match="'gpt2' is not a Llama"):
            load(tmp_path)
        with pytest.raises(InputError, match="--device 'gpu'"):
            load(tmp_path, device="gpu")
        if not torch.cuda.is_available():
            with pytest.raises(InputError, match="no GPU"):
                load(tmp_path, device="cuda")
