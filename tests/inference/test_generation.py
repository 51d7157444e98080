"""Generation from a real trained checkpoint, and streaming that shows exactly what was generated."""

import pytest
import torch
from transformers import TextStreamer

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
        """transformers' own streamer loses a space there; when it no longer does, ours can go."""
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


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": -1}, "--temperature -1"),
            ({"top_p": 0}, "--top-p 0"),
            ({"max_new_tokens": 0}, "--max-new-tokens 0"),
            ({"max_new_tokens": 100}, "longer than the model's context of 64"),
            ({"prompt": "word " * 200}, "longer than the model's context of 64"),
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
        with pytest.raises(InputError, match="no device"):
            load(tmp_path, device="gpu")
        if not torch.cuda.is_available():
            with pytest.raises(InputError, match="no GPU"):
                load(tmp_path, device="cuda")
