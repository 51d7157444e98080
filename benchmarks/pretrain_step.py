"""A pretraining step on this machine: ours, HF `Trainer` on stock `LlamaForCausalLM`, and litgpt's pretraining loop.

    pip install --target PEERS --no-deps litgpt==0.5.13 lightning lightning-utilities torchmetrics pytorch-lightning \
        jsonargparse docstring-parser typeshed-client
    python benchmarks/pretrain_step.py --peers PEERS [--rounds 9] [--profile]

All use the same architecture, initial weights, batches, bf16 autocast over fp32 weights, gradient clipping and AdamW,
without weight decay, which Trainer does not apply to norms. Each variant runs its own unchanged loop: `Trainer.train`;
`pretrain.fit` of litgpt with its `GPT`, its loss and Fabric in bf16-mixed, with and without the `torch.compile` of its
`main`; and our `TrainStep`. They take turns step by step in one process; each waits at its next batch for its turn. A
turn is timed from batch to batch.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parent / "gpu"))

SHAPES = {
    # 37M parameters, four sequences of 512: the step that was measured before there was a package
    "37M": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    # the preset of recipes/pretrain/nano.yaml
    "nano": {},
}
LENGTH, MICRO, ACCUMULATION, VOCABULARY, RATE = 512, 4, 2, 32_000, 5e-4


class Text:
    """Real text as a source of blocks: the bytes of the standard library's code as ids below 256."""

    def __init__(self) -> None:
        from tinyllama_hf.data.embedded import documents

        text = "".join(document.text for document in documents("code"))
        self.ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def blocks(self, start: int, count: int) -> list[Any]:
        from tinyllama_hf.data.order import Block

        return [Block(0, (start + i) * 7919 % (len(self.ids) // LENGTH - 1)) for i in range(count)]

    def tokens(self, blocks: list[Any]) -> np.ndarray:
        return np.stack([self.ids[b.index * LENGTH : b.index * LENGTH + LENGTH + 1] for b in blocks])

    def micro_batch(self, number: int) -> torch.Tensor:
        """The `[micro, seq + 1]` tokens of a forward pass."""
        return torch.from_numpy(self.tokens(self.blocks(number * MICRO, MICRO)))


class Turns:
    """Runs the training loop of a library step by step, in a thread that waits at the first batch of each step."""

    def __init__(self, name: str, start: Callable[["Turns"], None]):
        self.name, self.seconds, self.losses = name, [], []
        self._go, self._done, self._end = threading.Semaphore(0), threading.Semaphore(0), False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, start: Callable[["Turns"], None]) -> None:
        try:
            start(self)
        except BaseException as error:
            self.error = error
        self._done.release()

    def batches(self, text: Text) -> Iterator[torch.Tensor]:
        """The micro-batches; the first is given out once the first turn begins."""
        for number in range(10**9):
            if number % ACCUMULATION == 0:
                self._done.release()
                self._go.acquire()
            yield text.micro_batch(number)

    def ready(self) -> None:
        """Waits until the loop asks for its first batch."""
        self._done.acquire()
        if self.error:
            raise self.error

    def step(self) -> None:
        """Runs one optimizer step of the loop and records its time."""
        began = time.perf_counter()
        self._go.release()
        self._done.acquire()
        self.seconds.append(time.perf_counter() - began)
        if self.error:
            raise self.error


class Ours:
    """The step of the package, called directly: its loop does nothing else off the logging steps."""

    def __init__(self, name: str, settings: dict[str, Any], text: Text):
        from workload import build

        self.name, self.seconds, self.losses, self.number = name, [], [], 0
        self.train_step, self.flops_per_token = build(settings, text)
        for group in self.train_step.optimizer.param_groups:
            group["weight_decay"] = 0.0
        self.train_step.config.schedule.peak = RATE

    def ready(self) -> None:
        pass

    def step(self) -> None:
        self.number += 1
        began = time.perf_counter()
        loss = self.train_step(self.number).loss
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(loss.item())


def stock_model(architecture: dict[str, Any]):
    """Stock Llama with the initial weights of ours."""
    from transformers import LlamaForCausalLM

    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM

    torch.manual_seed(0)
    ours = TinyLlamaForCausalLM(TinyLlamaConfig.preset("nano", max_position_embeddings=LENGTH, **architecture))
    stock = LlamaForCausalLM(ours.config.to_llama())
    stock.load_state_dict(ours.state_dict())
    return stock


def trainer(architecture: dict[str, Any], text: Text) -> Callable[[Turns], None]:
    """`Trainer.train` on stock Llama, with what its users set for speed: bf16, fused AdamW."""

    def start(turns: Turns) -> None:
        from torch.utils.data import IterableDataset
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        class Blocks(IterableDataset):
            def __iter__(self):
                for batch in turns.batches(text):
                    for row in batch:
                        yield {"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]}

        class Losses(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **_):
                turns.losses.extend([logs["loss"]] if "loss" in logs else [])

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=10**6, per_device_train_batch_size=MICRO, bf16=True, use_cpu=True,
            gradient_accumulation_steps=ACCUMULATION, optim="adamw_torch_fused", learning_rate=RATE, adam_beta2=0.95,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, report_to=[], logging_steps=1,
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        model = stock_model(architecture)
        loop = Trainer(model, arguments, train_dataset=Blocks(), callbacks=[Losses()])
        loop.remove_callback(PrinterCallback)
        loop.train()

    return start


def litgpt(architecture: dict[str, Any], text: Text, compiled: bool) -> Callable[[Turns], None]:
    """litgpt's `pretrain.fit`, prepared as its `main` prepares it."""

    def start(turns: Turns) -> None:
        import lightning as L
        from litgpt import pretrain
        from litgpt.args import EvalArgs, TrainArgs
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from litgpt.utils import instantiate_torch_optimizer

        stock = stock_model(architecture)
        shape = stock.config
        config = Config(
            name="bench", block_size=LENGTH, n_layer=shape.num_hidden_layers, n_embd=shape.hidden_size,
            n_head=shape.num_attention_heads, n_query_groups=shape.num_key_value_heads, padded_vocab_size=VOCABULARY,
            vocab_size=VOCABULARY, intermediate_size=shape.intermediate_size, rotary_percentage=1.0, bias=False,
            parallel_residual=False, norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP",
        )  # fmt: skip
        fabric = L.Fabric(devices=1, accelerator="cpu", precision="bf16-mixed")
        weights: dict[str, torch.Tensor] = {}
        copy_weights_hf_llama(config, {}, weights, dict(stock.state_dict()))
        model = GPT(config)
        model.load_state_dict(weights)
        model = fabric.setup(torch.compile(model) if compiled else model)
        optimizer = {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": RATE, "betas": (0.9, 0.95), "weight_decay": 0.0},
        }
        optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(optimizer, model.parameters(), fused=False))

        class Loader:
            def __iter__(self):
                return turns.batches(text)

            def __len__(self):
                return 10**6

        state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
        train = TrainArgs(
            global_batch_size=MICRO * ACCUMULATION,
            micro_batch_size=MICRO,
            max_tokens=10**12,
            max_norm=1.0,
            min_lr=RATE,
            lr_warmup_steps=0,
            log_interval=1,
            save_interval=None,
        )
        log_dict = fabric.log_dict
        fabric.log_dict = lambda metrics, step=None: (turns.losses.append(metrics["loss"]), log_dict(metrics, step))
        fabric.print = lambda *_: None
        pretrain.fit(fabric, 1, state, Loader(), [text.micro_batch(0)], Path(tempfile.mkdtemp()), None, train,
                     EvalArgs(interval=10**9, initial_validation=False, final_validation=False))  # fmt: skip

    return start


def step_settings(shape: str) -> dict[str, Any]:
    """Settings of our training step, as `workload.build` takes them."""
    return {
        "preset": "nano",
        "model": "ours",
        "sequence_length": LENGTH,
        "micro_batch_size": MICRO,
        "accumulation": ACCUMULATION,
        "precision": "bf16",
        "compile": "off",
        "attention": "sdpa",
        "kernels": "none",
        "activation_checkpointing": False,
        "loss_chunk_megabytes": 128,
        "architecture": SHAPES[shape] | {"vocab_size": VOCABULARY},
    }


def variants(shape: str, text: Text, peers: bool) -> dict[str, Any]:
    """All loops, each ready for its first step."""
    base = step_settings(shape)
    architecture = base["architecture"]
    found: dict[str, Any] = {"ours": Ours("ours", base, text)}
    from tinyllama_hf.pretrain import launch

    compiles = launch.resolve_compile("auto", torch.device("cuda"))[0]  # whether there is a compiler at all
    if compiles:
        found["ours, layers compiled"] = Ours("ours, layers compiled", base | {"compile": "layers"}, text)
    found["HF Trainer"] = Turns("HF Trainer", trainer(architecture, text))
    found["HF Trainer"].ready()
    if peers:
        for name, compiled in (("litgpt", False), ("litgpt, compiled", True)):
            if compiled and not compiles:
                continue
            found[name] = Turns(name, litgpt(architecture, text, compiled))
            found[name].ready()
    return found


def measure(shape: str, rounds: int, warmup: int, peers: bool) -> dict[str, Any]:
    """Rounds of one step of each variant, with the matrix rate measured in between."""
    from tinyllama_hf.pretrain.throughput import measure_matmul_flops

    found = variants(shape, Text(), peers)
    matmul = []
    for number in range(warmup + rounds):
        for variant in found.values():
            variant.step()
        if number >= warmup and number % 3 == 0:
            matmul.append(measure_matmul_flops(torch.device("cpu"), torch.bfloat16))
    tokens = LENGTH * MICRO * ACCUMULATION
    flops = found["ours"].flops_per_token
    rows = {}
    for name, variant in found.items():
        seconds = statistics.median(variant.seconds[warmup:])
        steps = min(len(v.losses) for v in found.values())
        rows[name] = {
            "tokens_per_second": round(tokens / seconds, 1),
            "share_of_matmul_rate": round(tokens / seconds * flops / statistics.median(matmul), 3),
            "loss_after_equal_steps": round(float(variant.losses[steps - 1]), 5),
            "steps": steps,
        }
    ours = rows["ours"]["tokens_per_second"]
    for row in rows.values():
        row["ours_is_times_as_fast"] = round(ours / row["tokens_per_second"], 2)
    return {"matmul_gflops": round(statistics.median(matmul) / 1e9), "gflop_per_token": flops / 1e9, "variants": rows}


def profile(shape: str) -> str:
    """Time by operator of our step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step = variants(shape, Text(), False)["ours"]
    step.step()
    with record(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step.step()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with litgpt; without it, Trainer is the only peer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--profile", action="store_true", help="our step by operator, and nothing else")
    arguments = parser.parse_args()
    if arguments.profile:
        for shape in arguments.shapes:
            print(shape, profile(shape), sep="\n")
        return
    if arguments.peers:
        sys.path.append(str(arguments.peers))
    from common import save

    figures = {}
    for shape in arguments.shapes:
        figures[shape] = measure(shape, arguments.rounds, arguments.warmup, arguments.peers is not None)
        print(
            f"{shape}: matmul {figures[shape]['matmul_gflops']} GFLOP/s, "
            f"{figures[shape]['gflop_per_token']:.3f} GFLOP per token"
        )
        for name, row in figures[shape]["variants"].items():
            print(
                f"  {name:<24} {row['tokens_per_second']:>8} tokens/s"
                f"  {row['share_of_matmul_rate']:.1%} of the matmul rate"
                f"  ours is {row['ours_is_times_as_fast']:.2f} times as fast"
                f"  loss {row['loss_after_equal_steps']} after {row['steps']} steps"
            )
    print(f"wrote {os.path.relpath(save('pretrain_step', figures))}")


if __name__ == "__main__":
    main()
