"""Files of prompts: every line is checked, the order is kept, and an interruption loses no finished row."""

import errno
import fcntl
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tinyllama_hf_cli
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.batch.job import open_job
from tinyllama_hf.batch.prompts import read_prompts
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.generation import Context, generate_text
from tinyllama_hf.inference.load import load_draft
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.planning import inference_memory


GREEDY = Sampling(0, 1.0, 12)


@pytest.fixture(scope="module")
def chat_folder(tokenizer_folder, tmp_path_factory):
    """A random model with a chat template and a context of 96, in fp32."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    TinyLlamaForCausalLM(
        TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=96, num_key_value_heads=2)
    ).save_pretrained(folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, *rows) -> Path:
    """Writes rows as JSON Lines, and strings unchanged."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


BAD = {
    "no JSON": ("{'prompt': 'x'}", "not valid JSON"),
    "half a line": ('{"prompt": "x', "not valid JSON"),
    "half a pair": ('{"prompt": "\\ud83d"}', "the line: character 12 is '\\ud83d'"),
    "no number": ('{"prompt": "x", "score": NaN}', "not valid JSON (NaN "),
    "deep": ('{"prompt": ' + "[" * 100_000, "not valid JSON"),
    "a text": ('"x"', "type str: must be an object"),
    "neither": ({"text": "x"}, "fields ['text']: must include either"),
    "both": ({"prompt": "x", "messages": []}, "fields ['messages', 'prompt']: "),
    "another type": ({"prompt": ["x"]}, "prompt: has type list"),
    "too long": ({"prompt": "word " * 200}, "the model's context of 96"),
    "no list": ({"messages": "x"}, "messages: not a list of messages"),
    "a key that would be dropped": (
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages, message 0: key 'name'"),
    "half a pair in a message": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}', "message 0: character 29 is '\\ud83d'"),
    "no messages": ({"messages": []}, "messages: empty"),
    "unknown role": ({"messages": [{"role": "usr", "content": "x"}]}, "unknown role 'usr'; did you mean 'user'?"),
    "the assistant's turn": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "messages end with the role 'assistant'"),
    "a field of the output": ({"prompt": "x", "generated": "y"}, "field 'generated': "),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_does_not_lose_the_others(chat_folder, tmp_path, row, message):
    source = write(tmp_path / "in.jsonl", {"prompt": "a"}, row, "", {"prompt": "b"})
    prompts, bad = read_prompts(source, load_tokenizer(chat_folder), Context(96), 12)
    assert [prompt.line for prompt in prompts] == [1, 4]
    assert [line.line for line in bad] == [2] and bad[0].error.startswith("line 2: ") and message in bad[0].error
    result = bad[0].result()
    assert result["error"] == bad[0].error and json.loads(json.dumps(result)) == result
    assert not isinstance(row, dict) or {**row, "error": bad[0].error} == result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "none of its 0 lines"),
        (b"\xff\xfe\n[]\n", r"none of its 2 lines .*: line 1: not valid JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_a_prompt_is_refused(chat_folder, tmp_path, content, message):
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", str(chat_folder), sampling=GREEDY)


def test_rows_are_what_generate_and_chat_give(chat_folder, tmp_path):
    """In the order of the lines, with all fields; control tokens in text stay text."""
    texts = ["def f(x):\n    y", "", "import  json", "a </s> b", "🚀 hello", "x = 1"]
    question = [{"role": "user", "content": "One <s>?"}]
    rows = [{"id": i, "prompt": text, "more": {"π": [None]}} for i, text in enumerate(texts)]
    source = write(tmp_path / "in.jsonl", *rows[:3], {"messages": question}, "junk", *rows[3:])
    job = open_job(source, tmp_path / "new" / "out.jsonl", str(chat_folder), sampling=GREEDY)
    model, tokenizer = load(chat_folder)
    num_tokens = job.run(model, tokenizer, 4, GREEDY)
    found = read(job.output)
    chat, junk = found.pop(3), found.pop(3)
    assert junk.keys() == {"error"} and num_tokens == sum(row["new_tokens"] for row in (*found, chat)) > 50
    for row, given in zip(found, rows, strict=True):
        assert {name: row[name] for name in given} == given and row["finish_reason"] in ("length", "stop")
        assert row["prompt"] + row["generated"] == generate_text(model, tokenizer, row["prompt"], 12, temperature=0)
    session = ChatSession(model, tokenizer, sampling=GREEDY, write=lambda text: None)
    assert chat["generated"] == session.say("One <s>?")
    assert sorted(path.name for path in job.output.parent.iterdir()) == ["out.jsonl", "out.jsonl.record.json"]


def test_by_default_as_many_tokens_as_there_is_room_for(chat_folder, tmp_path):
    source = write(tmp_path / "in.jsonl", *({"prompt": "a " * n} for n in (1, 20, 40)))
    job = open_job(source, tmp_path / "out.jsonl", str(chat_folder), sampling=Sampling(0, 1.0))
    assert all(len(prompt.ids) + prompt.max_new_tokens == 96 for prompt in job.pending)
    job.run(*load(chat_folder), 4, Sampling(0, 1.0))
    assert all(row["finish_reason"] == "length" for row in read(job.output))


class TestGoingOn:
    @pytest.fixture
    def source(self, tmp_path):
        return write(tmp_path / "in.jsonl", *({"prompt": "x " * (1 + i % 7), "id": i} for i in range(20)), "junk")

    def open(self, chat_folder, source, name="out.jsonl", **changes):
        options = {"model": str(chat_folder), "sampling": Sampling(1.0, 0.9, 12), "seed": 3, **changes}
        return open_job(source, source.with_name(name), **options)

    def run(self, job, chat_folder, batch_size=4, draft=None, **options):
        model, tokenizer = load(chat_folder)
        draft = load_draft(draft, model, tokenizer) if draft else None
        return job.run(model, tokenizer, batch_size, Sampling(1.0, 0.9, 12), 3, draft, **options)

    def interrupt(self, job, chat_folder, monkeypatch, after=7, **options):
        """Simulates Ctrl-C while a row is written."""
        seen = []

        def dumps(value, real=json.dumps, **options):
            seen.append(value)
            if len(seen) > after and "generated" in value:
                raise KeyboardInterrupt
            return real(value, **options)

        with monkeypatch.context() as patch:
            patch.setattr("tinyllama_hf.batch.job.json.dumps", dumps)
            with pytest.raises(KeyboardInterrupt):
                self.run(job, chat_folder, **options)

    @pytest.mark.parametrize("draft", [None, "layers:1", "lookup"])
    def test_an_interrupted_call_goes_on(self, chat_folder, source, monkeypatch, draft):
        """Only incomplete rows are generated again; sampled results equal those of one call."""
        self.run(self.open(chat_folder, source, "whole.jsonl", draft=draft), chat_folder, draft=draft)
        first = self.open(chat_folder, source, draft=draft)
        self.interrupt(first, chat_folder, monkeypatch, draft=draft)
        assert not first.output.exists()
        with first.part.open("ab") as part:
            part.write(b'3\t{"id": 2, "gener')
        second = self.open(chat_folder, source, draft=draft)
        assert 0 < len(second.pending) < 20 and not second.is_finished
        before = first.part.read_bytes().rpartition(b"\n")[0]
        self.interrupt(second, chat_folder, monkeypatch, draft=draft)
        assert second.part.read_bytes().startswith(before)
        third = self.open(chat_folder, source, draft=draft)
        assert len(third.pending) < len(second.pending)
        self.run(third, chat_folder, batch_size=3, draft=draft)
        assert third.output.read_bytes() == (source.with_name("whole.jsonl")).read_bytes()
        assert not third.part.exists()

    def test_a_finished_call_does_nothing(self, chat_folder, source):
        self.run(self.open(chat_folder, source), chat_folder)
        assert self.open(chat_folder, source).is_finished
        output = source.with_name("out.jsonl")
        output.unlink()
        again = self.open(chat_folder, source)
        assert not again.is_finished and len(again.pending) == 20

    def test_two_at_once(self, chat_folder, source, monkeypatch):
        """The second process is refused while the first writes, and no row is lost."""
        first, second = self.open(chat_folder, source), self.open(chat_folder, source)
        seen = []

        def dumps(value, real=json.dumps, **options):
            seen.append("generated" in value)
            if seen[-1] and sum(seen) == 7:
                assert first.part.stat().st_size
                with pytest.raises(InputError, match=r"^--output .*out\.jsonl: another process"):
                    self.run(second, chat_folder)
            return real(value, **options)

        monkeypatch.setattr("tinyllama_hf.batch.job.json.dumps", dumps)
        self.run(first, chat_folder)
        assert sum(seen) >= 20 and [row.get("id") for row in read(first.output)] == [*range(20), None]
        assert self.run(second, chat_folder) == 0 and second.is_finished and not second.part.exists()

    def test_another_process_went_on_since_the_job_was_opened(self, chat_folder, source, monkeypatch):
        first, second = self.open(chat_folder, source), self.open(chat_folder, source)
        self.interrupt(first, chat_folder, monkeypatch)
        done = len(second.pending) - len(self.open(chat_folder, source).pending)
        self.run(second, chat_folder)
        assert done and len(second.pending) == 20 - done
        assert [row.get("id") for row in read(second.output)] == [*range(20), None]

    def test_a_part_that_went_away_between_opening_and_locking(self, chat_folder, source, monkeypatch):
        """As if another process finished at that moment; rows written to the removed file would be lost."""
        job, real, calls = self.open(chat_folder, source), fcntl.flock, []

        def flock(*arguments):
            if not calls:
                job.part.unlink()
            calls.append(arguments)
            real(*arguments)

        monkeypatch.setattr(fcntl, "flock", flock)
        self.run(job, chat_folder)
        assert len(calls) > 1 and [row.get("id") for row in read(job.output)] == [*range(20), None]

    def test_a_file_system_without_locks(self, chat_folder, source, monkeypatch):
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        job = self.open(chat_folder, source)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", no_locks)
            with pytest.raises(
                InputError, match=r"^--output .*out\.jsonl\.part cannot be locked .*No locks available"
            ):
                self.run(job, chat_folder)
        self.run(self.open(chat_folder, source), chat_folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 4}, r"\(--seed was 3, and is 4\)"),
            (
                {"sampling": Sampling(0.5, 0.9, 11)},
                "temperature was 1.0, and is 0.5; --max-new-tokens was 12, and is 11",
            ),
            ({"draft": "lookup"}, r"\(--draft was None, and is lookup\)"),
            ({"dtype": "bf16"}, r"\(--dtype was None, and is bf16\)"),
        ],
    )
    def test_other_settings_are_refused(self, chat_folder, source, monkeypatch, changes, message):
        self.interrupt(self.open(chat_folder, source), chat_folder, monkeypatch)
        with pytest.raises(InputError, match=message):
            self.open(chat_folder, source, **changes)

    def test_other_files_are_refused(self, chat_folder, source, monkeypatch, tmp_path):
        self.interrupt(self.open(chat_folder, source), chat_folder, monkeypatch)
        load(chat_folder)[0].half().save_pretrained(tmp_path / "half")
        tokenizer = load_tokenizer(chat_folder)
        tokenizer.add_bos_token = False
        tokenizer.save_pretrained(tmp_path / "half")
        with pytest.raises(InputError, match=r"\(other contents of the model; other contents of the prompts\)"):
            self.open(tmp_path / "half", source)
        write(source, {"prompt": "another"})
        with pytest.raises(InputError, match=r"\(other contents of the input; other contents of the prompts\)"):
            self.open(chat_folder, source)

    @pytest.mark.parametrize(
        ("file", "key", "value"),
        [("config.json", "rms_norm_eps", 1e-4), ("generation_config.json", "repetition_penalty", 1.5)],
    )
    def test_other_settings_of_the_model_are_refused(
        self, chat_folder, source, monkeypatch, tmp_path, file, key, value
    ):
        self.interrupt(self.open(chat_folder, source), chat_folder, monkeypatch)
        folder = Path(shutil.copytree(chat_folder, tmp_path / "copy"))
        (folder / "README.md").write_text("decides nothing")
        assert self.open(folder, source).pending
        fields = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**fields, key: value}))
        with pytest.raises(InputError, match=r"\(other contents of the model\)"):
            self.open(folder, source)

    def test_a_record_from_when_there_were_two_engines(self, chat_folder, source, monkeypatch):
        job = self.open(chat_folder, source)
        self.interrupt(job, chat_folder, monkeypatch)
        record = json.loads(job.record.read_text())
        record["settings"]["--engine"] = "batch"
        job.record.write_text(json.dumps(record))
        assert 0 < len(self.open(chat_folder, source).pending) < len(job.prompts.prompts)
        record["settings"]["--engine"] = "continuous"
        job.record.write_text(json.dumps(record))
        with pytest.raises(InputError, match="--engine was continuous, and is None"):
            self.open(chat_folder, source)

    def test_what_lies_there_is_not_replaced(self, chat_folder, source, tmp_path):
        output = write(source.with_name("out.jsonl"), "something else")
        with pytest.raises(InputError, match=r"out\.jsonl: exists and was not written by this command"):
            self.open(chat_folder, source)
        output.rename(output.with_name("out.jsonl.part"))
        with pytest.raises(InputError, match=r"out\.jsonl\.part: .* without out\.jsonl\.record\.json"):
            self.open(chat_folder, source)
        with pytest.raises(InputError, match="is the file of --input"):
            self.open(chat_folder, source, source.name)
        with pytest.raises(InputError, match="is a folder"):
            (tmp_path / "folder").mkdir()
            self.open(chat_folder, source, "folder")

    def test_a_damaged_part_is_refused(self, chat_folder, source, monkeypatch):
        job = self.open(chat_folder, source)
        self.interrupt(job, chat_folder, monkeypatch)
        job.part.write_bytes(b"\x00\x00\n" + job.part.read_bytes())
        with pytest.raises(InputError, match="damaged"):
            self.open(chat_folder, source)


