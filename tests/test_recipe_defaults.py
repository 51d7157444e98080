"""A recipe needs only what differs; the bundled ones are complete, and name the values that are not the defaults."""

import json
import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.pretrain.runs import exact_rows, read_metrics, run
from tinyllama_hf import TinyLlamaConfig
from tinyllama_hf.data.config import load_prepare_config
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import load_finetune_config, load_preference_config
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.setup import build_model, check_initial_model, describe_recipe, open_pretrain_run


LOADERS = {
    "pretrain": load_pretrain_config,
    "demo": load_pretrain_config,
    "sft": load_finetune_config,
    "dpo": load_preference_config,
    "data": load_prepare_config,
}
BUNDLED = [path for folder in LOADERS for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))]
# What a recipe is about. The default of `output_dir` is the name of the file.
SUBJECT = {
    "output_dir",
    "model.preset",
    "model.path",
    "data.tokenizer",
    "data.sources",
    "data.mixture_changes",
    "data.conversations",
    "data.preferences",
    "training.total_tokens",
    "adapter.kind",
    "tokenizer",
    "sources",
    "output",
}


def flat(recipe: dict) -> dict:
    """By `section.key`, or `key` where there are no sections."""
    nested = {
        f"{name}.{key}": v
        for name, section in recipe.items()
        if isinstance(section, dict)
        for key, v in section.items()
    }
    return {name: value for name, value in recipe.items() if not isinstance(value, dict)} | nested


def write_nested(path, values: dict) -> None:
    nested: dict = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    path.write_text(yaml.safe_dump(nested))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_bundled_recipe_names_the_values_that_are_not_the_defaults(path, tmp_path):
    load = LOADERS[path.parent.name]
    complete = flat(load(path).model_dump(mode="json", by_alias=True))
    short = tmp_path / path.name
    write_nested(
        short, {name: value for name, value in flat(yaml.safe_load(path.read_text())).items() if name in SUBJECT}
    )
    defaults = flat(load(short).model_dump(mode="json", by_alias=True))
    differing = {name for name, value in complete.items() if value != defaults[name]} - {"output_dir"}
    header = re.match(r"(#.*\n)+", path.read_text())[0].replace("\n#", "")
    listed = re.search(r"Not the defaults: ([^.]+(?:\.\w[^.]*)*)\.", header)
    assert set(re.split(r"[,\s]+", listed[1]) if listed else ()) == differing


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "data"])
def test_the_page_has_every_key_with_its_default(name, tmp_path):
    """The tables of docs/recipes.md, against the schema; a default that follows from other keys is described there."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    section = page[page.index(f"## recipes/{name}") :].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", section, flags=re.MULTILINE))
    values = flat(LOADERS[name](BUNDLED_OF[name]).model_dump(mode="json", by_alias=True))
    assert rows.keys() == values.keys()
    short = tmp_path / "short.yaml"
    subject = {key: value for key, value in values.items() if rows[key] == "required"}
    write_nested(short, subject)
    for key, value in flat(LOADERS[name](short).model_dump(mode="json", by_alias=True)).items():
        if written := re.fullmatch(r"`(.+)`", rows[key]):
            assert written[1] == "off" == value or yaml.safe_load(written[1]) == value, key


BUNDLED_OF = {
    "pretrain": ROOT / "recipes/pretrain/tinyllama-1.1b.yaml",
    "sft": ROOT / "recipes/sft/full.yaml",
    "dpo": ROOT / "recipes/dpo/lora.yaml",
    "data": ROOT / "recipes/data/slimpajama.yaml",
}


@pytest.fixture
def short(prepared, tmp_path, monkeypatch):
    """A recipe of six lines."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "first.yaml"
    path.write_text(
        f"model: {{preset: micro}}\ndata:\n  tokenizer: {prepared / 'tokenizer'}\n  sources:\n    - {prepared}\n"
        "training: {total_tokens: 4k}\n"
    )
    return path


