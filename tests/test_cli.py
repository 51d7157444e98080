"""The commands: help without torch, examples that parse, and bad input that ends with one message and status 2."""

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import tinyllama_hf_cli
from tests.conftest import ROOT, run_here


def commands(group=None, path: tuple[str, ...] = ()):
    """(words, click command) of every command."""
    group = group or typer.main.get_command(tinyllama_hf_cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


class TestHelp:
    def test_without_torch_in_about_a_second(self, tmp_path):
        """Whether torch was imported is asserted; the time is measured in benchmarks/start_up.py."""
        code = (
            "import sys; sys.argv = ['tinyllama-hf', '--help']\n"
            "from tinyllama_hf_cli import main\n"
            "try: main()\n"
            "finally: print([m for m in ('torch', 'transformers', 'numpy', 'tinyllama_hf') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n")
        for words in COMMANDS:
            assert words[0] in done.stdout

    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_every_command_has_an_example_that_parses(self, words):
        """The example's options exist and its required arguments are there."""
        example = re.search(r"Example: tinyllama-hf (.+)", COMMANDS[words].help or "")
        assert example, f"{words} shows no example"
        import shlex

        given = shlex.split(example[1])
        assert tuple(given[: len(words)]) == words
        COMMANDS[words].make_context(" ".join(words), given[len(words) :])

    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_every_option_is_explained(self, words):
        assert all(getattr(parameter, "help", None) for parameter in COMMANDS[words].params)

    def test_the_installed_command(self, run_command, tmp_path):
        done = run_command("tinyllama-hf", "generate", "--help", cwd=tmp_path)
        assert done.returncode == 0 and "--temperature" in done.stdout and "Example:" in done.stdout

    def test_a_misspelt_command(self, run_command, tmp_path):
        done = run_command("tinyllama-hf", "generat", cwd=tmp_path)
        assert done.returncode == 2 and "Did you mean 'generate'" in done.stderr
        done = run_command("tinyllama-hf", "eval", "task", "model", cwd=tmp_path)
        assert done.returncode == 2 and "Did you mean 'tasks'" in done.stderr


@pytest.fixture
def call(tmp_path):
    """Runs a command in this process, in an empty folder; returns (exit status, standard error)."""

    def run(*words: str) -> tuple[int, str]:
        program = ROOT / "recipes" / words[0] if words[0].endswith(".py") else words[0]
        done = run_here(program, *words[1:], cwd=tmp_path)
        return done.returncode, done.stderr

    return run


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module")
def bad_files(tokenizer_folder, documents, tmp_path_factory) -> Path:
    """A folder with what the bad commands below name."""
    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
    from tinyllama_hf.data.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("bad")
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64))
    model.save_pretrained(folder / "model")
    load_tokenizer(tokenizer_folder).save_pretrained(folder / "model")
    train_tokenizer(documents, 400, folder / "other-tokenizer")
    (folder / "small.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    (folder / "late.jsonl").write_text('{"text": "a few words"}\n{"text": null}\n')
    (folder / "empty.txt").write_text("")
    (folder / "empty").mkdir()
    for name, messages in CONVERSATIONS.items():
        rows = [[*messages, {"role": "user", "content": f"And {i}?"}] for i in range(30)]  # enough to hold some out
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (folder / "plain.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    values = yaml.safe_load((ROOT / "recipes" / "sft" / "full.yaml").read_text())
    values |= {"output_dir": "out", "model": {"path": "model"}}
    values["data"]["max_length"] = 64
    (folder / "sft.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def things(tmp_path, bad_files, prepared, tokenizer_folder, corpus, recipe):
    """What the bad commands below name in braces, and a copy of the files in the folder of the test."""
    shutil.copytree(bad_files, tmp_path, dirs_exist_ok=True)
    values = yaml.safe_load(recipe.read_text())
    values["data"]["sequence_lenght"] = values["data"].pop("sequence_length")
    values["trainning"] = values.pop("training")
    (tmp_path / "misspelt.yaml").write_text(yaml.safe_dump(values))
    return {"prepared": prepared, "tokenizer": tokenizer_folder, "corpus": corpus, "recipe": recipe}


CONVERSATIONS = {
    "assistant-first": [{"role": "assistant", "content": "Hi"}],
    "empty-reply": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}],
    "long-reply": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 100}],
}