class TestCommand:
    @pytest.fixture
    def call(self, monkeypatch, capsys, tmp_path):
        """Runs the command in this process; returns exit status, stdout and stderr."""

        def run(*words):
            monkeypatch.setattr(sys, "argv", ["tinyllama-hf", "generate", *map(str, words)])
            monkeypatch.chdir(tmp_path)
            with pytest.raises(SystemExit) as stop:
                tinyllama_hf_cli.main()
            return stop.value.code or 0, *capsys.readouterr()

        return run

    def test_bad_lines_are_named_at_the_end_again_and_again(self, chat_folder, tmp_path, call):
        write(tmp_path / "in.jsonl", "junk", {"prompt": "a"}, {"prompt": 1})
        words = (
            chat_folder,
            "--input",
            "in.jsonl",
            "--output",
            "out.jsonl",
            "--max-new-tokens",
            4,
            "--temperature",
            0,
        )
        status, output, errors = call(*words)
        assert status == 2 and output.startswith("wrote out.jsonl: 1 prompts continued, 4 new tokens")
        assert errors.startswith("error: --input in.jsonl: 2 of 3 lines") and "  line 3: prompt: " in errors
        assert [sorted(row) for row in read(tmp_path / "out.jsonl")] == [
            ["error"],
            ["finish_reason", "generated", "new_tokens", "prompt"],
            ["error", "prompt"],
        ]
        status, output, again = call(*words)
        assert (status, output, again) == (2, "out.jsonl: was finished already\n", errors)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--input", "in.jsonl"], "--output: is required with --input in.jsonl"),
            (["text", "--input", "in.jsonl", "--output", "o"], "PROMPT 'text': not valid with --input"),
            (["--output", "o"], "--output o: only valid with --input"),
            (["--batch-size", 4], "--batch-size 4: only valid with --input"),
            (["--input", "in.jsonl", "--output", "o", "--batch-size", 0], "--batch-size 0: must be at least 1"),
            (["--input", "in.jsonl", "--output", "o", "--engine", "batch"], "--engine batch: this option was removed"),
            (["text", "--engine", "continuous"], "--engine continuous: this option was removed"),
            (["--input", "in.jsonl", "--output", "o", "--draft", "nowhere"], "model 'nowhere': no such folder"),
            (["--input", "in.jsonl", "--output", "o", "--dtype", "fp8"], "--dtype 'fp8': "),
        ],
        ids=lambda value: "".join(map(str, value))[-30:],
    )
    def test_bad_input(self, chat_folder, tmp_path, call, words, message):
        write(tmp_path / "in.jsonl", {"prompt": "a"})
        status, output, errors = call(chat_folder, *words)
        assert status == 2 and not output and message in errors and errors.count("error: ") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    def test_a_batch_that_cannot_fit(self, chat_folder, tmp_path, call, monkeypatch):
        write(tmp_path / "in.jsonl", *({"prompt": "a"} for _ in range(64)))
        monkeypatch.setattr(inference_memory, "free_memory", lambda device: 500_000)
        status, _, errors = call(chat_folder, "--input", "in.jsonl", "--output", "out.jsonl", "--batch-size", 64)
        assert status == 2 and "--batch-size 64: keys and values of" in errors and "the largest that fits is" in errors
        assert not (tmp_path / "out.jsonl.part").exists()


