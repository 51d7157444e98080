"""Adapters: what is trained, in which precision, and that the written model is base plus adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.finetune.runs import tuned
from tests.finetune.test_sft_runs import assert_equal, weights
from tinyllama_hf import load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune import sft
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.trainer import load_base
from tinyllama_hf.inference.load import load, load_stock
from tinyllama_hf.pretrain.signals import Stopped


OPTIONS = ("training.epochs=3", "training.learning_rate=2e-2", "evaluation.every_steps=4")


@pytest.fixture
def trained(monkeypatch):
    """The dtypes of what the last run trains, by parameter."""
    import trl

    dtypes, train = {}, trl.SFTTrainer.train

    def watch(self, **options):
        dtypes.update({n: p.dtype for n, p in self.model.named_parameters() if p.requires_grad})
        return train(self, **options)

    monkeypatch.setattr(trl.SFTTrainer, "train", watch)
    return dtypes


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_the_written_model_is_the_base_with_the_adapter(recipe, base, trained, kind):
    from peft import PeftModel

    pytest.importorskip("bitsandbytes")
    folder = tuned(recipe, f"adapter.kind={kind}", *OPTIONS)
    record = json.loads((folder / "provenance.json").read_text())
    assert record["held_out_loss"]["after"] < 0.7 * record["held_out_loss"]["before"]
    assert set(trained.values()) == {torch.float32} and all("lora_" in name for name in trained)
    assert any("magnitude" in name for name in trained) == (kind == "dora")
    with_adapter = PeftModel.from_pretrained(load_stock(base)[0], folder / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(with_adapter(ids).logits, load_stock(folder)[0](ids).logits, atol=1e-4, rtol=1e-4)
    assert (folder / "adapter" / "chat_template.jinja").is_file() and (folder / "adapter" / "tokenizer.json").is_file()


def test_qlora_trains_over_weights_in_4_bit_that_evaluations_do_not_damage(recipe, monkeypatch):
    """The base of the run is quantized, and has the same bits after the evaluations of a run."""
    pytest.importorskip("bitsandbytes")
    import trl

    states, train = [], trl.SFTTrainer.train

    def frozen(model):
        return {
            name: tensor.clone() for name, tensor in model.base_model.model.state_dict().items() if "lora" not in name
        }

    def watch(self, **options):
        states.append(frozen(self.model))
        result = train(self, **options)
        states.append(frozen(self.model))
        return result

    monkeypatch.setattr(trl.SFTTrainer, "train", watch)
    tuned(recipe, "adapter.kind=qlora", *OPTIONS)
    assert_equal(*states)
    assert any("quant_state" in name for name in states[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qlora", "dora"])
def test_stopped_and_resumed(recipe, monkeypatch, kind):
    pytest.importorskip("bitsandbytes")
    options = (f"adapter.kind={kind}", *OPTIONS)
    folder = tuned(recipe, *options)
    expected, evaluate, calls = weights(folder), sft.FinetuneRun.evaluate, []

    def stop(self, model):
        calls.append(None)
        if len(calls) == 3:
            import signal

            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, model)

    monkeypatch.setattr(sft.FinetuneRun, "evaluate", stop)
    with pytest.raises(Stopped):
        sft.finetune_run(sft.open_run(load_finetune_config(recipe, options), overwrite=True), overwrite=True)
    monkeypatch.undo()
    assert_equal(weights(tuned(recipe, *options)), expected)


def test_the_base_is_loaded_in_the_precision_of_the_run(recipe):
    """Under an adapter in that of the recipe; all weights are trained in fp32, also with bf16 autocast."""

    def dtype(*overrides):
        return load_base(sft.open_run(load_finetune_config(recipe, overrides))).dtype

    assert dtype("training.precision=bf16", "adapter.kind=lora") == torch.bfloat16
    assert dtype("training.precision=bf16") == dtype("adapter.kind=lora") == torch.float32


def test_modules_to_save(recipe, base):
    """The head is trained as a whole next to the adapter, and is in the written model."""
    folder = tuned(
        recipe, "adapter.kind=lora", "adapter.targets=[q_proj]", "adapter.modules_to_save=[lm_head]", *OPTIONS
    )
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "q_proj" in name} | {"lm_head.weight"}


CHATML = ("chat.template=chatml", "model.new_tokens=<|im_start|>,<|im_end|>", *OPTIONS)


@pytest.fixture(scope="module")
def tied_base(base, tmp_path_factory):
    """The base model with one matrix for input and output embedding."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    model, _ = load_stock(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("full", False),
        ("lora", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("full", True), ("lora", False), ("qlora", False), ("qlora", True))
        ),
    ],
)
def test_new_tokens(recipe, base, tied_base, kind, tied):
    """ChatML on a tokenizer without its tokens: their rows are trained and written, and replies end with one."""
    pytest.importorskip("bitsandbytes")
    saved = () if kind == "full" else ("adapter.modules_to_save=embed_tokens,lm_head",)
    options = (f"model.path={tied_base if tied else base}", f"adapter.kind={kind}", *saved, *CHATML)
    folder = tuned(recipe, *options, "training.epochs=8", "training.learning_rate=5e-3")
    model, tokenizer = load_stock(folder)
    assert model.config.tie_word_embeddings == tied
    written = model.get_input_embeddings().weight
    assert len(written) == len(tokenizer) == 514 and tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 513
    assert not torch.equal(written[512], written[513]), "both began as the mean"
    record = json.loads((folder / "provenance.json").read_text())
    assert record["held_out_loss"]["after"] < 0.5 * record["held_out_loss"]["before"]
    assert record["stop_rate"]["after"] == 1.0
    if kind != "full":
        adapted, _ = load(tied_base if tied else base, adapter=folder / "adapter")
        ids = torch.tensor([[1, 512, *range(3, 40), 513]])
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_new_tokens_that_an_adapter_would_not_train(recipe):
    with pytest.raises(InputError, match=r"adapter\.modules_to_save to embed_tokens,lm_head"):
        sft.open_run(load_finetune_config(recipe, [*CHATML, "adapter.kind=lora"]))
    with pytest.raises(InputError, match="new_tokens: '</s>' is in the vocabulary"):
        sft.open_run(load_finetune_config(recipe, ["model.new_tokens=</s>"]))
