"""`from_pretrained` compared with stock: all sources of files, configurations, adapters and Auto classes."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.local_hub.accounts import READ_TOKEN
from tests.local_hub.server import LocalHub
from tests.test_modeling import ids, make_pair
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.errors import InputError
from tinyllama_hf.modeling_tinyllama import TinyLlamaModel


REPO = "demo/marked"
COMMITS = {"main": "a" * 40, "dev": "b" * 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a plain Llama folder."""
    folder = tmp_path_factory.mktemp("model")
    make_pair(hidden_size=64, intermediate_size=96, vocab_size=96, num_hidden_layers=1)[0].save_pretrained(folder)
    return folder


def marked(folder: Path, target: Path, value: int, as_tinyllama: bool = False) -> None:
    """Writes the model with a given value in weights, configuration and generation settings."""
    model = TinyLlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.fill_(value)
    model.config.max_position_embeddings = value
    model.generation_config.max_new_tokens = value
    model.save_pretrained(target, as_tinyllama=as_tinyllama)


def marks(model: torch.nn.Module) -> tuple:
    return (
        model.lm_head.weight.unique().tolist(),
        model.config.max_position_embeddings,
        model.generation_config.max_new_tokens,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "as_tinyllama"])
def cache(request, folder, tmp_path_factory) -> Path:
    """Returns a Hub cache with a repository of two branches, each with a subfolder."""
    cache = tmp_path_factory.mktemp("cache")
    repo = cache / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    for i, (branch, commit) in enumerate(COMMITS.items()):
        (repo / "refs" / branch).write_text(commit)
        marked(folder, repo / "snapshots" / commit, 101 + i, request.param)
        marked(folder, repo / "snapshots" / commit / "inner", 201 + i, request.param)
    return cache


class TestPlaces:
    @pytest.mark.parametrize("kind", [TinyLlamaForCausalLM, AutoModelForCausalLM])
    @pytest.mark.parametrize(
        ("arguments", "value"),
        [
            ({}, 101),
            ({"revision": "dev"}, 102),
            ({"revision": COMMITS["dev"], "local_files_only": True}, 102),
            ({"subfolder": "inner"}, 201),
            ({"subfolder": "inner", "revision": "dev", "dtype": torch.float64}, 202),
        ],
    )
    def test_of_a_cache(self, cache, kind, arguments, value):
        model = kind.from_pretrained(REPO, cache_dir=cache, **arguments)
        assert marks(model) == ([value], value, value)
        assert model.dtype == arguments.get("dtype", torch.float32)

    def test_what_the_cache_has_not_is_not_found(self, cache, tmp_path):
        for arguments in ({"revision": "other"}, {"cache_dir": tmp_path}, {"subfolder": "other"}):
            with pytest.raises(OSError):
                TinyLlamaForCausalLM.from_pretrained(REPO, **{"cache_dir": cache, **arguments})

    def test_of_a_private_repository(self, folder, tmp_path, monkeypatch):
        """The token is sent for every file, and `force_download` downloads each of them again."""
        from huggingface_hub import HfApi, constants

        with LocalHub(tmp_path / "hub").serving() as hub:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
            template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/{repo_id}", 1)[1]
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}" + template)
            api = HfApi(endpoint=hub.endpoint, token="hf_local_write")
            api.create_repo(REPO, private=True)
            marked(folder, tmp_path / "own", 103)
            api.upload_folder(repo_id=REPO, folder_path=tmp_path / "own")
            options = {"cache_dir": tmp_path / "cache"}
            with pytest.raises(OSError, match=REPO):
                TinyLlamaForCausalLM.from_pretrained(REPO, token=False, **options)
            assert marks(TinyLlamaForCausalLM.from_pretrained(REPO, token=READ_TOKEN, **options)) == ([103], 103, 103)
            (weights,) = (tmp_path / "cache").rglob("model.safetensors")
            before = weights.resolve().stat().st_mtime_ns
            TinyLlamaForCausalLM.from_pretrained(REPO, token=READ_TOKEN, force_download=True, **options)
            assert weights.resolve().stat().st_mtime_ns > before

    def test_of_a_gguf_file(self, folder):
        with pytest.raises(InputError, match=r"gguf_file='model\.gguf'"):
            TinyLlamaForCausalLM.from_pretrained(folder, gguf_file="model.gguf")


