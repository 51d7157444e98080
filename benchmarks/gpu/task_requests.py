"""Part `tasks`: the log-likelihoods of all requests of the seven commonsense tasks, with a model of 1.1b.

The requests are tokenized on another machine, since lm-eval is not needed here, and are read from one file:

    python benchmarks/gpu/task_requests.py TOKENIZER DATA build/task_requests.npz
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Bench, Figures
from torch.nn.utils.rnn import pad_sequence

from tinyllama_hf.evaluation.harness.prefix_tree import EncodedRequest, score_requests, tree_rows


FILE = Path(__file__).parents[2] / "build" / "task_requests.npz"
_COMPARED = 1024  # requests that are also scored one by one in padded batches, as lm-eval does
_BATCH = 64


def write_requests(tokenizer: str, data: str, file: Path) -> None:
    """Writes the tokens of the requests of the seven tasks under the published protocol, in random order."""
    from tests.evaluation.commonsense_scorer import SPLITS, question, read_rows
    from tinyllama_hf import load_tokenizer

    encode = load_tokenizer(tokenizer)
    rows = [question(task, row)[0] for task in SPLITS for row in read_rows(Path(data), task)]
    pairs = [(context.rstrip(), context + continuation) for pairs in rows for context, continuation in pairs]
    starts = encode([context for context, _ in pairs], add_special_tokens=False)["input_ids"]
    wholes = encode([whole for _, whole in pairs], add_special_tokens=False)["input_ids"]
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    lengths = [(len(starts[n]), len(wholes[n])) for n in order]
    tokens = np.concatenate([np.array(wholes[n], dtype=np.uint16) for n in order])
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, tokens=tokens, lengths=np.array(lengths, dtype=np.uint16))
    print(f"wrote {file}: {len(pairs)} requests, {len(tokens)} tokens")


def read_requests(file: Path = FILE) -> list[EncodedRequest]:
    """Reads the file of requests."""
    with np.load(file) as arrays:
        tokens, lengths = arrays["tokens"].astype(int), arrays["lengths"].astype(int)
    ends = np.cumsum(lengths[:, 1])
    wholes = [whole.tolist() for whole in np.split(tokens, ends[:-1])]
    return [
        EncodedRequest(whole[:length], whole[length:]) for whole, length in zip(wholes, lengths[:, 0], strict=True)
    ]


@torch.inference_mode()
def one_by_one(model: Any, requests: Sequence[EncodedRequest]) -> list[float]:
    """Returns log-likelihoods with the whole context for each request, and logits at all positions."""
    order = sorted(range(len(requests)), key=lambda number: -sum(map(len, requests[number])))
    found = [0.0] * len(requests)
    for start in range(0, len(order), _BATCH):
        numbers = order[start : start + _BATCH]
        batch = [torch.tensor([*requests[n].context, *requests[n].continuation]) for n in numbers]
        ids = pad_sequence(batch, batch_first=True).to(model.device)
        scores = model(input_ids=ids[:, :-1], use_cache=False).logits.float().log_softmax(2)
        scores = scores.gather(2, ids[:, 1:, None]).squeeze(2)
        for row, n in enumerate(numbers):
            first, last = len(requests[n].context) - 1, len(batch[row]) - 1
            found[n] = scores[row, first:last].double().sum().item()
    return found


def tasks(bench: Bench) -> Iterator[Figures]:
    """All requests once; then a part of them once more, and one by one."""
    requests = read_requests()[: bench.size(None, 64)]
    model = bench.model()
    limit = model.config.vocab_size
    requests = [EncodedRequest(*([token % limit for token in part] for part in request)) for request in requests]
    answers: dict[int, float] = {}

    def score(some: Sequence[EncodedRequest]) -> None:
        answers.clear()
        score_requests(model, some, lambda found, _: answers.update({n: a.log_likelihood for n, a in found}))

    score(requests[:32])  # selects kernels
    began = time.perf_counter()
    rows = tree_rows(requests)
    planned = time.perf_counter() - began
    read = sum(len(row.tokens) for row in rows)
    alone = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    seconds = bench.seconds(lambda: score(requests))
    about = {"requests": len(requests), "tokens_read": read, "tokens_one_by_one": alone}
    yield {"variant": "all", **about, "seconds": round(seconds, 2), "seconds_of_planning": round(planned, 2)}
    some = requests[: bench.size(_COMPARED, 16)]
    theirs: list[float] = []
    pairs = [bench.seconds(lambda: theirs.__setitem__(slice(None), one_by_one(model, some))) for _ in range(2)]
    own = [bench.seconds(lambda: score(some)) for _ in range(2)]
    worst = max(abs(answers[n] - theirs[n]) for n in range(len(some)))
    yield {"variant": f"{len(some)} requests", "seconds": round(own[-1], 3), "one_by_one": round(pairs[-1], 3),
           "ratio": round(pairs[-1] / own[-1], 2), "largest_difference": worst}  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    write_requests(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