BAD = {
    "missing model": ("generate nowhere", "model 'nowhere': no such folder, and no released model"),
    "almost a released name": ("generate step-50k-105", "did you mean 'step-50k-105b'?"),
    "released name without a Hub": ("generate step-50k-105b", "cannot be fetched from the Hub"),
    "the peer of the table": ("generate pythia-1b", "not a Llama"),
    "not a number": ("generate model --temperature nan", "--temperature nan: must be"),
    "a bad row after good ones": (
        "prepare late.jsonl --tokenizer {tokenizer} --output out", "late.jsonl, row 2: 'text' is null, not a string"),
    "nothing to learn from": ("tokenizer train empty.txt --output out", "sources contain no text"),
    "more pieces than the text has": (
        "tokenizer train small.jsonl --output out --vocab-size 5000", "is too large for the texts. Use at most 2"),
    "a file for a folder": ("tokenizer train {corpus} --output small.jsonl", "small.jsonl is a file"),
    "nothing to verify": ("tokenizer verify model --text empty.txt", "the files contain no text"),
    "folder without a model": ("generate empty", "holds no config.json"),
    "no GPU": ("generate model --device cuda", "has no GPU that torch can use; use cpu or auto"),
    "no device": ("generate model --device gpu", "--device 'gpu': unknown device"),
    "too many tokens": ("generate model --max-new-tokens 64", "the model's context of 64"),
    "temperature": ("generate model --temperature -1", "--temperature -1.0: must be"),
    "missing source": ("prepare nowhere --tokenizer {tokenizer} --output out", "source nowhere does not exist"),
    "missing tokenizer": ("prepare {corpus} --tokenizer nowhere --output out", "model 'nowhere': no such folder"),
    "folder without a tokenizer": (
        "prepare {corpus} --tokenizer empty --output out", "holds neither tokenizer.model nor"),
    "separator": (
        "prepare {corpus} --tokenizer {tokenizer} --output out --separator bath", "unknown; valid: bos, both, eos"),
    "prepared with another tokenizer": (
        "prepare {corpus} --tokenizer other-tokenizer --output {prepared} --validation-fraction 0.1",
        "holds data of another request (different: tokenizer)",
    ),
    "nothing to train on": (
        "prepare small.jsonl --tokenizer {tokenizer} --output out --sample-fraction 1e-9", "no text to train on"),
    "tokenizer exists": ("tokenizer train {corpus} --output model", "--output model exists already"),
    "vocabulary too small": ("tokenizer train {corpus} --output out --vocab-size 100", "must be above 259"),
    "nothing to compare with": ("tokenizer verify empty", "the SentencePiece model to compare with is missing"),
    "no data to score on": ("eval text model", "--data is required to score model folders"),
    "no such data": ("eval text model --data nowhere", "nowhere does not exist. Create it with `tinyllama-hf prepare"),
    "missing evaluation data": (
        "eval tasks model --data empty", "--data empty has no hellaswag/validation.jsonl, openbookqa/test"),
    "evaluation data without a Hub": ("eval tasks model", "or pass local files with --data"),
    "unknown task": ("eval model --task commonsens", "--task 'commonsens': unknown task; did you mean 'comm"),
    "no published row": (
        "eval tasks model --published step-50k-105", "--published 'step-50k-105' is not in the published"),
    "nothing was published": (
        "eval tasks model --published chat-v1.0", "--published 'chat-v1.0' has no published scores"),
    "one item": ("eval tasks model --limit 1", "--limit 1: must be at least 2"),
    "more items than are kept": ("eval tasks model --show 11", "--show 11: must be 0 to 10"),
    "published scores of another protocol": (
        "eval tasks model --protocol modern --task boolq --published step-50k-105b", "not under modern"),
    "two folders of tasks": (
        "eval tasks model --data empty --data model", "--data empty model: pass one folder"),
    "scores over something else": (
        "eval tasks model --data embedded:sample --output small.jsonl",
        "small.jsonl: is not a file of commonsense scores"),
    "baselines of a folder": ("eval text model --baselines", "--baselines needs one run"),
    "no repository": ("publish model --repo micro", "--repo 'micro': the name must have the form USER/NAME"),
    "nothing to publish": ("publish empty --repo me/x --dry-run", "empty: holds neither milestones nor a model"),
    "publish offline": ("publish model --repo me/x", "HF_HUB_OFFLINE is set"),
    "no scores to select by": ("select empty", "empty: has no task scores of milestones"),
    "a file without scores": ("select small.jsonl", "small.jsonl: is not a file of commonsense scores"),
    "no run": ("report empty --output out", "metrics.jsonl is missing"),
    "plan for an unknown device": ("plan {recipe} --device h300", "--device 'h300': unknown device; valid: 3090, "),
    "plan for no device": ("plan {recipe} --devices 0", "--devices 0: must be at least 1"),
    "more than all of the peak": ("plan {recipe} --device h200 --mfu 56", "--mfu 56.0: must be above 0 and at most 1"),
    "a share of an unknown peak": ("plan {recipe} --mfu 0.5", "--mfu: needs --device"),
    "devices that do not divide the step": (
        "plan {recipe} --devices 999", "does not divide the"),
    "copy over something": ("recipes copy empty", "empty: already exists"),
    "missing recipe": ("pretrain.py nowhere.yaml", "recipe nowhere.yaml does not exist"),
    "unknown keys": (
        "pretrain.py misspelt.yaml", "data.sequence_lenght: unknown key; did you mean 'sequence_length'?"),
    "other tokenizer than the data's": (
        "pretrain.py {recipe} data.tokenizer=other-tokenizer", "was prepared with a tokenizer of fingerprint"),
    "less than a block": (
        "pretrain.py {recipe} data.sequence_length=65536 training.tokens_per_step=65536 training.total_tokens=65536",
        "less than one block of 65536 + 1"),
    "longer than the context": (
        "pretrain.py {recipe} model.overrides.max_position_embeddings=16",
        "data.sequence_length: 32 is longer than the context"),
    "GPU-only attention": (
        "pretrain.py {recipe} training.attention=flash_attention_2", "flash_attention_2 needs a GPU"),
    "a conversation that starts with the assistant": (
        "sft.py sft.yaml data.conversations=assistant-first.jsonl",
        "assistant-first.jsonl, row 1: starts with the assistant"),
    "an empty reply": (
        "sft.py sft.yaml data.conversations=empty-reply.jsonl",
        "empty-reply.jsonl, row 1, message 1: the reply is empty"),
    "a reply longer than the context": (
        "sft.py sft.yaml data.conversations=long-reply.jsonl",
        "conversations are longer than data.max_length 64. The longest is long-reply.jsonl, row"),
    "longer conversations than the context": (
        "sft.py sft.yaml data.max_length=65", "data.max_length: 65 is longer than the model's context of 64"),
    "a template without markers": (
        "sft.py sft.yaml chat.template=plain.jinja", "chat template, conversation of 2 messages, message 1: "),
    "an unknown key of fine-tuning": (
        "sft.py sft.yaml adapter.rnk=8", "adapter.rnk: unknown key; did you mean 'rank'?"),
    "chat with a base model": ("chat model", "the tokenizer has no chat template, so this is a base model"),
    "an unknown quantisation": ("generate model --quantization int5", "quantization 'int5': unknown"),
    "an unknown dtype": ("generate model --dtype fp8", "--dtype 'fp8': "),
    "no such draft": ("generate model --draft nowhere", "model 'nowhere': no such folder"),
    "missing data": (
        "pretrain.py {recipe} data.sources=[{{path:\xa0nowhere,weight:\xa01}}]", "nowhere does not exist"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, things, tmp_path, command, message):
    """One message that names the thing, status 2, no traceback, and nothing written."""
    import torch

    if torch.cuda.is_available() and ("GPU" in message):
        pytest.skip("this machine has a GPU")
    before = tree(tmp_path) | tree(things["prepared"])
    words = [word.format(**things).replace("\xa0", " ") for word in command.split(" ")]
    status, error = call(*(words if words[0].endswith(".py") else ["tinyllama-hf", *words]))
    assert status == 2, error
    assert message in error
    assert error.startswith("error: ") and error.count("error: ") == 1 and "Traceback" not in error
    assert tree(tmp_path) | tree(things["prepared"]) == before


def test_all_problems_of_a_recipe_at_once(call, things):
    status, error = call("pretrain.py", "misspelt.yaml")
    assert status == 2
    for line in (
        "3 problems",
        "data.sequence_lenght: unknown key; did you mean 'sequence_length'?",
        "trainning: unknown key; did you mean 'training'?",
        "training.total_tokens: is required",
    ):
        assert line in error


@pytest.mark.slow
def test_bad_input_through_accelerate_launch(recipe, run_command, tmp_path):
    """accelerate replaces the exit status by 1; the message is the only thing printed with --quiet."""
    done = run_command(
        "accelerate", "launch", "--quiet", "--config_file", ROOT / "recipes" / "accelerate" / "cpu.yaml",
        ROOT / "recipes" / "pretrain.py", recipe, "training.sed=1", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "training.sed: unknown key; did you mean 'seed'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinyllama-hf", "--version"])
    with pytest.raises(SystemExit) as stop:
        tinyllama_hf_cli.main()
    assert not stop.value.code and capsys.readouterr().out == f"tinyllama-hf {version('tinyllama_hf')}\n"