class TestSixLines:
    def test_it_trains_and_the_run_has_its_complete_form(self, short, tmp_path, capsys):
        output = run(short)
        assert output.resolve() == tmp_path / "runs" / "first"
        rows = [row for row in read_metrics(output) if "loss" in row]
        assert rows[-1]["tokens"] == 4096
        complete = load_pretrain_config(output / "training.yaml")
        assert complete.describe_defaults() == []
        assert complete.model_dump() == load_pretrain_config(short).with_precision("fp32").model_dump()
        printed = capsys.readouterr().out
        for key, value in (("optimizer.eps", 1e-08), ("schedule.peak", 2e-3), ("training.precision", '"fp32"')):
            assert f"{key} {value}" in " ".join(printed.split())
        assert "model.preset" not in printed

    def test_a_longer_run_has_larger_steps_up_to_the_published_ones(self, short):
        def step(*overrides):
            training = load_pretrain_config(short, overrides).training
            return training.tokens_per_step, training.micro_batch_size

        assert step("training.total_tokens=4k") == (128, 1)
        assert step("training.total_tokens=200k") == step("training.total_tokens=1.2M") == (2048, 8)
        assert step("training.total_tokens=8M") == (8192, 8)
        assert step("training.total_tokens=3T", "data.sequence_length=2048") == (2**21, 8)
        assert step("training.total_tokens=3T", "data.sequence_length=1000") == (2097_000, 1)

    def test_what_is_given_decides_what_follows(self, short):
        config = load_pretrain_config(short, ["schedule.peak=1e-2", "training.total_tokens=1M", "schedule.name=wsd"])
        assert config.schedule.floor == 1e-3 and config.schedule.decay_tokens == 100_000
        assert load_pretrain_config(short, ["schedule.name=constant"]).schedule.floor is None

    def test_sources_without_weights_have_equal_ones(self, short):
        config = load_pretrain_config(short, ["data.sources=[a, {path: b}]", "data.tokenizer=x"])
        assert [(source.path, source.weight) for source in config.data.sources] == [("a", 0.5), ("b", 0.5)]
        with pytest.raises(InputError, match=r"data.sources.0.weight: is required"):
            load_pretrain_config(short, ["data.sources=[a, {path: b, weight: 0.5}]"])

    def test_the_tokenizer_is_that_of_the_first_source(self, short, prepared):
        text = short.read_text()
        short.write_text(re.sub("  tokenizer: .*\n", "", text))
        assert load_pretrain_config(short).data.tokenizer == f"{prepared}/tokenizer"

    def test_a_key_without_its_section(self, short):
        with pytest.raises(InputError, match=r"total_tokens: unknown key; did you mean training\.total_tokens\?"):
            load_pretrain_config(short, ["total_tokens=300k"])
        places = r"every_tokens: unknown key; did you mean checkpoints\.every_tokens or validation\.every_tokens\?"
        with pytest.raises(InputError, match=places):
            load_pretrain_config(short, ["every_tokens=300k"])

    def test_an_amount_that_is_no_number(self, short):
        with pytest.raises(InputError, match=r"training.total_tokens: 'abc': write a whole number, such as .*300k"):
            load_pretrain_config(short, ["training.total_tokens=abc"])

    @pytest.mark.parametrize("total", ["no", ".inf", "-3", "[1]", "{}", "4x", "1.5"])
    def test_a_wrong_value_gives_one_problem(self, short, total):
        """And none about the keys that follow from it."""
        with pytest.raises(InputError, match=r"1 problem\n  training.total_tokens: "):
            load_pretrain_config(short, [f"training.total_tokens={total}"])

    def test_a_section_that_is_no_section(self, short):
        with pytest.raises(InputError, match="1 problem\n  schedule: 3"):
            load_pretrain_config(short, ["schedule=3"])

    def test_without_preset(self, short):
        with pytest.raises(InputError, match=r"model.preset: is required \(1.1b, 120m, nano, micro\), or model.init"):
            load_pretrain_config(short, ["model={}"])


@pytest.mark.parametrize(
    ("written", "count"),
    [("300M", 300_000_000), ("1B", 10**9), ("1.5k", 1500), ("3T", 3 * 10**12), ("1e9", 10**9), ("2_048", 2048)],
)
def test_counts_of_tokens(recipe, written, count):
    overrides = ["training.total_tokens=9T", f"milestones.tokens=[{written}]", f"checkpoints.every_tokens={written}"]
    config = load_pretrain_config(recipe, overrides)
    assert config.milestones.tokens == [count] and config.checkpoints.every_tokens == count


def test_a_tracker_by_its_name(recipe):
    assert load_pretrain_config(recipe, ["logging.trackers=tensorboard"]).logging.trackers == ["tensorboard"]
    with pytest.raises(InputError, match=r"logging\.trackers"):
        load_pretrain_config(recipe, ["logging.trackers=tensorbord"])