class TestConfigurations:
    @pytest.mark.parametrize("given", ["str", "PathLike", "file", "LlamaConfig", "TinyLlamaConfig", "fields"])
    def test_that_are_given(self, folder, tmp_path, given):
        config = LlamaConfig.from_pretrained(folder, max_position_embeddings=99)
        config.save_pretrained(tmp_path)
        arguments = {
            "str": {"config": str(tmp_path)},
            "PathLike": {"config": tmp_path},
            "file": {"config": str(tmp_path / "config.json")},
            "LlamaConfig": {"config": config},
            "TinyLlamaConfig": {"config": TinyLlamaConfig.from_llama(config)},
            "fields": {"max_position_embeddings": 99},
        }[given]
        model = TinyLlamaForCausalLM.from_pretrained(folder, **arguments)
        assert type(model.config) is TinyLlamaConfig
        assert model.config.max_position_embeddings == 99

    def test_a_plain_file_has_llamas_defaults(self, tmp_path):
        """TinyLlama's defaults differ: files of Llama 1 do not have the number of key/value heads."""
        (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8}')
        ours, stock = (kind.from_pretrained(tmp_path) for kind in (TinyLlamaConfig, LlamaConfig))
        assert type(ours) is TinyLlamaConfig
        for name in ("num_key_value_heads", "num_hidden_layers", "intermediate_size", "rms_norm_eps", "hidden_size"):
            assert getattr(ours, name) == getattr(stock, name), name

    def test_of_another_family(self, folder, tmp_path):
        from transformers import GPT2Config

        config = GPT2Config(n_layer=1, n_embd=8, n_head=2)
        config.save_pretrained(tmp_path)
        for given in (config, str(tmp_path)):
            with pytest.raises(InputError, match="gpt2"):
                TinyLlamaForCausalLM.from_pretrained(folder, config=given)
        with pytest.raises(InputError, match="gpt2"):
            TinyLlamaConfig.from_pretrained(tmp_path)


class TestAdapters:
    @pytest.mark.parametrize("embedded", [False, True], ids=["alone", "next to the weights"])
    def test_a_folder(self, folder, tmp_path, embedded):
        """Returns base and adapter, as stock loads them."""
        peft = pytest.importorskip("peft")
        base = LlamaForCausalLM.from_pretrained(folder)
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
        if embedded:
            shutil.copytree(folder, tmp_path / "adapter", dirs_exist_ok=True)
        kinds = (TinyLlamaForCausalLM, LlamaForCausalLM)
        ours, stock = (kind.from_pretrained(tmp_path / "adapter") for kind in kinds)
        assert type(ours) is TinyLlamaForCausalLM and ours.active_adapters() == ["default"]
        found, expected = (model(input_ids=ids(1, 9, 96)).logits for model in (ours, stock))
        assert torch.equal(found, expected)
        assert not torch.equal(found, LlamaForCausalLM.from_pretrained(folder)(input_ids=ids(1, 9, 96)).logits)


class TestAutoModel:
    def test_knows_the_configuration(self, folder, tmp_path):
        config = TinyLlamaConfig.from_pretrained(folder)
        assert type(AutoModel.from_config(config)) is TinyLlamaModel
        model = TinyLlamaForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path, as_tinyllama=True)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is TinyLlamaModel
        for name, tensor in model.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_the_tables_of_the_library_stay_whole(self):
        """The tables of names, which `Trainer` and pipelines read, and those of classes, which share them."""
        from transformers.models.auto import modeling_auto

        for table, kind in (("MODEL_MAPPING", TinyLlamaModel), ("MODEL_FOR_CAUSAL_LM_MAPPING", TinyLlamaForCausalLM)):
            assert getattr(modeling_auto, f"{table}_NAMES")["tinyllama"] == kind.__name__
            mapping = getattr(modeling_auto, table)
            assert mapping[TinyLlamaConfig] is kind
            # Read the whole table, without importing the other models of the library.
            assert mapping._load_attr_from_module("tinyllama", "TinyLlamaConfig") is TinyLlamaConfig
            assert mapping._load_attr_from_module("tinyllama", kind.__name__) is kind

    def test_a_subclass_is_a_causal_model_too(self):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        from tinyllama_hf.quantization.quantized_model import QuantizedTinyLlama

        assert QuantizedTinyLlama.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