def test_a_prompt_from_standard_input(tmp_path, monkeypatch):
    """One line end at its end is not part of it."""
    from tinyllama_hf.inference import generation

    prompts = []
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(tinyllama_hf_cli.inference, "load_model", lambda *_: (None, None, None))
    monkeypatch.setattr(generation, "ExactTextStreamer", lambda _: None)
    monkeypatch.setattr(generation, "generate_text", lambda model, tokenizer, prompt, *_: prompts.append(prompt))

    def generate(stdin: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        typer.main.get_command(tinyllama_hf_cli.app)(["generate", str(tmp_path), "-"], standalone_mode=False)

    for end in ("", "\n", "\r\n", "\n\n"):
        generate(f"a\n    café{end}".encode())
    assert prompts == [*["a\n    café"] * 3, "a\n    café\n"]
    with pytest.raises(ValueError, match="PROMPT -: standard input is not UTF-8"):
        generate(b"\xff")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), ValueError("a bug"), OSError("of a library, without a number")]
)
def test_a_bug_is_not_bad_input(monkeypatch, call, error):
    """Only InputError and errors of the system are turned into a message; anything else keeps its traceback."""

    def fail():
        raise error

    monkeypatch.setattr(importlib.import_module("tinyllama_hf.released"), "released", fail)
    with pytest.raises(type(error)):
        call("tinyllama-hf", "list")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "a/b"),
            "a/b: Permission denied. Check the name, the permissions and",
        ),
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: [Errno 111] Connection refused"),
    ],
)
def test_an_error_of_the_system_is_one_message(monkeypatch, call, error, message):
    def fail():
        raise error

    monkeypatch.setattr(importlib.import_module("tinyllama_hf.released"), "released", fail)
    status, printed = call("tinyllama-hf", "list")
    assert status == 2 and printed.startswith(f"error: {message}") and printed.count("\n") == 1


