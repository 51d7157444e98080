"""Prompts, examples and scores of InstructEval (declare-lab/instruct-eval, commit 49bbd2c) as tasks of lm-eval.

The definitions in this folder name these classes. README.md in this folder has what differs.
"""

import random
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from lm_eval.api.task import ConfigurableTask


MAX_PROMPT_TOKENS = 2048


class InstructTask(ConfigurableTask):
    """A task with the prompt of InstructEval: solved examples, and the question, which a reply must answer first.

    Attributes:
        count_tokens (`Callable`, *optional*): returns the number of tokens of a prompt, with special tokens. With it,
            examples are left out from the last one until the prompt has at most 2048, as InstructEval does.
    """

    count_tokens: Callable[[str], int] | None = None

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._solved = cache(self._render)  # one template takes a millisecond

    def header(self, document: dict[str, Any]) -> str:
        """Returns the text before the examples."""
        return ""

    def examples(self, part: str) -> list[dict[str, Any]]:
        """Returns the rows to use as solved examples for the questions of a part of the data set."""
        return []

    def _render(self, part: str, number: int) -> tuple[str, ...]:
        rows = self.examples(part)[:number]
        return tuple(f"{self.doc_to_text(row)} {self.doc_to_target(row)}\n\n" for row in rows)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> str:
        """Returns the whole prompt; replaces lm-eval's."""
        solved = list(self._solved(doc.get("subject", ""), num_fewshot))
        start, question = self.header(doc), self.doc_to_text(doc)
        prompt = start + "".join(solved) + question
        while solved and self.count_tokens and self.count_tokens(prompt) > MAX_PROMPT_TOKENS:
            solved.pop()
            prompt = start + "".join(solved) + question
        if options.get("apply_chat_template"):
            return options["chat_template"]([{"role": "user", "content": prompt}])
        return prompt

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        """Returns whether the reply begins with the answer."""
        return {"acc": float(results[0].strip().startswith(self.doc_to_target(doc)))}


class InstructMmlu(InstructTask):
    """MMLU: all subjects in one task, whose score is the mean over all questions."""

    def header(self, document: dict[str, Any]) -> str:
        # Two spaces before the subject: InstructEval's format_subject begins with one.
        subject = document["subject"].replace("_", " ")
        return f"The following are multiple choice questions (with answers) about  {subject}.\n\n"

    def examples(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.dataset[self.config.fewshot_split] if row["subject"] == part]


class InstructBbh(InstructTask):
    """A task of BIG-Bench Hard: its first three rows are the examples, and are not asked."""

    NUM_EXAMPLES = 3

    def test_docs(self) -> Any:
        rows = self.dataset[self.config.test_split]
        return rows.select(range(self.NUM_EXAMPLES, len(rows)))

    def examples(self, part: str) -> list[dict[str, Any]]:
        return list(self.dataset[self.config.test_split].select(range(self.NUM_EXAMPLES)))


class InstructDrop(InstructTask):
    """DROP: questions with one answer; three drawn examples, whose passages are not asked about."""

    NUM_EXAMPLES = 3

    def validation_docs(self) -> Any:
        return self._drawn[1]

    def examples(self, part: str) -> list[dict[str, Any]]:
        return self._drawn[0]

    @cached_property
    def _drawn(self) -> tuple[list[dict[str, Any]], Any]:
        rows = self.dataset[self.config.validation_split]
        single = [index for index, row in enumerate(rows) if len(set(drop_answers(row))) == 1]
        shown = random.Random(0).sample(single, self.NUM_EXAMPLES)
        passages = {drop_passage(rows[index])[0] for index in shown}
        return [rows[index] for index in shown], rows.select(
            [index for index in single if drop_passage(rows[index])[0] not in passages]
        )


def drop_passage(row: dict[str, Any]) -> tuple[str, str]:
    """Returns passage and question of a row of the Hub, or of the file of OpenAI's simple-evals."""
    if "context" not in row:
        return row["passage"], row["question"]
    passage, _, question = row["context"].partition("\nQuestion:")
    return passage.removeprefix("Passage:"), question.removesuffix("\nAnswer:")


def drop_answers(row: dict[str, Any]) -> list[str]:
    """Returns all answers to a row."""
    return row["ref_text"].split("|") if "context" in row else row["answers_spans"]["spans"]


def drop_question(row: dict[str, Any]) -> str:
    """Returns the text of a question."""
    passage, question = drop_passage(row)
    return f"{passage.strip()} {question.strip()}\nAnswer:"


def drop_target(row: dict[str, Any]) -> str:
    """Returns the first answer."""
    return drop_answers(row)[0].strip()
