"""Training with custom heads, losses and tools: equal to `LlamaForCausalLM`, or refused."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from tests.test_modeling import ids, make_pair
from tinyllama_hf import TinyLlamaForCausalLM


SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
TOKENS = ids(2, 17, SMALL["vocab_size"])
LABELS = TOKENS.clone()
LABELS[0, :5] = -100


def small_pair(**overrides) -> list[LlamaForCausalLM]:
    """Returns (ours, stock) in training mode with equal weights."""
    return [model.train() for model in make_pair(**{**SMALL, **overrides})]


def assert_trains_equally(
    ours: torch.nn.Module, stock: torch.nn.Module, lean: bool, labels: torch.Tensor = LABELS, **arguments
) -> None:
    """Asserts equal loss and gradients; `lean` is whether ours computed the loss without logits."""
    outputs = [model(input_ids=TOKENS, labels=labels, **arguments) for model in (ours, stock)]
    assert (outputs[0].logits is None) == lean
    assert outputs[0].loss.shape == ()
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (ours, stock)]
    assert trained[0].keys() == trained[1].keys() and trained[0]
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter.grad, trained[1][name].grad, atol=1e-5, rtol=1e-4, msg=name)


class TestOtherHeads:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("size", [64, 128])
    def test_resized_embeddings(self, size, tied):
        pair = small_pair(tie_word_embeddings=tied)
        for model in pair:
            torch.manual_seed(0)
            model.resize_token_embeddings(size, mean_resizing=False)
        pair[1].load_state_dict(pair[0].state_dict())  # new rows have another standard deviation
        outputs = [model(input_ids=TOKENS % 64, labels=(TOKENS % 64).masked_fill(LABELS < 0, -100)) for model in pair]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
        for output in outputs:
            output.loss.backward()
        for a, b in zip(*(model.parameters() for model in pair), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("how", ["replaced", "given a bias"])
    def test_a_head_of_the_users(self, how):
        pair = small_pair()
        torch.manual_seed(0)
        head = torch.nn.Linear(SMALL["hidden_size"], SMALL["vocab_size"])
        for model in pair:
            if how == "replaced":
                model.lm_head = copy.deepcopy(head)
            else:
                model.lm_head.bias = torch.nn.Parameter(head.bias.detach().clone())
        assert_trains_equally(*pair, lean=False)

    @pytest.mark.parametrize(
        ("tied", "options"),
        [
            (False, {"target_modules": ["q_proj", "lm_head"]}),
            (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
            (False, {"target_modules": ["q_proj"]}),
            (True, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7, 11]}),
        ],
    )
    def test_adapters(self, tied, options):
        peft = pytest.importorskip("peft")
        pair = []
        for model in small_pair(tie_word_embeddings=tied):
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
            pair.append(peft.get_peft_model(model, config))
        assert_trains_equally(
            *pair, lean=options.keys() == {"target_modules"} and "lm_head" not in options["target_modules"]
        )

    def test_tensor_parallelism(self, tmp_path):
        """On a mesh of one process, weights are DTensors too; with FSDP2 the loss stays lean."""
        from torch import distributed
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        store = distributed.FileStore(str(tmp_path / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = distributed.init_device_mesh("cpu", (1,))
            plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
            ours, stock = (parallelize_module(model, mesh, plan) for model in small_pair())
            outputs = [model(input_ids=TOKENS, labels=LABELS) for model in (ours, stock)]
            assert outputs[0].logits is not None
            for output in outputs:
                output.loss.backward()
            assert torch.equal(outputs[0].loss, outputs[1].loss)
            assert torch.equal(*(m.lm_head.weight.grad.full_tensor() for m in (ours, stock)))

            sharded, stock = small_pair()
            fully_shard(sharded.lm_head, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            output = sharded(input_ids=TOKENS, labels=LABELS)
            assert output.logits is None
            torch.testing.assert_close(output.loss, stock(input_ids=TOKENS, labels=LABELS).loss)
        finally:
            distributed.destroy_process_group()


class TestOtherLosses:
    @pytest.mark.parametrize("ignore_index", [-100, 7])
    def test_ignore_index(self, ignore_index):
        labels = LABELS.where(LABELS >= 0, ignore_index)
        assert_trains_equally(*small_pair(), ignore_index == -100, labels, ignore_index=ignore_index)

    def test_a_loss_function_of_the_users(self):
        def z_loss(logits, labels, vocab_size, **kwargs):
            return logits.logsumexp(-1).square().mean() + labels.clamp(min=0).float().mean()

        pair = small_pair()
        for model in pair:
            model.loss_function = z_loss
        assert_trains_equally(*pair, lean=False)

    def test_a_class_of_another_name_has_the_same_loss(self, caplog):
        class Renamed(TinyLlamaForCausalLM):
            pass

        ours, stock = small_pair()
        renamed = Renamed(ours.config).train()
        renamed.load_state_dict(ours.state_dict())
        assert_trains_equally(renamed, stock, lean=True)
        assert not caplog.records

    @pytest.mark.parametrize("label", [-1, -101, SMALL["vocab_size"]])
    def test_a_label_that_is_no_id(self, label):
        labels = LABELS.clone()
        labels[1, 3] = label
        for model in small_pair():
            with pytest.raises(IndexError, match=f"Target {label} "):
                model(input_ids=TOKENS, labels=labels)

    @pytest.mark.parametrize("backward", ["grad", "backward"])
    def test_second_derivatives_are_refused(self, backward):
        """They would be wrong; from the logits they equal those of stock."""
        ours, stock = small_pair()
        penalties = []
        for model in (ours, stock):
            loss = model.loss_function(model(input_ids=TOKENS).logits, LABELS, SMALL["vocab_size"])
            (gradient,) = torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
            penalties.append(torch.autograd.grad(gradient.square().sum(), model.lm_head.weight)[0])
        torch.testing.assert_close(*penalties)
        loss = ours(input_ids=TOKENS, labels=LABELS).loss
        with pytest.raises(RuntimeError, match="create_graph=True"):
            if backward == "grad":
                torch.autograd.grad(loss, ours.lm_head.weight, create_graph=True)
            else:
                loss.backward(create_graph=True)

    def test_transforms_of_functions(self):
        """Per-sample gradients equal those of stock."""
        found = []
        for model in small_pair():
            parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

            def loss(head, tokens, model=model, parameters=parameters):
                given = {**parameters, "lm_head.weight": head}
                return torch.func.functional_call(
                    model, given, (), {"input_ids": tokens[None], "labels": tokens[None]}
                ).loss

            of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
            found.append(of_each(parameters["lm_head.weight"], TOKENS))
        assert found[0].shape == (2, SMALL["vocab_size"], SMALL["hidden_size"])
        torch.testing.assert_close(*found)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize("wrapped", [False, True])
def test_label_smoothing_in_trainer(tmp_path, wrapped):
    """Trainer shifts labels only for classes that it knows by name, and would train on unshifted ones otherwise."""
    losses = []
    for model in small_pair():
        if wrapped:
            peft = pytest.importorskip("peft")
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        steps = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "seed": 0}
        arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **steps, **quiet)
        trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
