"""Every option of every command and script arrives at the function that does the work, under the right name.

What the functions make of them is tested where they are; here they only note what they are given.
"""

import functools
import importlib
import inspect
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from tests.test_cli import COMMANDS


class Arrived(Exception):
    """Raised by the function that a case ends with."""


PREPARED = SimpleNamespace(
    run=SimpleNamespace(tokenizer="x" * 512),
    accelerator=SimpleNamespace(num_processes=2),
    known_device=lambda: None,
    print=lambda *_: None,
    summary=[],
)
LOADED = (SimpleNamespace(device="cpu", dtype="torch.bfloat16"), SimpleNamespace(chat_template=None), "draft")
BOUND = SimpleNamespace(listen=lambda: None, getsockname=lambda: ("h", 9))
LOAD = {
    "model": "m",
    "dtype": "bf16",
    "device": "cuda",
    "quantization": "nf4",
    "draft": "d",
    "adapter": "a",
    "compiled": True,
}
LOADING = "--dtype bf16 --device cuda --quantization nf4 --adapter a --compile --verbose"
SAMPLING = "--temperature 0.5 --top-p 0.6 --max-new-tokens 7"
# Words of a command, and the functions it calls in this order: what each returns (the case ends at `None`), and its
# arguments.
CASES = {
    "tokenizer train x --output o --vocab-size 300 --text-column body --overwrite": {
        "tinyllama_hf.data.sources.open_sources": ("opened", {"sources": ["x"], "text_column": "body"}),
        "tinyllama_hf.data.train_tokenizer.train_tokenizer": (
            None,
            {"vocab_size": 300, "output": Path("o"), "overwrite": True},
        ),
    },
    "tokenizer verify . --against {file} --text x --text-column body --stock": {
        "tinyllama_hf.data.sources.open_sources": ("opened", {"sources": ["x"], "text_column": "body"}),
        "transformers.AutoTokenizer.from_pretrained": ("stock", {}),
        "tinyllama_hf.data.train_tokenizer.verify_tokenizer": (
            None,
            {"tokenizer": "stock", "reference": Path("{file}")},
        ),
    },
    "prepare x --tokenizer t --output o --separator bos --validation-fraction 0.1 --sample-fraction 0.2 "
    "--text-column body --where a==1 --workers 3": {
        "tinyllama_hf.data.prepare.prepare": (
            None,
            {
                "sources": ["x"],
                "tokenizer": "t",
                "output": Path("o"),
                "separator": "bos",
                "validation_fraction": 0.1,
                "sample_fraction": 0.2,
                "text_column": "body",
                "where": "a==1",
                "workers": 3,
            },
        ),
    },
    "prepare x --tokenizer t --output o --dry-run": {
        "tinyllama_hf.data.prepare.plan_preparation": (None, {"tokenizer": "t"})
    },
    "prepare --check c": {"tinyllama_hf.data.shards.check_contents": (None, {"folder": Path("c")})},
    "plan {recipe} training.seed=77 --devices 2 --device h100 --mfu 0.3": {
        "tinyllama_hf.planning.run_plan.plan_run": (
            None,
            {"config.training.seed": 77, "num_devices": 2, "device.name": "NVIDIA H100 80GB HBM3", "mfu": 0.3},
        ),
    },
    "eval text m --data x --data y --baselines --output o --rescore --quantization nf4 --device cpu "
    "--dtype bf16 --max-bytes 5k": {
        "tinyllama_hf.evaluation.series.score": (
            None,
            {
                "models": ["m"],
                "data": ["x", "y"],
                "baselines": True,
                "output": Path("o"),
                "rescore": True,
                "quantization": "nf4",
                "device": "cpu",
                "dtype": "bf16",
                "max_bytes": 5000,
            },
        ),
    },
    "eval text m --watch --every 9 --output o --rescore --quantization nf4 --device cpu --dtype bf16 "
    "--max-bytes all": {
        "tinyllama_hf.evaluation.series.watch": (
            None,
            {
                "run": Path("m"),
                "every_seconds": 9,
                "output": Path("o"),
                "rescore": True,
                "quantization": "nf4",
                "device": "cpu",
                "dtype": "bf16",
                "max_bytes": None,
            },
        ),
    },
    "eval tasks m n --data x --limit 5 --samples s --output o --published v1.1 "
    "--task boolq --adapter a --run-code --show 2 --rescore --quantization nf4 --device cpu": {
        "tinyllama_hf.evaluation.task_scores.score_tasks": (
            SimpleNamespace(file=SimpleNamespace(protocol="protocol", models=[]), items=[]),
            {
                "models": ["m", "n"],
                "data": "x",
                "limit": 5,
                "definition.tasks": ("boolq",),
                "adapter": "a",
                "run_code": True,
                "with_items": True,
                "rescore": True,
                "samples": Path("s"),
                "output": Path("o"),
                "quantization": "nf4",
                "device": "cpu",
            },
        ),
        "tinyllama_hf.evaluation.table.table_lines": (
            None,
            {"scores.protocol": "protocol", "published.name": "v1.1"},
        ),
    },
    "eval tasks m --protocol modern --task arc_easy --include i": {
        "tinyllama_hf.evaluation.tasks.protocol_definitions.define_protocol": (
            SimpleNamespace(name="modern", tasks=("arc_easy",)),
            {"name": "modern", "tasks": ["arc_easy"], "include": Path("i")},
        ),
        "tinyllama_hf.evaluation.task_scores.score_tasks": (
            SimpleNamespace(file=SimpleNamespace(protocol="protocol", models=[]), items=[]),
            {"definition.tasks": ("arc_easy",), "include": Path("i")},
        ),
        "tinyllama_hf.evaluation.table.table_lines": (None, {"scores.protocol": "protocol"}),
    },
    "eval tasks m --data x --server http://h:1 --server-model s --output o": {
        "tinyllama_hf.evaluation.harness.served_model.find_served_model": (
            "served",
            {"model": "m", "server": "http://h:1", "server_model": "s"},
        ),
        "tinyllama_hf.evaluation.task_scores.score_tasks": (None, {"server": "served", "output": Path("o")}),
    },
    "eval replies m --data x --limit 5 --max-new-tokens 7 --output o --quantization nf4 --device cpu": {
        "tinyllama_hf.finetune.replies.score_replies": (
            None,
            {
                "models": ["m"],
                "data": "x",
                "limit": 5,
                "max_new_tokens": 7,
                "output": Path("o"),
                "quantization": "nf4",
                "device": "cpu",
            },
        ),
    },
    "report r --output o --prompt p --prompt q --stages s --chat c": {
        "tinyllama_hf.report.page.write_report": (
            None,
            {
                "run": Path("r"),
                "output": Path("o"),
                "prompts": ["p", "q"],
                "stages": Path("s"),
                "chat": Path("c"),
            },
        ),
    },
    "compare v1.1 pythia-1b --metric acc --different-protocols --resamples 2000 --seed 3 --markdown o --json p": {
        "tinyllama_hf.evaluation.comparison.compared_models.find_compared_models": (
            ["a", "b"],
            {"arguments": ["v1.1", "pythia-1b"]},
        ),
        "tinyllama_hf.evaluation.comparison.score_comparison.check_comparison": (
            "checked",
            {"models": ["a", "b"], "metric": "acc", "different_protocols": True, "resamples": 2000, "seed": 3},
        ),
        "tinyllama_hf.evaluation.comparison.score_comparison.compare_models": (
            [],
            {"models": ["a", "b"], "metric": "acc", "different_protocols": True, "resamples": 2000, "seed": 3},
        ),
        "tinyllama_hf.evaluation.comparison.comparison_text.comparison_lines": (
            ["a line"],
            {"comparisons": [], "resamples": 2000, "seed": 3},
        ),
        "tinyllama_hf.files.write_text": ("written", {"path": Path("o")}),
        "tinyllama_hf.files.write_json": (None, {"path": Path("p")}),
    },
    "compare a b --fail-on-regression": {
        "tinyllama_hf.evaluation.comparison.compared_models.find_compared_models": ([1, 2], {"arguments": ["a", "b"]}),
        "tinyllama_hf.evaluation.comparison.score_comparison.check_comparison": (
            "checked",
            {"different_protocols": False},
        ),
        "tinyllama_hf.evaluation.comparison.score_comparison.compare_models": (
            [SimpleNamespace(model="b", regressions=["piqa"])],
            {"different_protocols": False},
        ),
        "tinyllama_hf.evaluation.comparison.comparison_text.comparison_lines": ([], {}),
        "typer.Exit": (None, {"code": 1}),
    },
    "select s --metric text --task piqa --task boolq --json j": {
        "tinyllama_hf.evaluation.milestone_selection.rank_milestones": (
            None,
            {"series": Path("s"), "metric": "text", "tasks": ["piqa", "boolq"]},
        ),
    },
    "report r m --output o": {
        "tinyllama_hf.report.comparison.write_comparison": (
            None,
            {"runs": [Path("r"), Path("m")], "output": Path("o")},
        ),
    },
    f"generate m text {SAMPLING} --seed 5 --draft d {LOADING}": {
        "tinyllama_hf_cli.inference.load_model": (LOADED, LOAD),
        "tinyllama_hf.inference.generation.ExactTextStreamer": ("streamer", {"tokenizer": LOADED[1]}),
        "tinyllama_hf.inference.generation.generate_text": (
            None,
            {
                "prompt": "text",
                "temperature": 0.5,
                "top_p": 0.6,
                "max_new_tokens": 7,
                "seed": 5,
                "draft": "draft",
            },
        ),
    },
    f"generate m --input i --output o --batch-size 3 {SAMPLING} --seed 5 --draft d {LOADING}": {
        "tinyllama_hf_cli.inference.generate_file": (
            None,
            {
                "model": "m",
                "source": Path("i"),
                "output": Path("o"),
                "batch_size": 3,
                "seed": 5,
                "draft": "d",
                "adapter": "a",
                "sampling.temperature": 0.5,
                "sampling.top_p": 0.6,
                "sampling.max_new_tokens": 7,
                "weights": {"dtype": "bf16", "quantization": "nf4"},
                "load.args": tuple(LOAD.values()),
            },
        ),
    },
    f"chat m --system s {SAMPLING} --seed 5 --draft d {LOADING}": {
        "tinyllama_hf_cli.inference.load_model": (LOADED, LOAD),
        "tinyllama_hf.inference.chat.ChatSession": (
            None,
            {
                "system": "s",
                "sampling.temperature": 0.5,
                "sampling.top_p": 0.6,
                "sampling.max_new_tokens": 7,
                "seed": 5,
                "draft": "draft",
            },
        ),
    },
    f"serve m --host h --port 9 --template llama2 --page --rows 3 --waiting 4 --max-tokens 5 --max-messages 6 "
    f"--max-body-bytes 7000 --row-seconds 8 --api-key k --allow-origin o --allow-host n --engine tinyllama-hf "
    f"--draft lookup --shutdown-seconds 9 {LOADING}": {
        "tinyllama_hf.serving.run_server.bind": (BOUND, {"host": "h", "port": 9}),
        "tinyllama_hf_cli.serving.load_model": (LOADED, {**LOAD, "draft": "lookup"}),
        "tinyllama_hf.serving.app.build_app": (
            "app",
            {
                "name": "m",
                "tokenizer.chat_template": (ROOT / "tinyllama_hf" / "chat" / "llama2.jinja").read_text(),
                "options.rows": 3,
                "options.waiting": 4,
                "options.max_tokens": 5,
                "options.max_messages": 6,
                "options.max_body_bytes": 7000,
                "options.row_seconds": 8,
                "options.api_key": "k",
                "options.page": True,
                "options.allow_origins": ["o"],
                "options.allow_hosts": ["h", "n"],
            },
        ),
        "tinyllama_hf.serving.run_server.run_server": (None, {"app": "app", "seconds": 9}),
    },
    "memory micro --batch 3 --context 50 --quantization nf4 --dtype fp32 --device 16GB": {
        "tinyllama_hf.planning.inference_memory.batch_memory": (
            "found",
            {
                "batch": 3,
                "context": 50,
                "setup.quantization": "nf4",
                "setup.dtype": torch.float32,
            },
        ),
        "tinyllama_hf.planning.inference_memory.memory_lines": ([], {"found": "found"}),
        "tinyllama_hf.planning.inference_memory.fit_lines": (None, {"found": "found", "available": 16 * 10**9}),
    },
    "convert s --to llama --output o --dtype bf16 --max-shard-size 2GB --vocab-rows 9 --config c --force": {
        "tinyllama_hf.conversion.convert.convert": (
            None,
            {
                "source": "s",
                "to": "llama",
                "output": Path("o"),
                "dtype": "bf16",
                "max_shard_size": "2GB",
                "vocab_rows": 9,
                "config": Path("c"),
                "check": None,
                "force": True,
            },
        ),
    },
    "convert s --to gguf-lora --output new.gguf --base m": {
        "tinyllama_hf.conversion.convert.convert": (
            None,
            {"source": "s", "to": "gguf-lora", "output": Path("new.gguf"), "base": "m"},
        ),
    },
    "convert s --to awq --output o --sanity --calibration file --calibration s/config.json": {
        "tinyllama_hf.conversion.convert.convert": (
            None,
            {
                "check.__name__": "<lambda>",
                "calibration": [Path("file"), Path("s/config.json")],
                "force": False,
            },
        ),
    },
    "merge m a --output new --dtype bf16 --device cpu --overwrite": {
        "tinyllama_hf.inference.merge.merge_adapter": (
            None,
            {"base": "m", "adapter": "a", "output": Path("new"), "dtype": "bf16", "device": "cpu", "overwrite": True},
        ),
    },
    "verify x y --text t --tolerance 0.5 --tensors --config c": {
        "tinyllama_hf.conversion.verify.compare_tensors": ([], {"a": "x", "b": "y", "config": Path("c")}),
        "tinyllama_hf.conversion.verify.verify": (
            None,
            {
                "a": "x",
                "b": "y",
                "text": Path("t"),
                "tolerance": 0.5,
                "config": Path("c"),
            },
        ),
    },
    "publish r --repo me/x --private --license mit --dry-run --base-model me/y": {
        "tinyllama_hf.hub.publish.publish": (
            None,
            {
                "run": Path("r"),
                "repo": "me/x",
                "private": True,
                "license": "mit",
                "dry_run": True,
                "base_model": "me/y",
            },
        ),
    },
    "pretrain.py {recipe} training.seed=77 --overwrite --measure-peak": {
        "tinyllama_hf.pretrain.loop.prepare_run": (PREPARED, {"config.training.seed": 77, "overwrite": True}),
        "tinyllama_hf.pretrain.loop.train_run": (None, {"prepared": PREPARED, "measure_peak": True}),
    },
    "pretrain.py {recipe} --dry-run": {
        "tinyllama_hf.pretrain.loop.prepare_run": (PREPARED, {"overwrite": False}),
        "tinyllama_hf.planning.run_plan.plan_run": (None, {"vocab_size": 512, "num_devices": 2}),
    },
    "sft.py {sft} training.seed=77 --overwrite": {
        "tinyllama_hf.finetune.sft.open_run": ("run", {"config.training.seed": 77, "overwrite": True}),
        "tinyllama_hf.finetune.run_summary.summary_lines": ("printed", {"run": "run"}),
        "tinyllama_hf.finetune.sft.finetune_run": (None, {"run": "run", "overwrite": True}),
    },
    "sft.py {sft} --dry-run": {
        "tinyllama_hf.finetune.sft.open_run": ("run", {"overwrite": False}),
        "tinyllama_hf.finetune.run_summary.summary_lines": ("printed", {"run": "run"}),
        "tinyllama_hf.finetune.run_summary.dry_run_lines": (None, {"run": "run"}),
    },
    "dpo.py {dpo} training.seed=77 preference.beta=0.5 --overwrite": {
        "tinyllama_hf.finetune.dpo.open_preference_run": (
            "run",
            {"config.training.seed": 77, "config.preference.beta": 0.5, "overwrite": True},
        ),
        "tinyllama_hf.finetune.pair_summary.preference_lines": ("printed", {"run": "run"}),
        "tinyllama_hf.finetune.dpo.tune_preferences": (None, {"run": "run", "overwrite": True}),
    },
    "dpo.py {dpo} --dry-run": {
        "tinyllama_hf.finetune.dpo.open_preference_run": ("run", {"overwrite": False}),
        "tinyllama_hf.finetune.pair_summary.preference_lines": ("printed", {"run": "run"}),
        "tinyllama_hf.finetune.pair_summary.preference_dry_run_lines": (None, {"run": "run"}),
    },
}


