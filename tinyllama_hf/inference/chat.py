"""A conversation with a model: history, commands, and what to do when it no longer fits the context."""

import bisect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat.render import render
from ..decoding.proposals import Proposer
from ..errors import InputError, check_seed, did_you_mean
from .generation import DEFAULT_NEW_TOKENS, Context, ExactTextStreamer, Sampling, generate_ids, stop_tokens_of


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
        draft (`Proposer`, *optional*): proposes tokens.
        write (`Callable`): is given the pieces of a reply as they appear, and a line end after it.
        note (`Callable`): is given lines about the conversation, and what the draft was worth.

    Raises:
        InputError: if the tokenizer has no chat template, the template refuses a system prompt, the system prompt does
            not fit the context, or a value is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        draft: Proposer | None = None,
        write: Callable[[str], Any] = sys.stdout.write,
        note: Callable[[str], Any] = lambda line: None,
    ):
        self.model, self.tokenizer, self.draft = model, tokenizer, draft
        self.sampling, self.write, self.note = sampling or Sampling(), write, note
        self._max_new_tokens, self._seeded = self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS, seed is not None
        if seed is not None:
            torch.manual_seed(check_seed(seed))
        self.context = Context.of(model, draft)
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Begins a conversation with a system prompt, or without one.

        Raises:
            InputError: if the template refuses it, or it does not fit the context.
        """
        # With an empty message, so that a base model and a bad system prompt are refused now, not at the first message.
        ids = self._ids([{"role": "user", "content": ""}], system)
        self.context.new_tokens(len(ids), name="a conversation with this system prompt")
        self.system, self.exchanges = system, []

    def handle(self, line: str) -> bool:
        """Takes a line that the user typed, a message or a command; returns whether the conversation goes on.

        Raises:
            InputError: for an unknown command, a system prompt that is refused, and a message that does not fit the context.
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
            self.begin(self.system)
            self.note("the conversation is forgotten")
        elif name == "/system":
            self.begin(text.strip() or None)
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
        stop = stop_tokens_of(self.model, self.tokenizer)
        streamer = ExactTextStreamer(self.tokenizer, self.write, skip_prompt=True, hidden=stop)
        num_new = min(self._max_new_tokens, self.context.tokens - len(ids))
        options = {"draft": self.draft, "seeded": self._seeded, "eos_token_id": stop}
        reply = generate_ids(self.model, self.tokenizer, ids, num_new, self.sampling, streamer, **options)
        self.write("\n")
        if self.draft:
            self.note(str(self.draft.statistics))
        reply = [token for token in reply if token not in stop]
        reply_text = self.tokenizer.decode(reply, skip_special_tokens=True).strip()
        self.exchanges += [{"role": "user", "content": text}, {"role": "assistant", "content": reply_text}]
        return reply_text

    def _ids(self, turns: list[dict[str, str]], system: str | None) -> list[int]:
        first = [] if system is None else [{"role": "system", "content": system}]
        return render(self.tokenizer, [*first, *turns], add_generation_prompt=True).input_ids

    def _fit(self, text: str) -> list[int]:
        """The ids of the conversation with a new message; the oldest exchanges go where it leaves too little room."""
        context = self.context.tokens
        wanted = min(self._max_new_tokens, context // 4)
        message = {"role": "user", "content": text}

        def ids_without(dropped: int) -> list[int]:
            return self._ids([*self.exchanges[2 * dropped :], message], self.system)

        ids, dropped = ids_without(0), 0
        if self.exchanges and len(ids) + wanted > context:
            # The fewest that have to go are found by halving, since each try encodes the whole conversation.
            tries = range(1, len(self.exchanges) // 2)
            dropped = 1 + bisect.bisect_left(tries, True, key=lambda n: len(ids_without(n)) + wanted <= context)
            ids = ids_without(dropped)
        self.context.new_tokens(
            len(ids), name=f"a conversation with this message{' and the system prompt' if self.system else ''}"
        )
        if dropped:
            self.note(f"the context of {context} tokens is full: the first {dropped} exchanges are forgotten")
            self.exchanges = self.exchanges[2 * dropped :]
        return ids
