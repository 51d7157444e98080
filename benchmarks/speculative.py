"""Speculative decoding in batches: tokens/s compared with plain decoding and stock assisted generation, and the bound.

    python benchmarks/speculative.py --pair runs/demo/pretrain/milestones/NAME runs/demo/draft/milestones/NAME

There are two kinds of pairs: a trained one, and one with the geometry of 1.1b and a chosen agreement. In the second,
the blocks of the target do their work but add nothing, since their last projections are zero, so the next token is a
function of the last one. The draft has a tenth of the size, and its blocks add nothing either. For a chosen share of
the vocabulary its head predicts the next token of the target, and for the rest another one.
"""

import argparse
import copy
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save
from transformers import LlamaForCausalLM
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding.draft_length import expected_tokens
from tinyllama_hf.decoding.engine import LONGEST_DRAFT
from tinyllama_hf.decoding.grouped_attention import packed_attention
from tinyllama_hf.decoding.proposals import ModelProposer, SpeculationStatistics
from tinyllama_hf.decoding.ragged_cache import RaggedModel
from tinyllama_hf.decoding.rows import Rows
from tinyllama_hf.decoding.speculative import speculative_generate
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.planning.kv_cache import measure_cache


# A tenth of the cost of 1.1b, with its vocabulary: the head is then half of the draft.
DRAFT_GEOMETRY = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
}


@torch.no_grad()
def controlled_model(dtype: torch.dtype, device: str = "cpu", **overrides: Any) -> LlamaForCausalLM:
    """A model of 1.1b geometry, except for `overrides`, in which the blocks do their work but add nothing."""
    with torch.device(device):
        model = LlamaForCausalLM(TinyLlamaConfig.preset("1.1b", **overrides).to_llama()).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@torch.no_grad()
def set_agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, agreement: float) -> None:
    """Sets, in place, the next token that each token has: in the draft another one with probability 1 - `agreement`.

    If the blocks add nothing, the hidden state is the normalized embedding. The first `bits` values of the embedding
    are the binary code of the next token, as +1 and -1. The head scores each token by that code, so the next one wins.
    """
    vocabulary = target.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    follower = torch.randperm(vocabulary, generator=generator)
    wrong = torch.rand(vocabulary, generator=generator) >= agreement
    drafted = torch.where(wrong, (follower + 1) % vocabulary, follower)
    bits = (vocabulary - 1).bit_length()
    codes = ((torch.arange(vocabulary)[:, None] >> torch.arange(bits)) & 1).mul(2).sub(1)
    for model, following in ((target, follower), (draft, drafted)):
        for weight, rows in ((model.model.embed_tokens.weight, codes[following]), (model.lm_head.weight, codes)):
            weight.zero_()
            weight[:, :bits] = rows.to(weight)