class TestInitialModel:
    @pytest.fixture
    def initial(self, recipe, prepared, tmp_path):
        """A trained model of an architecture that is no preset, and a recipe that starts from it."""
        folder = run(recipe, "output_dir=" + str(tmp_path / "first")) / "milestones"
        path = tmp_path / "more.yaml"
        last = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[-1]
        values = {
            "model": {"init_from": str(last)},
            "training": {"total_tokens": 2048},
            "output_dir": str(tmp_path / "more"),
        }
        path.write_text(yaml.safe_dump(values | {"data": {"sources": [str(prepared)]}}))
        return path

    def test_brings_its_architecture_and_shows_its_loss(self, initial, capsys):
        opened = open_pretrain_run(load_pretrain_config(initial))
        assert (opened.model_config.hidden_size, opened.model_config.max_position_embeddings) == (64, 32)
        assert opened.config.data.sequence_length == 32
        assert next(build_model(opened).parameters()).dtype.is_floating_point
        output = run(initial)
        first = read_metrics(output)[0]
        assert first["step"] == 0 and first["validation_loss"] < 6  # that of a new model is log(512) = 6.2
        assert f"validation loss {first['validation_loss']:.3f}" in capsys.readouterr().out

    def test_other_sizes_are_refused(self, initial):
        with pytest.raises(InputError, match="hidden_size: 64 there, 128 in the recipe"):
            open_pretrain_run(load_pretrain_config(initial, ["model.overrides={hidden_size: 128}"]))

    def test_another_vocabulary_is_refused_with_the_fix(self, initial):
        model = yaml.safe_load(initial.read_text())["model"]["init_from"]
        config = TinyLlamaConfig.from_pretrained(model)
        with pytest.raises(InputError, match="prepare the data with the tokenizer of that model\n  vocab_size"):
            check_initial_model(model, TinyLlamaConfig(**{**config.to_dict(), "vocab_size": 77}))


class TestLonger:
    """A finished run continues to a larger `total_tokens` where its schedule does not depend on it."""

    CONSTANT = ("schedule.name=constant", "schedule.floor=null")

    def test_equals_one_that_was_that_long_from_the_start(self, recipe, tmp_path, capsys):
        long = ("training.total_tokens=4096", *self.CONSTANT)
        expected = run(recipe, *long, f"output_dir={tmp_path / 'long'}")
        output = run(recipe, *self.CONSTANT)
        capsys.readouterr()
        assert run(recipe, *long) == output
        assert "training.total_tokens 3,072 -> 4,096" in capsys.readouterr().out
        assert [row for row in exact_rows(output) if "loss" in row] == [
            row for row in exact_rows(expected) if "loss" in row
        ]
        record = json.loads((output / "run.json").read_text())
        assert record["num_tokens"] == 4096

    @pytest.mark.parametrize(
        "overrides",
        [(), ("schedule.name=wsd", "schedule.decay_tokens=512"), (*CONSTANT, "training.seed=1")],
        ids=["cosine", "wsd that has decayed", "another seed"],
    )
    def test_otherwise_it_is_refused(self, recipe, overrides):
        run(recipe, *[key for key in overrides if "seed" not in key])
        with pytest.raises(InputError, match=r"total_tokens: was 3072, is 4096|training\.seed: was"):
            run(recipe, *overrides, "training.total_tokens=4096")

    def test_shorter_is_refused(self, recipe):
        run(recipe, *self.CONSTANT)
        with pytest.raises(InputError, match=r"training\.total_tokens: was 3072, is 2048"):
            run(recipe, *self.CONSTANT, "training.total_tokens=2048")


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_a_warmup_longer_than_the_run_is_a_warning(recipe, name, capsys):
    """With the highest rate: here 3072 of 6144 tokens of the warm-up."""
    floor = "null" if name == "constant" else "0.0"
    output = run(recipe, "schedule.warmup_tokens=6144", f"schedule.name={name}", f"schedule.floor={floor}")
    assert "the highest learning rate is 0.0025, not schedule.peak 0.005" in " ".join(capsys.readouterr().out.split())
    assert max(row.get("learning_rate", 0) for row in read_metrics(output)) == pytest.approx(0.0025)


def test_a_complete_recipe_prints_no_defaults(recipe):
    opened = open_pretrain_run(load_pretrain_config(recipe))
    assert not [line for line in describe_recipe(opened.config, build_model(opened), 1, "off") if "defaults" in line]
