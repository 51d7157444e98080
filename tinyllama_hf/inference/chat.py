"""A conversation with a model: history, commands, and dropping old exchanges when the context is full."""

import bisect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat.render import render
from ..decoding.proposals import Proposer
from ..errors import check_seed, did_you_mean
from ..text import decode_text
from .generation import DEFAULT_NEW_TOKENS, Context, ExactTextStreamer, generate_ids, stop_token_ids
from .options import Sampling


COMMANDS = {
    "/system": "TEXT  set the system prompt and start over",
    "/reset": "start a new conversation",
    "/help": "show these commands",
    "/exit": "quit; so does the end of the input",
}


class ChatSession:
    """The state of a conversation.

    Args:
        model (`PreTrainedModel`): a chat model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        system (`str`, *optional*): the system prompt.
        sampling (`Sampling`, *optional*): sampling settings.
        seed (`int`, *optional*): seed of the random generator.
        draft (`Proposer`, *optional*): proposes tokens.
        write (`Callable`): called with the parts of a reply as they are generated, and a line end after it.
        note (`Callable`): called with messages about the conversation, and with the statistics of the draft.

    Raises:
        InputError: if the tokenizer has no chat template, if the template refuses a system prompt, if the system
            prompt does not fit the context, or if the seed is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        draft: Proposer | None = None,
        write: Callable[[str], Any] | None = None,
        note: Callable[[str], Any] = lambda line: None,
    ):
        self.model, self.tokenizer, self.draft = model, tokenizer, draft
        self.sampling, self.write, self.note = sampling or Sampling(), write or sys.stdout.write, note
        self._max_new_tokens, self._seeded = self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS, seed is not None
        if seed is not None:
            torch.manual_seed(check_seed(seed))
        self.context = Context.of(model, draft)
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Starts a conversation, with or without a system prompt.

        Raises:
            InputError: if the template refuses it, or it does not fit the context.
        """
        # With an empty message, to refuse a base model and an invalid system prompt now, not with the first message.
        ids = self._ids([{"role": "user", "content": ""}], system)
        self.context.new_tokens(len(ids), name="conversation with this system prompt")
        self.system = system
        self.exchanges: list[dict[str, str]] = []

    def handle(self, line: str) -> bool:
        """Handles a line of input, a message or a command; returns `False` if it ends the conversation.

        Raises:
            InputError: for an invalid system prompt, or a message that does not fit the context.
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
            self.note("started a new conversation")
        elif name == "/system":
            self.begin(text.strip() or None)
            self.note(f"system prompt {'set' if self.system else 'removed'}; started a new conversation")
        else:
            self.note(f"error: {name}: unknown command{did_you_mean(name, COMMANDS)}")
        return True

    def say(self, text: str) -> str:
        """Streams the reply to a message and returns it; both are added to the history.

        Raises:
            InputError: if the message does not fit the context.
        """
        ids = self._fit(text)
        stop = stop_token_ids(self.model, self.tokenizer)
        streamer = ExactTextStreamer(self.tokenizer, self.write, skip_prompt=True, hidden=stop)
        num_new = min(self._max_new_tokens, self.context.tokens - len(ids))
        settings = self.sampling, streamer, self.draft, self._seeded
        new = generate_ids(self.model, self.tokenizer, ids, num_new, *settings, eos_token_id=stop)
        self.write("\n")
        if self.draft:
            self.note(str(self.draft.statistics))
        reply = decode_text(self.tokenizer, [token for token in new if token not in stop]).strip()
        self.exchanges += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return reply

    def _ids(self, turns: list[dict[str, str]], system: str | None) -> list[int]:
        first = [] if system is None else [{"role": "system", "content": system}]
        return render(self.tokenizer, [*first, *turns], add_generation_prompt=True).input_ids

    def _fit(self, text: str) -> list[int]:
        """Returns the ids of the conversation with a new message; drops old exchanges that leave too little room."""
        context = self.context.tokens
        wanted = min(self._max_new_tokens, context // 4)
        message = {"role": "user", "content": text}

        def ids_without(dropped: int) -> list[int]:
            return self._ids([*self.exchanges[2 * dropped :], message], self.system)

        ids, dropped = ids_without(0), 0
        if self.exchanges and len(ids) + wanted > context:
            # Binary search for the smallest number to drop, since each try encodes the whole conversation.
            tries = range(1, len(self.exchanges) // 2)
            dropped = 1 + bisect.bisect_left(tries, True, key=lambda n: len(ids_without(n)) + wanted <= context)
            ids = ids_without(dropped)
        self.context.new_tokens(
            len(ids), name=f"conversation with this message{' and the system prompt' if self.system else ''}"
        )
        if dropped:
            self.note(f"the context of {context} tokens is full; dropped the oldest {dropped} exchanges")
            self.exchanges = self.exchanges[2 * dropped :]
        return ids