class Row:
    """Measures one setting: every variant once a round, one after the other."""

    def __init__(self, target: LlamaForCausalLM, draft: LlamaForCausalLM, batch: int, new_tokens: int, prompt: int):
        self.target, self.draft, self.batch, self.new_tokens = target, draft, batch, new_tokens
        generator = torch.Generator().manual_seed(batch)
        # Ragged, as real prompts are: from half the length to all of it.
        lengths = torch.linspace(prompt // 2, prompt, batch).long() if batch > 1 else torch.tensor([prompt])
        width = int(lengths.max())
        ids = torch.randint(3, target.config.vocab_size, (batch, width), generator=generator)
        self.mask = (torch.arange(width) >= width - lengths[:, None]).long().to(target.device)
        self.ids = (ids * self.mask.cpu()).to(target.device)
        self.statistics: list[SpeculationStatistics] = []
        self.tokens = batch * new_tokens

    def _options(self, do_sample: bool) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "pad_token_id": 0, **sampling}

    def plain(self, do_sample: bool = False) -> None:
        self.target.generate(self.ids, attention_mask=self.mask, **self._options(do_sample))

    def plain_packed(self, do_sample: bool = False) -> None:
        """Plain decoding with our attention, so that its gain is not counted as that of the draft."""
        with packed_attention([self.target.config]):
            self.plain(do_sample)

    def stock_assisted(self) -> None:
        for row in range(self.batch):
            real = self.mask[row].bool()
            draft = self.draft
            draft.generation_config = copy.deepcopy(draft.generation_config)
            self.target.generate(self.ids[row][real][None], attention_mask=self.mask[row][real][None],
                                 assistant_model=draft, **self._options(False))  # fmt: skip

    def ours(self, do_sample: bool = False) -> None:
        options = {k: v for k, v in self._options(do_sample).items() if k != "min_new_tokens"}
        output = speculative_generate(
            self.target, self.draft, self.ids, self.mask, return_dict_in_generate=True, **options
        )
        self.statistics.append(output.statistics)

    def run(self, rounds: int, variants: dict[str, Callable[[], None]]) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, variant in variants.items():
                began = time.perf_counter()
                variant()
                _wait(self.target)
                if number:  # the first round also allocates
                    seconds[name].append(time.perf_counter() - began)
        result = {name: round(self.tokens / statistics.median(times), 2) for name, times in seconds.items()}
        result |= {f"ours_over_{name}": round(result["ours"] / result[name], 3) for name in variants if name != "ours"}
        counted = self.statistics[-1]
        result |= {
            "batch": self.batch,
            "acceptance": round(counted.acceptance, 3),
            "tokens_per_pass": round(counted.tokens_per_pass, 2),
            "plain_rounds": counted.plain_rounds,
            "rounds": counted.target_passes,
        }
        return result | self._costs(counted)

    def _costs(self, counted: SpeculationStatistics) -> dict[str, Any]:
        """Measured passes, what perfect scheduling makes of them, and what ours spent in passes of the target."""
        middle = self.ids.shape[1] + self.new_tokens // 2
        plain = pass_seconds(self.target, self.batch, 1, middle)
        draft = pass_seconds(self.draft, self.batch, 1, middle)
        verify = {width: pass_seconds(self.target, self.batch, width + 1, middle) for width in (1, 2, 3, 4, 6, 8)}
        acceptance = counted.accepted / max(1, counted.verified)
        speeds = {w: plain * expected_tokens(acceptance, w) / (w * draft + v) for w, v in verify.items()}
        best = max(speeds, key=speeds.__getitem__)
        return {
            "judged_acceptance": round(acceptance, 3),
            "draft_cost": round(draft / plain, 3),
            "verification_cost": {width: round(value / plain, 3) for width, value in verify.items()},
            "bound_over_plain_packed": round(max(1.0, speeds[best]), 3),
            "bound_draft_length": best if speeds[best] > 1 else 0,
            "target_pass_equivalents": round(counted.target_passes + draft / plain * counted.draft_passes, 1),
        }


class QueuedRow(Row):
    """The same with more prompts than rows: a finished row is given to the next prompt, with and without a draft."""

    pad_token_id, eos_token_id = 0, None  # in the place of a tokenizer: tokens have no text here

    def __init__(self, *arguments: Any, prompts_per_row: int):
        super().__init__(*arguments)
        prompts = [row[mask.bool()].tolist() for row, mask in zip(self.ids, self.mask, strict=True)]
        self.requests = [
            Request(i, prompts[i % self.batch][i % 5 :], self.new_tokens) for i in range(self.batch * prompts_per_row)
        ]
        self.tokens *= prompts_per_row

    def plain_packed(self, do_sample: bool = False) -> None:
        list(generate_many(self.target, self, self.requests, self.batch, Sampling(float(do_sample), 1.0)))

    def ours(self, do_sample: bool = False) -> None:
        draft = ModelProposer(self.draft)
        sampling = Sampling(float(do_sample), 1.0)
        list(generate_many(self.target, self, self.requests, self.batch, sampling, draft=draft))
        self.statistics.append(draft.statistics)


@torch.no_grad()
def pass_seconds(model: LlamaForCausalLM, batch: int, tokens: int, length: int, repeats: int = 7) -> float:
    """Median seconds of a pass over `tokens` tokens of each of `batch` rows that have read about `length`."""
    rows, reader = _read_rows(model, batch, length)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        reader.read(rows, tokens, 0, tokens)  # they are read again, into the same slots
        _wait(model)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@torch.no_grad()
