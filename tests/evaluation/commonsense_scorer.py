"""An independent scorer of the seven tasks: written from their definitions, without lm-eval and our code.

Every task gives, for each row, (context, continuation) of every choice, the length in characters that acc_norm divides
by, and the number of the right choice.
"""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


SPLITS = {
    "hellaswag": "validation",
    "openbookqa": "test",
    "winogrande": "validation",
    "arc_challenge": "test",
    "arc_easy": "test",
    "boolq": "validation",
    "piqa": "validation",
}
BY_CHARACTER = {"hellaswag", "openbookqa", "arc_challenge", "arc_easy", "piqa"}


def read_rows(folder: Path, task: str, limit: int | None = None) -> list[dict]:
    plain = folder / task / f"{SPLITS[task]}.jsonl"
    compressed = plain.with_name(f"{plain.name}.gz")
    opened = gzip.open(compressed, "rt", encoding="utf-8") if compressed.is_file() else plain.open(encoding="utf-8")
    with opened as lines:
        return [json.loads(line) for line in lines][:limit]


def without_wikihow_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def question(task: str, row: dict) -> tuple[list[tuple[str, str]], list[int], int]:
    """Returns (context, continuation) and characters of each choice, and the index of the right one."""
    if task == "hellaswag":
        context = without_wikihow_marks(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        choices = [without_wikihow_marks(ending) for ending in row["endings"]]
        gold = int(row["label"])
    elif task == "openbookqa":
        context, choices = row["question_stem"], row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"].lstrip())
    elif task in ("arc_challenge", "arc_easy"):
        context, choices = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"])
    elif task == "boolq":
        context, choices = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]
        gold = row["label"]
    elif task == "piqa":
        context, choices = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
        gold = row["label"]
    else:  # winogrande: each name is put into the gap, and what follows the gap is scored
        before, after = row["sentence"].split("_", 1)
        options = [row["option1"], row["option2"]]
        return [(before + option, " " + after.strip()) for option in options], [1, 1], int(row["answer"]) - 1
    return [(context, " " + choice) for choice in choices], [len(choice) for choice in choices], gold


class Scorer:
    """Log-likelihoods of continuations by stock transformers in fp32."""

    def __init__(self, folder: Path, bos: bool = False, context: int | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bos = [self.tokenizer.bos_token_id] if bos else []
        self.context = context or self.model.config.max_position_embeddings
        self.num_cut = 0

    def encode(self, context: str, continuation: str) -> tuple[tuple[int, ...], int]:
        """Returns all tokens, and the number of the continuation's. Spaces before it are part of it."""
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        start = self.tokenizer(context, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        self.num_cut += len(self.bos + whole) > self.context + 1
        return tuple((self.bos + whole)[-self.context - 1 :]), len(whole) - len(start)

    @torch.inference_mode()
    def log_likelihoods(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Batches sequences of one length, without padding, and computes logits for the last positions only."""
        encoded = [self.encode(*pair) for pair in pairs]
        by_length = defaultdict(dict)
        for tokens, _ in encoded:
            by_length[len(tokens)][tokens[:-1]] = None
        longest = defaultdict(int)
        for tokens, scored in encoded:
            longest[tokens[:-1]] = max(longest[tokens[:-1]], scored)
        hidden = {}
        for distinct in by_length.values():
            sequences = list(distinct)
            for i in range(0, len(sequences), 8):
                batch = sequences[i : i + 8]
                states = self.model.model(input_ids=torch.tensor(batch), use_cache=False).last_hidden_state
                for sequence, row in zip(batch, states, strict=True):
                    hidden[sequence] = row[-longest[sequence] :].clone()
        found = []
        for tokens, scored in encoded:
            log_probabilities = self.model.lm_head(hidden[tokens[:-1]][-scored:]).log_softmax(-1)
            wanted = torch.tensor(tokens[-scored:])[:, None]
            found.append(log_probabilities.gather(1, wanted).double().sum().item())
        return found

    def items(self, folder: Path, limit: int | None = None) -> list[dict]:
        """Returns all items of the seven tasks, with the lead of the best choice over the second one."""
        questions = [
            (task, index, *question(task, row))
            for task in SPLITS
            for index, row in enumerate(read_rows(folder, task, limit))
        ]
        likelihoods = iter(self.log_likelihoods([pair for _, _, pairs, _, _ in questions for pair in pairs]))
        found = []
        for task, index, pairs, lengths, gold in questions:
            own = [next(likelihoods) for _ in pairs]
            merit = [x / n for x, n in zip(own, lengths, strict=True)] if task in BY_CHARACTER else own
            first, second = sorted(merit, reverse=True)[:2]
            item = {"task": task, "index": index, "log_likelihoods": own, "chosen": merit.index(first), "gold": gold}
            found.append({**item, "lead": first - second})
        return found
