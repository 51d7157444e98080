"""Part `exactness`: in fp32, what recorded steps generate equals the loop of transformers for each prompt alone."""

import copy
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from comparison import GREEDY, Comparison, NoTokenizer, generated, noisy, ragged, wide_model
from measuring import Bench, Figures, endless, recorded, release, without_graphs
from quantization import write_folder

from tests.decoding.distributions import VOCABULARY, model, p_value, similar, warped
from tests.exactness import PAD, left_padded
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding import fixed_memory
from tinyllama_hf.decoding.proposals import ModelProposer
from tinyllama_hf.decoding.speculative import generate_recorded, speculative_generate
from tinyllama_hf.errors import InputError, one_line
from tinyllama_hf.inference.options import Sampling


LEAST_P = 1e-4


def checks(bench: Bench) -> Iterator[Figures]:
    """All checks, in fp32 without TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    target = wide_model(bench)
    for check in (drafts, short_prompts, plain, growing_buckets, joining_rows, seeds, changed_weights, sampled, saved):
        try:
            yield from check(bench, target)
        except Exception as error:  # the others are checked as well
            traceback.print_exc()
            yield {"variant": check.__name__, "wrong": 1, "error": f"{type(error).__name__}: {one_line(error)}"}
        fixed_memory.release(target)


@torch.no_grad()
def drafts(bench: Bench, _: Any) -> Iterator[Figures]:
    """Eight drafts, from equal to useless, in ragged batches of 1 to 8, through both ways to call them: 72 rows."""
    rows, drafted, accepted = Comparison(None), 0, 0
    for seed in range(bench.size(8, 4)):
        torch.manual_seed(seed)
        config = TinyLlamaConfig.preset("micro", **bench.size({}, {"vocab_size": 1000}))
        target = TinyLlamaForCausalLM(config).eval().to(bench.device)
        draft, rows.model = noisy(target, (0.0, 0.002, 0.006, 0.05)[seed % 4]), target
        prompts = ragged(1 + seed % 8, seed, config.vocab_size, 16)
        options = {"max_new_tokens": 24, "eos_token_id": 5}
        inputs = {name: tensor.to(bench.device) for name, tensor in left_padded(prompts).items()}
        output = speculative_generate(target, draft, **inputs, draft_length=4, return_dict_in_generate=True,
                                      **GREEDY, **options)  # fmt: skip
        drafted, accepted = drafted + output.statistics.drafted, accepted + output.statistics.accepted
        found = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for ours in (found, generated(target, prompts, assistant_model=draft, **options)):
            for prompt, new in zip(prompts, ours, strict=True):
                rows.add(prompt, new, **options)
    yield rows.row("drafts in batches of 1 to 8", drafted=drafted, accepted=accepted)


def short_prompts(bench: Bench, target: Any) -> Iterator[Figures]:
    """Prompts of one token, of which a draft has not read any before its first step."""
    rows = Comparison(target)
    torch.manual_seed(0)
    prompts = [[9], [10], [11]]
    ours = generated(target, prompts, max_new_tokens=20, assistant_model=noisy(target, 0.01))
    for prompt, new in zip(prompts, ours, strict=True):
        rows.add(prompt, new, max_new_tokens=20)
    yield rows.row("drafts after prompts of one token")


def plain(bench: Bench, target: Any) -> Iterator[Figures]:
    """Without a draft: ragged batches of 1 to 8, with settings that are a part of the steps and some that are not."""
    rows = Comparison(target)
    settings: tuple[dict[str, Any], ...] = (
        {}, {"eos_token_id": [7, 60, 100]}, {"repetition_penalty": 1.3}, {"min_new_tokens": 5, "eos_token_id": [7, 9]},
    )  # fmt: skip
    for options in settings:
        for batch in bench.size(range(1, 9), (1, 3)):
            prompts = ragged(batch, batch)
            ours = generated(target, prompts, max_new_tokens=20, **options)
            for prompt, new in zip(prompts, ours, strict=True):
                rows.add(prompt, new, max_new_tokens=20, **options)
        yield rows.row(f"plain, {', '.join(options) or 'greedy'}")
    before = recorded(target)
    ours = generated(target, ragged(3, 3), max_new_tokens=20)
    for prompt, new in zip(ragged(3, 3), ours, strict=True):
        rows.add(prompt, new, max_new_tokens=20)
    after = recorded(target)
    generated(target, ragged(3, 4), max_new_tokens=20)
    rows.wrong += recorded(target) != after
    yield rows.row("a second call records nothing", first_call=before[1], second_call=after[1])


def growing_buckets(bench: Bench, target: Any) -> Iterator[Figures]:
    """Prompts of 3, 60 and 100 tokens with 200 new ones: attention reads 128, 256 and 384 slots."""
    rows, generator = Comparison(target), random.Random(0)
    prompts = [generator.choices(range(8, 128), k=length) for length in (3, 60, 100)]
    ours = generated(target, prompts, max_new_tokens=200)
    for prompt, new in zip(prompts, ours, strict=True):
        rows.add(prompt, new, max_new_tokens=200)
    yield rows.row("buckets that grow past 128 and 256")


def joining_rows(bench: Bench, target: Any) -> Iterator[Figures]:
    """Places are filled by the next prompts, plain and with a draft."""
    generator, rows = random.Random(1), Comparison(target)
    requests = [Request(key, prompt, generator.choice((3, 9, 30)))
                for key, prompt in enumerate(ragged(bench.size(40, 10), 5))]  # fmt: skip
    requests.append(Request(len(requests), [9, 10], 140))
    torch.manual_seed(1)
    for name, draft in (("", None), (" with a draft", ModelProposer(noisy(target, 0.01)))):
        for done in generate_many(target, NoTokenizer(), requests, 4, Sampling(0, 1.0), draft=draft):
            request = requests[done.key]
            rows.add(request.ids, done.ids, max_new_tokens=request.max_new_tokens)
        yield rows.row(f"rows that join{name}", acceptance=round(draft.statistics.acceptance, 2) if draft else None)


def seeds(bench: Bench, target: Any) -> Iterator[Figures]:
    """A seed gives the same samples twice, in another batch size and without graphs."""
    requests = [Request(key, [9 + key, 10, 11], 6 + 5 * key) for key in range(6)]

    def samples(batch: int) -> dict[int, list[int]]:
        found = generate_many(target, NoTokenizer(), requests, batch, Sampling(1.0, 0.9), seed=3)
        return {done.key: done.ids for done in found}

    first, others = samples(6), {"again": samples(6), "batches of 2": samples(2)}
    with without_graphs():
        others["without graphs"] = samples(6)
    for name, other in others.items():
        wrong = sum(first[key] != other[key] for key in first)
        yield {"variant": f"a seed: {name}", "rows": len(first), "equal": len(first) - wrong, "wrong": wrong}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generated(target, ragged(2, 1), do_sample=True, num_return_sequences=3, max_new_tokens=20))
    wrong = (drawn[0] != drawn[1]) + (drawn[0] == drawn[2]) + (6 - len({tuple(row) for row in drawn[0]}))
    yield {"variant": "torch's seed: equal, and six different rows", "rows": 6, "wrong": wrong}


def changed_weights(bench: Bench, target: Any) -> Iterator[Figures]:
    """Weights that change in place keep the graphs; other weights, and adapters, are recorded again."""
    target = copy.deepcopy(target)
    rows, prompts = Comparison(target), ragged(3, 8)

    def row(variant: str, records: bool) -> Figures:
        before = recorded(target)
        for prompt, new in zip(prompts, generated(target, prompts, max_new_tokens=20), strict=True):
            rows.add(prompt, new, max_new_tokens=20)
        has_recorded = recorded(target) != before
        rows.wrong += has_recorded is not records
        return rows.row(f"weights: {variant}", recorded=has_recorded)

    yield row("as they were made", True)
    with torch.no_grad():
        target.lm_head.weight.mul_(-1)
    yield row("changed in place", False)
    target.lm_head.weight = torch.nn.Parameter(-target.lm_head.weight.detach())
    yield row("replaced", True)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as reason:
        yield {"variant": "weights: LoRA", "skipped": str(reason)}
        return
    adapted = get_peft_model(target, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    yield row("LoRA added", True)
    with adapted.disable_adapter():
        yield row("LoRA disabled", True)
    adapted.merge_and_unload()
    yield row("LoRA merged", True)


def sampled(bench: Bench, _: Any) -> Iterator[Figures]:
    """Chi-square of the transitions of a model in which the next token depends on the last one only."""
    chain = model(0, reads_only_the_last_token=True)
    draft = similar(chain, 1).to(bench.device)
    target = chain.to(bench.device)
    with torch.inference_mode():
        logits = target(torch.arange(VOCABULARY, device=bench.device)[:, None]).logits[:, -1].cpu()
    setting = {"temperature": 0.6, "top_k": 12, "top_p": 0.95}
    options: dict[str, Any] = {"do_sample": True, "pad_token_id": PAD, **setting}

    def without(prompt: torch.Tensor, **more: Any) -> torch.Tensor:
        found = generate_recorded(target, prompt, torch.ones_like(prompt), **options, **more)
        assert found is not None, "plain decoding was not recorded"
        return found

    def drafted(prompt: torch.Tensor, **more: Any) -> torch.Tensor:
        return speculative_generate(target, draft, prompt, torch.ones_like(prompt), draft_length=3, **options, **more)

    calls: dict[str, Callable[..., torch.Tensor]] = {"without a draft": without, "with a draft": drafted}
    for name, call in calls.items():
        counts = transitions(bench, call)
        found = p_value(counts, warped(logits, **setting) * counts.sum(1, keepdim=True))
        yield {"variant": f"samples {name}, chi-square", "draws": int(counts.sum()), "p": round(found, 4),
               "wrong": int(found < LEAST_P)}  # fmt: skip


def transitions(bench: Bench, call: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Returns how often each token followed each one, `[VOCABULARY, VOCABULARY]`."""
    torch.manual_seed(1234)
    counts, length, width = torch.zeros(VOCABULARY, VOCABULARY), bench.size(1250, 100), 4
    while counts.sum() < bench.size(20_000, 4_000):
        prompt = torch.randint(VOCABULARY, (8, width)).to(bench.device)
        tokens = call(prompt, max_new_tokens=length)[:, width - 1 :].cpu()
        pairs = tokens[:, :-1] * VOCABULARY + tokens[:, 1:]
        counts += torch.bincount(pairs.flatten(), minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY)
    return counts


def saved(bench: Bench, _: Any) -> Iterator[Figures]:
    """nf4 saved and loaded again gives equal logits, and its steps are recorded."""
    with tempfile.TemporaryDirectory() as folder:
        kept = endless(TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro")).eval())
        write_folder(kept, Path(folder, "plain"))
        try:
            first, tokenizer = load(Path(folder, "plain"), device=bench.device, quantization="nf4")
        except InputError as reason:
            yield {"variant": "nf4, saved and loaded again", "skipped": str(reason)}
            return
        first.save_pretrained(Path(folder, "nf4"))
        tokenizer.save_pretrained(Path(folder, "nf4"))
        second, _ = load(Path(folder, "nf4"), device=bench.device)
        ids = torch.randint(3, 32000, (3, 40), generator=torch.Generator().manual_seed(7)).to(bench.device)
        with torch.inference_mode():
            wrong = not torch.equal(first(ids).logits, second(ids).logits)
        generated(endless(second), ragged(3, 8), max_new_tokens=8)
        yield {"variant": "nf4, saved and loaded again", "wrong": int(wrong), "recorded": recorded(second)[1]}
    release()