def run(words: list[str], monkeypatch) -> None:
    if words[0].endswith(".py"):
        monkeypatch.setattr("sys.argv", words)
        runpy.run_path(str(ROOT / "recipes" / words[0]))["main"]()
    else:
        name = command_of(words)
        COMMANDS[name].main(words[len(name) :], standalone_mode=False)


def command_of(words: list[str]) -> tuple[str, ...]:
    return next(name for name in COMMANDS if tuple(words[: len(name)]) == name)


@pytest.mark.parametrize("words", CASES, ids=lambda words: words.split(" --")[0])
def test_options_arrive(words, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    recipes = {
        "{recipe}": ROOT / "recipes" / "pretrain" / "micro.yaml",
        "{sft}": ROOT / "recipes" / "sft" / "full.yaml",
        "{dpo}": ROOT / "recipes" / "dpo" / "lora.yaml",
    }
    fill = {"{file}": str(file), **{name: str(path) for name, path in recipes.items()}}
    given: dict[str, dict] = {}
    for target, (result, _) in CASES[words].items():
        owner, _, name = target.rpartition(".")
        try:
            holder = importlib.import_module(owner)
        except ModuleNotFoundError:  # a class
            module, _, kind = owner.rpartition(".")
            holder = getattr(importlib.import_module(module), kind)
        monkeypatch.setattr(holder, name, _recorder(target, getattr(holder, name), result, given))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # `convert` ends like Ctrl-C at others
    monkeypatch.chdir(tmp_path)
    for name in "mndacrstxy":  # checked before the functions are called
        Path(name).mkdir()
        Path(name, "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Arrived):
        run([fill.get(word, word) for word in words.split()], monkeypatch)
    for target, (_, expected) in CASES[words].items():
        for path, value in expected.items():
            first, *rest = path.split(".")
            found = functools.reduce(getattr, rest, given[target][first])
            assert found == (Path(fill[str(value)]) if str(value) in fill else value), (target, path)


def _recorder(target, function, result, given):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def record(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given[target] = bound.arguments
        if result is None:
            raise Arrived
        return result

    return record


def test_no_option_is_left_out():
    seen = {name: set() for name in COMMANDS}
    for words in (case.split() for case in CASES if ".py" not in case):
        seen[command_of(words)] |= {word for word in words if word.startswith("--")}
    for name, command in COMMANDS.items():
        options = {
            option
            for parameter in command.params
            if parameter.param_type_name == "option" and not parameter.hidden
            for option in parameter.opts
        }
        assert seen[name] == options - {"--help"}, name
