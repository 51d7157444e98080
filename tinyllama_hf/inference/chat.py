"""A conversation with a model: history, commands, and what to do when it no longer fits the context."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat.render import render
from ..errors import InputError, did_you_mean
from .drafts import Draft
from .generation import DEFAULT_NEW_TOKENS, ExactTextStreamer, Sampling, context_of, generate_ids


COMMANDS = {
    "/system": "TEXT  set the system prompt and begin anew",
    "/reset": "forget the conversation",
    "/help": "show these commands",
    "/exit": "leave; so does the end of input",
}


class ChatSession:
    """The state of a conversation.

    Args:
        model (`PreTrainedModel`): a chat model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        system (`str`, *optional*): the system prompt.
        sampling (`Sampling`, *optional*): how tokens are drawn.
        seed (`int`, *optional*): of the draws.
        draft (`Draft`, *optional*): proposes tokens.
        write (`Callable`): is given the pieces of a reply as they appear.
        note (`Callable`): is given lines about the conversation.

    Raises:
        InputError: if the tokenizer has no chat template, or a value is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        draft: Draft | None = None,
        write: Callable[[str], Any] = sys.stdout.write,
        note: Callable[[str], Any] = lambda line: None,
    ):
        self.model, self.tokenizer, self.draft = model, tokenizer, draft
        self.system, self.sampling = system, sampling or Sampling()
        self.write, self.note = write, note
        self.exchanges: list[dict[str, str]] = []  # user and assistant by turns
        self.sampling.check()
        if seed is not None:
            torch.manual_seed(seed)
        self._ids([{"role": "user", "content": ""}])  # a base model is refused now, not at the first message

    def handle(self, line: str) -> bool:
        """Takes a line that the user typed, a message or a command; returns whether the conversation goes on.

        Raises:
            InputError: for an unknown command, and a message that does not fit the context.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self.say(line)
            return True
        name, _, text = line.partition(" ")
        if name == "/exit":
            return False
        if name == "/help":
            self.note("\n".join(f"{command:<8} {what}" for command, what in COMMANDS.items()))
        elif name == "/reset":
            self.exchanges = []
            self.note("the conversation is forgotten")
        elif name == "/system":
            self.system, self.exchanges = text.strip() or None, []
            self.note(f"system prompt {'set' if self.system else 'removed'}; the conversation begins anew")
        else:
            raise InputError(f"{name}: there is no such command{did_you_mean(name, COMMANDS)}")
        return True

    def say(self, text: str) -> str:
        """Puts a message of the user, streams the reply, and returns it; both join the history.

        Raises:
            InputError: if the message does not fit the context.
        """
        ids = self._fit(text)
        streamer = ExactTextStreamer(self.tokenizer, self.write, skip_prompt=True)
        budget = min(self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS, self._context - len(ids))
        reply = generate_ids(
            self.model,
            self.tokenizer,
            ids,
            budget,
            self.sampling,
            streamer,
            self.draft,
            eos_token_id=self._stop_tokens(),
        )
        reply_text = self.tokenizer.decode(reply, skip_special_tokens=True).strip()
        self.exchanges += [{"role": "user", "content": text}, {"role": "assistant", "content": reply_text}]
        return reply_text

    @property
    def _context(self) -> int:
        return context_of(self.model, self.draft)

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return render(self.tokenizer, [*system, *turns], add_generation_prompt=True).input_ids

    def _fit(self, text: str) -> list[int]:
        """The ids of the conversation with a new message; the oldest exchanges go where it leaves too little room."""
        context = self._context
        wanted = min(self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS, context // 4)
        message = {"role": "user", "content": text}
        kept = self.exchanges
        ids = self._ids([*kept, message])
        while kept and len(ids) + wanted > context:
            kept = kept[2:]
            ids = self._ids([*kept, message])
        if len(ids) >= context:
            raise InputError(
                f"the message makes a conversation of {len(ids)} tokens, which leaves no room for a reply in the model's "
                f"context of {context}; shorten the message{' or the system prompt' if self.system else ''}"
            )
        if dropped := (len(self.exchanges) - len(kept)) // 2:
            self.note(f"the context of {context} tokens is full: the first {dropped} exchanges are forgotten")
            self.exchanges = kept
        return ids

    def _stop_tokens(self) -> list[int]:
        """The end-of-sequence of the tokenizer and those that the model's folder names."""
        named = self.model.generation_config.eos_token_id
        named = named if isinstance(named, list) else [named]
        return sorted({self.tokenizer.eos_token_id, *named} - {None})