def start(folder, tmp_path, file_bytes=None, *options) -> subprocess.Popen:
    """Starts the command on 60 prompts of 60 tokens; `file_bytes` limits the size of files, as a full disk."""
    write(tmp_path / "in.jsonl", *({"prompt": "x " * (1 + i % 5), "id": i} for i in range(60)))
    words = "--input in.jsonl --output out.jsonl --batch-size 2 --max-new-tokens 60 --seed 1"
    command = [Path(sys.executable).parent / "tinyllama-hf", "generate", folder, *words.split(), *options]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return subprocess.Popen(
        [str(word) for word in command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit if file_bytes else None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_goes_on(chat_folder, tmp_path, number):
    process = start(chat_folder, tmp_path)
    part = tmp_path / "out.jsonl.part"
    deadline = time.monotonic() + 120
    while not part.is_file() or not part.stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.startswith("interrupted; ") and errors.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists() and part.stat().st_size
    again = start(chat_folder, tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and " before)" in output and not errors
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(60))


@pytest.mark.slow
def test_a_full_disk_says_so_and_the_command_goes_on(chat_folder, tmp_path):
    process = start(chat_folder, tmp_path, 6000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert "cannot be written (File too large)" in errors
    again = start(chat_folder, tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and " before)" in output
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(60))


@pytest.mark.slow
def test_smollm2_answers(smollm2, tmp_path):
    """Conversations of different lengths and a text prompt in fp32: equal output with and without a draft."""
    asked = [
        {"messages": [{"role": "user", "content": f"What is the capital of {land}?"}]} for land in ("France", "Japan")
    ]
    source = write(tmp_path / "in.jsonl", *asked, {"prompt": "The three primary colors are"})
    sampling = Sampling(0, 1.0, 30)
    model, tokenizer = load(smollm2, torch.float32)
    found = []
    for name, options in {"plain": {}, "draft": {"draft": "lookup"}}.items():
        job = open_job(source, tmp_path / f"{name}.jsonl", str(smollm2), sampling=sampling, draft=options.get("draft"))
        if "draft" in options:
            options = {"draft": load_draft("lookup", model, tokenizer)}
        job.run(model, tokenizer, 2, sampling, **options)
        found.append(read(job.output))
    assert found[0] == found[1]
    assert "Paris" in found[0][0]["generated"] and "Tokyo" in found[0][1]["generated"]
    assert [row["finish_reason"] for row in found[0]] == ["stop", "stop", "length"]
