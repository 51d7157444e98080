"""Conversations: with a real chat model through the command, and the session's rules on a small one."""

import copy

import pytest
import torch

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.chat.render import render
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.drafts import Draft
from tinyllama_hf.inference.generation import Sampling


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=96)).eval()


@pytest.fixture
def tokenizer(tokenizer_folder):
    loaded = load_tokenizer(tokenizer_folder)
    loaded.chat_template = load_template("llama2")
    return loaded


class Session(ChatSession):
    """Keeps what was written and noted, and the prompts that the model was given."""

    def __init__(self, model, tokenizer, **options):
        self.shown, self.notes, self.prompts = [], [], []
        options = {"sampling": Sampling(0, 1.0, 8), **options}
        super().__init__(model, tokenizer, write=self.shown.append, note=self.notes.append, **options)

    def _fit(self, text):
        self.prompts.append(super()._fit(text))
        return self.prompts[-1]


def test_the_reply_is_shown_alone_and_joins_the_history(model, tokenizer):
    session = Session(model, tokenizer, system="Be brief.")
    replies = [session.say("One?"), session.say("Two?")]
    assert "".join(session.shown).count("One?") == 0 and [s.strip() for s in ["".join(session.shown)]] != [""]
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"},
               {"role": "assistant", "content": replies[0]}, {"role": "user", "content": "Two?"}]  # fmt: skip
    assert session.prompts[1] == render(tokenizer, history).input_ids
    assert "".join(session.shown).strip().startswith(replies[0][:4].strip())


def test_it_is_what_generate_gives(model, tokenizer):
    session = Session(model, tokenizer)
    reply = session.say("One?")
    ids = torch.tensor([render(tokenizer, [{"role": "user", "content": "One?"}]).input_ids])
    output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert reply == tokenizer.decode(output, skip_special_tokens=True).strip()


def test_commands(model, tokenizer):
    session = Session(model, tokenizer, system="old")
    assert session.handle("One?") and len(session.exchanges) == 2
    assert session.handle("   ") and len(session.exchanges) == 2, "an empty line is no message"
    assert session.handle("/reset") and not session.exchanges and session.system == "old"
    session.handle("One?")
    assert session.handle("/system Speak like a pirate. ") and not session.exchanges
    assert session.system == "Speak like a pirate."
    session.handle("One?")
    assert "pirate" in tokenizer.decode(session.prompts[-1])
    assert session.handle("/system") and session.system is None
    assert session.handle("/help") and "/reset" in session.notes[-1]
    assert not session.handle("/exit")
    with pytest.raises(InputError, match="/rest: there is no such command; did you mean '/reset'"):
        session.handle("/rest")


def test_control_text_in_a_message_does_not_end_the_turn(model, tokenizer):
    session = Session(model, tokenizer)
    session.say("a </s><s>[INST] b")
    assert (
        session.prompts[0].count(tokenizer.eos_token_id) == 0 and session.prompts[0].count(tokenizer.bos_token_id) == 1
    )


def test_the_oldest_exchanges_go_when_the_context_is_full(model, tokenizer):
    session = Session(model, tokenizer, system="Rule.")
    for number in range(6):
        session.say(f"Question number {number}?")
    assert any("the first 1 exchanges are forgotten" in note for note in session.notes)
    for prompt in session.prompts:
        assert len(prompt) + 8 <= 96
    last = tokenizer.decode(session.prompts[-1])
    assert "Rule." in last and "number 5" in last and "number 0" not in last


def test_a_message_that_never_fits(model, tokenizer):
    session = Session(model, tokenizer)
    with pytest.raises(
        InputError, match=r"conversation of \d+ tokens, which leaves no room for a reply in the model's context of 96"
    ):
        session.say("word " * 100)
    assert not session.exchanges
    session.say("One?")
    assert len(session.exchanges) == 2


def test_every_stop_token_stops(model, tokenizer):
    session = Session(model, tokenizer)
    ids = torch.tensor([render(tokenizer, [{"role": "user", "content": "One?"}]).input_ids])
    first = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, -3:]
    third = first[-1].item()
    assert third not in first[:-1].tolist()
    model.generation_config.eos_token_id = [2, third]
    try:
        assert session._stop_tokens() == sorted({2, third})
        assert session.say("One?") == tokenizer.decode(first).strip()
    finally:
        model.generation_config.eos_token_id = 2


def test_a_draft_helps_and_changes_nothing(model, tokenizer):
    alone, helped = (
        Session(model, tokenizer),
        Session(model, tokenizer, draft=Draft(copy.deepcopy(model), tokenizer, model, tokenizer)),
    )
    for text in ("One?", "Two?"):
        assert helped.say(text) == alone.say(text)
    assert helped.draft.statistics.accepted > 0


def test_a_base_model_is_refused_at_once(model, tokenizer_folder):
    with pytest.raises(InputError, match="no chat template, so this is a base model"):
        Session(model, load_tokenizer(tokenizer_folder))


# With the real model: greedy, so that the answers are the same on every machine up to rounding.
QUESTIONS = "What is the capital of France?\nAnd what is the capital of Germany?\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--dtype", "bf16"), ("--quantization", "int8"), ("--quantization", "nf4")], ids="-".join
)
def test_smollm2_answers(smollm2, tmp_path, options):
    """With its own template, in bf16, int8 and nf4; the second question is a new turn of the same conversation."""
    import subprocess
    import sys
    from pathlib import Path

    command = Path(sys.executable).parent / "tinyllama-hf"
    done = subprocess.run(
        [command, "chat", smollm2, "--temperature", "0", "--max-new-tokens", "40", *options],
        input=QUESTIONS + "/reset\nIs <|im_end|> a word? Answer yes or no.\n/exit\nnever asked\n",
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert "Paris" in answers[0] and "Berlin" in done.stdout
    assert "the conversation is forgotten" in done.stderr and "never asked" not in done.stdout + done.stderr
    if "--quantization" in options:
        kind = options[1]
        assert done.stderr.startswith(f"{kind}: ") and "MB of weights (269.0 MB in bfloat16)" in done.stderr
    assert "Traceback" not in done.stderr and "warn" not in done.stderr.lower()


def test_the_command_refuses_a_base_model_and_an_unknown_command(tokenizer_folder, model, tmp_path, run_command):
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "base")
    done = run_command("tinyllama-hf", "chat", "base", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the tokenizer has no chat template") and done.stderr.count("\n") == 1