def _read_rows(model: LlamaForCausalLM, batch: int, length: int) -> tuple[Rows, RaggedModel]:
    """Rows of about `length` tokens, and a reader that has read them."""
    lengths = length - torch.arange(batch) % 7
    mask = (torch.arange(length) >= length - lengths[:, None]).long().to(model.device)
    limit = StoppingCriteriaList([MaxLengthCriteria(length + 1)])
    rows, reader = Rows(torch.ones_like(mask), mask, limit, length + 1), RaggedModel(model)
    reader.read(rows, length)
    return rows, reader


def _wait(model: LlamaForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def memory(target: LlamaForCausalLM, draft: LlamaForCausalLM, batch: int, length: int) -> dict[str, float]:
    """MB of the weights and of the caches, with the draft and without."""
    sizes = {}
    for name, model in (("target", target), ("draft", draft)):
        _, reader = _read_rows(model, batch, length)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        sizes[f"{name}_weights_mb"] = round(weights / 1e6, 1)
        sizes[f"{name}_cache_mb"] = round(measure_cache(reader.cache).total / 1e6, 1)
    return sizes


def measure(target: Any, draft: Any, batches: list[int], args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Rows of the table, one per batch size; each is printed when it is measured."""
    rows = []
    for batch in batches:
        sizes = target, draft, batch, args.new_tokens, args.prompt_tokens
        row = QueuedRow(*sizes, prompts_per_row=args.queue) if args.queue else Row(*sizes)
        variants: dict[str, Callable[[], None]] = {"plain_packed": row.plain_packed, "ours": row.ours}
        if not args.queue:
            variants = {"plain": row.plain, **variants}
            if batch <= args.stock_up_to:
                variants["stock_assisted"] = row.stock_assisted
        pair = f"{name}, {args.queue} prompts a row" if args.queue else name
        rows.append({"pair": pair, **row.run(args.rounds, variants)})
        print(json.dumps(rows[-1]), flush=True)
    if args.sampled:
        row = Row(target, draft, batches[0], args.new_tokens, args.prompt_tokens)
        variants = {name: functools.partial(getattr(row, name), True) for name in ("plain", "plain_packed", "ours")}
        sampled = row.run(args.rounds, variants)
        rows.append({"pair": f"{name}, sampled", **sampled})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("TARGET", "DRAFT"), help="Two trained folders.")
    parser.add_argument("--agreements", nargs="*", type=float, default=[0.1, 0.6, 0.75, 0.9])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock-up-to", type=int, default=1, help="Largest batch that stock runs row by row.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=22, help="Of the target of the controlled pair.")
    parser.add_argument(
        "--queue", type=int, default=0, help="Prompts for each row, one after the other; 0: one, and no queue."
    )
    parser.add_argument("--sampled", action="store_true", help="Also the first batch size with sampling.")
    parser.add_argument("--name", default="speculative", help="Of the file in results/.")
    args = parser.parse_args()
    dtype, rows, sizes = getattr(torch, args.dtype), [], {}
    if args.pair:
        target, draft = (load(folder, dtype=dtype)[0] for folder in args.pair)
        for model in (target, draft):
            model.generation_config.eos_token_id = None
        stock = [_stock(model) for model in (target, draft)]
        rows += measure(*stock, args.batches, args, "trained")
    for agreement in args.agreements:
        target = controlled_model(dtype, num_hidden_layers=args.layers)
        draft = controlled_model(dtype, **DRAFT_GEOMETRY)
        set_agreement(target, draft, agreement)
        rows += measure(target, draft, args.batches, args, f"1.1b, {agreement:.0%} agreement")
        sizes = memory(target, draft, args.batches[-1], args.prompt_tokens + args.new_tokens)
        del target, draft
    options = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "pair"
    }
    print(save(args.name, {"rows": rows, "memory": sizes, "options": options, "longest_draft": LONGEST_DRAFT}))


def _stock(model: TinyLlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in the stock class, so that all three variants run the same code."""
    plain = LlamaForCausalLM(model.config.to_llama()).to(model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


if __name__ == "__main__":
    main()