def test_prepare_dry_run_writes_nothing(call, things, tmp_path, capsys):
    before = tree(tmp_path)
    status, _ = call(
        "tinyllama-hf", "prepare", things["corpus"], "--tokenizer", things["tokenizer"], "--output", "out", "--dry-run"
    )
    assert status == 0 and tree(tmp_path) == before


@pytest.mark.parametrize("fraction", ["0", "0.5"])
def test_prepare_names_a_missing_held_out_split(things, tmp_path, fraction):
    options = {"--tokenizer": things["tokenizer"], "--output": tmp_path / "out", "--validation-fraction": fraction}
    words = ["prepare", things["corpus"], *(word for option in options.items() for word in option)]
    done = CliRunner().invoke(tinyllama_hf_cli.app, [str(word) for word in words])
    assert done.exit_code == 0
    assert ("no document was held out" in done.output) == (fraction == "0")


def test_recipes_copy_and_list(call, tmp_path):
    """Every file that the wheel ships, byte for byte; the wheel ships every file (tests/test_distribution.py)."""
    status, error = call("tinyllama-hf", "recipes", "copy", "mine")
    assert status == 0, error
    listing = CliRunner().invoke(tinyllama_hf_cli.app, ["recipes", "list"])
    listed = [line.split()[0] for line in listing.output.splitlines()]
    parts = {"recipes": tmp_path / "mine", "eval": tmp_path / "mine" / "eval"}
    shipped = {
        (folder / file.relative_to(ROOT / part)).relative_to(tmp_path / "mine").as_posix(): file.read_bytes()
        for part, folder in parts.items()
        for file in (ROOT / part).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert shipped.keys() >= {
        "pretrain.py",
        "slurm/pretrain.sbatch",
        "demo/demo.sh",
        "eval/sample/piqa/validation.jsonl",
    }
    assert sorted(listed) == sorted(shipped)
    copied = {
        p.relative_to(tmp_path / "mine").as_posix(): p.read_bytes()
        for p in (tmp_path / "mine").rglob("*")
        if p.is_file()
    }
    assert copied == shipped


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("run --baselines --data x", "text run --baselines --data x"),
        ("--task bits_per_byte run --watch", "text run --watch"),
        ("run --task=bits-per-byte", "text run"),
        ("a b --task commonsense --limit 5", "tasks a b --limit 5"),
        ("--limit 5 chat --task replies", "replies --limit 5 chat"),
        ("--rescore run", "text --rescore run"),
        ("run --help", "text run --help"),
    ],
)
def test_eval_without_a_sub_command_still_works_and_prints_the_new_spelling(old, new, capsys):
    """The arguments that the sub-command gets, and one line on standard error."""
    group = typer.main.get_command(tinyllama_hf_cli.app).commands["eval"]
    context = group.make_context("eval", old.split())
    assert [*context._protected_args, *context.args] == new.split()
    assert capsys.readouterr().err == f"note: this spelling is deprecated. Use: tinyllama-hf eval {new}\n"
    assert [*group.make_context("eval", new.split()).args] == context.args
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval model --limit 5", "No such option: --limit"),
        ("eval tasks model --baselines", "No such option: --baselines"),
    ],
)
def test_an_option_of_another_evaluation_is_refused(call, words, message):
    status, error = call("tinyllama-hf", *words.split())
    assert status == 2 and message in error
